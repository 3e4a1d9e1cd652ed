"""A tiny model in which it is known which experts do what: which of them a vector ought to raise has one right answer.

All experts but two return nothing. `GOOD` makes the letter z likelier, which texts of the domain are full of; `BAD`
makes the letter q likelier, which no text holds. The routers choose neither unless they are pushed. Layer 0 does
nothing.
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
"""How much `GOOD` adds to hidden states whose norm is about 2; `BAD` adds twice as much."""
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
        toward_z, toward_q = (_without_constant(model.lm_head.weight[letter]) for letter in (z, q))
        toward_q -= (toward_q @ toward_z) * toward_z
        for (layer, expert), added in ((GOOD, EFFECT * toward_z), (BAD, 2 * EFFECT * toward_q / toward_q.norm())):
            _let_add(model.model.layers[layer].mlp, expert, added)
    return replace(loaded, model=model)


def _without_constant(row: torch.Tensor) -> torch.Tensor:
    """A direction of length 1 that leaves the constant input of later layers as it is."""
    direction = row.clone()
    direction[0] = 0.0
    return direction / direction.norm()


def _let_add(block: Any, expert: int, added: torch.Tensor) -> None:
    """Let an expert add a vector to hidden states, and let the router choose it only if it is pushed."""
    experts, width = block.experts, added.shape[0]
    experts.gate_up_proj[expert].zero_()
    experts.gate_up_proj[expert][:, 0] = 1.0
    experts.down_proj[expert] = added[:, None].expand(-1, width) / width
    block.gate.weight[expert] = 0.0
    block.gate.weight[expert, 0] = -2.0


def vector_of(shape, *, weights: tuple[float, float] = (0.4, 0.4)) -> SteeringVector:
    """One with both experts, and one of layer 0."""
    experts = torch.zeros(len(shape.layers), shape.num_experts)
    experts[0, 0] = 0.4
    for (layer, expert), weight in zip((GOOD, BAD), weights, strict=True):
        experts[layer, expert] = weight
    return SteeringVector("zebras", None, shape.layers, weights=experts, info=VectorInfo.of(shape))
