"""The three steering formulas of Shchukin (2024), as pure functions on router logits. Knows nothing about models.

Shapes: T tokens, N experts of one layer. `logits_TN` are raw: before softmax, sigmoid, bias correction, groups, top-k.
`experts` is the expert vector E of the layer, [N] or one row a token [T, N]; `strength` is c, a number or [T, 1].
Everything is computed in the precision of `logits_TN`: callers pass float32. Imports no torch: tensors bring theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

Formula = Literal["additive", "max_scaled", "zero_max_scaled"]
FORMULAS: tuple[Formula, ...] = get_args(Formula)

Scale = Literal["magnitude", "paper"]
"""What (4) and (5) multiply by: `paper` max(z), exactly; `magnitude` its absolute value.

They agree wherever max(z) > 0. Below zero, the paper's own sign turns steering towards experts into steering away.
"""
SCALES: tuple[Scale, ...] = get_args(Scale)

FORCE_MARGIN = 1.0
"""By how much a forced expert's logit tops the largest one."""
BAN_DEPTH = 1e4
"""How far below the largest logit a banned expert's falls; finite, so that no softmax or sigmoid turns into NaN."""


def additive(logits_TN: Tensor, experts: Tensor, strength: float | Tensor, scale: Scale = "magnitude") -> Tensor:
    """Equation (3): z + c E. `scale` changes nothing; it is there so that the three have one signature."""
    return logits_TN + strength * experts


def max_scaled(logits_TN: Tensor, experts: Tensor, strength: float | Tensor, scale: Scale = "magnitude") -> Tensor:
    """Equation (4): z + max(z) c E, the maximum over the experts of each token."""
    return logits_TN + _largest(logits_TN, scale) * strength * experts


def zero_max_scaled(logits_TN: Tensor, experts: Tensor, strength: float | Tensor, scale: Scale = "magnitude") -> Tensor:
    """Equation (5), the default: z set to 0 where E > 0, then + max(z) c E, with the maximum of the original z.

    With `magnitude` a negative strength never raises a logit: where zeroing would, the original stays.
    """
    zeroed = logits_TN.where(experts <= 0, 0.0)
    steered = zeroed + _largest(logits_TN, scale) * strength * experts
    if scale == "paper" or (isinstance(strength, float | int) and strength >= 0):
        return steered
    return steered.where(strength * experts >= 0, steered.minimum(logits_TN))


def _largest(logits_TN: Tensor, scale: Scale) -> Tensor:
    largest_T1 = logits_TN.amax(-1, keepdim=True)
    return largest_T1 if scale == "paper" else largest_T1.abs()


BY_NAME: dict[Formula, Callable[[Tensor, Tensor, float | Tensor, Scale], Tensor]] = {
    "additive": additive,
    "max_scaled": max_scaled,
    "zero_max_scaled": zero_max_scaled,
}


def force(logits_TN: Tensor, forced: Tensor) -> Tensor:
    """Lift forced experts (bool, [N] or [T, N]) above all others, as SteerMoE (2509.09660) activates experts."""
    return logits_TN.where(~forced, logits_TN.amax(-1, keepdim=True) + FORCE_MARGIN)


def ban(logits_TN: Tensor, banned: Tensor) -> Tensor:
    """Push banned experts (bool, [N] or [T, N]) far below all others, as SteerMoE and Mixture of Tunable Experts do."""
    return logits_TN.where(~banned, logits_TN.amax(-1, keepdim=True) - BAN_DEPTH)
