"""Spend a damage budget by layer: each layer of a vector gets a strength of its own, found greedily.

A strength by layer is a factor of that layer's row of E, so every engine and formula steers with it as with any vector.

Shapes: L MoE layers, N experts per layer.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from steermoe.errors import SteeringError
from steermoe.evaluation.calibration import calibrate, check_budget

if TYPE_CHECKING:
    from steermoe.evaluation.teacher_forcing import TextFigures
    from steermoe.models.loading import LoadedModel
    from steermoe.steering.plans import SteeringPlan
    from steermoe.vectors.vector import SteeringVector

LEVELS = (0.0, 0.5, 1.0, 2.0, 4.0)
"""What a layer's strength can be, as a multiple of the one that all layers share within the budget."""
SHARED = LEVELS.index(1.0)
COARSE = 0.05
"""Relative precision of strengths that are only compared."""
LEAST_KL = 1e-4
"""Nats. Less damage than this counts as this much, so that next to no damage does not make any gain the best one."""
CREATED_BY = "steermoe calibrate --by-layer"
LEAST_TEXTS, MOST_TEXTS, MAX_TOKENS = 4, 12, 64
"""The fewest texts of a domain; how many are read of it, and of neutral ones, and how many tokens of each."""
HELD_BACK = 3
"""Every this many-th text of the domain only decides whether strengths by layer helped."""
SMALL_GROUP = 4
"""So few layers are no longer tried together for whether they do anything."""

Levels = tuple[int, ...]
"""The place in `LEVELS` of each layer's strength, [L]."""


class Reading(Protocol):
    """Reads fixed texts under plans: `teacher_forcing.TeacherForcing`, for example."""

    def compare(self, plan: "SteeringPlan") -> "TextFigures":
        """Read the texts with steering."""


@dataclass(frozen=True)
class LayerStrengths:
    """What the layers of a vector got.

    Attributes:
        factors: of each row of E [L], where 1 is the strength that all layers would share within the budget.
        idle: rows of E whose experts change nothing, whatever their strength.
        gain, gain_alike: nats per token by which the domain's texts that were held back became likelier, with these
            strengths and with one for all layers, each within the budget.
    """

    factors: tuple[float, ...]
    idle: tuple[int, ...]
    gain: float
    gain_alike: float

    @property
    def helped(self) -> bool:
        """Whether strengths by layer are better than one for all."""
        return self.gain > self.gain_alike


def calibrate_layers(
    loaded: "LoadedModel", plan: "SteeringPlan", own: Sequence[str], neutral: Sequence[str], budget: float
) -> "tuple[SteeringVector, LayerStrengths]":
    """As `strengths_by_layer`, on texts; some of the domain's are held back. The vector says that it was done.

    Raises:
        SteeringError: as there. GenerationError: texts that are too short.
    """
    from steermoe.evaluation.teacher_forcing import TeacherForcing

    few = list(own[:MOST_TEXTS])
    sets = few[1::HELD_BACK] + few[2::HELD_BACK], few[::HELD_BACK], neutral[:MOST_TEXTS]
    read = [TeacherForcing(loaded, texts, max_tokens=MAX_TOKENS) for texts in sets]
    vector, found = strengths_by_layer(read[0], read[1], read[2], plan, budget)
    made_by = ", ".join(part for part in (vector.info.created_by, CREATED_BY) if part)
    return replace(vector, info=replace(vector.info, created_by=made_by)) if found.helped else vector, found


def strengths_by_layer(
    own: Reading, held_back: Reading, neutral: Reading, plan: "SteeringPlan", budget: float
) -> "tuple[SteeringVector, LayerStrengths]":
    """The vector with rows scaled by layer, if that helps, and what was found; its strength is still to be calibrated.

    From no steering at all, the layer is raised by a level that makes the domain's texts likelier by the most nats for
    each nat of damage, until the budget is spent.

    Args:
        own: texts of the domain.
        held_back: others of it, which only decide whether it helped.
        neutral: texts that are not about it.
        plan: the vector, with the formula and the scale to steer with; its strength does not matter.
        budget: 95th percentile of KL per token on the neutral texts, in nats.

    Raises:
        SteeringError: an impossible budget, or a vector that makes the domain's texts no likelier in any layer.
    """
    check_budget(budget)
    search = _Search(own, neutral, plan, budget)
    idle = search.idle()
    found = search.raise_layers(idle)
    if not any(found.levels):
        raise SteeringError(
            f"vector '{search.vector.domain}' makes its domain's texts no likelier in any layer within {budget:g} "
            "nats: give other texts with --heldout, raise the budget, or leave out --by-layer"
        )
    factors = tuple(LEVELS[level] for level in found.levels)
    by_layer = scaled(search.vector, factors)
    gain = _gain_within(by_layer, held_back, neutral, plan, budget)
    alike = _gain_within(search.vector, held_back, neutral, plan, budget)
    strengths = LayerStrengths(factors, tuple(sorted(idle)), gain, alike)
    return by_layer if strengths.helped else search.vector, strengths


