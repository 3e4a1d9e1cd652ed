"""Keep a vector's experts that do not depend on which texts it was built from: those that hold under resampling.

Shapes: B texts, R resamples, L MoE layers, N experts per layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from steermoe.discovery.embedder import RoutingSource, TextProgress
from steermoe.discovery.labelled import routing_by_domain, vectors_from_read
from steermoe.errors import VectorError, count_of
from steermoe.vectors.vector import DEFAULT_THRESHOLD, SteeringVector

RESAMPLES, SEED = 50, 0
"""How often as many texts as there are get drawn, with replacement."""
LEAST_SHARE = 0.9
"""An expert is kept if it exceeds the threshold in this share of the resamples."""


def stable_vectors(
    source: RoutingSource,
    corpora: Mapping[str, Sequence[str]],
    *,
    threshold: float = DEFAULT_THRESHOLD,
    relative: bool | None = None,
    max_tokens: int = 512,
    progress: TextProgress | None = None,
) -> list[SteeringVector]:
    """As `labelled.vectors_from_labelled`, with the experts that hold when the texts are resampled.

    Raises:
        VectorError: as there, and if no expert holds.
    """
    read = routing_by_domain(source, corpora, max_tokens=max_tokens, progress=progress)
    embeddings = {domain: frequency for domain, (frequency, _) in read.items()}
    vectors = vectors_from_read(source, corpora, read, threshold=threshold, relative=relative)
    return [keep_stable(vector, embeddings) for vector in vectors]


def keep_stable(vector: SteeringVector, embeddings: Mapping[str, Tensor]) -> SteeringVector:
    """The vector without the experts that exceed the threshold in less than 90% of 50 resamples.

    Texts are drawn anew within each domain. So both the domain's frequencies and the baseline change, in which every
    domain counts the same.

    Args:
        vector: with frequencies, cut at its threshold.
        embeddings: F [B, L, N] of the texts of each domain that its baseline was made of, its own among them.

    Raises:
        VectorError: no expert is left.
    """
    assert vector.frequency is not None
    resampled = {domain: _resampled_means(frequency) for domain, frequency in embeddings.items()}
    usual: Tensor | float = 1 / vector.num_experts
    if vector.relative:
        usual = torch.stack(list(resampled.values())).mean(0)
    share_LN = (resampled[vector.domain] > vector.threshold * usual).float().mean(0)
    experts = vector.experts.where(share_LN >= LEAST_SHARE, 0.0)
    held, found = int(experts.count_nonzero()), int(vector.experts.count_nonzero())
    if not held:
        raise VectorError(
            f"'{vector.domain}': none of {count_of(found, 'expert')} exceeds the threshold in {LEAST_SHARE:.0%} of "
            f"{RESAMPLES} resamples of {count_of(len(embeddings[vector.domain]), 'text')}: give more texts, or a lower "
            "--threshold"
        )
    info = replace(
        vector.info,
        title=f"{vector.info.title or vector.domain}: {held} of {count_of(found, 'expert')} hold when resampled",
        created_by=f"{vector.info.created_by} --rule stable",
    )
    return replace(vector, weights=experts, info=info)


def _resampled_means(frequency: Tensor) -> Tensor:
    """The mean F of each resample of texts [R, L, N], from the F of each text [B, L, N]."""
    texts = len(frequency)
    draws = np.random.default_rng(SEED).integers(texts, size=(RESAMPLES, texts))
    counts = np.stack([np.bincount(row, minlength=texts) for row in draws])
    weights_RB = torch.from_numpy(counts / texts).to(frequency.dtype)
    return torch.einsum("rb,bln->rln", weights_RB, frequency)
