"""What embeds texts, with which options, and what the embeddings consist of.

A text's embedding does not depend on the batch: padding is on the right, masked out of attention and not counted.
Nothing after the last router is run, unless hidden states are requested.

Shapes: B texts, L MoE layers, N experts per layer, H hidden size.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from steermoe.errors import CorpusError
from steermoe.models.loading import LoadedModel

if TYPE_CHECKING:
    from steermoe.engines.llamacpp.engine import LlamaCppEngine

RoutingSource: TypeAlias = "LoadedModel | LlamaCppEngine"
"""What routing can be recorded from: a transformers model, or a GGUF file in llama.cpp."""

Features = Literal["counts", "probabilities"]
Tokens = Literal["all", "last"]


MOST_TOKENS = 2**31 - 1
"""More than any text has, and few enough for every tokenizer."""
TextProgress = Callable[[int, int], None]
"""Called with the texts and tokens done since the last call; 0 tokens if an earlier run did them."""


@dataclass(frozen=True)
class EmbeddingOptions:
    """How texts become embeddings.

    Attributes:
        features: "counts", how often each expert was chosen (Shchukin 2024), or mean router "probabilities".
        tokens: "all" of a text, or only its "last" one, which has seen all others.
        hidden: also keep the mean of the last layer's hidden states over the same tokens (2410.10814).
        max_tokens: tokens read of each text.
        batch_tokens: tokens per forward pass, including padding; a longer text gets a pass of its own.
        both: with counts, also return the probabilities (in `Embedded.probability`; they are not stored on disk).
    """

    features: Features = "counts"
    tokens: Tokens = "all"
    hidden: bool = False
    max_tokens: int = 512
    batch_tokens: int = 2048
    both: bool = False

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch_tokens"):
            if not 1 <= getattr(self, name) <= MOST_TOKENS:
                raise CorpusError(f"{name} is {getattr(self, name)}, expected 1 to {MOST_TOKENS}")


@dataclass(frozen=True, eq=False)
class Embedded:
    """Embeddings of some texts, in their order; a text without tokens has 0 tokens and meaningless rows.

    Attributes:
        frequency: F or P [B, L, N] float32, rows summing to 1.
        tokens: [B] int64, tokens read.
        hidden: mean hidden states [B, H] float32, or None.
        probability: P [B, L, N] in addition to F, if both were requested, or None.
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

    def texts(self, texts: Sequence[str], progress: TextProgress | None = None) -> Embedded:
        """Embed texts, in their order."""

    def parts(self, texts: Sequence[str], done: Collection[int] = ()) -> Iterator[tuple[list[int], Embedded]]:
        """Embed texts batch by batch: the places of a batch's texts, and their embeddings.

        Texts without tokens are in no batch. A batch all of whose places are in `done` is not computed.
        """


def in_order(embed: TextEmbedder, texts: Sequence[str], progress: TextProgress | None, *, both: bool) -> Embedded:
    """The parts of texts, put together in their order; with probabilities in addition, if `both`."""
    frequency = torch.zeros(len(texts), *embed.shape)
    probability = torch.zeros_like(frequency) if both else None
    tokens = torch.zeros(len(texts), dtype=torch.int64)
    hidden: Tensor | None = None
    for places, part in embed.parts(texts):
        frequency[places], tokens[places] = part.frequency, part.tokens
        if probability is not None and part.probability is not None:
            probability[places] = part.probability
        if part.hidden is not None:
            hidden = torch.zeros(len(texts), part.hidden.shape[1]) if hidden is None else hidden
            hidden[places] = part.hidden
        if progress is not None:
            progress(len(places), int(part.tokens.sum()))
    return Embedded(frequency, tokens, hidden, probability)
