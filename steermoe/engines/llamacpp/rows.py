"""Texts that llama.cpp generates together: it reads prompts one after another, then each call adds a token to all.

Imports no llama.cpp: it is passed the context that computes.
"""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from steermoe.engines.decoding import Row, by_prompt, score_of
from steermoe.engines.llamacpp.sampler import TokenSampler
from steermoe.engines.llamacpp.state import CallbackState
from steermoe.engines.request import TokenScore
from steermoe.routing.positions import NOWHERE
from steermoe.steering.mapping import PlanMapping
from steermoe.steering.plans import SteeringPlan
from steermoe.steering.report import SteeringReport

if TYPE_CHECKING:
    from torch import Tensor

CALL_TOKENS = 256
"""The most tokens of a forward call; longer prompts are read in several."""


class Context(Protocol):
    """The part of `context.Context` that is needed here.

    Attributes:
        texts, cells: room for this many texts, with this many tokens each.
    """

    texts: int
    cells: int

    def forward(
        self, tokens: Sequence[int], positions: Sequence[int], texts: Sequence[int], wanted: Sequence[int] | None
    ) -> None:
        """Compute some tokens."""

    def logits(self, token: int) -> NDArray[np.float32]:
        """[V], of a token of the last call."""

    def copy(self, text: int, to: int) -> None:
        """Let another text continue as this one does."""

    def forget(self, text: int) -> None:
        """Free the cache of one text."""


LlamaRow = Row[TokenSampler]
"""`number` is its place among the texts whose choices are counted."""


