"""Families of transformers in llama.cpp: the same weights choose the same experts, steered and not."""

import pytest
import torch

from tests.support import tiny_ggufs

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make llamacpp")
pytest.importorskip("numba", reason="numba is not installed: make llamacpp")

from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.llamacpp.engine import LlamaCppEngine
from steermoe.engines.request import Request, Sampling
from steermoe.routing.recording import record_routing
from steermoe.steering.handle import attach
from steermoe.steering.plans import SteeringPlan
from steermoe.vectors.vector import SteeringVector

GREEDY = Sampling(max_new_tokens=12, min_new_tokens=12, do_sample=False)
PROMPT = "The dog ran in an inn and then the cat"
SAME = 0.99
"""Share of choices that agree: random models have ties within rounding."""
TIE = 5e-3
"""Logits that are closer than this may swap places: the two libraries round differently."""


@pytest.fixture(scope="module", params=tiny_ggufs.FAMILIES)
def family(request, tmp_path_factory):
    loaded = tiny_ggufs.build(request.param)
    return loaded, tiny_ggufs.write(loaded, tmp_path_factory.mktemp("gguf"))


def make_plan(**fields):
    frequency = torch.full((tiny_ggufs.LAYERS, tiny_ggufs.EXPERTS), 0.1 / tiny_ggufs.EXPERTS)
    frequency[:, [2, 5]] += 0.45
    vector = SteeringVector("sport", frequency, tuple(range(tiny_ggufs.LAYERS)), threshold=1.0)
    return SteeringPlan(vector, 4.0, **fields)


@pytest.mark.parametrize("reach", ["graph", "pieces"])
@pytest.mark.parametrize("formula", [None, "zero_max_scaled", "max_scaled", "additive"])
def test_texts_and_choices(family, reach, formula):
    loaded, path = family
    plan = None if formula is None else make_plan(formula=formula)
    (theirs,) = HFEngine(loaded).generate([Request(PROMPT, plan, GREEDY)], record=True)
    engine = LlamaCppEngine(str(path), reach=reach, cache="f32")
    (ours,) = engine.generate([Request(PROMPT, plan, GREEDY)], record=True)
    same = [own == other for own, other in zip(ours.token_ids, theirs.token_ids, strict=True)]
    if not all(same):
        first = same.index(False)
        assert first > 0
        assert margin(loaded, plan, theirs.token_ids[:first]) < TIE
        return
    torch.testing.assert_close(ours.frequency, theirs.frequency)
    if plan is not None:
        assert ours.report.tokens_steered == theirs.report.tokens_steered == 11
        assert ours.report.vector_share == pytest.approx(theirs.report.vector_share, abs=0.01)


def margin(loaded, plan, new) -> float:
    """By how much the likeliest token leads the second after some new tokens, in transformers."""
    prompt = loaded.tokenizer(PROMPT)["input_ids"]
    handle = None if plan is None else attach(loaded.model, plan)
    try:
        if handle is not None:
            handle.set(prompt_length=len(prompt))
        with torch.no_grad():
            best = loaded.model(torch.tensor([[*prompt, *new]])).logits[0, -1].topk(2).values
    finally:
        if handle is not None:
            handle.remove()
    return float(best[0] - best[1])


def test_choices_on_a_text(family):
    loaded, path = family
    tokens = torch.randint(3, 250, (1, 200), generator=torch.Generator().manual_seed(1))
    with record_routing(loaded.model) as record, torch.no_grad():
        loaded.model(tokens)
    counts = torch.from_numpy(LlamaCppEngine(str(path), cache="f32").chosen(tokens[0].tolist())).sum(0)
    moved = (counts - record.counts[0]).abs().sum() / 2
    assert moved <= (1 - SAME) * counts.sum()
    assert counts.sum() == record.counts.sum()