def scaled(vector: "SteeringVector", factors: Sequence[float]) -> "SteeringVector":
    """The vector with each row of E [L, N] times its factor [L]."""
    return replace(vector, weights=vector.experts * torch.tensor(factors)[:, None])


def _gain_within(
    vector: "SteeringVector", own: Reading, neutral: Reading, plan: "SteeringPlan", budget: float
) -> float:
    """By how many nats per token texts get likelier at the strength that spends the budget."""
    plan = replace(plan, vector=vector)
    found = calibrate(lambda c: neutral.compare(replace(plan, strength=c)).kl_p95, budget, COARSE)
    figures = own.compare(replace(plan, strength=found.strength))
    return figures.nats_unsteered - figures.nats


@dataclass(frozen=True)
class _State:
    """Strengths by layer: what the domain's texts gain, and what neutral ones lose, in nats per token."""

    levels: Levels
    gain: float = 0.0
    kl_mean: float = 0.0
    kl_p95: float = 0.0


class _Search:
    """Raises the strengths of layers, one at a time. Arguments as for `strengths_by_layer`."""

    def __init__(self, own: Reading, neutral: Reading, plan: "SteeringPlan", budget: float) -> None:
        assert plan.vector is not None
        self.vector = plan.vector
        self._own, self._neutral, self._budget = own, neutral, budget
        shared = calibrate(lambda c: neutral.compare(replace(plan, strength=c)).kl_p95, budget, COARSE).strength
        self._plan = replace(plan, strength=shared)
        self._layers = len(self.vector.experts)

    def idle(self) -> set[int]:
        """The rows without weights, and those that change nothing at the highest level."""
        rows = self.vector.experts.any(-1).tolist()
        empty = {row for row, has_experts in enumerate(rows) if not has_experts}
        return empty | self._idle_among([row for row in range(self._layers) if row not in empty])

    def _idle_among(self, rows: list[int]) -> set[int]:
        """A group of rows is tried together, then its halves if it does anything, down to small groups."""
        if not rows:
            return set()
        levels = tuple(len(LEVELS) - 1 if row in rows else 0 for row in range(self._layers))
        tried = self._measure(levels)
        if tried.gain == tried.kl_mean == tried.kl_p95 == 0:
            return set(rows)
        if len(rows) <= SMALL_GROUP:
            return set()
        middle = len(rows) // 2
        return self._idle_among(rows[:middle]) | self._idle_among(rows[middle:])

    def raise_layers(self, idle: set[int]) -> _State:
        """The strengths that spend the budget; rows that turn out to be idle are added to `idle`.

        A raise is measured again only when it is the best one that is known (as in lazy greedy search), since raises of
        other layers mostly make it less worth while. The first one may exceed the budget, where its least level does:
        the strength that is calibrated afterwards brings it back.
        """
        state, turn = _State((0,) * self._layers), 0
        queue: list[tuple[float, int, int, _State]] = []

        def consider(row: int) -> None:
            raised = self._raised(state, row, idle)
            if raised is not None:
                heapq.heappush(queue, (-_worth(raised, state), row, turn, raised))

        for row in range(self._layers):
            if row not in idle:
                consider(row)
        while queue:
            _, row, when, raised = heapq.heappop(queue)
            if when < turn:
                consider(row)
            elif raised.kl_p95 <= self._budget or not any(state.levels):  # else this layer stays as it is
                state, turn = raised, turn + 1
                consider(row)
        return state

    def _raised(self, state: _State, row: int, idle: set[int]) -> _State | None:
        """With a row at its next level that makes the domain's texts likelier; None if there is none.

        A small push may do nothing or harm, where a larger one changes which experts are chosen, so all levels are
        tried. A row that changes nothing at any of them is added to `idle`.
        """
        changes = bool(state.levels[row])
        for level in range(state.levels[row] + 1, len(LEVELS)):
            raised = self._measure((*state.levels[:row], level, *state.levels[row + 1 :]))
            if raised.gain > state.gain:
                return raised
            changes |= (raised.gain, raised.kl_mean) != (state.gain, state.kl_mean)
        if not changes:
            idle.add(row)
        return None

    def _measure(self, levels: Levels) -> _State:
        plan = self._at(levels)
        own, neutral = self._own.compare(plan), self._neutral.compare(plan)
        return _State(levels, own.nats_unsteered - own.nats, neutral.kl_mean, neutral.kl_p95)

    def _at(self, levels: Levels) -> "SteeringPlan":
        return replace(self._plan, vector=scaled(self.vector, [LEVELS[level] for level in levels]))


def _worth(raised: _State, state: _State) -> float:
    """Nats per token that the domain's texts gain, for each nat of damage."""
    return (raised.gain - state.gain) / max(raised.kl_mean - state.kl_mean, LEAST_KL)
