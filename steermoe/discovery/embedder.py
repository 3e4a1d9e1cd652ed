"""Routing embeddings of a corpus: only what the routers need is computed, in batches of texts of similar length.

A text's embedding does not depend on the batch: padding stands on the right, is masked out of attention and is not
counted. Nothing after the last router is run, unless hidden states are asked for.

Shapes: B texts, S columns of a batch, L MoE layers, N experts a layer, H hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from torch import Tensor

from steermoe.errors import CorpusError
from steermoe.models.loading import LoadedModel

if TYPE_CHECKING:
    from steermoe.engines.llamacpp.engine import LlamaCppEngine

RoutingSource: TypeAlias = "LoadedModel | LlamaCppEngine"
"""What routing can be recorded of: a model of transformers, or a GGUF file in llama.cpp."""

Features = Literal["counts", "probabilities"]
Tokens = Literal["all", "last"]


Progress = Callable[[int, int], None]
"""Called with the texts and tokens done since the last call; 0 tokens where an earlier run did them."""


@dataclass(frozen=True)
class EmbeddingOptions:
    """How texts become embeddings.

    Attributes:
        features: "counts", how often each expert was chosen (Shchukin 2024), or mean router "probabilities".
        tokens: "all" of a text, or only its "last", as for a prompt that has been read.
        hidden: also keep the mean of the last layer's hidden states over the same tokens (2410.10814).
        max_tokens: tokens read of each text.
        batch_tokens: tokens a forward pass, padding included; a single longer text goes alone.
        both: with counts, give the probabilities too (in `Embedded.probability`; they are not kept on disk).
    """

    features: Features = "counts"
    tokens: Tokens = "all"
    hidden: bool = False
    max_tokens: int = 512
    batch_tokens: int = 2048
    both: bool = False

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch_tokens"):
            if getattr(self, name) < 1:
                raise CorpusError(f"{name} is {getattr(self, name)}, expected 1 or more")


@dataclass(frozen=True, eq=False)
class Embedded:
    """Embeddings of some texts, in their order; a text without tokens has 0 tokens and meaningless rows.

    Attributes:
        frequency: F or P [B, L, N] float32, rows summing to 1.
        tokens: [B] int64, tokens read.
        hidden: mean hidden states [B, H] float32, or None.
        probability: P [B, L, N] beside F, where both were asked for, or None.
    """

    frequency: Tensor
    tokens: Tensor
    hidden: Tensor | None = None
    probability: Tensor | None = None


class TextEmbedder(Protocol):
    """What embeds texts: `Embedder`, or `GGUFEmbedder` in llama.cpp."""

    @property
    def shape(self) -> tuple[int, int]:
        """L, N."""

    def texts(self, texts: Sequence[str], progress: Progress | None = None) -> Embedded:
        """Embed texts, in their order."""
