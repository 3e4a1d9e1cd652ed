"""The live engine alone: tickets, stop texts, calls, failures, its end."""

import asyncio
import threading
from dataclasses import replace

import pytest

from steermoe.engines.request import Request, Sampling
from steermoe.errors import GenerationError, SteeringError
from steermoe.serving.live import Closed, Limits, LiveEngine, QueueFull
from steermoe.serving.stopping import StopTexts
from tests.support import served
from tests.support import steering_models as tiny

SHORT = Sampling(max_new_tokens=8, min_new_tokens=8, do_sample=False)
LONG = replace(SHORT, max_new_tokens=200, min_new_tokens=200)


@pytest.fixture(scope="module")
def own(tiny_checkpoint):
    return served.tiny_engine(tiny_checkpoint)


@pytest.fixture
def live(own):
    with LiveEngine(own, Limits(rows=2, queued=3)) as live:
        yield live
    assert tiny.traces(own.loaded.model) == []


def test_pieces_make_the_text(live):
    first, second = live.submit([Request("A dog", None, SHORT), Request("It", None, SHORT)])
    pieces = list(first)
    assert "".join(piece.text for piece in pieces) == first.text == first.result().text
    assert sum((piece.tokens for piece in pieces), ()) == first.result().token_ids
    assert (first.finish_reason, second.result().new_tokens) == ("length", 8)
    assert (live.finished, live.generated, live.failed) == (2, 16, 0)


def test_pieces_in_an_event_loop(live):
    async def text(ticket):
        return "".join([piece.text async for piece in ticket])

    async def both():
        tickets = live.submit([Request("A dog", None, SHORT), Request("It", None, SHORT)])
        return [await asyncio.gather(*map(text, tickets)), [ticket.text for ticket in tickets]]

    streamed, whole = asyncio.run(both())
    assert streamed == whole


def test_a_full_queue(live):
    tickets = live.submit([Request("A dog", None, LONG)] + [Request(str(i), None, LONG) for i in range(4)])
    with pytest.raises(QueueFull) as caught:
        live.submit([Request("x", None, SHORT)])
    assert 1 <= caught.value.seconds <= 60
    with pytest.raises(QueueFull):
        live.call(lambda: None)
    for ticket in tickets:
        ticket.cancel()
    outcomes = []
    for ticket in tickets:
        try:
            outcomes.append(ticket.result(10).finish_reason)
        except Closed:
            outcomes.append("never begun")
    assert set(outcomes) <= {"interrupted", "never begun"}
    assert live.submit([Request("x", None, SHORT)])[0].result(10).new_tokens == 8


def test_a_call_waits_for_texts_and_later_texts_for_the_call(live):
    order = []
    (first,) = live.submit([Request("A dog", None, SHORT)])
    call = live.call(lambda: order.append((first.is_done, threading.current_thread().name)))
    (later,) = live.submit([Request("It", None, SHORT)])
    later.result(10)
    assert call.done()
    assert order == [(True, "steermoe-live")]
    with pytest.raises(ZeroDivisionError):
        live.call(lambda: 1 / 0).result(10)
    assert live.submit([Request("x", None, SHORT)])[0].result(10).new_tokens == 8


def test_steering_that_can_not_be_followed_leaves_the_text_alone(live):
    plan = tiny.plan_for_experts(live.engine.loaded.model, 1, positions="tool-calls")
    tickets = live.submit([Request(text, None, LONG) for text in ("A dog", "It", "waiting")])
    next(iter(tickets[0]))
    for ticket in (tickets[0], tickets[2]):
        with pytest.raises(SteeringError, match="tool-calls"):
            ticket.steer(plan).result(10)
    steered = tiny.plan_for_experts(live.engine.loaded.model, 1)
    for ticket in (tickets[0], tickets[2]):
        ticket.steer(steered).result(10)
        assert ticket.plan is steered
        ticket.cancel()
    assert tickets[1].result(20).new_tokens == 200


