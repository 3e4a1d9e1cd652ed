"""The recipe that refines the default model's experts: what is steered, what is learned, what stays."""

import argparse

import pytest
import torch
from safetensors.torch import load_file

from recipes import refine_default_model as recipe
from recipes.train_default_model import IGNORED, NEUTRAL
from steermoe.models.default import spec


def test_only_what_is_steered_passes_through_the_domains_experts_and_is_learned():
    context = recipe.Context("sport", [5, 6, 7], [8, 9])
    alone, asked = context.example(), context.example([1, 2])
    assert alone.ids.tolist() == [5, 6, 7, 8, 9]
    assert asked.ids.tolist() == [1, 2, 5, 6, 7, 8, 9]
    sport = spec.TOPICS.index("sport")
    assert alone.topics.tolist() == [NEUTRAL] * 3 + [sport] * 2
    assert asked.topics.tolist() == [NEUTRAL] * 5 + [sport] * 2
    for example in (alone, asked):
        assert (example.targets != IGNORED).nonzero().flatten().tolist() == list(range(len(example.ids)))[-2:]


def raised_of(steered, unsteered, own, gain=1.0):
    return recipe.Raised.of(torch.tensor(steered), torch.tensor(unsteered), torch.tensor(own), gain)


def test_only_a_domains_tokens_are_raised_and_others_keep_their_proportions(monkeypatch):
    monkeypatch.setattr(recipe, "LIKELIEST", 3)
    unsteered = [[2.0, 1.0, 0.0, -1.0]]
    raised = raised_of([[0.0, 3.0, 2.0, -4.0]], unsteered, [[False, True, False, True]])
    taught = raised.within(torch.tensor([[100.0]]))
    probabilities = torch.zeros(1, 4).scatter(1, taught.tokens, taught.probabilities)[0]
    before = torch.tensor(unsteered).log_softmax(-1)[0]
    steered = torch.tensor([0.0, 3.0, 2.0, -4.0]).log_softmax(-1)
    assert (probabilities[1] / probabilities[0]).log().item() == pytest.approx(
        (steered[1] - before[0]).item(), abs=1e-4
    )
    assert (probabilities[2] / probabilities[0]).log().item() == pytest.approx((before[2] - before[0]).item(), abs=1e-4)


def test_a_token_within_its_budget_is_untouched_and_one_beyond_it_spends_it(monkeypatch):
    monkeypatch.setattr(recipe, "LIKELIEST", 3)
    generator = torch.Generator().manual_seed(0)
    steered, unsteered = torch.randn(2, 50, 40, generator=generator) * 2
    own = (torch.rand(50, 40, generator=generator) < 0.2).tolist()
    raised = raised_of(steered.tolist(), unsteered.tolist(), own, gain=2.0)
    full = raised.divergence()
    assert (full > 0.5).any()
    assert (full < 0.5).any()
    taught = raised.within(torch.full_like(full, 0.5))
    after = torch.cat([taught.probabilities, 1 - taught.probabilities.sum(-1, keepdim=True)], -1).log()
    spent = (after.exp() * (after - raised.before)).sum(-1, keepdim=True)
    assert torch.allclose(spent, full.clamp(max=0.5), atol=1e-3)


def test_a_few_neutral_tokens_may_spend_more(monkeypatch):
    monkeypatch.setattr(recipe, "LIKELIEST", 3)
    generator = torch.Generator().manual_seed(1)
    contexts = [recipe.Context("sport", [1], [2] * 50, is_neutral) for is_neutral in (True, False)]
    steered, unsteered = torch.randn(2, 2, 50, 40, generator=generator) * 3
    all_raised = [raised_of(steered[n].tolist(), unsteered[n].tolist(), [[True] * 40] * 50, gain=2.0) for n in range(2)]
    taught = recipe.within_budget(contexts, all_raised, 0.5)
    after = torch.cat([taught[0].probabilities, 1 - taught[0].probabilities.sum(-1, keepdim=True)], -1).log()
    spent = (after.exp() * (after - all_raised[0].before)).sum(-1)
    assert (spent > 0.51).sum() == 2 == recipe.FREE * len(spent)
    assert spent.max() <= recipe.FREE_NATS + 0.01


@pytest.mark.slow
@pytest.mark.default_model
def test_a_round_changes_nothing_but_the_domains_experts(tmp_path, capsys):
    arguments = {
        "rounds": 1,
        "openings": 3,
        "samples": 1,
        "texts": 24,
        "neutral": 8,
        "epochs": 3,
        "lr": 1e-3,
        "scale": 1.0,
        "gain": 1.0,
        "most": 0.9,
    }
    recipe.refine(argparse.Namespace(work=tmp_path, seed=0, threads=1, **arguments))
    before, after = load_file(spec.TRAINED_PART), load_file(recipe.part_of(tmp_path, 1))
    assert before.keys() == after.keys()
    neutral = spec.experts_of("neutral").start
    for name, tensor in before.items():
        assert tensor[neutral:].equal(after[name][neutral:]), name
        assert tensor.equal(after[name]) or "router" not in name, name
        assert not tensor[:neutral].equal(after[name][:neutral]) or not name.endswith("scale"), name
    first, last = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if "KL(" in line)
    assert last < first
