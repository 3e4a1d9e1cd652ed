"""Continuous batching: a text that is finished makes room in llama.cpp's cache for the next one."""

import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from steermoe.engines.llamacpp.rows import Row, Run
from steermoe.engines.request import Completion, Request
from steermoe.steering.report import SteeringReport

if TYPE_CHECKING:
    from steermoe.engines.llamacpp.engine import LlamaCppEngine


class RollingDecoder:
    """As `base.Decoder`. The cache has room for so many tokens a row: one that may become longer waits until none is in
    flight, and it is made larger.

    Args:
        engine: which must do nothing else meanwhile.
        rows: that go on together at most.
    """

    def __init__(self, engine: "LlamaCppEngine", rows: int) -> None:
        self._engine = engine
        self._most = rows
        self._run: Run | None = None
        self._was_steered = False
        self.clear()

    def __len__(self) -> int:
        return len(self._waiting) + (len(self._run.rows) if self._run is not None else 0)

    def clear(self) -> None:
        self._waiting: deque[Row] = deque()
        if self._run is not None:
            self._run.rows = []

    def close(self) -> None:
        self.clear()

    def report(self) -> SteeringReport | None:
        return self._run.report() if self._run is not None and self._was_steered else None

    def start(self, requests: Sequence[Request], prompts: Sequence[list[int]]) -> None:
        for request, prompt in zip(requests, prompts, strict=True):
            self._waiting.append(self._engine.row(request, prompt))
            self._was_steered |= request.plan is not None

    def step(self) -> list[Completion]:
        finished = self._begin()
        if self._run is not None:
            finished += self._run.step()
        now = time.perf_counter()
        return [self._engine.completion(row, now - row.started) for row in finished]

    def _begin(self) -> list[Row]:
        """Begin as many rows as there is room for, in their order; those that are finished with their first token."""
        if not self._waiting:
            return []
        if self._run is None or not self._run.rows:
            self._make_room()
        assert self._run is not None
        context = self._run.context
        free = context.texts - len(self._run.rows)
        beginning: list[Row] = []
        while self._waiting and len(beginning) < free and self._waiting[0].most <= context.cells:
            beginning.append(self._waiting.popleft())
        return self._run.begin(beginning) if beginning else []

    def _make_room(self) -> None:
        """Where nothing is in flight, a cache for all that could go on together."""
        rows = list(self._waiting)[: self._most]
        context = self._engine.context(len(rows), max(row.most for row in rows))
        if self._run is None:
            self._engine.state.record(0)
            self._run = Run(context, self._engine.state, self._engine.tokenizer.ends)
        self._run.context = context
