"""Texts that are dropped or steered anew while others go on, scores of tokens, penalties; in every decoder of hf."""

from dataclasses import replace

import pytest
import torch

from steermoe.engines.decoding import Stop
from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.hf.rolling import RollingDecoder
from steermoe.engines.hf.sampling import warp
from steermoe.engines.hf.static import StaticDecoder
from steermoe.engines.request import PenalisedSampling, Request, Sampling
from steermoe.errors import GenerationError, SteeringError
from tests.support import steering_models as tiny
from tests.support.rolling import build

GREEDY = Sampling(max_new_tokens=24, min_new_tokens=24, do_sample=False)


@pytest.fixture(scope="module")
def engine():
    return HFEngine(tiny.loaded(build("mixtral")))


@pytest.fixture(params=["rolling", "static"])
def decoder(request, engine):
    made = (
        engine.decoder(8)
        if request.param == "rolling"
        else StaticDecoder(engine.loaded, engine.end_tokens(), steerable=True)
    )
    assert isinstance(made, RollingDecoder if request.param == "rolling" else StaticDecoder)
    yield made
    made.close()
    assert tiny.traces(engine.loaded.model) == []


def run(decoder, engine, requests, act):
    """The completions of requests; `act(row)` is called after each token of each."""
    decoder.start(requests, [engine.encode(one) for one in requests], on_token=lambda row, text: act(row))
    done = {}
    while len(decoder):
        done |= {completion.request: completion for completion in decoder.step()}
    return [done[one] for one in requests]


def test_a_dropped_row_ends_and_the_others_are_what_they_are_alone(decoder, engine):
    first, second, third = (Request(text, None, GREEDY) for text in ("Once upon", "A dog", "The cat is"))
    expected = [engine.generate([one])[0] for one in (first, second, third)]

    def act(row):
        if row.request is second and len(row.new) == 5:
            decoder.drop(second)

    done = run(decoder, engine, [first, second, third], act)
    assert [one.finish_reason for one in done] == ["length", "interrupted", "length"]
    assert [done[0].token_ids, done[2].token_ids] == [expected[0].token_ids, expected[2].token_ids]
    assert done[1].token_ids == expected[1].token_ids[:5]
    assert expected[1].text.startswith(done[1].text)


def test_a_text_is_steered_anew_from_the_next_token_on(decoder, engine):
    """Equal to a text whose plan is scheduled to begin at that token; another row beside it keeps its plan."""
    plan = tiny.plan_for_experts(engine.loaded.model, 1, 5, strength=40.0)
    late = replace(plan, schedule="after:9")
    changed, kept = Request("Once upon", None, GREEDY), Request("A dog", plan, GREEDY)
    expected = engine.generate([Request("Once upon", late, GREEDY)])[0]
    beside = engine.generate([kept])[0]
    assert expected.token_ids != engine.generate([changed])[0].token_ids

    def act(row):
        if row.request is changed and len(row.new) == 10:
            decoder.steer(changed, plan)

    done = run(decoder, engine, [changed, kept], act)
    assert done[0].token_ids == expected.token_ids
    assert done[1].token_ids == beside.token_ids
    assert done[0].request is changed


def test_steering_can_end_while_a_text_runs(decoder, engine):
    plan = tiny.plan_for_experts(engine.loaded.model, 1, 5, strength=40.0)
    request = Request("Once upon", plan, GREEDY)
    expected = engine.generate([Request("Once upon", replace(plan, schedule="first:9"), GREEDY)])[0]

    def act(row):
        if len(row.new) == 10:
            decoder.steer(request, None)

    assert run(decoder, engine, [request], act)[0].token_ids == expected.token_ids


def test_a_plan_that_does_not_fit_is_refused_and_the_text_goes_on(decoder, engine):
    request = Request("Once upon", None, GREEDY)
    plan = tiny.plan_for_experts(engine.loaded.model, 1, positions="tool-calls")
    refused = []

    def act(row):
        if len(row.new) == 3:
            with pytest.raises(SteeringError) as caught:
                decoder.steer(request, plan)
            refused.append(str(caught.value))

    assert run(decoder, engine, [request], act)[0].token_ids == engine.generate([request])[0].token_ids
    assert "tool-calls" in refused[0]


def test_stop_ends_one_row_of_several(decoder, engine):
    first, second = Request("Once upon", None, GREEDY), Request("A dog", None, GREEDY)

    def act(row):
        if row.request is first and len(row.new) == 4:
            raise Stop

    done = run(decoder, engine, [first, second], act)
    assert (len(done[0].token_ids), done[0].finish_reason) == (4, "interrupted")
    assert (done[1].token_ids, done[1].finish_reason) == (engine.generate([second])[0].token_ids, "length")


def test_scores_are_those_of_the_model(decoder, engine):
    request = Request("Once upon", None, replace(GREEDY, do_sample=True, seed=3), logprobs=3)
    beside = Request("A dog", None, GREEDY)
    done, other = run(decoder, engine, [request, beside], lambda row: None)
    assert other.scores is None
    assert len(done.scores) == len(done.token_ids) == 24
    ids = engine.encode(request)
    with torch.no_grad():
        logits = engine.loaded.model(torch.tensor([[*ids, *done.token_ids]])).logits[0, len(ids) - 1 : -1]
    expected = logits.float().log_softmax(-1)
    for token, score, row in zip(done.token_ids, done.scores, expected, strict=True):
        assert score.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [one for one, _ in score.top] == row.topk(3).indices.tolist()


def test_penalties_lower_what_was_generated():
    sampling = PenalisedSampling(do_sample=False, presence_penalty=0.5, frequency_penalty=0.25)
    scores = torch.zeros(2, 6)
    history = [torch.tensor([5, 5, 1, 2, 2]), torch.tensor([1, 1])]
    warped = warp(scores, [sampling, sampling], [3, 0], torch.tensor([0]), history.__getitem__)
    assert warped.tolist() == [[0, -0.75, -1.0, 0, 0, 0], [0] * 6]


def test_a_penalty_out_of_range():
    with pytest.raises(GenerationError, match=r"presence_penalty 2\.5 is out of range: expected -2 to 2"):
        PenalisedSampling(presence_penalty=2.5)
