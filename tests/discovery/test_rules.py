"""The rules of other papers against numpy references written from the papers, which share no code with the package."""

import math

import numpy as np
import pytest
import torch

from steermoe import formulas
from steermoe.discovery import rules
from steermoe.discovery.labelled import routing_embeddings
from steermoe.discovery.token_weights import WeighedChoices
from steermoe.errors import VectorError
from steermoe.routing.recording import record_routing
from steermoe.steering.handle import steer

SPORT, FOOD = ["A goal!", "The team ran.", "One more goal."], ["Salt, pepper and a pan.", "bread", "0123456789"]
TOP_K = 2


def counts_of(loaded, texts):
    """How often each expert was chosen, [B, L, N], and the tokens of each text, as numpy arrays."""
    counts, tokens = [], []
    for text in texts:
        ids = torch.tensor([loaded.tokenizer(text)["input_ids"]])
        with torch.no_grad(), record_routing(loaded.model) as record:
            loaded.model(input_ids=ids)
        counts.append(record.counts[0].numpy())
        tokens.append(ids.shape[1])
    return np.stack(counts), np.array(tokens)


@pytest.fixture(scope="module")
def counted(tiny_model):
    """Counts and tokens of both sets of texts."""
    return {"sport": counts_of(tiny_model, SPORT), "food": counts_of(tiny_model, FOOD)}


def built(loaded, rule, experts=None):
    return {v.domain: v for v in rules.vectors_by_rule(loaded, rule, {"sport": SPORT, "food": FOOD}, experts=experts)}


def chosen(logits, count=TOP_K):
    """The experts with the largest logits, one set a token."""
    return [set(row) for row in np.argsort(-logits, axis=1)[:, :count]]


def random_logits(seed=0, experts=8):
    return np.random.default_rng(seed).normal(0.5, 2.0, size=(400, experts))


def test_steermoe_takes_the_experts_with_the_largest_risk_differences(tiny_model, counted):
    """Activated: the best positive ones, k in a layer at most; deactivated: the most negative ones."""
    (own, own_tokens), (other, other_tokens) = counted["sport"], counted["food"]
    difference = own.sum(0) / own_tokens.sum() - other.sum(0) / other_tokens.sum()
    layers, experts = difference.shape
    places = sorted(((difference[i, j], i, j) for i in range(layers) for j in range(experts)), key=lambda one: -one[0])
    expected = np.zeros_like(difference)
    for value, i, j in [one for one in places if one[0] > 0][:6]:
        if (expected[i] == 1).sum() < TOP_K:
            expected[i, j] = np.sign(value)
    for _, i, j in [one for one in reversed(places) if one[0] < 0][:6]:
        if (expected[i] == -1).sum() < experts - TOP_K:
            expected[i, j] = -1
    vector = built(tiny_model, "steermoe")["sport"]
    assert np.array_equal(np.sign(vector.experts.numpy()), expected)
    assert (vector.info.formula, vector.info.scale, vector.info.strength) == ("zero_max_scaled", "magnitude", 1.01)


