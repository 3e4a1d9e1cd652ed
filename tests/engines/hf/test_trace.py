"""Traces of texts from transformers: what routers chose, and would have chosen, at every place."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.hf.rolling import RollingDecoder
from steermoe.engines.hf.static import StaticDecoder
from steermoe.engines.request import Request, Sampling
from steermoe.engines.trace import Domain
from steermoe.routing.families import list_families
from steermoe.routing.routers import chosen_experts, find_routers, module_that_routes
from steermoe.vectors.mixing import mix
from tests.support import steering_models as tiny
from tests.support import tiny_models
from tests.support.rolling import build, requests_for, roll

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
NEW = 7


def traced(model, plan=None, prompt="Once upon a time", **sampling):
    sampling = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **sampling}
    return Request(prompt, plan, Sampling(**sampling), trace=True)


def generate(model, *requests, **options):
    return HFEngine(tiny.loaded(model)).generate(list(requests), **options)


def frequency(trace):
    """F [L, N] of the tokens that were read."""
    counts = np.zeros((len(trace.layers), max(trace.experts)))
    for layer in range(len(trace.layers)):
        np.add.at(counts[layer], trace.chosen[trace.is_read, layer].ravel(), 1)
    return torch.from_numpy(counts / counts.sum(-1, keepdims=True)).float()


@pytest.mark.parametrize("family", FAMILIES)
def test_choices_are_those_that_recording_counts(family):
    model = tiny.build(family)
    plans = (None, tiny.plan_for_experts(model, 1, 5), tiny.plan_for_experts(model, 2, ban=((0, 2),), force=((1, 3),)))
    completions = generate(model, *(traced(model, plan) for plan in plans), record=True)
    for completion in completions:
        trace = completion.trace
        torch.testing.assert_close(frequency(trace), completion.frequency)
        assert trace.text == completion.text
        assert tuple(trace.token_ids) == completion.token_ids
        assert trace.is_read.tolist() == [True] * (NEW - 1) + [False]
        assert trace.layers == tuple(router.layer for router in find_routers(model))
    assert tiny.traces(model) == []
    np.testing.assert_array_equal(completions[0].trace.chosen, completions[0].trace.unsteered)
    assert (completions[1].trace.chosen != completions[1].trace.unsteered).any()
    assert (completions[2].trace.chosen[:-1, 1] == 3).any(-1).all()
    assert not (completions[2].trace.chosen[:, 0] == 2).any()


def alone(model, plan):
    """A steered text's trace, and per layer the choices that its routers make alone from what they had read."""
    seen = {number: [] for number, _ in enumerate(find_routers(model))}

    def keep(number, module, args, kwargs):
        seen[number].append((args, kwargs))

    routers = find_routers(model)
    hooks = [
        module_that_routes(model, router).register_forward_pre_hook(partial(keep, number), with_kwargs=True)
        for number, router in enumerate(routers)
    ]
    (completion,) = generate(model, traced(model, plan))
    for hook in hooks:
        hook.remove()
    found = []
    with torch.inference_mode():
        for number, router in enumerate(routers):
            host = module_that_routes(model, router)
            outputs = [host(*args, **kwargs) for args, kwargs in seen[number][1:]]  # the first call is the prompt
            found.append([chosen_experts(router, output)[0].tolist() for output in outputs])
    return completion.trace, np.array(found).transpose(1, 0, 2)


def assert_the_routers_own(model, plan):
    trace, expected = alone(model, plan)
    for token, layers in enumerate(expected):
        for layer, wanted in enumerate(layers):
            assert sorted(trace.unsteered[token, layer][: len(wanted)]) == sorted(wanted)
    return trace


@pytest.mark.parametrize("family", FAMILIES)
def test_unsteered_is_the_routers_own_choice_at_that_place(family):
    model = tiny.build(family)
    trace = assert_the_routers_own(model, tiny.plan_for_experts(model, 1, 5, strength=9.0))
    assert trace.moved[:-1].min() > 0
    assert_the_routers_own(model, tiny.plan_for_experts(model, 2, force=((0, 3),), ban=((1, 1),)))


