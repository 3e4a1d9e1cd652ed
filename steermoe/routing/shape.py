"""What a vector must fit: where a model has routers, and how many experts each one chooses from. Imports no torch.

Every kind of model has one: `routers.shape_of` gives it for a transformers model, `description.describe` for a
checkpoint without its weights, `gguf.header.read_gguf` for a GGUF file, `Engine.shape` for what an engine runs.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True)
class RouterShape:
    """The sizes of one router.

    Attributes:
        layer: the decoder layer it belongs to, counted from 0.
        num_experts: experts it can choose from (what expert vectors have columns for), N.
        width: columns of its logits, W; some routers have extra columns for shared experts.
        top_k: experts chosen for each token, k.
        blanks: how many of `num_experts`, the last ones, are columns without an expert: longcat's zero experts, zaya's
            skip.
        no_lists: why its experts can't be forced or banned; "" if they can.
        no_counts: why it can't choose another number of experts; "" if it can.
        least, most: how few and how many it could choose; `most` is 0 for all, and less where groups leave some out.
            These three say what plans may ask for, not what vectors must fit: shapes that differ in them are equal.
    """

    layer: int
    num_experts: int
    width: int
    top_k: int
    blanks: int = 0
    no_lists: str = ""
    no_counts: str = field(default="", compare=False)
    least: int = field(default=1, compare=False)
    most: int = field(default=0, compare=False)

    @property
    def vector_widths(self) -> tuple[int, ...]:
        """How many experts a vector may have in this layer: all columns, or those with an expert behind them."""
        return tuple(dict.fromkeys((self.num_experts, self.num_experts - self.blanks)))


@dataclass(frozen=True)
class RoutingShape:
    """All routers of a model in layer order, and what the model is called.

    Attributes:
        name: for messages, and for the folder of the model's vectors.
        architectures: its `model_type`, then other names for it; messages show the first one. Empty if unknown.
        known_as: other names of the model, such as the one inside a GGUF file; "" if `name` is only a stopgap.
        fingerprint: of the routers' weights (see `fingerprint.py`); "" if they are unknown.
    """

    name: str
    architectures: tuple[str, ...]
    routers: tuple[RouterShape, ...]
    known_as: tuple[str, ...] = ()
    fingerprint: str = ""

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

    def without_counts(self, reason: str) -> "RoutingShape":
        """The same, where routers can't choose another number of experts than their own, and why."""
        return replace(self, routers=tuple(replace(router, no_counts=reason) for router in self.routers))

    def is_a(self, architecture: str) -> bool:
        """Whether a `model_type` is this model's, apart from - and _; true if either is unknown."""
        return not architecture or not self.architectures or _plain(architecture) in map(_plain, self.architectures)

    def is_named(self, model: str) -> bool:
        """Whether a model's name is this one's, apart from its owner and the type of its weights.

        Also true if either is unknown.
        """
        own = {_bare(name) for name in (self.name, *self.known_as)}
        return not model or not own.isdisjoint({"", _bare(model)})


WEIGHT_TYPE = re.compile(
    r"(?:\.gguf|-\d+-of-\d+|[-_.](?:i?q\d+(?:_[a-z0-9]+)*|bf16|f16|f32|fp16|fp32|fp8|fp4|int8|int4|mxfp4|gguf|awq|gptq))+$"
)
"""What files and repositories add to a model's name if only the type of its weights differs."""


VERSION = re.compile(r"-[0-9a-f]{12}$")
"""What the folder of a model in the cache adds to its name."""
SNAPSHOT = re.compile(r"[0-9a-f]{40}")
"""The name of a folder that the hub's client keeps a checkpoint in, which does not say what the model is called."""


def name_of(checkpoint: Path) -> str:
    """What a checkpoint's folder calls its model: its own name, or what the hub's client says above a snapshot."""
    above = checkpoint.parent.parent.name
    if SNAPSHOT.fullmatch(checkpoint.name) and above.startswith("models--"):
        return above.rpartition("--")[2] or checkpoint.name
    return checkpoint.name


def _bare(name: str) -> str:
    """`sparse-8b` for `acme/Sparse-8B`, `Sparse-8B-GGUF` and `sparse-8b-Q4_K_M.gguf`; "" if it says nothing."""
    last = re.split(r"[/\\]", name)[-1].lower()
    return "" if SNAPSHOT.fullmatch(last) else re.sub("[ _]", "-", VERSION.sub("", WEIGHT_TYPE.sub("", last)))


def _plain(name: str) -> str:
    return re.sub("[-_]", "", name)
