"""The three steering formulas of Shchukin (2024), as pure functions on router logits. Knows nothing about models.

Shapes: T tokens, N experts of one layer. `logits_TN` are raw: before softmax, sigmoid, bias correction, groups, top-k.
`experts` is the expert vector E of the layer, [N] or one row per token [T, N]; `strength` is c, a number or [T, 1].
Everything is computed in the precision of `logits_TN`: callers pass float32. Imports no torch, only uses the tensors
that it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

Formula = Literal["additive", "max_scaled", "zero_max_scaled"]
FORMULAS: tuple[Formula, ...] = get_args(Formula)

Scale = Literal["magnitude", "paper"]
"""What (4) and (5) multiply by: `paper` uses max(z) itself, `magnitude` its absolute value.

They agree wherever max(z) > 0. Below zero, the paper's own sign turns steering towards experts into steering away.
"""
SCALES: tuple[Scale, ...] = get_args(Scale)

FORCE_MARGIN = 1.0
"""How far a forced expert's logit is raised above the largest one, at least."""
LOWEST, FLOOR = -40.0, -87.0
"""The largest of a token's logits stays above the first, every one above the second, unless it was below before.

The sigmoid of -87, 1.6e-38, is nearly the smallest number of float32.
"""
BAN_DEPTH = 1e4
"""How far a banned expert's logit is put below the largest one, at least; finite, so that softmax and sigmoid never
give NaN."""
FLOAT32_EPS = 2.0**-23


def additive(logits_TN: Tensor, experts: Tensor, strength: float | Tensor, scale: Scale = "magnitude") -> Tensor:
    """Equation (3): z + c E. `scale` has no effect; it is there so that all three have one signature."""
    return apply("additive", logits_TN, strength * experts, experts > 0, scale)


def max_scaled(logits_TN: Tensor, experts: Tensor, strength: float | Tensor, scale: Scale = "magnitude") -> Tensor:
    """Equation (4), the default: z + max(z) c E, the maximum over the experts of each token."""
    return apply("max_scaled", logits_TN, strength * experts, experts > 0, scale)


def zero_max_scaled(logits_TN: Tensor, experts: Tensor, strength: float | Tensor, scale: Scale = "magnitude") -> Tensor:
    """Equation (5): z set to 0 where E > 0, then + max(z) c E, with the maximum of the original z.

    With `magnitude` a negative strength never raises a logit: where zeroing would, the original stays.
    """
    return apply("zero_max_scaled", logits_TN, strength * experts, experts > 0, scale)


def apply(
    formula: Formula, logits_TN: Tensor, push: Tensor, raised: Tensor, scale: Scale, may_lower: bool = True
) -> Tensor:
    """Any of the three formulas, from tensors that can be prepared before tokens arrive.

    Args:
        formula: its name.
        logits_TN: z.
        push: c E, [N] or one row per token [T, N].
        raised: where E > 0, bool, of the same shape.
        scale: see `Scale`.
        may_lower: whether `push` can have negative entries; False saves time.
    """
    steered = _steered(formula, logits_TN, push, raised, scale, may_lower)
    return bound(steered, logits_TN) if may_lower or scale == "paper" else steered


def _steered(
    formula: Formula, logits_TN: Tensor, push: Tensor, raised: Tensor, scale: Scale, may_lower: bool
) -> Tensor:
    if formula == "additive":
        return logits_TN + push
    largest_T1 = logits_TN.amax(-1, keepdim=True)
    if scale == "magnitude":
        largest_T1 = largest_T1.abs()
    if formula == "max_scaled":
        return logits_TN.addcmul(largest_T1, push)
    steered = logits_TN.masked_fill(raised, 0.0).addcmul(largest_T1, push)
    if scale == "magnitude" and may_lower:
        return steered.where(push >= 0, steered.minimum(logits_TN))
    return steered


def apply_in_place(formula: Formula, logits_TN: Tensor, push: Tensor, raised: Tensor) -> Tensor:
    """As `apply` with `magnitude` and a push without negative entries, but in the memory of the logits.

    Shorter types than float32 are computed in float32 and rounded once.
    """
    if formula == "additive":
        return logits_TN.add_(push)
    largest_T1 = logits_TN.amax(-1, keepdim=True).abs_()
    kept = logits_TN if formula == "max_scaled" else logits_TN.masked_fill_(raised, 0.0)
    return kept.addcmul_(largest_T1, push)


def bound(steered_TN: Tensor, logits_TN: Tensor) -> Tensor:
    """Keep steered logits from sinking so far that a sigmoid makes them 0; routers divide by a sum of sigmoids.

    A token's logits move up together if all have sunk below `LOWEST`, and none sinks below `FLOOR`. What a softmax
    gives stays the same: a logit at `FLOOR` is 47 below the largest one or more, a weight of 4e-21.
    """
    largest_T1 = steered_TN.amax(-1, keepdim=True)
    have_sunk_T1 = (largest_T1 < LOWEST) & (largest_T1 < logits_TN.amax(-1, keepdim=True))
    some_sank_T1 = ((steered_TN < FLOOR) & (steered_TN < logits_TN)).any(-1, keepdim=True)
    lifted_TN = steered_TN.where(~have_sunk_T1, (steered_TN - largest_T1) + LOWEST)
    return lifted_TN.masked_fill((lifted_TN < FLOOR) & some_sank_T1, FLOOR)


BY_NAME: dict[Formula, Callable[[Tensor, Tensor, float | Tensor, Scale], Tensor]] = {
    "additive": additive,
    "max_scaled": max_scaled,
    "zero_max_scaled": zero_max_scaled,
}


def force(logits_TN: Tensor, forced: Tensor, eps: float = FLOAT32_EPS) -> Tensor:
    """Lift forced experts (bool, [N] or [T, N]) above all others, as SteerMoE (2509.09660) activates experts.

    Args:
        logits_TN: z.
        forced: the experts.
        eps: the precision of the type that the result is rounded to; by default float32's.
    """
    largest_T1 = logits_TN.amax(-1, keepdim=True)
    return logits_TN.where(~forced, largest_T1 + (largest_T1.abs() * eps).clamp(min=FORCE_MARGIN))


def ban(logits_TN: Tensor, banned: Tensor, eps: float = FLOAT32_EPS) -> Tensor:
    """Push banned experts (bool, [N] or [T, N]) far below all others, as SteerMoE and Mixture of Tunable Experts do.

    Args: as for `force`.
    """
    smallest_T1 = logits_TN.amin(-1, keepdim=True)
    below_T1 = smallest_T1 - (smallest_T1.abs() * eps).clamp(min=FORCE_MARGIN)
    return logits_TN.where(~banned, below_T1.minimum(logits_TN.amax(-1, keepdim=True) - BAN_DEPTH))
