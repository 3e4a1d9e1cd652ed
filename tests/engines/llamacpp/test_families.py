"""Families of transformers in llama.cpp: the same weights choose the same experts, steered and not."""

from dataclasses import replace

import pytest
import torch

from tests.support import tiny_ggufs, tiny_models

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


@pytest.fixture(scope="module", params=tiny_ggufs.FAMILIES)
def adverse(request, tmp_path_factory):
    """A family whose correction biases, if it has any, are against the lists of the test."""
    loaded = tiny_ggufs.build(request.param)
    for name, tensor in [*loaded.model.named_parameters(), *loaded.model.named_buffers()]:
        if tiny_models.CORRECTION.search(name):
            tensor.data[:] = torch.tensor([8.0 if expert in BANNED else -8.0 for expert in range(len(tensor))])
    return loaded, tiny_ggufs.write(loaded, tmp_path_factory.mktemp("gguf"))


FORCED, BANNED = (2,), (0, 1, 3, 6)
"""With groups of 4 of which a token uses one: bans leave the first group too few experts."""


@pytest.mark.parametrize("strength", [0.0, 1e4])
@pytest.mark.parametrize("reach", ["graph", "pieces"])
@pytest.mark.parametrize("lists", [(FORCED, ()), ((), BANNED), (FORCED, BANNED)], ids=str)
def test_lists_hold_whatever_the_biases(adverse, reach, lists, strength):
    _, path = adverse
    force, ban = ([(layer, expert) for layer in range(tiny_ggufs.LAYERS) for expert in named] for named in lists)
    plan = replace(make_plan(), strength=strength, force=tuple(force), ban=tuple(ban), positions="all")
    engine = LlamaCppEngine(str(path), reach=reach, cache="f32")
    tokens = torch.randint(3, 250, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    chosen_TLN = engine.chosen(tokens, plan)
    assert (chosen_TLN[:, :, lists[0]] == 1).all()
    assert (chosen_TLN[:, :, lists[1]] == 0).all()
    (ours,) = engine.generate([Request(PROMPT, plan, GREEDY)])
    places = ours.report.slots // tiny_ggufs.TOP_K
    assert places > 12
    assert ours.report.forced_places == ours.report.forced_hits == places * len(lists[0])
    assert ours.report.banned_places == places * len(lists[1])
    assert ours.report.banned_hits == 0
