"""Two texts side by side: their steering changes as they come, they go on from a token, they end when told to."""

import html
import time
from dataclasses import replace

import numpy as np
import pytest

from steermoe.engines.request import Request
from steermoe.errors import SteeringError, SteerMoEError, TraceError
from steermoe.serving.page import view
from steermoe.serving.page.session import Session, Sessions
from steermoe.serving.page.settings import Settings
from steermoe.steering.tracing import RoutingTracer
from steermoe.tracing.page import page
from tests.support import served

GREEDY = Settings("Milo", amounts={"sport": 1.0}, tokens=12, temperature=0.0)
LONG = Settings("Milo", amounts={"sport": 1.0}, tokens=900, temperature=0.0)


def done(run):
    """Wait for both texts, and return them."""
    return [text.ticket.result(60) for text in run.texts]


def wait_until(is_true):
    deadline = time.monotonic() + 30
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_both_texts_are_those_of_the_engine_alone(session, checkpoint):
    engine = served.tiny_engine(checkpoint)
    run = session.start(GREEDY)
    unsteered, steered = done(run)
    for completion, plan in ((unsteered, None), (steered, session.plan(GREEDY))):
        (alone,) = engine.generate([Request("Milo", plan, GREEDY.sampling(), special_tokens=False)])
        assert completion.token_ids == alone.token_ids
    assert run.is_done
    assert [domain.name for domain in run.domains] == ["sport"]
    shares = [run.trace(side).share[:-1].mean() for side in (0, 1)]
    assert shares[1] > shares[0] + 0.3
    assert np.array_equal(run.trace(0).chosen, run.trace(0).unsteered)


def test_a_slider_changes_the_running_text_and_no_other(session):
    run = session.start(LONG)
    seen = run.texts[1].seen
    wait_until(lambda: len(seen) > 10)
    other = Settings("Milo", amounts={"food": 0.5}, strength=-1.5, tokens=900, temperature=0.0)
    assert run.again == LONG
    session.steer(other).result(10)
    assert run.again is None
    wait_until(lambda: len(seen) > 30)
    session.steer(Settings("Milo", tokens=900)).result(10)
    wait_until(lambda: len(seen) > 50)
    session.stop()
    unsteered, steered = done(run)
    strengths = steered.trace.strength
    values = [float(one) for one in dict.fromkeys(strengths.tolist())]
    assert values[:3] == [8.0, -12.0, 0.0]
    assert not unsteered.trace.strength.any()
    assert [domain.name for domain in run.domains] == ["sport", "food"]
    first, second = (int(np.argmax(strengths == value)) for value in values[1:3])
    assert 10 < first < second
    assert "smt-c1" in view.side_of(run, 1)


def test_a_model_that_can_not_be_traced_writes_without_traces(session, monkeypatch):
    def fail(tracer):
        raise TraceError("routers saw 3 tokens where the batch has 2")

    monkeypatch.setattr(RoutingTracer, "take", fail)
    run = session.start(GREEDY)
    wait_until(lambda: run.is_done)
    again = session.without_trace(run)
    unsteered, steered = done(again)
    assert (unsteered.new_tokens, steered.new_tokens) == (GREEDY.tokens, GREEDY.tokens)
    assert unsteered.trace is None
    assert html.escape(steered.text) in view.side_of(again, 1)
    assert view.UNTRACED in view.side_of(again, 1)
    assert session.without_trace(again) is None
    later = session.start(GREEDY)  # is not tried again
    assert [one.text for one in done(later)] == [unsteered.text, steered.text]


