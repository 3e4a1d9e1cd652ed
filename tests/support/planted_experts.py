"""A tiny model in which it is known which experts do what: which of them a vector ought to raise has one right answer.

All experts but two return nothing. `GOOD` makes the letter z likelier, which texts of the domain are full of; `BAD`
makes q likelier in place of z. The routers choose neither unless they are pushed. Layer 0 does nothing.
"""

import copy
from dataclasses import replace
from typing import Any

import torch

from steermoe.models.loading import LoadedModel
from steermoe.vectors.vector import SteeringVector, VectorInfo

GOOD, BAD = (1, 3), (2, 5)
"""A layer, and an expert in it."""
EFFECT = 0.5
"""How much the two add to hidden states whose norm is about 2."""
DOMAIN = [f"{'zz z' * count} zz{'z ' * 9}zzz zz" for count in range(1, 7)]
NEUTRAL = [f"the brown fox number {number} jumps over the old dog and runs into a wood" for number in range(6)]


def plant(loaded: LoadedModel) -> LoadedModel:
    """A copy of the tiny Mixtral of `conftest.py` with the two experts."""
    model = copy.deepcopy(loaded.model)
    z, q = (loaded.tokenizer(letter)["input_ids"][0] for letter in "zq")
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(25)
        model.model.embed_tokens.weight[:, 0] = 1.0  # of every token, so that experts and routers have a constant input
        model.lm_head.weight.mul_(20)
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.zero_()
            layer.mlp.gate.weight.mul_(50)
        head = model.lm_head.weight
        for (layer, expert), direction in ((GOOD, head[z]), (BAD, head[q] - head[z])):
            _let_add(model.model.layers[layer].mlp, expert, direction)
    return replace(loaded, model=model)


def _let_add(block: Any, expert: int, direction: torch.Tensor) -> None:
    """Let an expert add a constant vector, and let the router choose it only if it is pushed."""
    experts, width = block.experts, direction.shape[0]
    direction = direction.clone()
    direction[0] = 0.0  # the constant input of later layers stays as it is
    experts.gate_up_proj[expert].zero_()
    experts.gate_up_proj[expert][:, 0] = 1.0
    experts.down_proj[expert] = (EFFECT * direction / direction.norm())[:, None].expand(-1, width) / width
    block.gate.weight[expert] = 0.0
    block.gate.weight[expert, 0] = -2.0


def vector_of(shape, *, weights: tuple[float, float] = (0.4, 0.4)) -> SteeringVector:
    """One with both experts, and one of layer 0."""
    experts = torch.zeros(len(shape.layers), shape.num_experts)
    experts[0, 0] = 0.4
    for (layer, expert), weight in zip((GOOD, BAD), weights, strict=True):
        experts[layer, expert] = weight
    return SteeringVector("zebras", None, shape.layers, weights=experts, info=VectorInfo.of(shape))
