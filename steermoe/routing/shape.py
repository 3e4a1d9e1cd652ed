"""What steering must fit: where a model has routers, and how many experts each one chooses from. Imports no torch.

Every kind of model gives one: `routers.shape_of` a model of transformers, `description.describe` a checkpoint whose
weights are not loaded, `gguf.header.read_gguf` a GGUF file, `Engine.shape` whatever an engine runs.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class RouterShape:
    """One router in numbers.

    Attributes:
        layer: the decoder layer it belongs to, counted from 0.
        num_experts: experts it can choose from (what expert vectors have columns for), N.
        width: columns of its logits, W; some routers have more than experts, such as for shared ones.
        top_k: experts chosen for each token, k.
    """

    layer: int
    num_experts: int
    width: int
    top_k: int


@dataclass(frozen=True)
class RoutingShape:
    """All routers of a model, in the order of their layers, and what the model is called.

    Attributes:
        name: for messages, and for the folder of the model's vectors.
        architectures: its `model_type`, and what else it is called elsewhere; the first one is for messages, none where
            it is not known.
    """

    name: str
    architectures: tuple[str, ...]
    routers: tuple[RouterShape, ...]

    @property
    def architecture(self) -> str:
        return self.architectures[0] if self.architectures else ""

    @property
    def layers(self) -> tuple[int, ...]:
        """The decoder layer of each router, [L]."""
        return tuple(router.layer for router in self.routers)

    @property
    def num_experts(self) -> int:
        """The most experts that a router has, N."""
        return max(router.num_experts for router in self.routers)

    @property
    def top_k(self) -> int:
        """Of the first router."""
        return self.routers[0].top_k

    def is_a(self, architecture: str) -> bool:
        """Whether a `model_type` is this model's, however it is spelled; true where either is not known."""
        return not architecture or not self.architectures or _plain(architecture) in map(_plain, self.architectures)


def _plain(name: str) -> str:
    return re.sub("[-_]", "", name)
