"""Mean router probabilities: what each family's router computes from its logits, summed over real tokens only."""

import pytest
import torch

from steermoe.errors import SteeringError
from steermoe.routing.intercept import intercept
from steermoe.routing.recording import record_routing
from steermoe.routing.routers import find_routers
from tests.support.tiny_models import build, tokens

SOFTMAX = ["mixtral", "qwen3_moe", "gpt_oss", "olmoe", "granitemoeshared"]
SIGMOID = ["deepseek_v3", "llama4"]


class _Keep:
    """Keeps the logits of every call."""

    def __init__(self):
        self.logits = []

    def active(self):
        return True

    def runs(self):
        return 1

    def edit(self, logits):
        self.logits.append(logits.detach().clone())
        return logits

    def observe(self, output):
        pass


@pytest.mark.parametrize("family", SOFTMAX + SIGMOID)
def test_probabilities_are_the_scores_of_the_logits(family):
    model = build(family)
    inputs = tokens(model, rows=2)
    routers = find_routers(model)
    keepers = [_Keep() for _ in routers]
    undo = [intercept(model, router, keeper) for router, keeper in zip(routers, keepers, strict=True)]
    with torch.no_grad():
        model(**inputs)
    for remove in undo:
        remove()
    with torch.no_grad(), record_routing(model, probabilities=True) as record:
        model(**inputs)
    mean = record.mean_probability()
    for number, keeper in enumerate(keepers):
        logits = keeper.logits[0].float().view(2, -1, keeper.logits[0].shape[-1])
        scores = logits.sigmoid() if family in SIGMOID else logits.softmax(-1)
        expected = (scores / scores.sum(-1, keepdim=True)).mean(1)
        assert torch.allclose(mean[:, number, : expected.shape[-1]], expected, atol=1e-6)


def test_padding_is_left_out_and_the_model_unchanged():
    model = build("mixtral")
    ids = tokens(model)["input_ids"]
    padded = torch.nn.functional.pad(ids, (0, 4), value=1)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 4))
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with record_routing(model, probabilities=True) as record:
            recorded = model(input_ids=ids).logits
            alone = record.mean_probability()
            record.reset()
            model(input_ids=padded, attention_mask=mask)
            beside = record.mean_probability()
    assert torch.equal(plain, recorded)
    assert torch.allclose(alone, beside, atol=1e-6)


def test_restricted_to_the_last_token():
    model = build("mixtral")
    ids = tokens(model, rows=2)["input_ids"]
    last = torch.zeros(ids.shape, dtype=torch.bool)
    last[:, -1] = True
    with torch.no_grad(), record_routing(model) as record:
        record.restrict(last)
        model(input_ids=ids)
    assert record.tokens.tolist() == [1, 1]
    top_k = find_routers(model)[0].top_k
    assert torch.equal(record.counts.sum(-1), torch.full_like(record.counts[..., 0], top_k))


def test_probabilities_that_were_not_requested():
    model = build("mixtral")
    with torch.no_grad(), record_routing(model) as record:
        model(**tokens(model))
    with pytest.raises(SteeringError, match="probabilities=True"):
        record.mean_probability()


@pytest.mark.parametrize(
    ("family", "quirks"),
    [
        *[(family, {}) for family in (*SOFTMAX, "deepseek_v3", "laguna", "minimax_m3_vl", "step3p7", "deepseek_v4")],
        *[("cohere2_moe", {"expert_selection_fn": kind}) for kind in ("softmax", "sigmoid")],
    ],
)
def test_probabilities_of_the_chosen_are_proportional_to_their_weights(family, quirks):
    """The weights that the router gives its experts reveal its scoring, whatever its source and configuration say."""
    model = build(family, **quirks)
    router = find_routers(model)[0]
    returned = []
    handle = router.module.register_forward_hook(lambda module, args, output: returned.append(output))
    with torch.no_grad(), record_routing(model, probabilities=True) as record:
        model(**tokens(model, length=1))
    handle.remove()
    parts = returned[0] if returned[0][0].is_floating_point() else returned[0][::-1]  # transformers before 5.20
    _, weights, chosen = parts[:3]
    expected = weights[0].float() / weights[0].float().sum()
    recorded = record.mean_probability()[0, 0][chosen[0]]
    assert torch.allclose(recorded / recorded.sum(), expected, atol=1e-5)
