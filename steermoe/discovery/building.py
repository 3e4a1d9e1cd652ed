"""Build steering vectors from texts: each text's routing embedding, and their mean as a domain's vector.

Shapes: B texts, L MoE layers, N experts a layer.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from steermoe.discovery.embedding import (
    EmbeddingOptions,
    Progress,
    RoutingSource,
    architecture_of,
    embedder,
    routers_of,
)
from steermoe.errors import VectorError
from steermoe.vectors import DEFAULT_THRESHOLD, SteeringVector, VectorInfo


def routing_embeddings(
    loaded: RoutingSource,
    texts: Sequence[str],
    *,
    max_tokens: int = 512,
    batch_tokens: int = 2048,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """How often each expert is chosen on each text (Shchukin 2024).

    Args:
        loaded: the model with its tokenizer.
        texts: texts of any length.
        max_tokens: only so many tokens of each are read.
        batch_tokens: tokens a forward pass; similar lengths go together, padding is not counted.
        progress: called with the texts and tokens done since the last call.

    Returns:
        F [B, L, N] float32, each row summing to 1, and the number of tokens read of each text [B].

    Raises:
        VectorError: no texts, or a text without tokens.
    """
    if not texts:
        raise VectorError("no texts were given")
    with embedder(loaded, EmbeddingOptions(max_tokens=max_tokens, batch_tokens=batch_tokens)) as embed:
        embedded = embed.texts(texts, progress)
    if empty := [number for number, tokens in enumerate(embedded.tokens.tolist()) if not tokens]:
        raise VectorError(f"text {empty[0]} has no tokens: leave it out")
    return embedded.frequency, embedded.tokens


def vector_from_texts(
    loaded: RoutingSource,
    domain: str,
    texts: Sequence[str],
    *,
    threshold: float = DEFAULT_THRESHOLD,
    keywords: Sequence[str] = (),
    max_tokens: int = 512,
) -> SteeringVector:
    """The steering vector of a domain: the mean routing embedding of its texts, cut at `threshold` times 1/N.

    Args:
        loaded: the model that the vector is for.
        domain: its name, such as "sport".
        texts: texts of the domain, some dozens at least.
        threshold: the paper takes 3.
        keywords: words of the domain, to highlight in comparisons.
        max_tokens: tokens read of each text.

    Raises:
        VectorError: no texts, or an empty one.
    """
    frequencies, tokens = routing_embeddings(loaded, texts, max_tokens=max_tokens)
    info = replace(vector_info(loaded, texts, tokens, "steermoe.vector_from_texts"), keywords=tuple(keywords))
    layers = tuple(router.layer for router in routers_of(loaded))
    return SteeringVector(domain, frequencies.mean(0), layers, threshold=threshold, info=info)


def vector_info(loaded: RoutingSource, texts: Sequence[str], tokens: Tensor, created_by: str) -> VectorInfo:
    """Where a vector comes from: its model and its texts."""
    return VectorInfo(
        model=loaded.name,
        architecture=architecture_of(loaded),
        top_k=routers_of(loaded)[0].top_k,
        texts=len(texts),
        tokens=int(tokens.sum()),
        corpus_sha256=hashlib.sha256("\n".join(texts).encode()).hexdigest(),
        created_by=created_by,
    )
