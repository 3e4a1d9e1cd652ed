"""Figures of texts, what makes one unsound, and intervals: gibberish, loops and lists of words must be caught."""

import numpy as np
import pytest

from steermoe.evaluation import measures
from steermoe.evaluation.bootstrap import bootstrap, share_worse
from steermoe.evaluation.soundness import LOOP_TOKENS, Usual, defect_of
from steermoe.evaluation.words import without_forms_of, word_pattern
from steermoe.models import loading
from steermoe.models.default import pull

# ---- figures ----


@pytest.mark.parametrize(
    ("tokens", "loop"),
    [
        ([1, 2, 3, 4, 5, 6], 0),
        ([1, 2, 3, 3, 4], 2),
        ([9, 1, 2, 1, 2, 1, 2, 8], 6),
        ([1, 2, 3, 4, 1, 2, 3, 4, 5], 8),
        ([7] * 12, 12),
        ([1, 2, 3, 9, 1, 2, 3], 0),
        ([], 0),
        ([5], 0),
    ],
)
def test_longest_loop(tokens, loop):
    assert measures.longest_loop(tokens) == loop


def test_repeated_ngrams():
    assert measures.repeated_ngrams([1, 2, 3, 4, 5, 6]) == 0
    assert measures.repeated_ngrams([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert measures.repeated_ngrams([1, 2]) == 0


def test_distinct_ngrams_at_a_fixed_length():
    assert measures.distinct_ngrams([1, 2, 1, 2], 1, length=4) == 0.5
    assert measures.distinct_ngrams([1, 2, 1, 2, 9, 9], 2, length=4) == pytest.approx(2 / 3)
    assert measures.distinct_ngrams([1, 2, 1], 1, length=4) is None


def test_word_figures():
    found = measures.word_figures("A goal! Two goals were scored. It rained.", word_pattern(["goal", "score"]))
    assert (found.distinct, found.sentences) == (2, pytest.approx(2 / 3))
    assert found.per_thousand == pytest.approx(3000 / 8)
    nothing = measures.word_figures("...", word_pattern(["goal"]))
    assert (nothing.per_thousand, nothing.distinct, nothing.sentences) == (0, 0, 0)


def test_words_in_any_of_their_forms_are_left_out():
    assert without_forms_of(["goals", "golf", "scored", "keeper"], ["goal", "score"]) == ["golf", "keeper"]
    assert without_forms_of(["goals"], []) == ["goals"]


# ---- soundness ----

USUAL = Usual(nats=3.0, deviation=0.3)


@pytest.mark.parametrize(
    ("figures", "found"),
    [
        ({}, ""),
        ({"nats": 3.9}, ""),
        ({"nats": 4.6}, "gibberish"),
        ({"nats": 1.5}, "loop"),
        ({"repeated": 0.4}, "loop"),
        ({"loop": LOOP_TOKENS}, "loop"),
        ({"per_thousand": 500.0}, "list"),
        ({"nats": None}, ""),
        ({"nats": 9.0, "per_thousand": 900.0}, "list"),
    ],
)
def test_defects_are_named(figures, found):
    figures = {"nats": 3.0, "repeated": 0.02, "loop": 2, "per_thousand": 60.0, **figures}
    assert defect_of(USUAL, **figures) == found


def test_usual_of_very_even_texts_leaves_room():
    assert Usual.of([3.0, 3.0]).deviation > 0.1


@pytest.fixture(scope="module")
def judged():
    """A function that judges any text after an opening against the default model's own unsteered stories."""
    if not pull.is_pulled():
        pytest.skip("the default model is not pulled: `make model`")
    from steermoe.engines.hf.engine import HFEngine
    from steermoe.engines.request import Completion, Request, Sampling
    from steermoe.evaluation.teacher_forcing import continuation_nats
    from steermoe.evaluation.texts import domain_list
    from steermoe.models.default.stories import domain_words, openings

    loaded = loading.load()
    starts = openings("heldout", 16)
    stories = HFEngine(loaded).generate(
        [Request(s, None, Sampling(max_new_tokens=40, seed=n)) for n, s in enumerate(starts)]
    )
    usual = Usual.of([nats for nats in continuation_nats(loaded, stories) if nats is not None])
    pattern = word_pattern([*domain_list("sport"), *domain_words("sport")])

    def judge(text: str) -> str:
        ids = tuple(loaded.tokenizer(" " + text)["input_ids"][:60])
        completion = Completion(Request(starts[0]), text, ids, 0, "length", 0.0)
        (nats,) = continuation_nats(loaded, [completion])
        return defect_of(
            usual,
            nats,
            measures.repeated_ngrams(ids),
            measures.longest_loop(ids),
            measures.word_figures(text, pattern).per_thousand,
        )

    return judge


@pytest.mark.default_model
@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("grape seven qua zebra lamp Tuesday of wherein blue nine gulp ox telex from mud perhaps kilt", "gibberish"),
        ("She ran to the door and the dog ran to the door and " + "the dog ran to the door and " * 5, "loop"),
        ("football goalkeeper tennis basketball referee tournament league stadium athlete champion striker", "list"),
        (
            "The team met at the stadium before the final. Her brother was the goalkeeper, and he could not sleep. In "
            "the second half the striker shot, the ball hit the post, and everybody in the village shouted.",
            "",
        ),
    ],
)
def test_metrics_catch_what_fools_a_classifier(judged, text, found):
    assert judged(text) == found


# ---- intervals ----


def test_bootstrap_of_a_mean():
    values = np.random.default_rng(1).normal(2.0, 1.0, 100)
    found = bootstrap(values)
    assert found.mean == pytest.approx(values.mean())
    assert found.low < found.mean < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 10, rel=0.15)
    assert bootstrap(values) == found  # seeded
    assert bootstrap(np.append(values, np.nan)).openings == 100
    assert bootstrap(np.array([np.nan])) is None


def test_paired_differences_are_narrower_than_unpaired():
    random = np.random.default_rng(0)
    usual = random.normal(0, 5, 60)
    steered = usual + random.normal(1, 0.1, 60)
    paired = bootstrap(steered - usual)
    assert paired.low > 0.9
    assert bootstrap(steered).low < 0.5


def test_share_that_moved_the_wrong_way():
    assert share_worse(np.array([1.0, -1.0, 0.0, np.nan])) == pytest.approx(1 / 3)
    assert share_worse(np.array([np.nan])) is None
