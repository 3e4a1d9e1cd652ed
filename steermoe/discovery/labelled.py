"""Build vectors from texts whose domains are known: one vector per domain, or a contrast with other texts."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steermoe.discovery.contrast import (
    MIN_DIFFERENCE,
    Expert,
    activation_rate,
    contrastive_vector,
    risk_difference,
    strongest,
)
from steermoe.discovery.embed_corpus import embedder
from steermoe.discovery.embedder import EmbeddingOptions, RoutingSource, TextProgress
from steermoe.errors import VectorError
from steermoe.vectors.vector import DEFAULT_THRESHOLD, SteeringVector, VectorInfo

CREATED_BY = "steermoe vectors build"


@dataclass(frozen=True, eq=False)
class Contrast:
    """A contrastive vector with the experts to force and to ban, the strongest first."""

    vector: SteeringVector
    force: list[Expert]
    ban: list[Expert]


def vectors_from_labelled(
    loaded: RoutingSource,
    corpora: Mapping[str, Sequence[str]],
    *,
    threshold: float = DEFAULT_THRESHOLD,
    relative: bool | None = None,
    max_tokens: int = 512,
    progress: TextProgress | None = None,
) -> list[SteeringVector]:
    """One vector per domain: the mean routing embedding of its texts (Shchukin 2024), with the mean of all as baseline.

    Args:
        loaded: the model that the vectors are for.
        corpora: domain -> its texts.
        threshold: E keeps what exceeds `threshold` times 1/N, or times the baseline.
        relative: whether to use the baseline; by default if there are more domains than `threshold`, since with C
            domains no frequency can exceed C times the baseline. In it every domain counts the same, however many
            texts it has.
        max_tokens: tokens read of each text.
        progress: called with texts and tokens done.

    Raises:
        VectorError: no texts, a text without tokens, or a vector whose E would be empty.
    """
    read = routing_by_domain(loaded, corpora, max_tokens=max_tokens, progress=progress)
    return vectors_from_read(loaded, corpora, read, threshold=threshold, relative=relative)


def vectors_from_read(
    loaded: RoutingSource,
    corpora: Mapping[str, Sequence[str]],
    read: Mapping[str, tuple[Tensor, Tensor]],
    *,
    threshold: float = DEFAULT_THRESHOLD,
    relative: bool | None = None,
) -> list[SteeringVector]:
    """As `vectors_from_labelled`, from what `routing_by_domain` returns."""
    frequencies = {domain: embeddings.mean(0) for domain, (embeddings, _) in read.items()}
    is_relative = len(corpora) > threshold if relative is None else relative
    baseline = torch.stack(list(frequencies.values())).mean(0)
    vectors = [
        SteeringVector(
            domain,
            frequency,
            loaded.shape.layers,
            threshold=threshold,
            baseline=baseline if len(corpora) > 1 else None,
            relative=is_relative,
            info=vector_info(loaded, corpora[domain], read[domain][1], CREATED_BY),
        )
        for domain, frequency in frequencies.items()
    ]
    for vector in vectors:
        _check_not_empty(vector)
    return vectors


def contrasts(
    loaded: RoutingSource,
    corpora: Mapping[str, Sequence[str]],
    against: Sequence[str],
    *,
    min_difference: float = MIN_DIFFERENCE,
    count: int = 10,
    max_tokens: int = 512,
    progress: TextProgress | None = None,
) -> list[Contrast]:
    """The risk difference of each domain against other texts (2509.09660), as a vector and as lists of experts.

    Args:
        loaded: the model that the vectors are for.
        corpora: domain -> its texts.
        against: the other texts.
        min_difference: see `contrastive_vector`.
        count: the most experts in a list.
        max_tokens: tokens read of each text.
        progress: called with texts and tokens done.

    Raises:
        VectorError: no texts, a text without tokens, or sets that route alike.
    """
    layers = loaded.shape.layers

    def rate(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        embeddings, tokens = routing_embeddings(loaded, texts, max_tokens=max_tokens, progress=progress)
        return activation_rate(embeddings, tokens, loaded.shape.top_k), tokens

    rate_against, _ = rate(against)
    made = []
    for domain, texts in corpora.items():
        own, tokens = rate(texts)
        difference = risk_difference(own, rate_against)
        info = replace(vector_info(loaded, texts, tokens, CREATED_BY), title=f"{domain} against other texts")
        vector = contrastive_vector(domain, difference, layers, min_difference=min_difference, info=info)
        made.append(
            Contrast(vector, strongest(difference, layers, count), strongest(difference, layers, count, least=True))
        )
    return made


def _check_not_empty(vector: SteeringVector) -> None:
    if vector.experts.any() or vector.frequency is None:
        return
    usual: Tensor | float = 1 / vector.num_experts
    if vector.relative and vector.baseline is not None:
        usual = vector.baseline.clamp(min=1e-12)
    largest = float((vector.frequency / usual).max())
    of = "the baseline" if vector.relative else "the mean frequency 1/N"
    raise VectorError(
        f"'{vector.domain}': no expert exceeds {vector.threshold:g} times {of}, the largest is {largest:.2f} times: "
        f"pass a smaller --threshold{', or --absolute' if vector.relative else ''}"
    )


def routing_by_domain(
    loaded: RoutingSource,
    corpora: Mapping[str, Sequence[str]],
    *,
    max_tokens: int = 512,
    progress: TextProgress | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """As `routing_embeddings`, for the texts of each domain."""
    return {
        domain: routing_embeddings(loaded, texts, max_tokens=max_tokens, progress=progress)
        for domain, texts in corpora.items()
    }


def routing_embeddings(
    loaded: RoutingSource,
    texts: Sequence[str],
    *,
    max_tokens: int = 512,
    batch_tokens: int = 2048,
    progress: TextProgress | None = None,
) -> tuple[Tensor, Tensor]:
    """How often each expert is chosen on each text (Shchukin 2024).

    Args:
        loaded: the model with its tokenizer.
        texts: texts of any length.
        max_tokens: tokens read of each text.
        batch_tokens: tokens per forward pass; similar lengths go together, padding is not counted.
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
        texts: texts of the domain, at least a few dozen.
        threshold: 3 in the paper.
        keywords: words of the domain, to highlight in comparisons.
        max_tokens: tokens read of each text.

    Raises:
        VectorError: no texts, or an empty one.
    """
    frequencies, tokens = routing_embeddings(loaded, texts, max_tokens=max_tokens)
    info = replace(vector_info(loaded, texts, tokens, "steermoe.vector_from_texts"), keywords=tuple(keywords))
    return SteeringVector(domain, frequencies.mean(0), loaded.shape.layers, threshold=threshold, info=info)


def vector_info(loaded: RoutingSource, texts: Sequence[str], tokens: Tensor, created_by: str) -> VectorInfo:
    """Where a vector comes from: its model and its texts."""
    return replace(
        VectorInfo.of(loaded.shape),
        texts=len(texts),
        tokens=int(tokens.sum()),
        corpus_sha256=hashlib.sha256("\n".join(texts).encode()).hexdigest(),
        created_by=created_by,
    )
