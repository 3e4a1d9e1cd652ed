"""What other tools' files come to: weights of experts, listed by layer, which become the matrix of a vector.

Shapes: L MoE layers of a model, N experts per layer, k experts chosen per token.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from steermoe.errors import VectorError, count_of, shown
from steermoe.formulas import Formula
from steermoe.routing.shape import RoutingShape
from steermoe.vectors.vector import MAX_EXPERTS, MAX_LAYERS, SteeringVector, VectorInfo, format_layers

if TYPE_CHECKING:
    from torch import Tensor

DSMOE_STRENGTH = math.log(1.1)
"""What DSMoE (2604.05267) adds to the logits of a domain's experts."""
MAX_NUMBERS = 2**22
"""Of a matrix; far more than any model has."""
ACTIVATED = 1.01
"""The strength c of (5) that stands for SteerMoE's max + 0.01: with E = 1 a logit becomes 1.01 |max(z)|."""
DEACTIVATED = -1e4
"""E of an expert that SteerMoE deactivates: its logit falls far below the smallest one."""


@dataclass(frozen=True)
class Cells:
    """The weights of experts, as a file lists them.

    Attributes:
        weights: of (layer, expert); the others are 0.
        layers: the layers that the file speaks of, those with zeros included; None for those in `weights`.
        experts: N, if the file says it.
        is_guess: `experts` is one more than the largest that it names; a model's N takes its place.
        by_router: its layers are those with routers, however it numbers them; else they are decoder layers.
        formula, strength: what its tool does to the logits, if a formula does the same.
        is_dsmoe: they are scores of DSMoE, which adds to the logits of the best experts.
    """

    weights: Mapping[tuple[int, int], float]
    layers: tuple[int, ...] | None = None
    experts: int | None = None
    by_router: bool = False
    formula: Formula | None = None
    strength: float | None = None
    is_dsmoe: bool = False
    is_guess: bool = False

    def vector(self, name: str, domain: str, shape: RoutingShape | None) -> SteeringVector:
        """The vector with these weights.

        Args:
            name: the file, for messages.
            domain: the vector's.
            shape: the model's that it is for; None if it is unknown.

        Raises:
            VectorError: numbers that no model has, or not this one; only zeros; or a size that only a model can tell.
        """
        info = VectorInfo() if shape is None else VectorInfo.of(shape)
        info = replace(info, formula=self.formula, strength=self.strength, created_by="steermoe vectors import")
        layers, matrix = self._matrix(name, shape)
        return SteeringVector(domain, None, layers, weights=matrix, info=info)

    def _matrix(self, name: str, shape: RoutingShape | None) -> tuple[tuple[int, ...], "Tensor"]:
        import torch

        self._check(name)
        is_own = self.experts is not None and (shape is None or not self.is_guess)
        experts = self.experts if is_own or shape is None else shape.num_experts
        if experts is None:
            raise VectorError(f"'{name}' does not say how many experts a layer has: pass --model")
        own = self._own_layers()
        place = self._places(name, own, shape)
        layers = tuple(sorted(set(place.values()))) if shape is None else shape.layers
        if not 0 < len(layers) * experts <= MAX_NUMBERS:
            raise VectorError(
                f"'{name}' is for {len(layers)} layers of {experts} experts, expected 1 to {MAX_NUMBERS:,} in all"
            )
        row_of = {layer: row for row, layer in enumerate(layers)}
        matrix = torch.zeros(len(layers), experts)
        for (layer, expert), weight in self.weights.items():
            if expert >= experts:
                of = "the file has" if shape is None or is_own else f"{shape.name} has"
                raise VectorError(f"'{name}' names expert {expert} of layer {layer}, {of} 0 to {experts - 1}")
            if weight:
                matrix[row_of[place[layer]], expert] = weight
        if not matrix.any():
            raise VectorError(f"'{name}' contains only zeros, as float32: it would steer nothing")
        return layers, matrix

    def _own_layers(self) -> list[int]:
        """The layers that the file speaks of."""
        return sorted({*(layer for layer, _ in self.weights), *(self.layers or ())})

    def _places(self, name: str, own: list[int], shape: RoutingShape | None) -> dict[int, int]:
        """The decoder layer of each layer of the file.

        Raises:
            VectorError: the model has no router in one of them, and its weights are not all 0.
        """
        if shape is None:
            return {layer: layer for layer in own}
        if self.by_router:
            if len(own) != len(shape.layers):
                raise VectorError(
                    f"'{name}' is for {count_of(len(own), 'layer')}, {shape.name} has {len(shape.layers)} with "
                    "routers: it is for another model"
                )
            return dict(zip(own, shape.layers, strict=True))
        used = {layer for (layer, _), weight in self.weights.items() if weight}
        if foreign := sorted(used - set(shape.layers)):
            raise VectorError(
                f"'{name}' has weights in layer {foreign[0]}, {shape.name} has routers in "
                f"{format_layers(shape.layers)}: it is for another model"
            )
        return {layer: layer for layer in own}

    def _check(self, name: str) -> None:
        for (layer, expert), weight in self.weights.items():
            if not (0 <= layer < MAX_LAYERS and 0 <= expert < MAX_EXPERTS):
                raise VectorError(
                    f"'{name}' names expert {shown(expert)} of layer {shown(layer)}, expected numbers from 0 on, below "
                    f"{MAX_EXPERTS} and {MAX_LAYERS}"
                )
            if not abs(weight) < 3e38:  # the end of float32; NaN too
                raise VectorError(
                    f"'{name}': the weight of expert {expert} in layer {layer} is {shown(weight)}, expected a finite "
                    "number of float32"
                )


