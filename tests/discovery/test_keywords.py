"""Keywords: those by which a reader would name a domain, without names, numbers and common words, in any language."""

import sys

import pytest

from steermoe.discovery.keywords import Keyword, cluster_keywords, word_analyser
from steermoe.errors import CorpusError, SteerMoEError
from steermoe.models.default.stories import domain_words, load_stories

WANTED = {
    "biology": {"biology", "species", "cells"},
    "food": {"food", "kitchen", "butter"},
    "law": {"judge", "lawyer", "court"},
    "medicine": {"doctor", "nurse", "hospital"},
    "music": {"music", "melody", "rhythm"},
    "software": {"software", "code", "computer"},
    "space": {"space", "moon", "orbit"},
    "sport": {"ball", "team", "match"},
}


def words(keywords: list[Keyword]) -> list[str]:
    return [keyword.word for keyword in keywords]


@pytest.fixture(autouse=True, scope="module")
def _extra():
    pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def stories():
    """The keywords of the repository's stories, topic by topic, and all stories."""
    texts = load_stories("train")
    topics = sorted({story.topic for story in texts})
    found = cluster_keywords([story.rest for story in texts], [topics.index(story.topic) for story in texts])
    return {topic: found[number] for number, topic in enumerate(topics)}, texts


@pytest.mark.parametrize("topic", WANTED)
def test_a_topic_of_stories_is_named(stories, topic):
    found = words(stories[0][topic])
    assert len(found) == 10
    assert set(found) >= WANTED[topic]
    listed = set(domain_words(topic))
    assert sum(word in listed or word.removesuffix("s") in listed for word in found) >= 5


@pytest.mark.parametrize("topic", WANTED)
def test_no_character_of_a_story_is_a_keyword(stories, topic):
    keywords, texts = stories
    text = " ".join(story.rest for story in texts if story.topic == topic)
    for word in set(words(keywords[topic])) - {"earth"}:
        assert f" {word}" in text, f"'{word}' is only written with a capital: a name"


def test_scores_fall_and_are_positive(stories):
    for keywords in stories[0].values():
        scores = [keyword.score for keyword in keywords]
        assert scores == sorted(scores, reverse=True)
        assert scores[-1] > 0


SPORT = ["the goal came late", "a goal and a referee", "the referee saw the goal", "no goal today"]
FOOD = ["the butter came late", "butter and bread", "bread with butter", "no butter today"]


def test_keywords_distinguish_clusters():
    found = cluster_keywords(SPORT + FOOD, [0] * 4 + [1] * 4)
    assert words(found[0]) == ["goal", "referee"]
    assert words(found[1]) == ["butter", "bread"]


def test_one_text_cannot_make_a_keyword_however_often_it_repeats_it():
    texts = [*SPORT, "Halloran " * 50 + "goal", *FOOD]
    assert words(cluster_keywords(texts, [0] * 5 + [1] * 4)[0]) == ["goal", "referee"]


def test_noise_is_not_a_cluster_but_a_contrast():
    texts = [*SPORT, *FOOD, *["the referee"] * 6]
    found = cluster_keywords(texts, [0] * 4 + [1] * 4 + [-1] * 6)
    assert sorted(found) == [0, 1]
    assert "referee" not in words(found[0])


def test_a_cluster_of_two_texts_has_keywords():
    assert words(cluster_keywords(["a red kite", "the red kite", *FOOD], [0, 0, 1, 1, 1, 1])[0]) == ["kite", "red"]


def test_a_plural_is_not_listed_with_its_singular():
    texts = ["goal goals", "goals goal", "goals win", "goals", *FOOD]
    assert words(cluster_keywords(texts, [0] * 4 + [1] * 4)[0]) == ["goals"]


def test_count():
    texts = ["red green blue grey", "red green blue grey", *FOOD]
    assert len(cluster_keywords(texts, [0, 0, 1, 1, 1, 1], count=3)[0]) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't say 3rd, 1999 or x2!", ["say"]),
        ("the dog's ball_game", ["dog"]),
        ("L'équipe a gagné", ["équipe", "gagné"]),
        ("Мяч в воротах", ["мяч", "воротах"]),
        ("हिन्दी में खेल", ["हिन्दी", "में", "खेल"]),
        ("ลูกบอล", ["ลูกบอล"]),
        ("足球比赛", ["足球", "球比", "比赛"]),
        ("caf\u0065\u0301", ["café"]),
        ("Größe", ["größe"]),
        ("", []),
    ],
)
def test_words_of_any_script(text, expected):
    assert word_analyser(frozenset({"the", "or", "don"}))(text) == expected


@pytest.mark.parametrize(("texts", "labels"), [(["1 2 3", "!"], [0, 0]), (["the", "and"], [0, 1])])
def test_texts_without_words(texts, labels):
    assert cluster_keywords(texts, labels) == {label: [] for label in labels}


def test_only_noise():
    assert cluster_keywords(SPORT, [-1] * 4) == {}


def test_labels_that_do_not_fit():
    with pytest.raises(CorpusError, match="4 texts have 3 cluster labels"):
        cluster_keywords(SPORT, [0, 0, 1])


def test_scikit_learn_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(SteerMoEError, match=r"needs? scikit-learn .*pip install 'steermoe\[discover\]'"):
        cluster_keywords(SPORT, [0] * 4)