def test_cancelling_at_any_moment_is_never_lost(live):
    """Also while the first token of the text is being drawn."""
    for number in range(20):
        (ticket,) = live.submit([Request(str(number), None, LONG)])
        for _ in range(number * 50):
            pass
        ticket.cancel()
        try:
            assert ticket.result(10).finish_reason == "interrupted"
        except Closed:
            continue


def test_a_failure_ends_the_texts_it_met_and_no_others(live, monkeypatch):
    (before,) = live.submit([Request("A dog", None, LONG)])
    next(iter(before))
    decoder = live._decoder

    def fail():
        raise RuntimeError("the device is gone\nand more")

    monkeypatch.setattr(decoder, "step", fail)
    with pytest.raises(GenerationError, match="the model failed: the device is gone and more"):
        before.result(10)
    assert live.submit([Request("x", None, SHORT)])[0].result(10).new_tokens == 8
    assert live.failed == 1


def test_closing_finishes_what_was_taken(own):
    live = LiveEngine(own, Limits(rows=2, queued=8))
    tickets = live.submit([Request(str(number), None, SHORT) for number in range(6)])
    live.close()
    assert [ticket.result(0).new_tokens for ticket in tickets] == [8] * 6
    with pytest.raises(Closed):
        live.submit([Request("x", None, SHORT)])


def test_closing_within_a_grace(own):
    live = LiveEngine(own, Limits(rows=1, queued=8))
    tickets = live.submit([Request(str(number), None, LONG) for number in range(4)])
    next(iter(tickets[0]))
    live.close(0)
    for ticket in tickets:
        with pytest.raises(Closed):
            ticket.result(0)


def test_models_whose_rows_can_not_change(tiny_checkpoint, monkeypatch):
    """They generate batch by batch; texts are streamed, cancelled and steered in the middle of one all the same."""
    monkeypatch.setattr("steermoe.engines.hf.engine.rows_can_change", lambda model: False)
    engine = served.tiny_engine(tiny_checkpoint)
    plan = tiny.plan_for_experts(engine.loaded.model, 1, strength=30.0, formula="additive")
    plain = engine.generate([Request("A dog", None, LONG)])[0].token_ids
    live = LiveEngine(engine, Limits(rows=4))
    steered, cancelled, other = live.submit([Request(text, None, LONG) for text in ("A dog", "It", "x")])
    next(iter(steered))
    cancelled.cancel()
    steered.steer(plan).result(10)
    (late,) = live.submit([Request("late", None, LONG)])
    assert cancelled.result(20).finish_reason == "interrupted"
    assert cancelled.result(0).new_tokens < 200 == other.result(20).new_tokens
    assert steered.result(20).token_ids[:1] == plain[:1]
    assert steered.result(0).token_ids != plain
    next(iter(late))
    live.close(0)
    with pytest.raises(Closed):
        late.result(0)
    assert tiny.traces(engine.loaded.model) == []


def test_too_long_texts(live):
    with pytest.raises(GenerationError, match="a text has at most 256 here"):
        live.submit([Request("A dog", None, Sampling(max_new_tokens=255))])


STOPPED = [
    (["abc"], ["abc"], "", "abc"),
    (["abc"], ["c"], "ab", "c"),
    (["a", "b", "c", "d"], ["bc"], "a", "bc"),
    (["ab", "ab", "ac"], ["abac"], "ab", "abac"),
    (["aab", "x"], ["ab", "aab"], "", "aab"),
    (["ab", "c"], ["abd"], "abc", ""),
    (["ab"], ["abd"], "ab", ""),
    (["one two"], ["two", "one"], "", "one"),
    (["x"], [], "x", ""),
]


@pytest.mark.parametrize(("pieces", "stops", "shown", "found"), STOPPED)
def test_stop_texts(pieces, stops, shown, found):
    one = StopTexts(stops)
    text = "".join(map(one.add, pieces))
    assert (text + one.rest(), one.found) == (shown, found)
