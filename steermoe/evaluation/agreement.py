"""How far the classifier agrees with other judges of the same stories, as Cohen's kappa (Cohen 1960).

A judge names a topic for each text, or "neutral". One counts words, of lists that no classifier has seen; another, if
there is a sentence model, takes the topic of the nearest of the texts that the classifier learned from.

Shapes: S stories, O openings, K topics.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steermoe.errors import ModelError, reason
from steermoe.evaluation.bootstrap import LEVEL, RESAMPLES
from steermoe.evaluation.classifier import LEARNT_WORDS, DomainClassifier, pieces
from steermoe.evaluation.judge import Floats
from steermoe.evaluation.results import StoryRecord
from steermoe.evaluation.texts import NEUTRAL, Labelled
from steermoe.evaluation.words import distinct_words, word_pattern

TopicJudge = Callable[[Sequence[str]], list[str]]
"""Names the topic of each text."""
SENTENCE_TOKENS, SENTENCE_BATCH = 128, 64


def by_words(lists: Mapping[str, Sequence[str]]) -> TopicJudge:
    """A judge: the topic of whose list a text has the most different words; neutral if it has none, or in a tie."""
    patterns = {topic: word_pattern(words) for topic, words in lists.items() if words}

    def judge(texts: Sequence[str]) -> list[str]:
        found = []
        for text in texts:
            counts = {topic: len(distinct_words(text, pattern)) for topic, pattern in patterns.items()}
            most = max(counts.values(), default=0)
            best = [topic for topic, count in counts.items() if count == most > 0]
            found.append(best[0] if len(best) == 1 else NEUTRAL)
        return found

    return judge


def by_nearest(texts: Labelled, model: "SentenceModel") -> TopicJudge:
    """A judge: the topic of the nearest text, by cosine, of those to learn from, in pieces as short as stories."""
    known = [(piece, label) for text, label in texts.learn for piece in pieces(text, LEARNT_WORDS)]
    embedded = model.embed([piece for piece, _ in known])

    def judge(stories: Sequence[str]) -> list[str]:
        nearest = (model.embed(stories) @ embedded.T).argmax(1)
        return [known[number][1] for number in nearest]

    return judge


class SentenceModel:
    """An encoder whose mean last hidden state embeds a text, such as all-MiniLM-L6-v2.

    Args:
        folder: its checkpoint.

    Raises:
        ModelError: there is none.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        if not (folder / "config.json").is_file():
            raise ModelError(f"'{folder}' holds no model: name the folder of a sentence model, with its config.json")
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._model: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval()
            self.embed(["A text.", "Another one."])
        except Exception as error:  # whatever makes it no sentence model
            raise ModelError(f"the sentence model in '{folder}' can't be used: {reason(error)}") from error

    def embed(self, texts: Sequence[str]) -> Floats:
        """[texts, hidden], of length 1."""
        import torch

        found = []
        for first in range(0, len(texts), SENTENCE_BATCH):
            batch = self._tokenizer(
                list(texts[first : first + SENTENCE_BATCH]),
                truncation=True,
                max_length=SENTENCE_TOKENS,
                padding=True,
                return_tensors="pt",
            )
            with torch.inference_mode():
                states = self._model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            found.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(found).double().numpy() if found else np.empty((0, self._model.config.hidden_size))


def agreement(
    classifier: DomainClassifier, judges: Mapping[str, TopicJudge], stories: Sequence[StoryRecord]
) -> dict[str, Any]:
    """By judge: the share of stories whose topic is the classifier's too, and kappa with its interval over openings.

    `named` repeats both for the stories in which the judge finds a topic other than neutral.
    """
    texts = [story.text for story in stories]
    labels = [*classifier.labels]
    first = [labels[column] for column in classifier.probabilities(texts).argmax(1)]
    found: dict[str, Any] = {}
    for name, judge in judges.items():
        second = judge(texts)
        topics = sorted({*labels, *second})
        pairs = [
            (story.opening, topics.index(a), topics.index(b))
            for story, a, b in zip(stories, first, second, strict=True)
        ]
        named = [pair for pair in pairs if topics[pair[2]] != NEUTRAL]
        found[name] = {**_compared(pairs, len(topics)), "named": _compared(named, len(topics))}
    return found


def _compared(pairs: Sequence[tuple[int, int, int]], topics: int) -> dict[str, Any]:
    """Of (opening, topic by one judge, topic by another)."""
    if not pairs:
        return {"texts": 0, "same": None, "kappa": None}
    openings = sorted({opening for opening, _, _ in pairs})
    counts = np.zeros((len(openings), topics, topics))
    for opening, one, other in pairs:
        counts[openings.index(opening), one, other] += 1
    random = np.random.default_rng(0)
    drawn = random.multinomial(len(openings), np.full(len(openings), 1 / len(openings)), size=RESAMPLES)
    resampled = cohens_kappa(np.tensordot(drawn, counts, 1))
    total = counts.sum(0)
    low, high = np.nanquantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {
        "texts": len(pairs),
        "same": float(total.trace() / total.sum()),
        "kappa": {
            "mean": float(cohens_kappa(total)),
            "low": float(low),
            "high": float(high),
            "openings": len(openings),
        },
    }


def cohens_kappa(counts: Floats) -> Floats:
    """Of counts [..., K, K] by the topics of two judges; 1 if both always name one and the same topic."""
    total = counts.sum((-2, -1))
    same = np.trace(counts, axis1=-2, axis2=-1) / total
    chance = (counts.sum(-1) * counts.sum(-2)).sum(-1) / total**2
    return np.where(chance < 1, (same - chance) / np.where(chance < 1, 1 - chance, 1), 1.0)
