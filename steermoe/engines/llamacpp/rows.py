"""Texts that llama.cpp writes together: prompts are read one after the other, then all go on, a token a call.

Imports no llama.cpp: a context that computes is handed in.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steermoe.engines.llamacpp.sampler import TokenSampler
from steermoe.engines.llamacpp.state import CallbackState
from steermoe.engines.request import Request
from steermoe.engines.text import Pieces
from steermoe.steering.plans import SteeringPlan
from steermoe.steering.report import SteeringReport

CALL_TOKENS = 256
"""Tokens of a forward call at most; longer prompts are read in several."""


class Context(Protocol):
    """What computes; see `context`.

    Attributes:
        texts, cells: how many texts have room for how many tokens each.
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
        """Let another text go on as this one does."""

    def forget(self, text: int) -> None:
        """Free the cache of one text."""


@dataclass(eq=False)
class Row:
    """One text that is being written.

    Attributes:
        number: its place in the context's cache, and among the rows in flight.
        text: its place among the texts whose choices are counted.
        slot: its plan's place among those that the callback knows, or -1.
        new: its tokens so far; all but the last one are in the cache, behind the prompt's.
        finish_reason: empty until it is finished.
    """

    request: Request
    prompt: list[int]
    sampler: TokenSampler
    factor: NDArray[np.float32]
    pieces: Pieces | None = None
    started: float = field(default_factory=time.perf_counter)
    number: int = -1
    text: int = -1
    slot: int = -1
    new: list[int] = field(default_factory=list)
    finish_reason: str = ""

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.new)

    @property
    def most(self) -> int:
        """Tokens that it may come to."""
        return len(self.prompt) + self.request.sampling.max_new_tokens

    @property
    def beginning(self) -> tuple[Any, ...]:
        """Equal for rows whose prompts are computed alike."""
        plan = self.request.plan
        return tuple(self.prompt), None if plan is None or plan.positions == "generated" else plan


class Run:
    """Writes texts together, each from its own beginning to its own end, and keeps count of what was steered.

    Each has a cache of its own, so what it reads does not depend on the others. llama.cpp computes those texts in one
    go whose numbers follow each other, so the last one takes the place of one that is finished.

    Attributes:
        context: what computes; to be changed only when no row is in flight.
        rows: in flight.
    """

    def __init__(
        self,
        context: Context,
        state: CallbackState,
        ends: set[int],
        on_text: Callable[[str], None] | None = None,
    ) -> None:
        self.context = context
        self.rows: list[Row] = []
        self._state, self._ends, self._on_text = state, ends, on_text
        self._plans: list[SteeringPlan] = []
        self._calls = self._seen = self._steered = self._hits = self._slots = 0
        state.install([])
        state.take_share()

    def begin(self, rows: Sequence[Row]) -> list[Row]:
        """Read the prompts, one after the other, equal ones once, and draw each row's first token.

        Returns:
            the rows that are finished with it.
        """
        self._install([*self.rows, *rows])
        for row in rows:
            row.number = len(self.rows)
            self.rows.append(row)
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            groups.setdefault(row.beginning, []).append(row)
        for group in groups.values():
            logits = self._read_prompt(group[0])
            for row in group[1:]:
                self.context.copy(group[0].number, row.number)
            for row in group:
                self._take(row, logits)
        return self._drop()

    def step(self) -> list[Row]:
        """Add a token to every row in flight; those that are finished with it."""
        rows = self.rows
        if not rows:
            return []
        self._forward(rows, [row.new[-1] for row in rows], [row.length - 1 for row in rows], range(len(rows)))
        for number, row in enumerate(rows):
            self._take(row, self.context.logits(number))
        return self._drop()

    def report(self) -> SteeringReport:
        hits, slots = self._state.take_share()
        self._hits += hits
        self._slots += slots
        return SteeringReport(self._calls, self._seen, self._steered, self._hits, self._slots)

    def _drop(self) -> list[Row]:
        """Take the finished rows out, and close the gaps that they leave."""
        finished = [row for row in self.rows if row.finish_reason]
        for row in reversed(finished):
            last = self.rows.pop()
            if last is not row:
                self.context.copy(last.number, row.number)
                last.number = row.number
                self.rows[row.number] = last
            self.context.forget(len(self.rows))
        return finished

    def _install(self, rows: Sequence[Row]) -> None:
        """Let the callback know the plans of all rows."""
        plans = list(dict.fromkeys(row.request.plan for row in rows if row.request.plan is not None))
        if plans != self._plans:
            self._state.install(plans)
        self._plans = plans
        for row in rows:
            row.slot = -1 if row.request.plan is None else plans.index(row.request.plan)

    def _read_prompt(self, row: Row) -> NDArray[np.float32]:
        for start in range(0, len(row.prompt), CALL_TOKENS):
            part = row.prompt[start : start + CALL_TOKENS]
            count = len(part)
            # the last token's logits are wanted each time: without any, the last layer would not be computed
            self._forward([row] * count, part, range(start, start + count), [count - 1])
        return self.context.logits(count - 1)

    def _forward(
        self, rows: Sequence[Row], tokens: Sequence[int], places: Sequence[int], wanted: Sequence[int]
    ) -> None:
        factors = [row.factor[place] for row, place in zip(rows, places, strict=True)]
        texts = None
        if len(self._state.counts):
            is_new = [place >= len(row.prompt) for row, place in zip(rows, places, strict=True)]
            texts = [row.text if new else -1 for row, new in zip(rows, is_new, strict=True)]
        self._steered += self._state.steer([row.slot for row in rows], factors, wanted, texts)  # type: ignore[arg-type]
        self.context.forward(tokens, places, [row.number for row in rows], wanted)
        self._calls += self._state.verify()
        self._seen += len(tokens)

    def _take(self, row: Row, logits: NDArray[np.float32]) -> None:
        """Draw a row's next token and see whether it is the last."""
        token = row.sampler.draw(logits, row.prompt + row.new, len(row.new))
        if token in self._ends:
            row.finish_reason = "stop"
        else:
            row.new.append(token)
            if row.pieces is not None:
                self._send(row.pieces.add(token))
            if len(row.new) == row.request.sampling.max_new_tokens:
                row.finish_reason = "length"
        if row.finish_reason and row.pieces is not None:
            self._send(row.pieces.rest())

    def _send(self, text: str) -> None:
        if text and self._on_text is not None:
            self._on_text(text)


def factors_of(plan: SteeringPlan | None, prompt: int, new: int) -> NDArray[np.float32]:
    """By how much the plan's strength is multiplied at each place of the text."""
    if plan is None:
        return np.zeros(prompt + new, dtype=np.float32)
    return plan.factor(torch.arange(-prompt, new)).float().numpy()


def frequency_of(counts: NDArray[np.int64]) -> Tensor | None:
    """Routing embedding F [L, N], or None if nothing was counted."""
    sums = counts.sum(-1, keepdims=True)
    return torch.from_numpy((counts / sums).astype(np.float32)) if sums.all() else None
