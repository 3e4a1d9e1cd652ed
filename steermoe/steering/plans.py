"""Plans: everything that decides how tokens are steered, with a vector's own values as defaults.

Knows nothing about models.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from steermoe.errors import SteeringError, quoted, shown
from steermoe.formulas import FORMULAS, SCALES, Formula, Scale
from steermoe.routing.positions import POSITIONS, Positions, select
from steermoe.steering.limits import LARGEST, MOST_STRENGTH, check_count, check_listed, check_tags, whole
from steermoe.vectors.vector import SteeringVector

DEFAULT_FORMULA: Formula = "max_scaled"
"""At equal damage it reached more texts than (5), whose effect jumps where c E passes 1 (docs/evidence.md)."""
DEFAULT_SCALE: Scale = "magnitude"
DEFAULT_STRENGTH = 8.0
"""For vectors that were not calibrated; `steermoe calibrate` finds their own."""

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

Numbers = TypeVar("Numbers", "Tensor", "NDArray[np.floating[Any]]")
"""Tensors, or arrays of floats: what is computed of equal numbers is equal to the bit."""

SCHEDULES = {
    "constant": "the same for all tokens",
    "decay:N": "falls linearly from token 0 to nothing at token N",
    "window:A-B": "tokens A to B - 1 only",
    "first:N": "the first N tokens only, 0 to N - 1",
    "after:N": "token N and all after it",
}
"""What each schedule does to the strength, by how it is written."""

LayerExpert = tuple[int, int]
"""(decoder layer, expert)."""


@dataclass(frozen=True)
class Schedule:
    """How the strength changes over the generated tokens. Prompt tokens, if they are steered, get the full strength.

    `constant`; `decay:N` falls linearly to 0 over N tokens, as in the authors' notebook; `window:A-B` steers only
    tokens A to B-1, `first:N` only tokens 0 to N-1, `after:N` only tokens from N on. Which token is number 0 depends on
    the positions (`routing.positions.EXTENT`).

    Raises:
        SteeringError: another kind, or numbers that it can't have; they go up to `limits.LARGEST`.
    """

    kind: Literal["constant", "decay", "window", "first", "after"] = "constant"
    start: int = 0
    stop: int = 0

    def __post_init__(self) -> None:
        numbers = (self.start, self.stop)
        is_right = all(isinstance(number, int) and 0 <= number <= LARGEST for number in numbers) and (
            self.kind in ("constant", "after")
            or (self.kind in ("decay", "first") and self.stop > 0)
            or (self.kind == "window" and self.start < self.stop)
        )
        if not is_right:
            raise _unknown(f"{self.kind}, {shown(self.start)}, {shown(self.stop)}")

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        if text == "constant":
            return cls()
        match = re.fullmatch(r"(decay|first|after):([0-9]+)|window:([0-9]+)-([0-9]+)", text)
        if not match:
            raise _unknown(text)
        kind, *digits = match.groups()
        number, start, stop = (None if one is None else whole(one, "schedule: token") for one in digits)
        if kind == "after" and number is not None:
            return cls("after", number)
        if number:
            return cls("decay" if kind == "decay" else "first", 0, number)
        if start is None or stop is None or start >= stop:
            raise _unknown(text)
        return cls("window", start, stop)

    def factor(self, index: Numbers) -> Numbers:
        """The factor for the strength at generated token number `index` (negative in the prompt), float32."""
        at: Any = index
        match self.kind:
            case "constant":
                return _single(at == at)
            case "decay":
                return _single((1 - at.clip(min=0) / self.stop).clip(min=0))
            case "after":
                return _single((at < 0) | (at >= self.start))
        return _single((at < 0) | ((at >= self.start) & (at < self.stop)))

    def __str__(self) -> str:
        return {
            "constant": "constant",
            "decay": f"decay:{self.stop}",
            "window": f"window:{self.start}-{self.stop}",
            "first": f"first:{self.stop}",
            "after": f"after:{self.start}",
        }[self.kind]


def _single(numbers: Any) -> Any:
    """In float32, tensor or array."""
    return numbers.astype(np.float32, copy=False) if isinstance(numbers, np.ndarray | np.generic) else numbers.float()


def _unknown(schedule: str) -> SteeringError:
    return SteeringError(
        f"schedule '{quoted(schedule)}' is unknown: use constant, decay:N or first:N (N over 0), after:N or window:A-B "
        "(A below B), in tokens"
    )


@dataclass(frozen=True)
class SteeringPlan:
    """Everything that decides how tokens are steered.

    Attributes:
        vector: the expert vector to steer with; None if only `force` and `ban` are wanted.
        strength: c of the formulas; negative steers away from the domain, 0 leaves the model exactly as it is.
        formula: `additive` (3), `max_scaled` (4) or `zero_max_scaled` (5).
        scale: see `formulas.Scale`.
        positions: `generated` tokens (the default), or others; see `routing.positions.EXTENT`.
        schedule: a Schedule or its text.
        layers: steer only decoder layers (first, last), both included; None for all.
        force, ban: experts that every steered token must, or must not, be sent to, each as (decoder layer, expert).
        think_tags: the texts before and after what the model thinks; None for its own.
        active_experts: how many experts every steered token gets; None for as many as the model gives it.

    Raises:
        SteeringError: an unknown name, a strength or a number that is out of range, or nothing to do.
    """

    vector: SteeringVector | None = None
    strength: float = DEFAULT_STRENGTH
    formula: Formula = DEFAULT_FORMULA
    scale: Scale = DEFAULT_SCALE
    positions: Positions = "generated"
    schedule: Schedule = field(default_factory=Schedule)
    layers: tuple[int, int] | None = None
    force: tuple[LayerExpert, ...] = ()
    ban: tuple[LayerExpert, ...] = ()
    think_tags: tuple[str, str] | None = None
    active_experts: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("formula", FORMULAS), ("scale", SCALES), ("positions", POSITIONS)):
            if (value := getattr(self, name)) not in known:
                raise SteeringError(f"{name} '{quoted(str(value))}' is unknown: use {', '.join(known)}")
        if isinstance(self.schedule, str):
            object.__setattr__(self, "schedule", Schedule.parse(self.schedule))
        self._check_strength()
        if self.think_tags is not None:
            object.__setattr__(self, "think_tags", check_tags(self.think_tags))
        for name in ("force", "ban"):
            check_listed(getattr(self, name))
            object.__setattr__(self, name, tuple(_pair(name, entry) for entry in getattr(self, name)))
        if self.layers is not None:
            object.__setattr__(self, "layers", _pair("layers", self.layers))
            if not 0 <= self.layers[0] <= self.layers[1]:
                raise SteeringError(
                    f"layers {self.layers[0]}-{self.layers[1]} is not a range: give first and last, counted from 0"
                )
        if self.active_experts is not None:
            object.__setattr__(self, "active_experts", check_count(self.active_experts))
        if self.vector is None and not self.force and not self.ban and self.active_experts is None:
            raise SteeringError("a plan needs a vector, experts to force or ban, or a number of active experts")
        if both := sorted(set(self.force) & set(self.ban)):
            raise SteeringError(f"experts {both[:3]} are both forced and banned: keep each in one of the lists")

    def _check_strength(self) -> None:
        """What is added to logits must stay finite: NaN would spoil a text, and all that share its cached blocks."""
        number = self.strength
        if not isinstance(number, int | float) or not abs(number) <= MOST_STRENGTH:
            of = "" if self.vector is None else f" for '{quoted(self.vector.domain)}'"
            raise SteeringError(
                f"strength {shown(number)}{of} is out of range: expected a finite number from "
                f"{-MOST_STRENGTH:g} to {MOST_STRENGTH:g}, such as {DEFAULT_STRENGTH:g}"
            )
        if self.vector is None:
            return
        largest = self.vector.largest
        if abs(number) * largest > MOST_STRENGTH * 1.01:  # 1, up to rounding, is the most that frequencies are
            raise SteeringError(
                f"strength {number:g} times the largest weight of '{quoted(self.vector.domain)}', {largest:g}, is out "
                f"of range: expected at most {MOST_STRENGTH:g}; lower one of them"
            )

    def as_dict(self) -> dict[str, Any]:
        """Everything but the vector's numbers, as JSON values, for completions, vLLM's wire format and story keys.

        The first four keys keep the order that completions have always had.
        """
        named = {"domain": None if self.vector is None else self.vector.domain, "formula": None, "scale": None}
        return {**named, **{f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "vector"}}

    @property
    def does_something(self) -> bool:
        return bool(self.force or self.ban or self.active_experts) or (self.vector is not None and self.strength != 0)

    def factor(self, index: Numbers) -> Numbers:
        """How strongly each token is steered, as a multiple of the strength.

        Args:
            index: the number of each token: among those that the schedule counts, negative in the prompt, and far below
                that if the token is left alone (`positions.NOWHERE`).
        """
        number: Any = index + 1 if self.positions == "last-prompt" else index
        return self.schedule.factor(number) * select(self.positions, index) * self.does_something

    def steers(self, prompt: int, generated: int) -> bool:
        """Whether it may steer any token of a text; where that depends on tags, whether it would if all were inside.

        Args:
            prompt: tokens of the prompt.
            generated: generated tokens that the model reads; it does not read the last one of a text.
        """
        firsts = [-1] * (prompt > 0)  # of the prompt, of what is generated, of a window: they stand for the others
        start = self.schedule.start
        firsts += [first for first in {0, start, max(0, start - 1)} if first < generated]
        return bool(firsts) and bool(self.factor(np.array(firsts, dtype=np.float64)).any())


def _pair(name: str, value: Any) -> tuple[int, int]:
    if isinstance(value, Sequence) and len(value) == 2 and all(isinstance(number, int) for number in value):
        if all(abs(number) <= LARGEST for number in value):
            return value[0], value[1]
        raise SteeringError(f"{name}: {shown(value)} is out of range, expected whole numbers from 0 to {LARGEST}")
    wanted = "(first, last)" if name == "layers" else "(layer, expert) pairs"
    raise SteeringError(f"{name}: {shown(value)} is wrong, expected {wanted} of whole numbers, such as (3, 5)")


def _plain(value: Any) -> Any:
    """Tuples as lists, a schedule as its text."""
    if isinstance(value, tuple):
        return list(map(_plain, value))
    return str(value) if isinstance(value, Schedule) else value


UNSTEERED = {**dict.fromkeys(SteeringPlan(ban=((0, 0),)).as_dict()), "strength": 0.0}
"""What `SteeringPlan.as_dict` would return for no plan."""


def plan_for(vector: SteeringVector | None, strength: float | None = None, **fields: Any) -> SteeringPlan:
    """A plan; strength, formula and scale default to those that the vector was calibrated with."""
    info = vector.info if vector is not None else None
    if strength is None:
        strength = info.strength if info and info.strength is not None else DEFAULT_STRENGTH
    for name in ("formula", "scale"):
        if fields.get(name) is None:
            fields[name] = getattr(info, name, None) or {"formula": DEFAULT_FORMULA, "scale": DEFAULT_SCALE}[name]
    return SteeringPlan(vector, strength, **fields)


def doubts(plan: SteeringPlan | None) -> list[str]:
    """Warnings about a plan's strength: that it is a guess, or beyond the calibrated range."""
    return [] if plan is None else [warning for warning in (guessed_strength(plan), beyond_safe_range(plan)) if warning]