def test_a_text_goes_on_from_a_token_that_was_clicked(session):
    run = session.start(GREEDY)
    done(run)
    kept = run.trace(1).token_ids[:5].tolist()
    again = session.branch(1, 4, Settings("other", amounts={"food": 1.0}, tokens=7, temperature=0.0))
    assert again.prompt == run.prompt + kept
    assert again.shown_prompt == "Milo" + "".join(run.trace(1).tokens[:5])
    assert again.again == Settings(again.shown_prompt, amounts={"food": 1.0}, tokens=7, temperature=0.0)
    completions = done(again)
    assert [one.prompt_tokens for one in completions] == [len(again.prompt)] * 2
    assert [one.new_tokens for one in completions] == [7, 7]
    assert session.run is again
    for side, number in ((1, 99), (0, -1)):
        with pytest.raises(SteeringError, match="there is no token"):
            session.branch(side, number, GREEDY)


def test_the_unsteered_text_goes_on_as_it_would_have(session):
    run = session.start(GREEDY)
    whole = done(run)[0].token_ids
    again = session.branch(0, 4, Settings("Milo", tokens=7, temperature=0.0))
    assert done(again)[0].token_ids == whole[5:]


def test_a_message_is_answered_and_goes_on(session):
    settings = Settings("Hello", is_chat=True, amounts={"sport": 1.0}, tokens=6, temperature=0.0)
    run = session.start(settings)
    assert run.request.chat is not None
    done(run)
    again = session.branch(1, 2, replace(settings, prompt="Bye", is_chat=False))
    done(again)
    assert again.again is None
    assert again.prompt[: len(run.prompt)] == run.prompt
    assert ">Hello" not in view.side_of(again, 1)


def test_new_texts_end_the_ones_before(session):
    run = session.start(LONG)
    wait_until(lambda: run.texts[0].seen)
    session.start(GREEDY)
    assert [one.finish_reason for one in done(run)] == ["interrupted"] * 2
    assert done(session.run)[0].new_tokens == 12


@pytest.mark.parametrize(
    "settings",
    [
        Settings("Milo", amounts={"chess": 1.0}),
        Settings("Milo", amounts={"../sport": 1.0}),
        Settings("Milo", amounts={"sport": 1.0}, layers="40-50"),
        Settings("Milo", amounts={"sport": 1.0}, layers="x"),
        Settings("Milo", amounts={"sport": 1.0}, schedule="sometimes"),
        Settings("Milo", amounts={"sport": 1.0}, schedule="after:500", tokens=10),
        Settings("Milo" * 1000, amounts={"sport": 1.0}),
    ],
)
def test_what_cannot_be_done_leaves_the_running_text_alone(session, settings):
    run = session.start(LONG)
    wait_until(lambda: run.texts[0].seen)
    with pytest.raises(SteerMoEError):
        session.start(settings)
    assert session.run is run
    assert not any(text.ticket.is_cancelled for text in run.texts)


def test_a_slider_without_a_running_text_does_nothing(session):
    assert session.steer(GREEDY) is None
    done(session.start(GREEDY))
    assert session.steer(GREEDY) is None


def test_what_is_shown_is_escaped(session):
    evil = Settings("</p><script>alert(1)</script>", amounts={"sport": 1.0}, tokens=5, temperature=0.0)
    run = session.start(evil)
    shown = [view.side_of(run, 1)]
    completions = done(run)
    shown += [view.side_of(run, 0), page(completions, "m", "<script>")]
    for text in shown:
        assert "<script>alert" not in text
        assert "&lt;script&gt;alert(1)" in text


def test_visitors_have_sessions_of_their_own_and_the_oldest_goes(session):
    made = []

    def make():
        made.append(Session(session._live, session._resolver))
        return made[-1]

    sessions = Sessions(make, most=2)
    first = sessions.of("a")
    run = first.start(LONG)
    wait_until(lambda: run.texts[0].seen)
    assert sessions.of("b") is not first
    assert sessions.of("a") is first
    sessions.of("c")
    assert len(sessions) == 2
    assert sessions.of("a") is first
    sessions.end("a")
    assert [one.finish_reason for one in done(run)] == ["interrupted"] * 2
    sessions.end("a")
