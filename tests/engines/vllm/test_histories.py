"""What workers know of a request's tokens, without vLLM: the same numbers, however a text is computed."""

import pytest

from steermoe.engines.vllm.histories import SPARE, Histories
from steermoe.engines.vllm.wire import pack, tags_of, unpack
from steermoe.errors import SteeringError
from steermoe.routing.positions import NOWHERE
from steermoe.steering.plans import SteeringPlan
from steermoe.steering.segments import Between, Segments, Tags

OPEN, CLOSE = 1, 2
TAGS = Tags(thinking=Between(((frozenset([OPEN]),),), ((frozenset([CLOSE]),),)))
PLAN = SteeringPlan(ban=((0, 0),), positions="answer")
DATA = pack(PLAN, TAGS)
TEXT = [5, 6, OPEN, 7, 8, CLOSE, 9, 10, 11, 12]
PROMPT = 2


def expected():
    segments = Segments("answer", TAGS, PROMPT)
    segments.read(TEXT)
    return segments.numbers


def read(histories, first, tokens, request="a", text=TEXT):
    here = text[first : first + tokens]
    return histories.numbers(request, DATA, PROMPT, first, here, lambda start: text[start:first])


@pytest.mark.parametrize(
    "calls",
    [
        [(0, 10)],
        [(0, 1), (1, 3), (4, 1), (5, 5)],  # in chunks
        [(4, 6)],  # the rest is in the prefix cache
        [(0, 6), (6, 1), (0, 7), (7, 3)],  # preempted, and computed again
        [(0, 8), (3, 7)],
        [(0, 6), (6, 3), (8, 2)],  # a drafted token was not accepted
    ],
)
def test_numbers_follow_from_the_tokens_alone(calls):
    histories = Histories()
    for first, tokens in calls:
        assert read(histories, first, tokens) == tuple(expected()[first : first + tokens])


def test_drafts_that_were_not_accepted_leave_nothing():
    histories = Histories()
    read(histories, 0, 6)
    drafted = [*TEXT[:6], 9, OPEN, OPEN]
    assert read(histories, 6, 3, text=drafted) == (0, NOWHERE, NOWHERE)
    assert read(histories, 7, 3) == (1, 2, 3)


def test_tokens_that_vllm_does_not_tell_are_an_error():
    with pytest.raises(SteeringError, match="--no-async-scheduling"):
        read(Histories(), 6, 2, text=[*TEXT[:5], -1, *TEXT[6:]])


def test_requests_that_have_ended_are_forgotten():
    histories = Histories()
    for number in range(SPARE + 4):
        read(histories, 0, 2, request=str(number))
    histories.forget({"2", "3"}, 2)
    assert sorted(histories._kept) == ["2", "3"]


def test_plans_without_tags_need_no_history():
    data = pack(SteeringPlan(ban=((0, 0),)))
    assert tags_of(data) is None
    assert Histories().numbers("a", data, 2, 0, [1, 2], lambda start: []) is None


def test_tags_travel_with_the_plan():
    assert tags_of(DATA) == TAGS
    assert unpack(DATA) == PLAN == unpack(pack(PLAN))
    assert pack(PLAN) != DATA