def toggled(activate: Mapping[int, list[int]], deactivate: Mapping[int, list[int]]) -> Cells:
    """Experts to activate and to deactivate, by layer, as formula (5) does it (see `ACTIVATED`).

    SteerMoE (2509.09660) sets an activated expert's score above the largest one and a deactivated one's below the
    smallest. An expert in both lists is deactivated.
    """
    weights = {(layer, expert): 1.0 for layer, experts in activate.items() for expert in experts}
    weights |= {(layer, expert): DEACTIVATED for layer, experts in deactivate.items() for expert in experts}
    layers = tuple(sorted({*activate, *deactivate}))
    return Cells(weights, layers, formula="zero_max_scaled", strength=ACTIVATED)


def strongest(name: str, cells: Cells, top: int | None, bottom: int | None, most: int | None) -> Cells:
    """The experts that papers steer with, out of a list of scores: SteerMoE toggles them, DSMoE adds to their logits.

    Args:
        name: the file, for messages.
        cells: the scores.
        top: how many with the largest scores above 0 to activate.
        bottom: how many with the smallest scores below 0 to deactivate.
        most: how many may be activated in one layer; None for any number.

    Raises:
        VectorError: there are fewer.
    """
    ranked = sorted(cells.weights.items(), key=lambda entry: -entry[1])
    raised = [place for place, weight in ranked if weight > 0][: top or 0]
    lowered = [place for place, weight in reversed(ranked) if weight < 0][: bottom or 0]
    for wanted, found, side, option in ((top, raised, "above", "--top"), (bottom, lowered, "below", "--bottom")):
        if wanted is not None and len(found) < wanted:
            raise VectorError(
                f"'{name}' has {count_of(len(found), 'expert')} with a score {side} 0, {option} asks for {wanted}: "
                "lower it"
            )
    if cells.is_dsmoe:
        weights = dict.fromkeys(raised, 1.0) | dict.fromkeys(lowered, -1.0)
        return replace(cells, weights=weights, layers=_layers(cells), formula="additive", strength=DSMOE_STRENGTH)
    activate: dict[int, list[int]] = {}
    for layer, expert in raised:
        if most is None or len(activate.get(layer, ())) < most:
            activate.setdefault(layer, []).append(expert)
    deactivate: dict[int, list[int]] = {}
    for layer, expert in lowered:
        deactivate.setdefault(layer, []).append(expert)
    chosen = toggled(activate, deactivate)
    layers, experts = _layers(cells), cells.experts
    return replace(chosen, layers=layers, experts=experts, is_guess=cells.is_guess, by_router=cells.by_router)


def _layers(cells: Cells) -> tuple[int, ...]:
    return cells.layers or tuple(sorted({layer for layer, _ in cells.weights}))