class Run:
    """Generates texts together, each from its own beginning to its own end, and counts what is steered.

    Each text has a cache of its own, so what it reads does not depend on the others. llama.cpp computes texts in one go
    if their places in the cache are adjacent, so the last one takes the place of one that is finished.

    Attributes:
        context: computes; change it only while no row is in flight.
        rows: the rows in flight; a row's index here is its place in the context's cache.
    """

    def __init__(self, context: Context, state: CallbackState) -> None:
        self.context = context
        self._state = state
        self._plans = PlanMapping()
        self._calls = self._seen = self._steered = self._hits = self._slots = 0
        self._listed = SteeringReport()
        self._is_traced = False
        state.install([])
        state.take_share()
        state.take_listed()
        self.clear()

    def clear(self) -> None:
        """Forget the rows in flight."""
        self.rows: list[LlamaRow] = []
        self._followed: list[int] = []
        self._factors: dict[LlamaRow, list[float]] = {}

    def begin(self, rows: Sequence[LlamaRow]) -> list[LlamaRow]:
        """Read the prompts one after another, equal ones once, and draw each row's first token.

        Returns:
            the rows that end with it.
        """
        self._install([row.plan for row in [*self.rows, *rows]])
        self.rows += rows
        for row in rows:
            self._factors[row] = factors_of(row.plan, len(row.prompt), row.request.sampling.max_new_tokens).tolist()
        for group in by_prompt(rows):
            first, *others = (self.rows.index(row) for row in group)
            logits = self._read_prompt(first)
            for other in others:
                self.context.copy(first, other)
            for row in group:
                self._take(row, logits)
        return self.drop()

    def follow(self, row: LlamaRow) -> None:
        """Steer a row in flight by the plan that it has now."""
        self._install([one.plan for one in self.rows])
        self._factors[row] = factors_of(row.plan, len(row.prompt), row.request.sampling.max_new_tokens).tolist()

    def step(self) -> list[LlamaRow]:
        """Add a token to every row in flight; returns the rows that end with it."""
        rows = self.rows
        if not rows:
            return []
        places = range(len(rows))
        self._forward(places, [row.new[-1] for row in rows], [row.cached for row in rows], places)
        for place, row in enumerate(rows):
            self._take(row, self.context.logits(place))
        return self.drop()

    def report(self) -> SteeringReport:
        hits, slots = self._state.take_share()
        self._hits += hits
        self._slots += slots
        self._listed += SteeringReport(**self._state.take_listed())
        return SteeringReport(self._calls, self._seen, self._steered, self._hits, self._slots) + self._listed

    def drop(self) -> list[LlamaRow]:
        """Take the finished rows out, and close the gaps that they leave; returns them."""
        finished = [row for row in self.rows if row.finish_reason]
        for row in reversed(finished):
            place, last = self.rows.index(row), self.rows.pop()
            if last is not row:
                self.context.copy(len(self.rows), place)
                self.rows[place] = last
            self.context.forget(len(self.rows))
            del self._factors[row]
        if finished:
            self._followed = self._plans.numbers(row.plan for row in self.rows)
        return finished

    def _install(self, plans: Sequence[SteeringPlan | None]) -> None:
        """Pass the plans of all rows to the callback."""
        if not self._plans.knows(plans):
            mapping = PlanMapping(plans)
            self._state.install(mapping.plans)
            self._plans = mapping
        self._followed = self._plans.numbers(plans)

    def _read_prompt(self, place: int) -> NDArray[np.float32]:
        prompt = self.rows[place].prompt
        for start in range(0, len(prompt), CALL_TOKENS):
            part = prompt[start : start + CALL_TOKENS]
            count = len(part)
            # ask for the last token's logits each time: without any, the last layer would not be computed
            self._forward([place] * count, part, range(start, start + count), [count - 1])
        return self.context.logits(count - 1)

    def _forward(
        self, places: Sequence[int], tokens: Sequence[int], positions: Sequence[int], wanted: Sequence[int]
    ) -> None:
        """Compute tokens, each with its row's place and its position in the row's text."""
        at = [(self.rows[place], position) for place, position in zip(places, positions, strict=True)]
        factors = [self._factor(row, position) for row, position in at]
        texts = None
        if len(self._state.counts):
            texts = [row.number if position >= len(row.prompt) else -1 for row, position in at]
        slots = self._traced(at)
        if slots or self._is_traced:
            self._state.trace(slots)
            self._is_traced = bool(slots)
        self._steered += self._state.steer([self._followed[place] for place in places], factors, wanted, texts)  # type: ignore[arg-type]
        self.context.forward(tokens, positions, places, wanted)
        self._calls += self._state.verify()
        self._seen += len(tokens)
        if slots:
            chosen, unsteered = self._state.take_traced()
            for (row, _), slot in zip(at, slots, strict=True):
                if slot >= 0 and row.recorder is not None:
                    place = row.place
                    row.recorder.read(len(row.new) - 1, chosen[slot], unsteered[slot], row.plan, place)

    def _traced(self, at: Sequence[tuple[LlamaRow, int]]) -> list[int]:
        """Where the choices of each token are kept while its call runs; -1 if it is not traced, [] if none is."""
        if all(row.recorder is None for row in self.rows):
            return []
        numbers = itertools.count()
        slots = [
            next(numbers) if row.recorder is not None and position >= len(row.prompt) else -1 for row, position in at
        ]
        return slots if max(slots) >= 0 else []

    def _factor(self, row: LlamaRow, position: int) -> float:
        """The factor of a token: one of the prompt, or the last one that the row has taken."""
        number = position - len(row.prompt)
        if number >= 0:
            number = row.place
        return 0.0 if number == NOWHERE else self._factors[row][len(row.prompt) + number]

    def _take(self, row: LlamaRow, logits: NDArray[np.float32]) -> None:
        token = row.sampler.draw(logits, row.prompt + row.new, len(row.new))
        if row.recorder is not None:
            row.recorder.drew(logprob_of(token, logits))
        most = row.request.logprobs
        row.take(token, None if most is None else _score_of(logits, token, most))


def _score_of(logits: NDArray[np.float32], token: int, most: int) -> TokenScore:
    """As `decoding.score_of`, of logits [V]; only where scores are asked for is torch imported."""
    import torch

    return score_of(torch.tensor(logits), token, most)


def logprob_of(token: int, logits: NDArray[np.float32]) -> float:
    """The natural logarithm of a token's probability by logits [V]."""
    largest = logits.max()
    return float(logits[token] - largest - np.log(np.exp(logits - largest).sum(dtype=np.float64)))


def factors_of(plan: SteeringPlan | None, prompt: int, new: int) -> NDArray[np.float32]:
    """[prompt + new], by how much the plan's strength is multiplied at the tokens with these numbers."""
    if plan is None:
        return np.zeros(prompt + new, dtype=np.float32)
    return plan.factor(np.arange(-prompt, new, dtype=np.float32))


def frequency_of(counts: NDArray[np.int64]) -> "Tensor | None":
    """Routing embedding F [L, N], or None if nothing was counted."""
    import torch

    sums = counts.sum(-1, keepdims=True)
    return torch.from_numpy((counts / sums).astype(np.float32)) if sums.all() else None
