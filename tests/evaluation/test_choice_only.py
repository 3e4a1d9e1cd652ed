"""What `--measure` measures is what `models bake --choice-only` writes."""

import pytest
import torch

from steermoe.errors import ModelError
from steermoe.evaluation.choice_only import choosing_by, compare_with_choice_only
from steermoe.models.baking.checkpoint import Checkpoint
from steermoe.models.baking.record import Steering
from steermoe.steering.baking import pushes_of
from steermoe.steering.plans import SteeringPlan
from steermoe.vectors.vector import SteeringVector
from tests.support import tiny_ggufs
from tests.support import tiny_models as tiny

TEXTS = ["in the an the in the a the in an in the an a the in the an in an a"]


def plan_for(shape, strength=0.5):
    weights = torch.zeros(len(shape.routers), shape.num_experts)
    weights[:, (1, 4)] = torch.tensor([0.6, 0.4])
    vector = SteeringVector("sport", None, shape.layers, weights=weights)
    return SteeringPlan(vector, strength, formula="additive", positions="all")


def test_it_is_what_is_written(tmp_path):
    model = tiny.build("deepseek_v3")
    inputs = tiny.tokens(model)
    plain = tiny.run(model, inputs)
    model.save_pretrained(tmp_path / "own")
    source = Checkpoint(tmp_path / "own")
    pushes = pushes_of(source.shape, plan_for(source.shape))
    source.bake(Steering("choice", "sport", 0.5, "0" * 64), pushes, tmp_path / "out")
    baked = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with choosing_by(model, pushes):
        moved = tiny.run(model, inputs)
    assert torch.equal(tiny.run(baked, inputs), moved)
    assert not torch.equal(moved, plain)
    assert torch.equal(tiny.run(model, inputs), plain)


def test_both_ways_are_compared():
    loaded = tiny_ggufs.build("deepseek_v3", n_group=1, topk_group=1)
    additive, choice = compare_with_choice_only(loaded, plan_for(loaded.shape, 50.0), TEXTS)
    assert (additive.vector_share, choice.vector_share) == (1.0, 1.0)  # so the weights alone differ
    assert additive.jaccard == pytest.approx(choice.jaccard, abs=0.05)
    assert additive.kl_mean > 0
    assert choice.kl_mean > 0
    assert additive.kl_mean != pytest.approx(choice.kl_mean, rel=0.01)


def test_no_bias_on_scores():
    loaded = tiny_ggufs.build("mixtral")
    with pytest.raises(ModelError, match="the routers of MixtralForCausalLM have no bias on scores"):
        compare_with_choice_only(loaded, plan_for(loaded.shape), TEXTS)
