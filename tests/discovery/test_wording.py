"""Clusters follow the words of their texts or they do not, measured without labels."""

import numpy as np
import pytest

from steermoe.discovery.wording import Wording, wording_of

DISHES = ("soup", "bread", "butter", "cheese", "onion", "pepper", "garlic", "basil")
GAMES = ("goal", "referee", "match", "striker", "corner", "penalty", "keeper", "league")


@pytest.fixture(autouse=True, scope="module")
def _extra():
    pytest.importorskip("sklearn")


def corpus(count=40) -> list[str]:
    random = np.random.default_rng(0)
    return [" ".join(random.choice(words, 4, replace=False)) for words in (DISHES, GAMES) for _ in range(count)]


def test_clusters_of_topics_follow_the_words():
    found = wording_of(corpus(), np.repeat([0, 1], 40))
    assert (found.share, found.chance) == (1.0, 0.5)
    assert found.above_chance == 1.0


def test_clusters_across_topics_do_not():
    assert abs(wording_of(corpus(), np.random.default_rng(1).integers(0, 2, 80)).above_chance) < 0.3


def test_noise_is_left_out():
    labels = np.repeat([0, 1], 40)
    labels[:20] = -1
    assert wording_of(corpus(), labels).chance == pytest.approx((20**2 + 40**2) / 60**2)


@pytest.mark.parametrize(
    ("texts", "labels"),
    [
        (corpus(10), np.repeat([0, 1], 10)),
        (corpus(), np.zeros(80, dtype=int)),
        (corpus(), np.full(80, -1)),
        ([f"{n} {n}" for n in range(60)], np.repeat([0, 1], 30)),
    ],
)
def test_too_little_to_compare(texts, labels):
    assert wording_of(texts, labels) is None


def test_above_chance():
    assert Wording(0.75, 0.5).above_chance == 0.5
    assert Wording(0.5, 0.5).above_chance == 0.0
