"""Turn stories into figures: what each is about, how many of the domain's words it has, and whether it is sound."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from steermoe.evaluation import measures
from steermoe.evaluation.classifier import DomainClassifier
from steermoe.evaluation.results import StoryRecord
from steermoe.evaluation.soundness import Usual, defect_of
from steermoe.evaluation.words import word_pattern

FIGURES = {
    "sound_success": "share of texts that are about the domain and sound",
    "success": "share of texts whose most likely domain, of all and neutral, is the wanted one",
    "probability": "probability of the domain by the classifier",
    "words_per_1000": "words from the domain's list per 1,000 words",
    "distinct_words": "different words of the list in a text",
    "sentences_hit": "share of sentences with a word from the list",
    "damaged": "share of texts that are gibberish, a loop or a list of words",
    "nats": "negative log-likelihood per token under the unsteered model",
    "distinct_1": "share of different tokens among the first 40 tokens",
    "distinct_2": "share of different pairs of tokens among the first 40 tokens",
    "distinct_3": "share of different triples of tokens among the first 40 tokens",
    "repeated_4": "share of 4-grams that occurred before",
    "loop": "tokens of the longest stretch in which one piece repeats immediately",
    "length": "tokens of a text",
    "vector_share": "share of top-k slots that went to the domain's experts",
    "evenness": "entropy of the experts' use over log N",
}
"""Every figure of a story, and what it is."""

Floats = NDArray[np.float64]


class Judge:
    """Judges stories by the classifier, the word lists, and comparison with the unsteered stories.

    Args:
        classifier: knows the domains.
        words: a word list by domain; a domain without one gets no word figures.
        keywords: further words by domain, such as the vectors' own; they only help to detect bare lists of words.
        unsteered: the stories that define what is usual.
        openings, seeds: their numbers.
    """

    def __init__(
        self,
        classifier: DomainClassifier,
        words: Mapping[str, Sequence[str]],
        keywords: Mapping[str, Sequence[str]],
        unsteered: Sequence[StoryRecord],
        openings: int,
        seeds: int,
    ) -> None:
        self.classifier = classifier
        self.openings, self.seeds = openings, seeds
        self._patterns = {domain: word_pattern(listed) for domain, listed in words.items() if listed}
        self._known = {
            domain: word_pattern({*words.get(domain, ()), *keywords.get(domain, ())})
            for domain in words.keys() | keywords.keys()
            if words.get(domain) or keywords.get(domain)
        }
        self._unsteered = unsteered
        self._probabilities: dict[str, Floats] = {}

    @cached_property
    def usual(self) -> Usual:
        return Usual.of([story.nats for story in self._unsteered if story.nats is not None])

    def most_likely(self, stories: Sequence[StoryRecord]) -> dict[str, float]:
        """Share of stories by the domain that the classifier finds most likely."""
        found = self._classified(stories).argmax(1)
        return {label: float((found == column).mean()) for column, label in enumerate(self.classifier.labels)}

    def success(self, stories: Sequence[StoryRecord], domain: str) -> Floats:
        """The success figure alone, [O], for any domain, also one that the stories were not steered toward."""
        hits = self._classified(stories).argmax(1) == self.classifier.labels.index(domain)
        values = np.full((self.openings, self.seeds), np.nan)
        for story, hit in zip(stories, hits, strict=True):
            values[story.opening, story.seed] = hit
        return _mean_over_seeds(values)

    def figures(self, stories: Sequence[StoryRecord], domain: str) -> dict[str, Floats]:
        """Each figure in `FIGURES` as its mean over seeds for each opening [O]; NaN if there is none."""
        column = self.classifier.labels.index(domain)
        values = {name: np.full((self.openings, self.seeds), np.nan) for name in FIGURES}
        for story, row in zip(stories, self._classified(stories), strict=True):
            for name, value in self._of_story(story, row, column, domain).items():
                if value is not None:
                    values[name][story.opening, story.seed] = value
        return {name: _mean_over_seeds(of_stories) for name, of_stories in values.items()}

    def _classified(self, stories: Sequence[StoryRecord]) -> Floats:
        """Probabilities [stories, domains]; each text is classified only once for all domains."""
        new = list({story.text for story in stories} - self._probabilities.keys())
        self._probabilities.update(zip(new, self.classifier.probabilities(new), strict=True))
        found = [self._probabilities[story.text] for story in stories]
        return np.array(found).reshape(-1, len(self.classifier.labels))

    def _of_story(self, story: StoryRecord, probabilities: Floats, column: int, domain: str) -> dict[str, float | None]:
        tokens = story.token_ids
        repeated, loop = measures.repeated_ngrams(tokens), measures.longest_loop(tokens)
        known = self._known.get(domain)
        density = measures.word_figures(story.text, known).per_thousand if known else 0.0
        success = float(probabilities.argmax() == column)
        damaged = bool(defect_of(self.usual, story.nats, repeated, loop, density)) or not tokens
        figures: dict[str, float | None] = {
            "sound_success": success * (not damaged),
            "success": success,
            "probability": float(probabilities[column]),
            "damaged": float(damaged),
            "nats": story.nats,
            **{f"distinct_{size}": measures.distinct_ngrams(tokens, size) for size in (1, 2, 3)},
            "repeated_4": repeated,
            "loop": float(loop),
            "length": float(len(tokens)),
            "vector_share": story.vector_shares.get(domain),
            "evenness": story.entropy,
        }
        if domain in self._patterns:
            words = measures.word_figures(story.text, self._patterns[domain])
            figures |= {
                "words_per_1000": words.per_thousand,
                "distinct_words": float(words.distinct),
                "sentences_hit": words.sentences,
            }
        return figures


def _mean_over_seeds(values: Floats) -> Floats:
    """[O] from [O, seeds], without NaN; NaN if nothing is left."""
    known = ~np.isnan(values)
    counts = known.sum(1)
    return np.where(counts > 0, np.where(known, values, 0.0).sum(1) / np.maximum(counts, 1), np.nan)
