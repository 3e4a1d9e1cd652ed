"""New topics: from a few words and from pasted texts, with progress, and kept for the next time."""

import pytest

from steermoe.discovery.writing import Writing
from steermoe.errors import SteerMoEError, VectorError
from steermoe.evaluation.new_topics import CREATED_BY, NewTopics, split_texts
from steermoe.serving.live import LiveEngine
from steermoe.serving.page.building import Progress, Stopped, watched
from steermoe.steering.resolver import PlanResolver
from steermoe.steering.spec import SteeringSpec

TEXTS = "\n\n".join(f"The pirate number {n} sailed over\nthe sea with {n} men." for n in range(6))


@pytest.fixture
def building(engine, home):
    with LiveEngine(engine) as live:
        topics = NewTopics(engine.loaded, Writing(texts=6, new_tokens=24))
        yield topics, live


def test_a_topic_in_words_becomes_a_vector_that_is_found(building, engine, home):
    progress = Progress()
    topics, live = building
    future = live.call(topics.described("pirates at sea", progress))
    lines = list(watched(future, progress))
    assert future.result() == "pirates-at-sea"
    assert lines
    plan = PlanResolver(engine.shape, None, watch=True, names_only=True).plan(SteeringSpec(domain=("pirates-at-sea",)))
    assert plan.vector.info.strength == plan.strength


def test_pasted_texts_become_a_vector(building, engine, home):
    progress = Progress()
    topics, live = building
    assert live.call(topics.pasted("My Pirates", TEXTS, progress)).result(60) == "my-pirates"
    plan = PlanResolver(engine.shape, None, watch=True, names_only=True).plan(SteeringSpec(domain=("my-pirates",)))
    assert plan.vector.info.created_by == CREATED_BY
    assert plan.vector.info.texts == 6
    assert plan.strength == plan.vector.info.strength > 0


def test_the_work_can_be_stopped(building, home):
    progress = Progress()
    progress.is_stopped = True
    topics, live = building
    future = live.call(topics.described("a robot in the kitchen", progress))
    with pytest.raises(Stopped, match="build it again"):
        future.result(60)


@pytest.mark.parametrize(
    ("name", "texts", "message"),
    [
        ("x", "one\n\ntwo", "there are 2 texts, expected 4 to 500"),
        ("x", "a\n\n" * 501, "there are 501 texts"),
        ("x", "a" * 1_000_001, "1000001 characters"),
        ("", TEXTS, "name"),
        ("../x", TEXTS, "name"),
        ("sport", TEXTS, "packaged topic: take another, such as my-sport"),
    ],
)
def test_wrong_texts_and_names_are_refused_at_once(building, name, texts, message):
    with pytest.raises(VectorError, match=message):
        building[0].pasted(name, texts, Progress())


def test_no_topic_is_refused(building):
    with pytest.raises(SteerMoEError):
        building[0].described("  ", Progress())


def test_texts_are_paragraphs_or_lines():
    assert split_texts("a b\nc\n\n\nd\n \ne\n\nf") == ["a b c", "d", "e", "f"]
    assert split_texts("a\nb\nc\nd\n") == ["a", "b", "c", "d"]


def test_progress_says_how_far_it_is():
    progress = Progress()
    with progress.counting("Writing", "texts", 10) as count:
        count(3, 100)
    assert progress.line.startswith("Writing: 3 of 10 texts, about")
    with progress.working("Calibrating ...") as show:
        show("strength 3")
    assert progress.line == "strength 3"