def test_steermoe_leaves_k_experts_in_each_layer():
    difference = torch.tensor([[0.9, 0.8, 0.7, -0.5], [-0.9, -0.8, -0.7, -0.6]])
    signs = rules.steermoe_experts(difference, 2, 9).sign().tolist()
    assert signs == [[1, 1, 0, -1], [-1, -1, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steermoe_is_formula_5(dtype):
    """log-softmax, max + 0.01 and min - 0.01 choose the same experts as (5) at 1.01, and weigh them nearly alike."""
    z = torch.from_numpy(random_logits()).to(dtype).double().numpy()
    z = z[z.max(1) > 0]
    experts = np.array([1, 0, 0, rules.DEACTIVATED, 0, rules.DEACTIVATED, 0, 0])
    logp = z - np.log(np.exp(z).sum(1, keepdims=True))
    theirs = logp.copy()
    theirs[:, experts > 0] = logp.max(1, keepdims=True) + 0.01
    theirs[:, experts < 0] = logp.min(1, keepdims=True) - 0.01
    logits = torch.from_numpy(z).to(dtype)
    ours = formulas.zero_max_scaled(logits.float(), torch.from_numpy(experts).float(), rules.ACTIVATED)
    assert chosen(ours.to(dtype).double().numpy()) == chosen(theirs)
    assert all(0 in row and not row & {3, 5} for row in chosen(theirs))
    largest = z.max(1)
    lead_ours, lead_theirs = ours[:, 0].double().numpy() - largest, theirs[:, 0] - logp.max(1)
    assert np.allclose(lead_ours - lead_theirs, 0.01 * (largest - 1), atol=1e-5)
    assert np.abs(lead_ours - lead_theirs).max() < 0.08


def test_steermoe_chooses_as_forcing_and_banning_do():
    """Also where the largest logit is below 0."""
    z = random_logits(1) - 3
    experts = torch.tensor([1, 0, 0, rules.DEACTIVATED, 0, rules.DEACTIVATED, 0, 0])
    assert (z.max(1) < 0).any()
    logits = torch.from_numpy(z).float()
    ours = formulas.zero_max_scaled(logits, experts, rules.ACTIVATED)
    listed = formulas.ban(formulas.force(logits, experts > 0), experts < 0)
    assert chosen(ours.numpy()) == chosen(listed.numpy())


def test_a_steermoe_vector_steers_by_itself(tiny_model):
    vector = built(tiny_model, "steermoe")["sport"]
    with steer(tiny_model.model, vector, positions="all"), record_routing(tiny_model.model) as record:
        tiny_model.model(input_ids=torch.tensor([tiny_model.tokenizer("Salt and a pan.")["input_ids"]]))
    counts, tokens = record.counts[0], int(record.tokens[0])
    assert (counts[vector.experts > 0] == tokens).all()
    assert not counts[vector.experts < 0].any()


def test_dsmoe_scores_by_hand():
    """(on heavy tokens - on light ones) x the share of all choices; the best ones of all layers."""
    heavy, light = np.array([[5, 1], [3, 4]]), np.array([[1, 3], [3, 0]])
    total = heavy + light
    choices = WeighedChoices(*map(torch.from_numpy, (heavy, light, total)), torch.tensor([10]))
    scores = rules.dsmoe_scores(choices)
    assert np.allclose(scores.numpy(), (heavy - light) * total / total.sum())
    assert rules.dsmoe_experts(scores, 1).tolist() == [[1, 0], [0, 0]]
    assert rules.dsmoe_experts(scores, 2).tolist() == [[1, 0], [0, 1]]


def test_dsmoe_is_formula_3(tiny_model):
    vector = built(tiny_model, "dsmoe", experts=3)["sport"]
    assert sorted(vector.experts.flatten().tolist())[-4:] == [0, 1, 1, 1]
    assert vector.info.formula == "additive"
    assert vector.info.strength == pytest.approx(math.log(1.1))
    z, row = random_logits(2), vector.experts[0]
    expected = z.copy()
    expected[:, row.numpy() > 0] += np.log(1 + 0.10)
    ours = formulas.additive(torch.from_numpy(z).float(), row, vector.info.strength)
    assert np.allclose(ours.numpy(), expected, atol=1e-6)
    multiplied = np.exp(z) * np.where(row.numpy() > 0, 1.1, 1.0)  # a tenth more probability, before the sum is 1 again
    assert np.allclose(ours.double().softmax(1).numpy(), multiplied / multiplied.sum(1, keepdims=True), atol=1e-6)


def stable(counts, tokens, count):
    """Experts that are among the most active ones of all layers in each resample, from the counts themselves."""
    generator = np.random.default_rng(rules.SEED)
    found = None
    for rows in generator.integers(len(tokens), size=(rules.RESAMPLES, len(tokens))):
        rate = counts[rows].sum(0) / tokens[rows].sum()
        best = {place for place in np.argsort(-rate.ravel(), kind="stable")[:count] if rate.ravel()[place] > 0}
        found = best if found is None else found & best
    return found


def test_safex_takes_experts_that_are_stable_for_these_texts_alone(tiny_model, counted):
    count = 13
    own, other = stable(*counted["sport"], count), stable(*counted["food"], count)
    assert own - other
    assert own & other
    vector = built(tiny_model, "safex", experts=count)["sport"]
    assert set(np.flatnonzero(vector.experts.numpy().ravel())) == own - other
    frequency = routing_embeddings(tiny_model, SPORT)[0].mean(0)
    assert torch.equal(vector.experts, frequency.where(vector.experts > 0, 0.0))
    assert vector.info.strength is None


def test_safex_masks_as_a_large_negative_strength_does():
    z = np.abs(random_logits(3)) + 0.1
    experts = torch.tensor([0.3, 0, 0, 0.2, 0, 0, 0, 0])
    masked = np.where(experts.numpy() > 0, -np.inf, z)
    ours = formulas.max_scaled(torch.from_numpy(z).float(), experts, -1e4)
    assert chosen(ours.numpy()) == chosen(masked)


def test_other_domains_count_among_the_others(tiny_model):
    """With two sets, naming the second as other texts is the same as building both."""
    (alone,) = rules.vectors_by_rule(tiny_model, "steermoe", {"sport": SPORT}, FOOD)
    assert torch.equal(alone.experts, built(tiny_model, "steermoe")["sport"].experts)


@pytest.mark.parametrize(
    ("rule", "others", "message"),
    [
        ("steermoe", [], "compares texts with others: name them with --against"),
        ("safex", SPORT, "finds no expert of its own in these texts"),
        ("dsmoe", FOOD, "compares texts with no others"),
    ],
)
def test_what_a_rule_can_not_use(tiny_model, rule, others, message):
    with pytest.raises(VectorError, match=message):
        rules.vectors_by_rule(tiny_model, rule, {"sport": SPORT}, others)
