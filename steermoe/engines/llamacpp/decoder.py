"""Continuous batching: a text that is finished makes room in llama.cpp's cache for the next one."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from steermoe.engines.decoding import finish
from steermoe.engines.engine import OnToken
from steermoe.engines.llamacpp.rows import Context, LlamaRow, Run, frequency_of
from steermoe.engines.llamacpp.sampler import TokenSampler
from steermoe.engines.request import Completion, Request
from steermoe.steering.plans import SteeringPlan
from steermoe.steering.report import SteeringReport
from steermoe.steering.tags import ModelTags

if TYPE_CHECKING:
    from steermoe.engines.llamacpp.state import CallbackState
    from steermoe.engines.llamacpp.tokenizer import GGUFTokenizer


class RollingDecoder:
    """As `engine.Decoder`. The cache has room for a fixed number of tokens per row. A row that may need more waits
    until no row is in flight; then the cache is made larger.

    Args:
        context: creates an empty context, given how many texts it needs room for and how many tokens of each.
        state: the callback's state; nothing else may use it in the meantime.
        tokenizer: the model's tokenizer.
        rows: at most this many run together.
        recorded: how many requests there will be, to also fill `Completion.frequency`; 0 leaves it empty.
        tags: the model's; by default none.
        least: how many texts the cache has room for at least, and how many tokens of each.
    """

    def __init__(
        self,
        context: Callable[[int, int], Context],
        state: "CallbackState",
        tokenizer: "GGUFTokenizer",
        rows: int,
        recorded: int = 0,
        tags: ModelTags | None = None,
        least: tuple[int, int] = (1, 0),
    ) -> None:
        self._tags = tags or ModelTags()
        self._least = least
        self._context, self._state, self._tokenizer = context, state, tokenizer
        self._most, self._recorded = rows, recorded
        self._run: Run | None = None
        self._given = 0
        self._was_steered = False
        self.clear()

    def __len__(self) -> int:
        return len(self._waiting) + (len(self._run.rows) if self._run is not None else 0)

    def clear(self) -> None:
        self._waiting: deque[LlamaRow] = deque()
        if self._run is not None:
            self._run.clear()

    def close(self) -> None:
        self.clear()

    def report(self) -> SteeringReport | None:
        return self._run.report() if self._run is not None and self._was_steered else None

    def start(
        self,
        requests: Sequence[Request],
        prompts: Sequence[list[int]],
        on_text: Callable[[str], None] | None = None,
        on_token: OnToken | None = None,
    ) -> None:
        ends = self._tokenizer.ends
        for request, prompt in zip(requests, prompts, strict=True):
            sampler = TokenSampler(request.sampling, sorted(ends))
            tags = self._tags.of(request.plan)
            shape = self._state.shape if request.trace else None
            row = LlamaRow(
                request,
                prompt,
                self._tokenizer,
                ends,
                sampler,
                on_text,
                self._given,
                tags=tags,
                on_token=on_token,
                shape=shape,
            )
            self._waiting.append(row)
            self._given += 1
            self._was_steered |= request.plan is not None

    def drop(self, request: Request) -> None:
        for row in self._rows():
            if row.request is request:
                row.end("interrupted")

    def steer(self, request: Request, plan: SteeringPlan | None) -> None:
        for row in self._rows():
            if row.request is request:
                row.steer(plan, self._tags.of(plan))
                self._was_steered |= plan is not None
                if self._run is not None and row in self._run.rows:
                    self._run.follow(row)

    def _dropped(self) -> list[LlamaRow]:
        """Take out the rows that have ended since the last step."""
        dropped = [] if self._run is None else self._run.drop()
        dropped += [row for row in self._waiting if row.finish_reason]
        self._waiting = deque(row for row in self._waiting if not row.finish_reason)
        return dropped

    def _rows(self) -> list[LlamaRow]:
        return [*self._waiting, *(self._run.rows if self._run is not None else ())]

    def step(self) -> list[Completion]:
        finished = self._dropped()
        finished += self._begin()
        if self._run is not None:
            finished += self._run.step()
        if not self._recorded:
            return [finish(row) for row in finished]
        return [finish(row, frequency_of(self._state.counts[row.number])) for row in finished]

    def _begin(self) -> list[LlamaRow]:
        """Start as many rows as there is room for, in order; returns those that end with their first token."""
        if not self._waiting:
            return []
        if self._run is None or not self._run.rows:
            self._make_room()
        assert self._run is not None
        context = self._run.context
        free = context.texts - len(self._run.rows)
        beginning: list[LlamaRow] = []
        while self._waiting and len(beginning) < free and self._waiting[0].most <= context.cells:
            beginning.append(self._waiting.popleft())
        return self._run.begin(beginning) if beginning else []

    def _make_room(self) -> None:
        """Get a cache for all rows that can run together; only while none is in flight."""
        rows = list(self._waiting)[: self._most]
        texts, cells = max(len(rows), self._least[0]), max(self._least[1], *(row.most for row in rows))
        context = self._context(texts, cells)
        if self._run is None:
            self._state.record(self._recorded)
            self._run = Run(context, self._state)
        self._run.context = context
