"""Traces from llama.cpp: those of the transformers engine on the same weights, for every rule of choosing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support import tiny_ggufs

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make llamacpp")
pytest.importorskip("numba", reason="numba is not installed: make llamacpp")

from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.llamacpp.callback import FIELD
from steermoe.engines.llamacpp.engine import LlamaCppEngine
from steermoe.engines.request import Request, Sampling
from steermoe.errors import SteeringError
from steermoe.models.gguf.choice import Rule
from steermoe.steering.plans import SteeringPlan
from steermoe.vectors.vector import SteeringVector

GREEDY = Sampling(max_new_tokens=10, min_new_tokens=10, do_sample=False)
PROMPT = "Once upon a time the dog ran in"
GROUPS = {"n_group": 4, "topk_group": 2}
"""Of deepseek_v3, whose routers also have biases."""
FAMILIES = {"mixtral": {}, "gpt_oss": {}, "deepseek_v3": GROUPS, "qwen2_moe": {}}
TIES = 2
"""Places of a text that may differ: random models have ties within rounding."""


def plan(*experts, **fields):
    frequency = torch.full((tiny_ggufs.LAYERS, tiny_ggufs.EXPERTS), 0.1 / tiny_ggufs.EXPERTS)
    frequency[:, list(experts)] += 0.9 / len(experts)
    vector = SteeringVector("sport", frequency, tuple(range(tiny_ggufs.LAYERS)), threshold=1.0)
    return SteeringPlan(vector, **{"strength": 3.0, **fields})


PLANS = {
    "unsteered": None,
    "vector": plan(1, 5),
    "decay": plan(6, schedule="decay:4"),
    "one layer": plan(4, layers=(1, 1)),
    "lists": replace(plan(2), force=((0, 3),), ban=((1, 0), (1, 7))),
}


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request):
    found = tiny_ggufs.build(request.param, **FAMILIES[request.param])
    generator = torch.Generator().manual_seed(0)
    for name, tensor in (*found.model.named_buffers(), *found.model.named_parameters()):
        if name.endswith("e_score_correction_bias"):
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * 0.3)
    return found


@pytest.fixture(scope="module")
def hf(loaded):
    return HFEngine(loaded)


@pytest.fixture(scope="module", params=["graph", "pieces"])
def engine(request, loaded, tmp_path_factory):
    path = tiny_ggufs.write(loaded, tmp_path_factory.mktemp("gguf"))
    engine = LlamaCppEngine(str(path), reach=request.param, cache="f32")
    yield engine
    engine.close()


def differ(one, other):
    """Places [T, L] whose sets of experts are not the same."""
    return int((np.sort(one, 2) != np.sort(other, 2)).any(2).sum())


def requests():
    return [Request(PROMPT, each, GREEDY, trace=True) for each in PLANS.values()]


def test_as_the_transformers_engine(engine, hf):
    ours, theirs = engine.generate(requests(), record=True), hf.generate(requests())
    for name, own, other in zip(PLANS, ours, theirs, strict=True):
        assert own.token_ids == other.token_ids, name
        assert own.trace.tokens == other.trace.tokens
        assert differ(own.trace.chosen, other.trace.chosen) <= TIES, name
        assert differ(own.trace.unsteered, other.trace.unsteered) <= TIES, name
        np.testing.assert_allclose(own.trace.strength, other.trace.strength)
        np.testing.assert_allclose(own.trace.logprob, other.trace.logprob, atol=2e-2)
        counts = np.zeros((tiny_ggufs.LAYERS, tiny_ggufs.EXPERTS))
        for layer in range(tiny_ggufs.LAYERS):
            np.add.at(counts[layer], own.trace.chosen[own.trace.is_read, layer].ravel(), 1)
        np.testing.assert_allclose(own.frequency.numpy(), counts / counts.sum(-1, keepdims=True), atol=1e-6)
    assert differ(ours[0].trace.chosen, ours[0].trace.unsteered) == 0
    assert differ(ours[1].trace.chosen, ours[1].trace.unsteered) > 5


def test_only_some_rows_are_traced_and_reports_stay_the_same(engine):
    plain = [replace(request, trace=False) for request in requests()]
    mixed = [replace(request, trace=number % 2 == 0) for number, request in enumerate(requests())]
    usual, traced = engine.generate(plain), engine.generate(mixed)
    assert [done.token_ids for done in traced] == [done.token_ids for done in usual]
    assert [done.trace is not None for done in traced] == [request.trace for request in mixed]
    assert traced[0].report == usual[0].report
    for request, done in zip(mixed, traced, strict=True):
        if request.trace:
            (alone,) = engine.generate([request])
            assert differ(done.trace.chosen, alone.trace.chosen) == 0
            assert differ(done.trace.unsteered, alone.trace.unsteered) == 0
    engine.generate(plain[:1])
    assert not engine.state.header[FIELD["has_trace"]]
    assert not engine.state.header[FIELD["from_topk"]] or not engine.file.chooses_by_logits


def test_tokens_are_passed_on_as_they_are_read(engine):
    seen = []
    (done,) = engine.generate([replace(requests()[1], on_trace=seen.append)])
    assert [token.number for token in seen] == list(range(10))
    assert "".join(token.text for token in seen) == done.text
    np.testing.assert_array_equal(np.stack([token.chosen for token in seen]), done.trace.chosen)


def test_a_rule_that_is_not_known_is_an_error():
    draw = np.random.default_rng(0)
    rule = Rule("x", None, 1, 1)
    logits, rows = draw.random((40, 8), dtype=np.float32), np.zeros(40, dtype=np.intp)
    chosen = rule.choose(rows, logits, 2)
    rule.check(rows, logits, chosen)
    with pytest.raises(SteeringError, match="use --engine hf"):
        rule.check(rows, logits, (chosen + 1) % 8)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "softplus"])
def test_the_scoring_is_found_from_choices(scoring):
    draw = np.random.default_rng(1)
    biases = (draw.random((3, 8)) / 4).astype(np.float32)
    logits, rows = draw.normal(size=(200, 8)).astype(np.float32), draw.integers(0, 3, 200)
    true = Rule("x", biases, 4, 2, scoring)
    rule = Rule("x", biases, 4, 2)
    rule.check(rows, logits, true.choose(rows, logits, 2))
    np.testing.assert_array_equal(rule.choose(rows, logits, 2), true.choose(rows, logits, 2))