@pytest.mark.slow
@pytest.mark.parametrize("family", [family.family for family in list_families() if family.steerable])
def test_every_family(family):
    """Biases, groups, extra columns and layers without routers among them."""
    model = tiny_models.build(family, vocab_size=tiny.VOCABULARY)
    if not hasattr(model, "generate") or model.config.is_encoder_decoder:
        pytest.skip("nothing that continues a text")
    plan = tiny.plan_for_experts(model, 1, 5, strength=9.0)
    plain, steered = (replace(traced(model, one), trace=False) for one in (None, plan))
    texts = [generate(model, one)[0].token_ids for one in (plain, steered)]
    # alone, since recording takes padding tokens that a model generates beside other rows for filler
    completions = [generate(model, traced(model, one), record=True)[0] for one in (None, plan)]
    assert [completion.token_ids for completion in completions] == texts
    for completion in completions:
        torch.testing.assert_close(frequency(completion.trace), completion.frequency)
    trace = completions[1].trace
    first = completions[0].trace.chosen[0, 0], trace.unsteered[0, 0]  # before anything was steered
    assert sorted(first[0]) == sorted(first[1])


def test_before_what_is_steered_both_are_the_unsteered_models_choices():
    model = tiny.build("deepseek_v3")
    last = find_routers(model)[-1].layer
    plan = tiny.plan_for_experts(model, 1, 5, layers=(last, last), strength=9.0)
    plain, steered = generate(model, traced(model), traced(model, plan))
    np.testing.assert_array_equal(steered.trace.unsteered[0], plain.trace.chosen[0])
    np.testing.assert_array_equal(steered.trace.chosen[0, :-1], plain.trace.chosen[0, :-1])
    faint = replace(plan, strength=1e-6, formula="additive", layers=None)
    (same,) = generate(model, traced(model, faint))
    assert same.token_ids == plain.token_ids
    np.testing.assert_array_equal(same.trace.unsteered, plain.trace.chosen)
    np.testing.assert_array_equal(same.trace.chosen, plain.trace.chosen)
    assert same.trace.strength[:-1] == pytest.approx(1e-6)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_rows_that_come_and_go_have_the_traces_that_they_have_alone(family):
    """Some of the rows ask for one; the texts of all are what they are without."""
    model = build(family)
    engine = HFEngine(tiny.loaded(model))
    usual = requests_for(model)
    asked = [replace(request, trace=number % 3 != 0) for number, request in enumerate(usual)]
    decoder = engine.decoder(4)
    assert isinstance(decoder, RollingDecoder)
    together = roll(decoder, engine, asked, 4)
    decoder.close()
    assert tiny.traces(model) == []
    for request, done in zip(asked, together, strict=True):
        (single,) = engine.generate([request])
        assert done.token_ids == single.token_ids
        assert (done.trace is None) == (not request.trace)
        if done.trace is not None:
            np.testing.assert_array_equal(done.trace.chosen, single.trace.chosen)
            np.testing.assert_array_equal(done.trace.unsteered, single.trace.unsteered)
            np.testing.assert_allclose(done.trace.strength, single.trace.strength)
            np.testing.assert_allclose(done.trace.logprob, single.trace.logprob, atol=1e-4)
            assert done.trace.tokens == single.trace.tokens
            assert done.trace.text == done.text


