"""Continuous batching: rows that come and go give the texts that they give alone, whatever the cache is made of."""

import copy
import functools
from dataclasses import replace

import pytest

from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.hf.rolling import RollingDecoder
from steermoe.engines.hf.static import StaticDecoder
from steermoe.engines.request import Request, Sampling
from steermoe.errors import SteeringError
from steermoe.routing.families import list_families
from steermoe.routing.routers import find_routers
from steermoe.steering.plans import SteeringPlan
from tests.support import steering_models as tiny
from tests.support import tiny_models
from tests.support.rolling import build, requests_for, roll

FAMILIES = ("mixtral", "qwen3_moe", "granitemoeshared", "gpt_oss", "deepseek_v3")


@functools.cache
def alone(family):
    """The requests of a family's model, each with what `generate` gives for it alone."""
    engine = HFEngine(tiny.loaded(build(family)))
    return [(request, engine.generate([request])[0]) for request in requests_for(build(family))]


@pytest.mark.parametrize("rows", [1, 3, 5, 14])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_text_is_what_it_is_alone(family, rows):
    model = build(family)
    engine = HFEngine(tiny.loaded(model))
    expected = alone(family)
    decoder = engine.decoder(rows)
    assert isinstance(decoder, RollingDecoder)
    try:
        together = roll(decoder, engine, [request for request, _ in expected], rows)
    finally:
        decoder.close()
    assert tiny.traces(model) == []
    for (request, single), done in zip(expected, together, strict=True):
        assert done.request is request
        assert done.token_ids == single.token_ids
        assert (done.text, done.finish_reason) == (single.text, single.finish_reason)
        assert (done.prompt_tokens, done.new_tokens) == (single.prompt_tokens, single.new_tokens)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family.family for family in list_families() if family.steerable])
def test_every_family(family):
    """Those that can refill rows do so with the texts of single calls; the others, batch by batch, have them too."""
    model = tiny_models.build(family, vocab_size=tiny.VOCABULARY)
    if not hasattr(model, "generate") or model.config.is_encoder_decoder:
        pytest.skip("nothing that continues a text")
    engine = HFEngine(tiny.loaded(model))
    plan = tiny.plan_for_experts(model, 1, 5, schedule="decay:6")
    expected = [(request, engine.generate([request])[0]) for request in requests_for(model, [None, plan])]
    decoder = engine.decoder(5)
    together = roll(decoder, engine, [request for request, _ in expected], 5)
    decoder.close()
    assert [done.token_ids for done in together] == [single.token_ids for _, single in expected]


def test_rows_that_end_at_once_and_prompts_that_share():
    """Text ends at the first token: nothing is placed in the cache, and the others continue."""
    model = build("mixtral")
    engine = HFEngine(tiny.loaded(model))
    short = Request("It", None, Sampling(max_new_tokens=1, do_sample=False))
    long = Request("It", None, Sampling(max_new_tokens=4, min_new_tokens=4, do_sample=False))
    decoder = engine.decoder(2)
    ids = engine.encode(short)
    decoder.start([short, short], [ids, ids])
    assert len(decoder) == 2
    assert [done.new_tokens for done in decoder.step()] == [1, 1]
    assert len(decoder) == 0
    assert decoder.step() == []
    decoder.start([short, long], [ids, ids])
    assert [done.request for done in decoder.step()] == [short]
    assert [len(decoder.step()) for _ in range(2)] == [0, 1]
    decoder.close()


def test_an_end_of_text(monkeypatch):
    model = build("mixtral")
    engine = HFEngine(tiny.loaded(model))
    request = Request("Once", None, Sampling(max_new_tokens=12, min_new_tokens=12, do_sample=False))
    (usual,) = engine.generate([request])
    free = Request("Once", None, Sampling(max_new_tokens=12, do_sample=False))
    monkeypatch.setattr(engine, "end_tokens", lambda: {usual.token_ids[5]})
    decoder = engine.decoder(2)
    (done,) = roll(decoder, engine, [free], 1)
    decoder.close()
    assert done.finish_reason == "stop"
    assert done.token_ids == usual.token_ids[: usual.token_ids.index(usual.token_ids[5])]


def test_steering_that_did_not_happen_is_an_error(monkeypatch):
    model = build("mixtral")
    engine = HFEngine(tiny.loaded(model))
    monkeypatch.setattr("steermoe.steering.handle.intercept", lambda *_: lambda: None)
    decoder = engine.decoder(2)
    with pytest.raises(SteeringError, match="2 of 2 routers"):
        roll(decoder, engine, [Request("Once", tiny.plan_for_experts(model, 1), Sampling())], 1)
    decoder.close()
    assert tiny.traces(model) == []


def test_after_clear_it_starts_afresh():
    model = build("gpt_oss")
    engine = HFEngine(tiny.loaded(model))
    expected = alone("gpt_oss")[:6]
    requests = [request for request, _ in expected]
    decoder = engine.decoder(2)
    decoder.start(requests[:4], [engine.encode(request) for request in requests[:4]])
    decoder.step()
    decoder.clear()
    assert len(decoder) == 0
    together = roll(decoder, engine, requests, 2)
    decoder.close()
    assert [done.token_ids for done in together] == [single.token_ids for _, single in expected]


def test_reports_count_each_row_s_own_tokens():
    model = build("mixtral")
    engine = HFEngine(tiny.loaded(model))
    plan = tiny.plan_for_experts(model, 1, 5)
    sampling = Sampling(max_new_tokens=6, min_new_tokens=6)
    decoder = engine.decoder(2)
    assert decoder.report() is None
    roll(decoder, engine, [Request("It rained", p, sampling) for p in (plan, None, plan, plan)], 2)
    report = decoder.report()
    decoder.close()
    assert report.tokens_steered == 3 * 5  # the last token of each is never fed
    assert report.vector_share == 1.0


def test_static_decoder_adds_up_its_reports():
    model = build("mixtral")
    engine = HFEngine(tiny.loaded(model))
    sampling = Sampling(max_new_tokens=6, min_new_tokens=6)
    decoder = StaticDecoder(engine.loaded, engine.end_tokens())
    requests = [Request("It rained", p, sampling) for p in (tiny.plan_for_experts(model, 1, 5), None) * 2]
    together = roll(decoder, engine, requests, 2)
    assert [done.request for done in together] == requests
    assert decoder.report().tokens_steered == 2 * 5
    decoder.close()


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_rows_with_different_numbers_of_experts(family):
    """Each text is what a model gives whose own number it is; `tests/routing/test_counts.py` has every family."""
    model = build(family)
    engine = HFEngine(tiny.loaded(model))
    plans = [
        None,
        SteeringPlan(active_experts=1, positions="all"),
        tiny.plan_for_experts(model, 2, active_experts=3),
        tiny.plan_for_experts(model, 1, active_experts=4, schedule="first:4", ban=((0, 2),)),
    ]
    requests = requests_for(model, plans, count=8)
    expected = [engine.generate([request])[0] for request in requests]
    decoder = engine.decoder(3)
    together = roll(decoder, engine, requests, 3)
    decoder.close()
    assert tiny.traces(model) == []
    assert [done.token_ids for done in together] == [single.token_ids for single in expected]
    assert [done.token_ids for done in engine.generate(requests)] == [single.token_ids for single in expected]
    other = copy.deepcopy(model)
    for router in find_routers(other):
        router.module.top_k = 1
    plain = replace(requests[1], plan=None)
    assert HFEngine(tiny.loaded(other)).generate([plain])[0].token_ids == expected[1].token_ids
