"""The classifier and the judge: what a text is about, figures of each opening, texts that only look like success."""

import numpy as np
import pytest

pytest.importorskip("sklearn")

from steermoe.evaluation.classifier import DomainClassifier, pieces
from steermoe.evaluation.judge import FIGURES, Judge
from steermoe.evaluation.results import StoryRecord
from steermoe.evaluation.summary import EvaluationSummary, _damage_at
from steermoe.evaluation.texts import packaged_texts
from steermoe.models.default import spec

SPORT = "The team trained in the stadium, and in the final the striker scored the winning goal of the match."
PLAIN = "The old man put the letter into a drawer and went out into the rain to look for his brother."


@pytest.fixture(scope="module")
def classifier():
    return DomainClassifier(packaged_texts())


def story(text, opening=0, seed=0, *, nats=3.0, tokens=None):
    ids = tuple(range(100, 140)) if tokens is None else tuple(tokens)
    return StoryRecord(opening, seed, text, ids, "length", nats, {"sport": 0.25}, 0.5)


@pytest.fixture
def judge(classifier):
    unsteered = [story(PLAIN, opening, seed, nats=3.0 + 0.1 * opening) for opening in range(3) for seed in range(2)]
    return Judge(classifier, {"sport": ["stadium", "goal"]}, {"sport": ("striker",)}, unsteered, 3, 2)


def test_classifier_recognises_held_out_stories(classifier):
    assert set(classifier.auc) == set(spec.TOPICS)
    assert min(classifier.auc.values()) > 0.9
    assert np.mean(list(classifier.recall.values())) > 0.8


def test_pieces_of_a_text():
    text = "one two three four five six seven"
    assert list(pieces(text, 3)) == ["one two three", "four five six"]
    assert list(pieces(text, 4)) == ["one two three four", "five six seven"]
    assert list(pieces("one", 4)) == ["one"]


def test_probabilities_sum_to_one(classifier):
    found = classifier.probabilities([SPORT, PLAIN])
    assert found.sum(1) == pytest.approx([1, 1])
    assert [classifier.labels[column] for column in found.argmax(1)] == ["sport", "neutral"]
    assert classifier.probabilities([]).shape == (0, 9)


def test_figures_are_means_over_seeds(judge):
    figures = judge.figures([story(SPORT), story(PLAIN, seed=1), story(SPORT, 1)], "sport")
    assert set(figures) == set(FIGURES)
    assert figures["success"] == pytest.approx([0.5, 1, np.nan], nan_ok=True)
    assert figures["distinct_words"] == pytest.approx([1, 2, np.nan], nan_ok=True)
    assert figures["vector_share"] == pytest.approx([0.25, 0.25, np.nan], nan_ok=True)


@pytest.mark.parametrize(
    "damaged",
    [
        {"nats": 9.0},
        {"nats": 0.5},
        {"tokens": [1, 2, 3] * 12},
        {"text": "striker goal stadium striker"},
        {"tokens": []},
    ],
)
def test_a_text_that_is_not_sound_is_not_a_success(judge, damaged):
    figures = judge.figures([story(damaged.pop("text", SPORT), **damaged)], "sport")
    assert figures["sound_success"][0] == 0
    assert figures["damaged"][0] == 1


def test_a_domain_without_a_list_has_no_word_figures(judge):
    assert np.isnan(judge.figures([story(PLAIN)], "law")["words_per_1000"]).all()


def test_most_likely_shares_sum_to_one(judge):
    found = judge.most_likely([story(SPORT), story(PLAIN)])
    assert found["sport"] == found["neutral"] == 0.5
    assert sum(found.values()) == pytest.approx(1)


def test_summary_compares_steered_with_unsteered(judge):
    from steermoe.evaluation.protocol import Condition

    unsteered = [story(PLAIN, opening, seed) for opening in range(3) for seed in range(2)]
    steered = [story(SPORT, opening, seed) for opening in range(3) for seed in range(2)]
    summary = EvaluationSummary(judge, unsteered, ["sport"])
    condition = Condition("steered", "sport", strength=4.0)
    damage = {"kl_p95": 0.5, "nats": 3.2, "nats_unsteered": 3.0}
    summary.add(condition, steered, damage, 0.7)
    summary.add(Condition("shuffled", "sport", strength=4.0), unsteered)
    found = summary.as_dict(condition.group)
    (row, _) = found["conditions"]
    assert row["differences"]["success"]["mean"] == 1
    assert row["on_texts"] == {**damage, "lift": 0.7, "perplexity_ratio": pytest.approx(np.exp(0.2))}
    assert found["complaints"] == []
    assert found["confusion"]["vectors"] == ["unsteered", "sport"]


def test_damage_at_a_rate_of_success_is_read_from_the_curve():
    points = [(0.0, np.zeros(20)), (0.4, np.full(20, 0.4)), (1.0, np.full(20, 0.6))]
    assert _damage_at(points, 0.3)["mean"] == pytest.approx(0.3)
    assert _damage_at(points, 0.5)["mean"] == pytest.approx(0.7)
    assert _damage_at(points, 0.9) is None
