"""Traces as values: written and read, wrong ones refused in one line, shares and their sums."""

import json

import numpy as np
import pytest
import torch

from steermoe.engines.recorder import Recorder
from steermoe.engines.trace import Domain, Trace, domains_of, moved, shares
from steermoe.errors import GenerationError
from steermoe.routing.shape import RouterShape, RoutingShape
from steermoe.vectors.mixing import mix
from steermoe.vectors.vector import SteeringVector
from tests.support import steering_models as tiny

SHAPE = RoutingShape("m", (), (RouterShape(0, 8, 8, 2), RouterShape(3, 4, 5, 1)))
"""Layers of different sizes; the second has a column without an expert."""


def taken(text="ab\N{SNOWMAN}", **options):
    """A trace of the tokens of a text, each of which chose the experts 1, 2 and 3."""
    tokenizer = tiny.byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    recorder = Recorder(SHAPE, tokenizer, [], False, **options)
    for number, token in enumerate(ids):
        recorder.drew(-0.5)
        recorder.took(token)
        if number < len(ids) - 1:
            chosen = np.array([[1, 2], [3, -1]], np.int32)
            recorder.read(number, chosen, np.array([[1, 5], [4, -1]], np.int32), None, None)
    return recorder.finish(None, range(len(ids)), len(ids) - 1)


def test_a_text_with_half_characters_and_places_without_an_expert():
    trace = taken()
    assert trace.text == "ab\N{SNOWMAN}"
    assert trace.tokens == ("a", "b", "", "", "\N{SNOWMAN}")
    assert trace.unsteered[0, 1].tolist() == [-1, -1]  # column 4 of the second layer is none of its experts
    assert trace.moved.tolist() == pytest.approx([2 / 3] * 4 + [0])
    assert trace.is_read.tolist() == [True] * 4 + [False]


def test_a_text_that_ends_within_a_character_keeps_all_of_it():
    tokenizer = tiny.byte_tokenizer()
    ids = tokenizer("\N{SNOWMAN}")["input_ids"][:2]
    recorder = Recorder(SHAPE, tokenizer, [], False)
    for token in ids:
        recorder.drew(0.0)
        recorder.took(token)
    assert recorder.finish(None, range(2), 1).text == tokenizer.decode(ids)


def test_what_is_written_is_read_again():
    trace = taken().with_domains([Domain("sport", np.eye(2, 8, 1, dtype=bool))])
    again = Trace.from_json(trace.to_json())
    for name in ("tokens", "layers", "experts", "text"):
        assert getattr(again, name) == getattr(trace, name)
    for name in ("token_ids", "logprob", "chosen", "unsteered", "share", "share_before", "strength"):
        np.testing.assert_allclose(getattr(again, name), getattr(trace, name), atol=1e-5)
    np.testing.assert_array_equal(again.domains[0].experts, trace.domains[0].experts)
    nothing = Trace.from_json(taken("").to_json())
    assert len(nothing) == 0
    assert nothing.share.shape == (0, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"tokens": "abc"},
        {"tokens": [1] * 5},
        {"experts": [8]},
        {"layers": []},
        {"layers": None},
        {"chosen": [[[8, 0], [0, 0]]] * 5},
        {"chosen": [[[-2, 0], [0, 0]]] * 5},
        {"chosen": [[0]]},
        {"chosen": 7},
        {"unsteered": [[[0, 0], [0, 0], [0, 0]]] * 5},
        {"logprob": [0.0]},
        {"strength": ["x"] * 5},
        {"token_ids": [2**70] * 5},
        {"domains": [{"name": "x", "experts": [[0, 9]]}]},
        {"domains": [{"name": "x", "experts": [[0, -1]]}]},
        {"domains": [{}]},
        {"domains": 3},
    ],
)
def test_something_else_is_refused_in_one_line(change):
    with pytest.raises(GenerationError) as caught:
        Trace.from_dict(json.loads(taken().to_json()) | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[", "[]", "3", "{}", "null"])
def test_other_json_is_refused(text):
    with pytest.raises(GenerationError, match="no trace"):
        Trace.from_json(text)


def test_domains_of_a_mixture_are_its_parts():
    frequency = torch.full((2, 4), 0.25)
    frequency[:, 0] += 0.3
    frequency = frequency / frequency.sum(-1, keepdim=True)
    one = SteeringVector("sport", frequency, (0, 3), threshold=1.0)
    other = SteeringVector("food", frequency.flip(1), (0, 3), threshold=1.0)
    found = domains_of([mix([(one, 0.5), (other, 0.2)]), one], SHAPE)
    assert [domain.name for domain in found] == ["sport", "food"]
    assert found[1].experts.nonzero()[1].tolist() == [3, 3]
    nested = mix([(mix([(one, 0.5), (other, 0.2)]), 1.0), (one, 2.0)])
    assert [domain.name for domain in domains_of([nested], SHAPE)] == ["sport", "food"]


def test_shares_count_places_that_are_there():
    chosen = np.array([[[0, 1], [2, -1]], [[-1, -1], [-1, -1]]], np.int32)
    marks = np.zeros((2, 8), bool)
    marks[0, 0] = marks[1, 2] = True
    assert shares(chosen, [Domain("x", marks)])[:, 0].tolist() == pytest.approx([2 / 3, 0])
    assert moved(chosen, np.array([[[1, 0], [3, -1]], [[-1, -1], [-1, -1]]], np.int32)).tolist() == pytest.approx(
        [1 / 3, 0]
    )
    with pytest.raises(GenerationError, match="another model"):
        taken().with_domains([Domain("x", marks[:, :3])])
