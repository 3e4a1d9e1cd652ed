"""The largest strengths that a plan may have, in every family: whatever a router makes of its logits stays finite."""

import pytest
import torch

from steermoe import list_families, steer
from steermoe.routing.routers import shape_of
from steermoe.steering.limits import MOST_STRENGTH
from steermoe.vectors.vector import SteeringVector
from tests.support.tiny_models import build, run, tokens

STEERABLE = [family.family for family in list_families() if family.steerable]


@pytest.mark.parametrize("family", STEERABLE)
def test_the_largest_strengths_give_no_nan(family):
    """Also if every expert is in the vector, so that all logits of a token sink together."""
    model = build(family)
    shape = shape_of(model)
    weights = torch.linspace(0.5, 1.0, min(router.num_experts for router in shape.routers)).repeat(len(shape.layers), 1)
    vector, inputs = SteeringVector("all", None, shape.layers, weights=weights), tokens(model)
    for strength in (MOST_STRENGTH, -MOST_STRENGTH, -120.0):
        with steer(model, vector, strength, formula="additive", positions="all"):
            assert bool(run(model, inputs).isfinite().all()), strength
