"""Check that plans fit a model, and lay them out as tensors for each of its layers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from steermoe.errors import SteeringError
from steermoe.routing.shape import RouterShape, RoutingShape
from steermoe.steering.plans import SteeringPlan
from steermoe.vectors.vector import format_layers


@dataclass(frozen=True, eq=False)
class Bank:
    """The distinct plans of a batch as tensors for one layer, [P, N] each.

    Attributes:
        push: strength times expert vector, c E.
        raised: where E > 0.
        wanted: [P, W], the columns that a plan raises or forces.
        active: how many experts its tokens get, [P]; 0 for as many as the router gives them.
        is_idle: no plan does anything in this layer.
    """

    push: Tensor
    raised: Tensor
    forced: Tensor
    banned: Tensor
    wanted: Tensor
    active: Tensor
    may_lower: bool
    has_lists: bool
    has_active: bool
    is_idle: bool
    _moved: dict[torch.device, "Bank"] = field(default_factory=dict)

    @classmethod
    def of(cls, router: RouterShape, number: int, plans: Sequence[SteeringPlan]) -> "Bank":
        """For the `number`-th router of a model that the plans fit."""
        return _banks([router], [number], plans)[0]

    def on(self, device: torch.device) -> "Bank":
        """The same on a device; moved once."""
        if self.push.device == device:
            return self
        if device not in self._moved:
            own = {name: getattr(self, name) for name in ("push", "raised", "forced", "banned", "wanted")}
            moved = {id(tensor): _moved(tensor, device) for tensor in own.values()}
            there: dict[str, Any] = {name: moved[id(tensor)] for name, tensor in own.items()}
            self._moved[device] = replace(self, **there, _moved={})
        return self._moved[device]


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The same on a device, which is not waited for; what shares memory shares it there too."""
    own = tensor[tuple(slice(1) if stride == 0 else slice(None) for stride in tensor.stride())]
    return own.to(device, non_blocking=True).expand_as(tensor)


def check_plan(shape: RoutingShape, plan: SteeringPlan) -> None:
    """Raise what attaching the plan to a model of this shape would raise, without attaching it."""
    banks_for(shape, [plan])


def banks_for(shape: RoutingShape, plans: Sequence[SteeringPlan]) -> list[Bank]:
    """The plans' tensors for each router, [L] banks.

    Raises:
        CompatibilityError: a vector of another model.
        SteeringError: layers or experts that the model does not have, or a plan that would do nothing.
    """
    for plan in plans:
        _check_fits(shape, plan)
    banks = _banks(shape.routers, range(len(shape.routers)), plans)
    for place, plan in enumerate(plans):
        does = any(
            bool(b.push[place].any() or b.forced[place].any() or b.banned[place].any() or b.active[place])
            for b in banks
        )
        if plan.does_something and not does:
            raise SteeringError(_nothing_to_do(plan))
    return banks


def _banks(routers: Sequence[RouterShape], numbers: Sequence[int], plans: Sequence[SteeringPlan]) -> list[Bank]:
    """The banks of the routers with these numbers, made together: one by one, 64 plans take several times as long."""
    widest, places = max(router.num_experts for router in routers), max(1, len(plans))
    experts_RPN = torch.zeros(len(routers), places, widest)
    active_RP = torch.zeros(len(routers), places, dtype=torch.long)
    for place, plan in enumerate(plans):
        inside_R1 = torch.tensor([_is_inside(plan, router.layer) for router in routers])[:, None]
        active_RP[:, place] = inside_R1[:, 0] * (plan.active_experts or 0)
        if plan.vector is not None and plan.strength:
            own_RN = plan.vector.experts[list(numbers), :widest]
            experts_RPN[:, place, : own_RN.shape[1]] = own_RN.where(inside_R1, 0.0)
    push_RPN = experts_RPN * torch.tensor([float(plan.strength) for plan in plans] or [0.0])[:, None]
    raised_RPN = experts_RPN > 0
    forced, banned = (_marks(routers, plans, name, places) for name in ("force", "ban"))
    may_lower_R = (push_RPN < 0).flatten(1).any(1).tolist()
    pushes_R = push_RPN.flatten(1).any(1).tolist()
    return [
        _bank(
            router,
            push_RPN[row, :, : router.num_experts].contiguous(),
            raised_RPN[row, :, : router.num_experts].contiguous(),
            (forced.get(router.layer), banned.get(router.layer)),
            active_RP[row],
            (may_lower_R[row], pushes_R[row]),
        )
        for row, router in enumerate(routers)
    ]


def _marks(routers: Sequence[RouterShape], plans: Sequence[SteeringPlan], name: str, places: int) -> dict[int, Tensor]:
    """The experts that plans force, or ban, in each of the layers where any does: [P, N] by layer."""
    experts_of: dict[int, int] = {}
    for router in routers:
        experts_of[router.layer] = max(router.num_experts, experts_of.get(router.layer, 0))
    found: dict[int, list[tuple[int, int]]] = {}
    for place, plan in enumerate(plans):
        for layer, expert in getattr(plan, name):  # lists can be long
            if layer in experts_of and _is_inside(plan, layer):
                found.setdefault(layer, []).append((place, expert))
    marks = {layer: torch.zeros(places, experts_of[layer], dtype=torch.bool) for layer in found}
    for layer, pairs in found.items():
        place_M, expert_M = torch.tensor(pairs).T
        marks[layer][place_M, expert_M] = True
    return marks


def _bank(
    router: RouterShape,
    push: Tensor,
    raised: Tensor,
    listed: tuple[Tensor | None, Tensor | None],
    active: Tensor,
    flags: tuple[bool, bool],
) -> Bank:
    """The bank of one router; `listed` is what is forced and banned, `flags` whether a push lowers, whether any is."""
    own = [None if marks is None else marks[:, : router.num_experts] for marks in listed]
    has_lists = any(marks is not None and bool(marks.any()) for marks in own)
    has_active = bool(active.any())
    none = torch.zeros(1, 1, dtype=torch.bool).expand_as(raised)  # one False for all
    forced, banned = (none if marks is None or not has_lists else marks for marks in own)
    wanted = raised if forced is none else raised | forced
    return Bank(
        push,
        raised,
        forced,
        banned,
        wanted if router.width == router.num_experts else pad(wanted, (0, router.width - router.num_experts)),
        active if has_active else torch.zeros(1, dtype=torch.long).expand_as(active),
        may_lower=flags[0],
        has_lists=has_lists,
        has_active=has_active,
        is_idle=not has_lists and not flags[1] and not has_active,
    )


def steered_layers(shape: RoutingShape, plan: SteeringPlan) -> int:
    """In how many of the model's MoE layers a plan does anything. Raises as `banks_for`."""
    return sum(not bank.is_idle for bank in banks_for(shape, [plan]))


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
