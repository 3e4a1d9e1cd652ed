"""Check that plans fit a model, and lay them out as arrays for each of its layers. Imports no torch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steermoe.errors import SteeringError
from steermoe.routing.shape import RouterShape, RoutingShape
from steermoe.steering.plans import SteeringPlan
from steermoe.vectors.vector import format_layers

RAISED, FORCED, BANNED = 1, 2, 4
"""Bits of a plan's marks: where E > 0, and the experts to force and to ban."""


@dataclass(frozen=True, eq=False)
class LayerTable:
    """The distinct plans of a batch as arrays for one layer, [P, N] each; a row of zeros if there is no plan.

    Attributes:
        push: strength times expert vector, c E, float32.
        raised: where E > 0.
        active: how many experts its tokens get, [P]; 0 for as many as the router gives them.
    """

    push: NDArray[np.float32]
    raised: NDArray[np.bool_]
    forced: NDArray[np.bool_]
    banned: NDArray[np.bool_]
    active: NDArray[np.int64]

    @classmethod
    def of(cls, router: RouterShape, number: int, plans: Sequence[SteeringPlan]) -> "LayerTable":
        """For the `number`-th router of a model that the plans fit."""
        experts = np.zeros((max(1, len(plans)), router.num_experts), dtype=np.float32)
        forced, banned = np.zeros(experts.shape, dtype=np.bool_), np.zeros(experts.shape, dtype=np.bool_)
        active = np.zeros(len(experts), dtype=np.int64)
        for place, plan in enumerate(plans):
            if not _is_inside(plan, router.layer):
                continue
            if plan.vector is not None and plan.strength:
                row = plan.vector.expert_array[number]
                experts[place, : len(row)] = row
            active[place] = plan.active_experts or 0
            for listed, marks in ((plan.force, forced), (plan.ban, banned)):
                for layer, expert in listed:
                    if layer == router.layer:  # lists can be long
                        marks[place, expert] = True
        strength_P1 = np.array([float(plan.strength) for plan in plans] or [0.0], dtype=np.float32)[:, None]
        return cls(experts * strength_P1, experts > 0, forced, banned, active)

    def marks(self) -> NDArray[np.uint8]:
        """As `marks_of`."""
        return marks_of(self.raised, self.forced, self.banned)

    @property
    def busy(self) -> NDArray[np.bool_]:
        """[P], whether each plan does anything in this layer."""
        return (self.push != 0).any(1) | self.forced.any(1) | self.banned.any(1) | (self.active != 0)


def marks_of(*marks: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """[P, N]: which experts are raised, forced and banned, as bits."""
    bits: Any = 0
    for bit, marked in zip((RAISED, FORCED, BANNED), marks, strict=True):
        bits = bits | marked.astype(np.uint8) * np.uint8(bit)
    return np.asarray(bits)


def check_plan(shape: RoutingShape, plan: SteeringPlan) -> None:
    """Raise what attaching the plan to a model of this shape would raise, without attaching it."""
    tables_for(shape, [plan])


def tables_for(shape: RoutingShape, plans: Sequence[SteeringPlan]) -> list[LayerTable]:
    """The plans' numbers for each router, [L] tables.

    Raises:
        CompatibilityError: a vector of another model.
        SteeringError: layers or experts that the model does not have, or a plan that would do nothing.
    """
    for plan in plans:
        _check_fits(shape, plan)
    tables = [LayerTable.of(router, number, plans) for number, router in enumerate(shape.routers)]
    busy_LP = np.array([table.busy for table in tables])
    for place, plan in enumerate(plans):
        if plan.does_something and not busy_LP[:, place].any():
            raise SteeringError(_nothing_to_do(plan))
    return tables


def steered_layers(shape: RoutingShape, plan: SteeringPlan) -> int:
    """In how many of the model's MoE layers a plan does anything. Raises as `tables_for`."""
    return sum(bool(table.busy.any()) for table in tables_for(shape, [plan]))


def _check_fits(shape: RoutingShape, plan: SteeringPlan) -> None:
    layers, routers = shape.layers, shape.routers
    if plan.vector is not None:
        plan.vector.check_fits(shape)
    experts_of: dict[int, int] = {}
    for router in routers:
        experts_of[router.layer] = max(router.num_experts, experts_of.get(router.layer, 0))
    for layer, expert in (*plan.force, *plan.ban):
        experts = experts_of.get(layer, 0)
        if not 0 <= expert < experts:
            raise SteeringError(
                f"expert ({layer}, {expert}) does not exist: {shape.name} has routers in layers "
                f"{format_layers(layers)}, experts 0 to {(experts or routers[0].num_experts) - 1}"
            )
    if plan.layers is not None and not any(plan.layers[0] <= layer <= plan.layers[1] for layer in layers):
        first, last = plan.layers
        raise SteeringError(f"layers {first}-{last} hold no router: the model has them in {format_layers(layers)}")
    listed = {layer for layer, _ in (*plan.force, *plan.ban)}
    for router in routers:
        if router.no_lists and router.layer in listed:
            raise SteeringError(
                f"experts of layer {router.layer} can't be forced or banned: {router.no_lists}; leave force and ban "
                "out, or use another model"
            )
    _check_counts(shape, plan)
    forced, banned = (Counter(layer for layer, _ in set(listed)) for listed in (plan.force, plan.ban))
    for router in routers:
        top_k = plan.active_experts if plan.active_experts and _is_inside(plan, router.layer) else router.top_k
        if forced[router.layer] > top_k:
            raise SteeringError(
                f"{forced[router.layer]} experts are forced in layer {router.layer}, but it chooses {top_k} per "
                f"token: force at most {top_k}"
            )
        if banned[router.layer] > router.num_experts - top_k:
            raise SteeringError(
                f"{banned[router.layer]} of {router.num_experts} experts are banned in layer {router.layer}, but it "
                f"chooses {top_k} per token: ban at most {router.num_experts - top_k}"
            )


def _is_inside(plan: SteeringPlan, layer: int) -> bool:
    return plan.layers is None or plan.layers[0] <= layer <= plan.layers[1]


def _check_counts(shape: RoutingShape, plan: SteeringPlan) -> None:
    """Raise SteeringError if a router can't choose as many experts as a plan says."""
    number = plan.active_experts
    if number is None:
        return
    for router in shape.routers:
        if not _is_inside(plan, router.layer) or number == router.top_k:
            continue
        if router.no_counts:
            raise SteeringError(
                f"layer {router.layer} of {shape.name} can't have {number} active experts: {router.no_counts}; leave "
                "active experts out, or use another model"
            )
        if number < router.least:
            raise SteeringError(
                f"{number} active experts are too few for layer {router.layer} of {shape.name}: ask for {router.least} "
                "or more"
            )
        most = router.most or router.num_experts
        if number > most:
            groups = ", as it leaves out whole groups of them" if router.most else ""
            raise SteeringError(
                f"{number} active experts are too many for layer {router.layer} of {shape.name}, which chooses from "
                f"{most}{groups}: ask for at most {most}"
            )


def _nothing_to_do(plan: SteeringPlan) -> str:
    where = "" if plan.layers is None else f" in layers {plan.layers[0]}-{plan.layers[1]}"
    if plan.vector is None:
        return f"the experts to force and ban are outside layers {plan.layers}: nothing would be steered"
    return (
        f"vector '{plan.vector.domain}' has no expert above its threshold {plan.vector.threshold:g}{where}: nothing "
        "would be steered; lower the threshold (vector.with_threshold) or widen the layers"
    )
