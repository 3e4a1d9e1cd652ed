"""Routers choose from the logits of a step what they choose in the model, together where they are alike."""

import pytest
import torch

from steermoe.engines.hf.cache import rows_can_change
from steermoe.engines.hf.compiled.choices import OwnChoices
from steermoe.engines.hf.compiled.step import DecodeStep
from steermoe.errors import SteerMoEError, TraceError, UnsupportedModel
from steermoe.routing.families import list_families
from steermoe.steering.editing_graph import Edits
from tests.support import steering_models as tiny
from tests.support import tiny_models
from tests.support.rolling import build

ROWS = 5
QUICK = ("mixtral", "granitemoeshared", "gpt_oss", "deepseek_v3", "qwen2_moe", "minimax_m2", "afmoe")


def logits_and_choices(model):
    """What the routers of a step compute and choose for rows of their own: [R, B, W] and [R, B, k]."""
    step = DecodeStep(model)
    edits = Edits.none(len(step.routers), ROWS, step.routers[0].num_experts)
    ids = torch.arange(40, 40 + ROWS)[:, None]
    with torch.no_grad(), step.traceable():
        step._call.edits = edits.tensors()
        model(input_ids=ids)
    numbers = range(len(step.routers))
    logits, chosen = (torch.stack([of[n] for n in numbers]) for of in (step._call.logits, step._call.chosen))
    return logits, chosen


@pytest.mark.parametrize("family", QUICK)
def test_choices_follow_from_logits(family):
    model = build(family)
    logits, chosen = logits_and_choices(model)
    own = OwnChoices(model)
    assert torch.equal(own.of(logits), chosen)
    assert torch.equal(own.of(logits[:, :1]), chosen[:, :1])
    assert not torch.equal(own.of(-logits), chosen)
    assert tiny.traces(model) == []


def test_routers_are_taken_together_only_if_their_rules_are_the_same():
    model = tiny_models.build("deepseek_v3", vocab_size=tiny.VOCABULARY)
    routers = [module for name, module in model.named_modules() if name.endswith(".gate")]
    for router in routers:
        router.e_score_correction_bias.zero_()
    assert len(OwnChoices(model)._alike) == 1
    routers[1].e_score_correction_bias[3] = 1.0
    own = OwnChoices(model)
    assert len(own._alike) == 2
    logits, chosen = logits_and_choices(model)
    assert torch.equal(own.of(logits), chosen)
    assert (chosen[1] == 3).any(-1).all()


def test_a_router_that_needs_more_than_logits_is_an_error(monkeypatch):
    model = tiny_models.build("mixtral", vocab_size=tiny.VOCABULARY)
    kind = type(model.model.layers[0].mlp.gate)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, hidden, more: forward(self, hidden))
    with pytest.raises(TraceError, match="MixtralTopKRouter does not choose by its logits alone"):
        OwnChoices(model).of(torch.zeros(tiny.LAYERS, 1, tiny.EXPERTS))


@pytest.mark.slow
@pytest.mark.parametrize("family", [family.family for family in list_families() if family.steerable])
def test_every_family(family):
    """None gives wrong choices; those that give none are generated without compiled steps."""
    model = tiny_models.build(family, vocab_size=tiny.VOCABULARY)
    if not hasattr(model, "generate") or model.config.is_encoder_decoder or not rows_can_change(model):
        pytest.skip("its step isn't compiled")
    try:
        logits, chosen = logits_and_choices(model)
    except UnsupportedModel as error:
        pytest.skip(str(error))
    try:
        found = OwnChoices(model).of(logits)
    except SteerMoEError as error:
        pytest.skip(str(error))
    assert torch.equal(found.sort(-1).values, chosen.sort(-1).values)
