"""Texts that llama.cpp writes: prompts are read one after the other, then all texts go on together, a token a call.

Imports no llama.cpp: a context that computes is handed in by `llamacpp`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steermoe.engines.base import Request
from steermoe.engines.callback_state import CallbackState
from steermoe.engines.text import Pieces
from steermoe.engines.token_sampler import TokenSampler
from steermoe.plans import SteeringPlan
from steermoe.steering import SteeringReport

CALL_TOKENS = 256
"""Tokens of a forward call at most; longer prompts are read in several."""


class Context(Protocol):
    """What computes; see `llamacpp`."""

    def forward(
        self, tokens: Sequence[int], positions: Sequence[int], texts: Sequence[int], wanted: Sequence[int] | None
    ) -> None:
        """Compute some tokens."""

    def logits(self, token: int) -> NDArray[np.float32]:
        """[V], of a token of the last call."""

    def forget(self, text: int) -> None:
        """Free the cache of one text."""


@dataclass(eq=False)
class Row:
    """One text that is being written."""

    number: int
    request: Request
    prompt: list[int]
    sampler: TokenSampler
    slot: int
    factor: NDArray[np.float32]
    pieces: Pieces | None
    new: list[int] = field(default_factory=list)
    finish_reason: str = ""

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.new)


class Run:
    """Writes some texts together, and keeps count of what was steered."""

    def __init__(
        self, context: Context, state: CallbackState, on_text: Callable[[str], None] | None, record: bool
    ) -> None:
        self._context, self._state, self._on_text, self._record = context, state, on_text, record
        self._calls = self._seen = self._steered = 0

    def write(self, rows: Sequence[Row], ends: set[int]) -> None:
        """Read all prompts, then a token a row and call until every row is finished."""
        for row in rows:
            self._take(row, self._read_prompt(row), ends)
        active = [row for row in rows if not row.finish_reason]
        while active:
            self._forward(
                active,
                [row.new[-1] for row in active],
                [row.length - 1 for row in active],
                range(len(active)),
            )
            logits = [self._context.logits(i) for i in range(len(active))]
            for row, own in zip(active, logits, strict=True):
                self._take(row, own, ends)
            active = [row for row in active if not row.finish_reason]

    def report(self) -> SteeringReport:
        hits, slots = self._state.take_share()
        return SteeringReport(self._calls, self._seen, self._steered, hits / slots if slots else 0.0)

    def _read_prompt(self, row: Row) -> NDArray[np.float32]:
        for start in range(0, len(row.prompt), CALL_TOKENS):
            part = row.prompt[start : start + CALL_TOKENS]
            count = len(part)
            # the last token's logits are wanted each time: without any, the last layer would not be computed
            self._forward([row] * count, part, range(start, start + count), [count - 1])
        return self._context.logits(count - 1)

    def _forward(
        self, rows: Sequence[Row], tokens: Sequence[int], places: Sequence[int], wanted: Sequence[int]
    ) -> None:
        factors = [row.factor[place] for row, place in zip(rows, places, strict=True)]
        texts = None
        if self._record:
            is_new = [place >= len(row.prompt) for row, place in zip(rows, places, strict=True)]
            texts = [row.number if new else -1 for row, new in zip(rows, is_new, strict=True)]
        self._steered += self._state.steer([row.slot for row in rows], factors, wanted, texts)  # type: ignore[arg-type]
        self._context.forward(tokens, places, [row.number for row in rows], wanted)
        self._calls += self._state.verify()
        self._seen += len(tokens)

    def _take(self, row: Row, logits: NDArray[np.float32], ends: set[int]) -> None:
        """Draw a row's next token and see whether it is the last."""
        token = row.sampler.draw(logits, row.prompt + row.new, len(row.new))
        if token in ends:
            row.finish_reason = "stop"
        else:
            row.new.append(token)
            if row.pieces is not None:
                self._send(row.pieces.add(token))
            if len(row.new) == row.request.sampling.max_new_tokens:
                row.finish_reason = "length"
        if row.finish_reason:
            self._context.forget(row.number)
            if row.pieces is not None:
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
