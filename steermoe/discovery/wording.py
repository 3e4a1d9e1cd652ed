"""Do clusters of texts follow their words? A check that needs no labels. Knows no model.

Shapes: B texts, W words of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from steermoe.discovery.clustering import NOISE
from steermoe.discovery.keywords import count_words, languages_of

MOST_TEXTS = 2000
"""At most this many texts are compared, evenly spaced in the corpus."""
LEAST_TEXTS = 30
"""Fewer comparisons say nothing."""


@dataclass(frozen=True)
class Wording:
    """How often a text is in the same cluster as the one that is nearest to it by words (cosine of tf-idf).

    Attributes:
        share: of the texts. chance: the share if clusters of these sizes were drawn at random.
    """

    share: float
    chance: float

    @property
    def above_chance(self) -> float:
        """0 is as by chance, 1 is always (as Cohen's kappa)."""
        return (self.share - self.chance) / max(1 - self.chance, 1e-12)


def wording_of(texts: Sequence[str], labels: NDArray[np.int64]) -> Wording | None:
    """Compare texts that are in a cluster and share a word with another one.

    Returns:
        None if there are too few such texts, or fewer than two clusters.

    Raises:
        SteerMoEError: scikit-learn is missing.
    """
    inside = np.flatnonzero(labels != NOISE)
    if len(inside) > MOST_TEXTS:
        inside = inside[np.linspace(0, len(inside) - 1, MOST_TEXTS).astype(int)]
    own, read = labels[inside], [texts[place] for place in inside.tolist()]
    if len(inside) < LEAST_TEXTS or len(np.unique(own)) < 2:
        return None
    vocabulary, counts_BW = count_words(read, languages_of(read))
    if not len(vocabulary):
        return None
    words_BW = counts_BW.tocsr()
    texts_W = np.bincount(words_BW.indices, minlength=len(vocabulary))
    words_BW.data = (1 + np.log(words_BW.data)) * np.log(len(read) / texts_W)[words_BW.indices]
    like_BB = (words_BW @ words_BW.T).toarray()
    norm_B = np.sqrt(np.diag(like_BB))
    like_BB /= np.maximum(norm_B[:, None] * norm_B, 1e-12)
    np.fill_diagonal(like_BB, 0)
    nearest_B, compared_B = like_BB.argmax(1), like_BB.max(1) > 0
    if compared_B.sum() < LEAST_TEXTS:
        return None
    shares = np.bincount(own) / len(own)
    return Wording(float((own[nearest_B] == own)[compared_B].mean()), float((shares**2).sum()))
