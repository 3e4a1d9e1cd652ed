"""Lay out plans as tensors for each layer of a model."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from steermoe.routing.shape import RouterShape, RoutingShape
from steermoe.steering.plans import SteeringPlan
from steermoe.steering.tables import LayerTable, tables_for


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
        return cls.from_table(router, LayerTable.of(router, number, plans))

    @classmethod
    def from_table(cls, router: RouterShape, table: LayerTable) -> "Bank":
        """The same numbers in the same memory."""
        push, raised, forced, banned, active = map(
            torch.from_numpy, (table.push, table.raised, table.forced, table.banned, table.active)
        )
        none = torch.zeros(1, 1, dtype=torch.bool).expand_as(raised)  # one False for all
        has_active, is_forcing, is_banning = (bool(own.any()) for own in (active, forced, banned))
        has_lists = is_forcing or is_banning
        wanted = raised | forced if is_forcing else raised
        return cls(
            push,
            raised,
            forced if is_forcing else none,
            banned if is_banning else none,
            wanted if router.width == router.num_experts else pad(wanted, (0, router.width - router.num_experts)),
            active if has_active else torch.zeros(1, dtype=torch.long).expand_as(active),
            may_lower=bool((push < 0).any()),
            has_lists=has_lists,
            has_active=has_active,
            is_idle=not (has_lists or has_active or bool(push.any())),
        )

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


def banks_for(shape: RoutingShape, plans: Sequence[SteeringPlan]) -> list[Bank]:
    """The plans' tensors for each router, [L] banks. Raises as `tables_for`."""
    tables = tables_for(shape, plans)
    return [Bank.from_table(router, table) for router, table in zip(shape.routers, tables, strict=True)]
