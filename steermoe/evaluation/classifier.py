"""The classifier that judges what a text is about: tf-idf and logistic regression on texts of known domains."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steermoe.errors import SteerMoEError
from steermoe.evaluation.texts import Labelled

Floats = NDArray[np.float64]


class DomainClassifier:
    """Probability of each domain, "neutral" among them, for any text.

    Its quality is measured on texts that it did not learn from, and that are of another make where the package's own
    are used: it learns from short texts of many kinds and is tested on stories.

    Args:
        texts: what to learn from, and what to be tested on.
        seed: of the optimiser.

    Attributes:
        labels: the domains, in the order of the probabilities' columns.
        auc: area under the ROC curve of each domain against all others, on the texts held out.
        accuracy: share of those texts whose own domain is the likeliest.

    Raises:
        SteerMoEError: scikit-learn is missing.
    """

    def __init__(self, texts: Labelled, seed: int = 0) -> None:
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.linear_model import LogisticRegression
            from sklearn.metrics import roc_auc_score
            from sklearn.pipeline import make_pipeline
        except ImportError as error:
            raise SteerMoEError(
                f"the classifier needs scikit-learn ({error}): pip install 'steermoe[evaluate]'"
            ) from error
        self._pipeline: Any = make_pipeline(
            TfidfVectorizer(sublinear_tf=True, stop_words="english", min_df=1),
            LogisticRegression(C=30.0, class_weight="balanced", max_iter=2000, random_state=seed),
        )
        self._pipeline.fit([text for text, _ in texts.learn], [label for _, label in texts.learn])
        self.labels: list[str] = [str(label) for label in self._pipeline.classes_]
        tested = [(text, label) for text, label in texts.measure if label in self.labels]
        truth = np.array([label for _, label in tested])
        found = self.probabilities([text for text, _ in tested])
        self.accuracy = float((np.array(self.labels)[found.argmax(1)] == truth).mean())
        self.auc: dict[str, float] = {
            label: float(roc_auc_score(truth == label, found[:, column]))
            for column, label in enumerate(self.labels)
            if 0 < (truth == label).sum() < len(truth)
        }

    def probabilities(self, texts: Sequence[str]) -> Floats:
        """[texts, domains], each row summing to 1."""
        if not texts:
            return np.empty((0, len(self.labels)))
        found: Floats = self._pipeline.predict_proba(list(texts))
        return found