def test_the_figures_of_a_token():
    """Log-probabilities are the model's, strengths follow the schedule, shares are counted by domain."""
    model = tiny.build("mixtral")
    vectors = [tiny.vector_for(model, 1, domain="sport"), tiny.vector_for(model, 4, 5, domain="food")]
    plan = replace(tiny.plan_for_experts(model, 1), vector=mix([(one, 0.5) for one in vectors]), schedule="decay:4")
    (completion,) = generate(model, traced(model, plan, do_sample=True, seed=3, temperature=1.7, top_p=0.9))
    trace = completion.trace
    assert trace.strength.tolist() == [5.0, 3.75, 2.5, 1.25, 0.0, 0.0, 0.0]
    assert [domain.name for domain in trace.domains] == ["sport", "food"]
    marks = np.isin(trace.chosen, (4, 5)) & (trace.chosen >= 0)
    np.testing.assert_allclose(trace.share[:, 1], marks.sum((1, 2)) / (2 * tiny.LAYERS))
    assert (trace.share[-1] == 0).all()
    assert completion.report.vector_share == pytest.approx(trace.share[:4].sum(1).mean())
    ids = HFEngine(tiny.loaded(model)).encode(completion.request)
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -1]
    assert trace.logprob[0] == pytest.approx(float(logits.log_softmax(-1)[completion.token_ids[0]]), abs=1e-5)
    assert (trace.logprob < 0).all()


@pytest.mark.parametrize("kind", [StaticDecoder, RollingDecoder])
def test_tokens_are_passed_on_as_they_are_read(kind):
    model = tiny.build("mixtral")
    loaded = tiny.loaded(model)
    engine, seen = HFEngine(loaded), []
    plan = tiny.plan_for_experts(model, 1, schedule="first:3")
    request = replace(traced(model, plan), on_trace=seen.append)
    decoder = kind(loaded, {tiny.END})
    decoder.start([request], [engine.encode(request)])
    (completion,) = (done for _ in range(NEW) for done in decoder.step())
    decoder.close()
    trace = completion.trace
    assert [token.number for token in seen] == list(range(NEW))
    assert "".join(token.text for token in seen) == completion.text
    assert [token.is_read for token in seen] == trace.is_read.tolist()
    assert [token.strength for token in seen] == trace.strength.tolist() == [5.0] * 3 + [0.0] * 4
    for number, token in enumerate(seen):
        np.testing.assert_array_equal(token.chosen, trace.chosen[number])
        np.testing.assert_array_equal(token.unsteered, trace.unsteered[number])
        assert token.share == {"sport": pytest.approx(float(trace.share[number, 0]))}
        assert token.share_before == {"sport": pytest.approx(float(trace.share_before[number, 0]))}


def test_without_a_trace_nothing_is_looked_at(monkeypatch):
    model = tiny.build("mixtral")

    def fail(*_):
        raise AssertionError("a text without a trace was traced")

    for module in ("static", "rolling"):
        monkeypatch.setattr(f"steermoe.engines.hf.{module}.RoutingTracer", fail)
    (completion,) = generate(model, replace(traced(model, tiny.plan_for_experts(model, 1)), trace=False))
    assert completion.trace is None


def test_tags_decide_which_tokens_of_a_trace_are_steered():
    model = build("mixtral")
    plan = tiny.plan_for_experts(model, 3, positions="answer", think_tags=("<b>", "</b>"))
    (completion,) = generate(model, traced(model, plan, "Hi <b>"))
    assert completion.trace.strength.tolist() == [0.0] * NEW
    (completion,) = generate(model, traced(model, plan, "Hi <b>x</b>"))
    assert completion.trace.strength.tolist() == [5.0] * (NEW - 1) + [0.0]


def test_domains_can_be_exchanged():
    model = tiny.build("mixtral")
    (completion,) = generate(model, traced(model))
    assert completion.trace.share.shape == (NEW, 0)
    marks = np.zeros((tiny.LAYERS, tiny.EXPERTS), dtype=bool)
    marks[:, :4] = True
    halves = completion.trace.with_domains([Domain("low", marks), Domain("high", ~marks)])
    np.testing.assert_allclose(halves.share[:-1].sum(1), 1)
    np.testing.assert_array_equal(halves.share, halves.share_before)
