"""The vLLM engine against the hf engine: the same greedy tokens, for every kind of plan, on several families."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from steermoe.engines.decoding import Stop
from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.messages import Message
from steermoe.engines.request import Request, Sampling
from steermoe.engines.vllm.engine import VLLMEngine
from steermoe.models import loading
from steermoe.steering.plans import SteeringPlan
from steermoe.steering.resolver import PlanResolver
from steermoe.steering.spec import SteeringSpec
from tests.support.tiny_models import CORRECTION
from tests.support.vllm_engines import (
    FAMILIES,
    OPTIONS,
    all_at_once,
    end,
    one_by_one,
    plans_of_every_kind,
    requests,
    vector,
    write_checkpoint,
)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """The hf and the vLLM engine on one checkpoint."""
    folder = tmp_path_factory.mktemp("vllm") / request.param
    reference = write_checkpoint(request.param, folder)
    engine = VLLMEngine(str(folder), **OPTIONS)
    yield reference, engine
    end(engine)


def test_chats_are_those_of_the_hf_engine(pair):
    reference, engine = pair
    messages = (Message("user", "A dog"), Message("assistant", " ran"), Message("user", " home </s>."))
    chat = engine.chat(messages)
    assert chat == reference.chat(messages)
    assert chat.text == "A dog ran home </s>."
    request = Request(chat.prompt, sampling=Sampling(max_new_tokens=8, do_sample=False), chat=chat)
    (answer,), (expected,) = engine.generate([request]), reference.generate([request])
    assert (answer.text, answer.token_ids) == (expected.text, expected.token_ids)


def test_an_answer_is_stopped_and_what_came_is_kept(pair):
    _, engine = pair
    chat = engine.chat((Message("user", "A dog"),))
    request = Request("A dog", sampling=Sampling(max_new_tokens=40, min_new_tokens=40), chat=chat)

    def stop(text):
        raise Stop

    (done,) = engine.generate([request], on_text=stop)
    assert done.finish_reason == "interrupted"
    assert done.new_tokens < 40
    assert engine.generate([request])[0].new_tokens == 40


def test_every_plan_gives_the_tokens_of_the_hf_engine(pair):
    reference, engine = pair
    plans = plans_of_every_kind(engine.shape)
    asked = requests(list(plans.values()))
    expected = one_by_one(reference, asked)
    assert len(set(expected)) > len(plans) // 2, "steering must change these texts, or the test shows nothing"
    found = all_at_once(engine, asked)
    assert dict(zip(plans, found, strict=True)) == dict(zip(plans, expected, strict=True))


def test_min_p_leaves_the_likeliest_token(pair):
    """In one batch with a text that has no min-p."""
    reference, engine = pair
    hot = Sampling(max_new_tokens=8, min_new_tokens=8, temperature=2.0, seed=3)
    asked = [Request("A dog", sampling=sampling) for sampling in (replace(hot, min_p=1.0), hot)]
    least, plain = all_at_once(engine, asked)
    greedy = Request("A dog", sampling=replace(hot, do_sample=False))
    assert [least] == one_by_one(reference, [greedy])
    assert plain != least


FORCED, BANNED = 2, (0, 1, 3, 6)
"""With groups of 4 of which a token uses one: bans leave the first group too few experts."""


def adverse(model):
    """Correction biases against the lists, as large as in real checkpoints."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if CORRECTION.search(name):
            tensor.data[:] = torch.tensor([6.0 if n in BANNED else -6.0 if n == FORCED else n / 8 for n in range(8)])


@pytest.mark.filterwarnings("ignore:Exception ignored in. <function CPUDNNLGEMMHandler")  # vLLM's, while it compiles
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("family", ["glm4_moe", "mixtral", "gemma4"])
def test_lists_hold_whatever_the_biases(family, compiled, tmp_path):
    """The routers of gemma4 have a routing function of their own in vLLM."""
    wider = {"moe_intermediate_size": 64} if family == "gemma4" else {}
    reference = write_checkpoint(family, tmp_path / family, adverse, **wider)
    engine = VLLMEngine(str(tmp_path / family), compiled=compiled, **OPTIONS)
    try:
        layers = engine.shape.layers
        force, ban = tuple((layer, FORCED) for layer in layers), tuple((layer, n) for layer in layers for n in BANNED)
        sport = vector(engine.shape, 4, 7)
        plans = [
            SteeringPlan(force=force, positions="all"),
            None,
            SteeringPlan(ban=ban, positions="all"),
            SteeringPlan(sport, 25.0, force=force, ban=ban),
            SteeringPlan(sport, 25.0, "additive", force=force, positions="all"),
        ]
        asked = requests(plans)
        assert all_at_once(engine, asked) == one_by_one(reference, asked)
        for request in asked:
            (found,) = engine.generate([request])
            if request.plan is not None:
                report = found.report
                assert report.forced_hits == report.forced_places
                assert (report.forced_places > 0) == bool(request.plan.force)
                assert report.banned_hits == 0
                assert (report.banned_places > 0) == bool(request.plan.ban)
    finally:
        end(engine)


@pytest.mark.default_model
def test_the_default_model_generates_the_stories_of_the_hf_engine():
    reference = HFEngine(loading.load(dtype="float32"))
    engine = VLLMEngine(dtype="float32", kv_cache_memory_bytes=1 << 28, max_model_len=256)
    try:
        resolver = PlanResolver(engine.shape)
        plans = [None, *(resolver.plan(SteeringSpec(domain)) for domain in ("sport", "law=0.5", "food"))]
        opening = "Once upon a time there was a brown dog named Milo who lived by the river."
        asked = [Request(opening, plan, Sampling(max_new_tokens=40, do_sample=False)) for plan in plans]
        expected, found = reference.generate(asked), engine.generate(asked)
        assert [one.text for one in found] == [one.text for one in expected]
        assert len({one.text for one in found}) == len(plans)
        assert found[0].report == expected[0].report
    finally:
        end(engine)