def guessed_strength(plan: SteeringPlan) -> str:
    """A warning if the strength is the default one because the vector has none of its own; "" otherwise."""
    if plan.vector is None or plan.vector.info.strength is not None or plan.strength != DEFAULT_STRENGTH:
        return ""
    return (
        f"'{plan.vector.domain}' is not calibrated: strength {plan.strength:g} is a guess, which may do nothing or "
        "spoil the text; `steermoe calibrate` measures how strong it can be"
    )


def beyond_safe_range(plan: SteeringPlan) -> str:
    """A warning if the strength is outside the range that the vector was calibrated to; "" otherwise.

    Also "" if no range is known, or if the plan's formula or scale is not the one that the range was measured with.
    """
    info = plan.vector.info if plan.vector is not None else None
    if plan.vector is None or info is None or info.safe_range is None:
        return ""
    if (info.formula, info.scale) != (plan.formula, plan.scale):
        return ""
    low, high = info.safe_range
    if low <= plan.strength <= high:
        return ""
    measured = f" (damage there: {info.damage:.2g} nats)" if info.damage is not None else ""
    return (
        f"strength {plan.strength:g} is outside {low:g} to {high:g}, the safe range that '{plan.vector.domain}' was "
        f"calibrated to{measured}: the text may suffer; `steermoe calibrate` measures it"
    )
