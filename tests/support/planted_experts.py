"""A tiny model in which it is known which experts do what: which of them a vector ought to raise has one right answer.

All experts but two return nothing. `GOOD` makes the letter z likelier, which texts of the domain are full of; `BAD`
makes the letter q likelier, which no text holds. The routers choose neither unless they are pushed. Layer 0 does
nothing.
"""

import copy
from dataclasses import replace

import torch

from steermoe.models.loading import LoadedModel
from steermoe.vectors.vector import SteeringVector, VectorInfo

GOOD, BAD = (1, 3), (2, 5)
"""A layer, and an expert in it."""
DOMAIN = [f"{'zz z' * count} zz{'z ' * 9}zzz zz" for count in range(1, 7)]
NEUTRAL = [f"the brown fox number {number} jumps over the old dog and runs into a wood" for number in range(6)]


def plant(loaded: LoadedModel) -> LoadedModel:
    """A copy of the tiny Mixtral of `conftest.py` with the two experts."""
    model = copy.deepcopy(loaded.model)
    letter = {text: loaded.tokenizer(text)["input_ids"][0] for text in "zq"}
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = (
            1.0  # of every token, so that experts and routers have something constant
        )
        for number, layer in enumerate(model.model.layers):
            experts = layer.mlp.experts
            experts.down_proj.zero_()
            for wanted, text in ((GOOD, "z"), (BAD, "q")):
                if number != wanted[0]:
                    continue
                expert, direction = wanted[1], model.lm_head.weight[letter[text]].clone()
                direction[0] = 0.0  # the constant stays as it is
                experts.gate_up_proj[expert].zero_()
                experts.gate_up_proj[expert][:, 0] = 1.0
                experts.down_proj[expert] = (4.0 * direction / direction.norm())[:, None].expand(-1, 16) / 16
                layer.mlp.gate.weight[expert] = 0.0
                layer.mlp.gate.weight[expert, 0] = -2.0
    return replace(loaded, model=model)


def vector_of(shape, *, weights: tuple[float, float] = (0.4, 0.4)) -> SteeringVector:
    """One with both experts, and one of layer 0."""
    experts = torch.zeros(len(shape.layers), shape.num_experts)
    experts[0, 0] = 0.4
    for (layer, expert), weight in zip((GOOD, BAD), weights, strict=True):
        experts[layer, expert] = weight
    return SteeringVector("zebras", None, shape.layers, weights=experts, info=VectorInfo.of(shape))
