"""What a vector must fit: where a model has routers, and how many experts each one chooses from. Imports no torch.

Every kind of model has one: `routers.shape_of` gives it for a transformers model, `description.describe` for a
checkpoint without its weights, `gguf.header.read_gguf` for a GGUF file, `Engine.shape` for what an engine runs.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class RouterShape:
    """The sizes of one router.

    Attributes:
        layer: the decoder layer it belongs to, counted from 0.
        num_experts: experts it can choose from (what expert vectors have columns for), N.
        width: columns of its logits, W; some routers have extra columns for shared experts.
        top_k: experts chosen for each token, k.
    """

    layer: int
    num_experts: int
    width: int
    top_k: int


@dataclass(frozen=True)
class RoutingShape:
    """All routers of a model in layer order, and what the model is called.

    Attributes:
        name: for messages, and for the folder of the model's vectors.
        architectures: its `model_type`, then other names for it; messages show the first one. Empty if unknown.
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
        """The largest number of experts that a router has, N."""
        return max(router.num_experts for router in self.routers)

    @property
    def top_k(self) -> int:
        """Of the first router."""
        return self.routers[0].top_k

    def is_a(self, architecture: str) -> bool:
        """Whether a `model_type` is this model's, apart from - and _; true if either is unknown."""
        return not architecture or not self.architectures or _plain(architecture) in map(_plain, self.architectures)


def _plain(name: str) -> str:
    return re.sub("[-_]", "", name)
