"""The classifier that judges what a text is about: tf-idf and logistic regression on texts of known domains.

The stories to judge are short, so it learns from whole texts and from pieces of them, and is tested on pieces.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steermoe.errors import SteerMoEError
from steermoe.evaluation.texts import Labelled

Floats = NDArray[np.float64]

LEARNT_WORDS, TESTED_WORDS = 25, 30
"""Words per piece; 40 tokens are about 30 words."""


class DomainClassifier:
    """Probability of each domain, including "neutral", for any text.

    Its quality is measured on texts that it did not learn from. With the package's texts they are even of another kind:
    it learns from short texts of many kinds and is tested on stories.

    Args:
        texts: what to learn from, and what to be tested on.
        seed: for the optimiser.

    Attributes:
        labels: the domains, in the order of the probabilities' columns.
        auc: area under the ROC curve of each domain against all others, on the first 30 words of the held-out texts.
        recall: share of each domain's held-out texts for which that domain is the most likely: the most that steering
            could reach.

    Raises:
        SteerMoEError: scikit-learn is missing.
    """

    def __init__(self, texts: Labelled, seed: int = 0) -> None:
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.linear_model import LogisticRegression
            from sklearn.metrics import roc_auc_score
            from sklearn.pipeline import make_pipeline, make_union
        except ImportError as error:
            raise SteerMoEError(
                f"the classifier needs scikit-learn ({error}): pip install 'steermoe[evaluate]'"
            ) from error
        words = TfidfVectorizer(sublinear_tf=True, stop_words="english")
        parts_of_words = TfidfVectorizer(sublinear_tf=True, analyzer="char_wb", ngram_range=(3, 5), min_df=2)
        self._pipeline: Any = make_pipeline(
            make_union(words, parts_of_words),
            LogisticRegression(C=30.0, class_weight="balanced", max_iter=2000, random_state=seed),
        )
        learnt = [(piece, label) for text, label in texts.learn for piece in (text, *pieces(text, LEARNT_WORDS))]
        self._pipeline.fit([piece for piece, _ in learnt], [label for _, label in learnt])
        self.labels: list[str] = [str(label) for label in self._pipeline.classes_]
        tested = [(next(pieces(text, TESTED_WORDS)), label) for text, label in texts.measure if label in self.labels]
        truth = np.array([label for _, label in tested])
        found = self.probabilities([piece for piece, _ in tested])
        most_likely = np.array(self.labels)[found.argmax(1)]
        known = [label for label in self.labels if 0 < (truth == label).sum() < len(truth)]
        self.recall: dict[str, float] = {label: float((most_likely[truth == label] == label).mean()) for label in known}
        self.auc: dict[str, float] = {
            label: float(roc_auc_score(truth == label, found[:, self.labels.index(label)])) for label in known
        }

    def probabilities(self, texts: Sequence[str]) -> Floats:
        """[texts, domains], each row summing to 1."""
        if not texts:
            return np.empty((0, len(self.labels)))
        found: Floats = self._pipeline.predict_proba(list(texts))
        return found


def pieces(text: str, size: int) -> Iterator[str]:
    """The text in runs of `size` words; a last run of less than half of that is left out, unless it is the only one."""
    words = text.split()
    for start in range(0, max(1, len(words) - size // 2), size):
        yield " ".join(words[start : start + size])
