"""Steering as tensors that a compiled step takes along with its tokens: one step serves any mix of plans.

A row without a plan gets zeros, and its logits come out unchanged.

Shapes: R routers, B rows, N experts, k experts chosen per token, P distinct plans.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from steermoe import formulas
from steermoe.steering.banks import Bank
from steermoe.steering.plans import SteeringPlan


@dataclass(frozen=True, eq=False)
class Edits:
    """What happens to the logits of each row.

    Attributes:
        push: [R, B, N], strength times schedule times expert vector.
        zeroed: [R, B, N], logits that are set to 0 first, as in (5).
        forced, banned: [R, B, N], experts of the lists.
        additive: [B, 1], rows whose push is not multiplied by the largest logit, as in (3).
        magnitude: [B, 1], rows that take the largest logit without its sign.
        only_lower: [B, 1], rows where a negative push may never raise a logit.
    """

    push: Tensor
    zeroed: Tensor
    forced: Tensor
    banned: Tensor
    additive: Tensor
    magnitude: Tensor
    only_lower: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    @classmethod
    def none(cls, routers: int, rows: int, experts: int) -> "Edits":
        """Edits that leave every row alone."""
        marks = torch.zeros(routers, rows, experts, dtype=torch.bool)
        flags = torch.zeros(rows, 1, dtype=torch.bool)
        return cls(
            torch.zeros(routers, rows, experts),
            marks,
            marks.clone(),
            marks.clone(),
            flags,
            flags.clone(),
            flags.clone(),
        )

    @classmethod
    def of(
        cls, plans: Sequence[SteeringPlan], banks: Sequence[Bank], numbers: Sequence[int], factor_B: Tensor
    ) -> "Edits":
        """Edits of rows that follow the plans with these numbers (-1 for none), each at a multiple of its strength.

        Args:
            plans: the distinct plans.
            banks: the banks of those plans, one per router.
            numbers: one per row.
            factor_B: 0 for rows that are not steered now.
        """
        plan_B = torch.tensor(numbers).clamp(min=0)
        steered_B1 = (factor_B != 0)[:, None] & (torch.tensor(numbers) >= 0)[:, None]
        factor_B1 = torch.where(steered_B1, factor_B[:, None], 0.0)

        def flag(*wanted: bool) -> Tensor:
            return torch.tensor(wanted)[plan_B, None] & steered_B1

        def marks(name: str) -> Tensor:
            return torch.stack([getattr(bank, name)[plan_B] & steered_B1 for bank in banks])

        five = flag(*(plan.formula == "zero_max_scaled" for plan in plans))
        magnitude = flag(*(plan.scale == "magnitude" for plan in plans))
        return cls(
            push=torch.stack([bank.push[plan_B] * factor_B1 for bank in banks]),
            zeroed=marks("raised") & five,
            forced=marks("forced"),
            banned=marks("banned"),
            additive=flag(*(plan.formula == "additive" for plan in plans)),
            magnitude=magnitude,
            only_lower=five & magnitude,
        )


def edit(logits_BN: Tensor, router: int, tensors: Sequence[Tensor], eps: float = formulas.FLOAT32_EPS) -> Tensor:
    """What `formulas.apply`, `force` and `ban` do, for rows of different plans at once, float32.

    Args:
        logits_BN: one router's logits.
        router: its number.
        tensors: as `Edits.tensors` returns them.
        eps: as for `formulas.force`.
    """
    push, zeroed, forced, banned, additive, magnitude, only_lower = tensors
    push_BN = push[router]
    largest_B1 = logits_BN.amax(-1, keepdim=True)
    gain_B1 = torch.where(additive, 1.0, torch.where(magnitude, largest_B1.abs(), largest_B1))
    steered = logits_BN.masked_fill(zeroed[router], 0.0) + gain_B1 * push_BN
    steered = torch.where(only_lower & (push_BN < 0), steered.minimum(logits_BN), steered)
    steered = formulas.bound(steered, logits_BN)
    return formulas.ban(formulas.force(steered, forced[router], eps), banned[router], eps)


def count_listed(tensors: Sequence[Tensor], chosen_RBk: Tensor) -> Tensor:
    """Places of forced experts that they took, all of them, and the same of banned ones, [4]."""
    _, _, forced_RBN, banned_RBN, *_ = tensors
    was_chosen_RBN = torch.zeros_like(forced_RBN).scatter_(2, chosen_RBk, True)
    both = (forced_RBN, banned_RBN)
    return torch.stack([count for marks in both for count in ((marks & was_chosen_RBN).sum(), marks.sum())])
