"""Find the largest strength whose damage stays within a budget.

Damage is the 95th percentile of KL(steered || unsteered) per token, in nats, on neutral texts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf, isnan
from typing import TYPE_CHECKING, Protocol

from steermoe.errors import SteeringError, count_of

if TYPE_CHECKING:
    from steermoe.formulas import Formula, Scale
    from steermoe.steering.plans import SteeringPlan
    from steermoe.vectors.vector import SteeringVector

DEFAULT_BUDGET = 1.0
LARGEST = 64.0
FIRST = 0.5
TOLERANCE = 0.02
LEAST_DAMAGE, MOST_OVERLAP = 0.05, 0.9
"""A vector does nothing if at the largest strength the damage, in nats, is below the first number, and the experts that
tokens choose overlap with those without steering by more than the second.
"""
SATURATED = 0.98
"""Above this share of the damage at the largest strength, more strength is taken to change nothing."""


class Damage(Protocol):
    """What steering changed on some texts: `teacher_forcing.TextFigures`, for example."""

    @property
    def kl_p95(self) -> float:
        """The 95th percentile of KL(steered || unsteered) per token, in nats."""

    @property
    def jaccard(self) -> float:
        """How much the experts that tokens choose overlap with those without steering, 0 to 1."""


class Forcing(Protocol):
    """Measures the damage of plans on fixed texts: `teacher_forcing.TeacherForcing`, for example."""

    def compare(self, plan: "SteeringPlan") -> Damage:
        """Read the texts with steering."""


@dataclass(frozen=True)
class Calibration:
    """The result of a calibration.

    Attributes:
        strength: the one to steer with.
        safe_range: from 0 to the largest strength up to which no measured one exceeds the budget.
        damage: nats, at the upper end of the safe range.
        budget: nats.
        saturates: the budget is never exceeded; then `strength` is the smallest with the full effect.
        measured: every strength that was tried, with its damage, in order.
    """

    strength: float
    safe_range: tuple[float, float]
    damage: float
    budget: float
    saturates: bool
    measured: tuple[tuple[float, float], ...]


def calibrate(
    damage_at: Callable[[float], float],
    budget: float = DEFAULT_BUDGET,
    tolerance: float = TOLERANCE,
    first: float = FIRST,
) -> Calibration:
    """Double the strength until it exceeds the budget, then bisect.

    Args:
        damage_at: the damage at a strength. It need not increase monotonically, but strengths between two measured ones
            within the budget are assumed to be within it too.
        budget: nats, above 0.
        tolerance: relative precision of the strength.
        first: the strength that is tried first.

    Raises:
        SteeringError: a budget that is not a positive number, or that even the smallest strength exceeds.
    """
    check_budget(budget)
    measured: dict[float, float] = {}

    def damage(strength: float) -> float:
        if strength not in measured:
            found = damage_at(strength)  # a divergence: only rounding takes it below 0, only overflow makes it NaN
            measured[strength] = inf if isnan(found) else max(found, 0.0)
        return measured[strength]

    low, high = 0.0, first
    while damage(high) <= budget and high < LARGEST:
        low, high = high, high * 2
    saturates = damage(high) <= budget
    if saturates:
        limit, enough = high, SATURATED * damage(high)
        low, high = _between(_around(measured, enough), lambda strength: damage(strength) >= enough, tolerance)
        strength = high
    else:
        low, high = _between((low, high), lambda strength: damage(strength) > budget, tolerance)
        strength = limit = low
    if not limit:
        raise SteeringError(
            f"even strength {min(measured):g} costs {measured[min(measured)]:.3g} nats, budget is {budget:g}: "
            "raise the budget"
        )
    return Calibration(strength, (0.0, limit), damage(limit), budget, saturates, tuple(sorted(measured.items())))


def check_budget(budget: float) -> None:
    """Reject an invalid budget before long work.

    Raises:
        SteeringError: it is not a positive number.
    """
    if not 0 < budget < float("inf"):
        raise SteeringError(f"budget {budget} must be a number above 0, in nats, such as {DEFAULT_BUDGET:g}")


def calibrate_vector(
    teacher_forcing: Forcing,
    vector: "SteeringVector",
    budget: float = DEFAULT_BUDGET,
    formula: "Formula | None" = None,
    scale: "Scale | None" = None,
    tolerance: float = TOLERANCE,
    first: float = FIRST,
) -> "tuple[SteeringVector, Calibration]":
    """The vector with its calibrated strength, formula, scale, safe range and damage, and the calibration.

    Args:
        teacher_forcing: neutral texts, on the model that the vector is for.
        vector: what to calibrate.
        budget: nats.
        formula: by default the vector's own.
        scale: by default the vector's own.
        tolerance: as for `calibrate`.
        first: as for `calibrate`.

    Raises:
        SteeringError: an impossible budget, or a vector that does nothing at any strength.
    """
    from steermoe.steering.plans import plan_for

    plan = plan_for(vector, 1.0, formula=formula, scale=scale)

    def damage_at(strength: float) -> float:
        return teacher_forcing.compare(replace(plan, strength=strength)).kl_p95

    found = calibrate(damage_at, budget, tolerance, first)
    if found.saturates and found.damage < LEAST_DAMAGE:
        _check_effect(vector, found.damage, teacher_forcing.compare(replace(plan, strength=LARGEST)).jaccard)
    info = replace(
        vector.info,
        strength=found.strength,
        formula=plan.formula,
        scale=plan.scale,
        safe_range=found.safe_range,
        damage=found.damage,
    )
    return replace(vector, info=info), found


def _check_effect(vector: "SteeringVector", damage: float, overlap: float) -> None:
    """Raise if even the largest strength leaves predictions and routing alone: any strength would look safe."""
    if overlap > MOST_OVERLAP:
        layers = int((vector.experts != 0).any(-1).sum())
        raise SteeringError(
            f"vector '{vector.domain}' does nothing: strength {LARGEST:g} costs {damage:.2g} nats and leaves "
            f"{overlap:.0%} of the routing as it is; it has experts in {layers} of "
            f"{count_of(vector.num_layers, 'layer')}: build it from other texts (`steermoe vectors build --texts`), or "
            "with a lower --threshold"
        )


def _around(measured: dict[float, float], enough: float) -> tuple[float, float]:
    """The measured strengths just below and above where the damage first reaches `enough`."""
    high = min(strength for strength, damage in measured.items() if damage >= enough)
    return max((strength for strength in measured if strength < high), default=0.0), high


def _between(ends: tuple[float, float], is_beyond: Callable[[float], bool], tolerance: float) -> tuple[float, float]:
    """Narrow an interval whose upper end is beyond the limit and whose lower end is not, to two decimals."""
    low, high = ends
    while high - low > max(0.01, tolerance * low):
        middle = round((low + high) / 2, 2)
        if middle in (low, high):
            break
        low, high = (low, middle) if is_beyond(middle) else (middle, high)
    return low, high
