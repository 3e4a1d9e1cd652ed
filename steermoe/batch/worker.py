"""Generates stories in an engine: finished rows are refilled, and a batch that is too large for the memory is halved.
Knows no files.
"""

import gc
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch

from steermoe.batch.jobs import Job
from steermoe.engines.engine import Decoder, Engine
from steermoe.engines.memory import is_out_of_memory
from steermoe.engines.messages import Chat, Message
from steermoe.engines.request import Completion, Request
from steermoe.errors import BatchError, SteerMoEError
from steermoe.steering.plans import SteeringPlan
from steermoe.steering.report import SteeringReport

WINDOW = 1024
"""Stories that are sorted together, so that those of similar length run side by side."""
REFILL_SHARE = 16
"""New rows start when 1/16 of all rows are free: started one by one, each prompt would make all other rows wait."""
GROW_AFTER = 16
"""A batch that was halved is doubled again after 16 stories per row without trouble."""

Skip = Callable[[Job, str], None]
"""Called with a job whose story can't be generated, and the reason."""


@dataclass(frozen=True, eq=False)
class PlannedJob:
    """A job with the key of its story and its plan."""

    job: Job
    key: int
    plan: SteeringPlan | None


class Worker(Protocol):
    """Generates stories, in this process or elsewhere."""

    @property
    def rows(self) -> int:
        """The most rows at once."""

    @property
    def report(self) -> SteeringReport | None:
        """The steering report, once all stories are finished; None if none of them was to be steered."""

    def generate(self, jobs: Iterator[PlannedJob], skip: Skip) -> Generator[dict[str, Any], None, None]:
        """The record of each story, in the order in which stories are finished.

        Raises:
            SteeringError: requested steering did not happen.
        """


@dataclass(eq=False)
class _Ready:
    """A job with its request and the tokens of its prompt."""

    job: Job
    key: int
    request: Request
    prompt: list[int]

    @property
    def most_tokens(self) -> int:
        """The most tokens that its story can have, prompt included."""
        return len(self.prompt) + self.request.sampling.max_new_tokens


class EngineWorker:
    """Generates stories in an engine of this process.

    Args:
        engine: the engine.
        rows: rows at once; None for as many as the memory allows.
        on_trace: called with each story's record and its completion, which then has a trace.
    """

    def __init__(
        self,
        engine: Engine,
        rows: int | None = None,
        on_trace: Callable[[dict[str, Any], Completion], None] | None = None,
    ) -> None:
        if rows is not None and rows < 1:
            raise BatchError(f"batch size {rows} is out of range: expected 1 or more")
        self._engine, self._on_trace = engine, on_trace
        self._finished_since_halving = 0
        self._most_rows = engine.most_rows if rows is None else rows
        self.rows = self._most_rows
        self.report: SteeringReport | None = None
        self._room = engine.room() if rows is None else None

    def generate(self, jobs: Iterator[PlannedJob], skip: Skip) -> Generator[dict[str, Any], None, None]:
        """As `Worker.generate`."""
        decoder = self._engine.decoder(self._most_rows)
        try:
            for ready, completion in self._complete(decoder, self._ready(jobs, skip), skip):
                if failed := completion.missed or completion.unanswered:
                    skip(ready.job, failed)
                else:
                    record = self._record(ready, completion)
                    if self._on_trace is not None:
                        self._on_trace(record, completion)
                    yield record
            self.report = decoder.report()
        finally:
            decoder.close()

    def _ready(self, jobs: Iterator[PlannedJob], skip: Skip) -> Iterator[_Ready]:
        """Jobs with their tokens, sorted by length within each window; the longest first."""
        while window := list(islice(jobs, WINDOW)):
            ready, prompts, chats = [], dict[str, list[int]](), dict[tuple[Message, ...], Chat]()
            for planned in window:
                job = planned.job
                try:
                    if job.messages and job.messages not in chats:
                        chats[job.messages] = self._engine.chat(job.messages, job.thinking)
                    chat = chats.get(job.messages)
                    is_traced = self._on_trace is not None
                    request = Request(job.prompt, planned.plan, job.sampling, job.special_tokens, chat, is_traced)
                    request.require_steered()
                    prompt = self._engine.encode(request, prompts.get(job.prompt) if chat is None else None)
                except SteerMoEError as error:
                    skip(job, str(error))
                    continue
                if chat is None:
                    prompts[job.prompt] = prompt
                ready.append(_Ready(job, planned.key, request, prompt))
            yield from sorted(ready, key=lambda one: -one.most_tokens)

    def _complete(self, decoder: Decoder, ready: Iterator[_Ready], skip: Skip) -> Iterator[tuple[_Ready, Completion]]:
        """Run jobs in the decoder, each as soon as there is room for it."""
        running: dict[Request, _Ready] = {}
        waiting: deque[_Ready] = deque()
        while True:
            waiting.extend(islice(ready, max(0, self.rows - len(waiting))))
            starting = self._next(running, waiting)
            try:
                if starting:
                    running.update((one.request, one) for one in starting)
                    decoder.start([one.request for one in starting], [one.prompt for one in starting])
                done = decoder.step()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failed = first_line(error)
                done = None
            if done is None:  # outside of `except`, where the error would keep the memory in use
                decoder.clear()
                self._halve(running, waiting, failed, skip)
                continue
            self._grow(len(done))
            for completion in done:
                yield running.pop(completion.request), completion
            if not running and not waiting:
                waiting.extend(islice(ready, 1))
                if not waiting:
                    return

    def _next(self, running: dict[Request, _Ready], waiting: deque[_Ready]) -> list[_Ready]:
        """The jobs to start now: all that there is room for, if that is worth making the others wait."""
        free = self.rows - len(running)
        if running and free < min(self.rows // REFILL_SHARE, len(waiting)):
            return []
        found: list[_Ready] = []
        longest = max((one.most_tokens for one in running.values()), default=0)
        while waiting and len(found) < free:
            longest = max(longest, waiting[0].most_tokens)
            if self._room is not None and self._room.rows(longest) <= len(running) + len(found) and (running or found):
                break
            found.append(waiting.popleft())
        return found

    def _halve(self, running: dict[Request, _Ready], waiting: deque[_Ready], failed: str, skip: Skip) -> None:
        """Start the rows again, half as many at once; a story that does not fit into memory even alone is skipped."""
        started = list(running.values())
        running.clear()
        if len(started) == 1:
            skip(started.pop().job, f"there is not enough memory for this story alone ({failed})")
        self.rows = max(1, min(self.rows, len(started)) // 2)
        self._finished_since_halving = 0
        waiting.extendleft(reversed(started))
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    def _grow(self, finished: int) -> None:
        """Double the rows again after a while without trouble: one long story may have been the reason."""
        self._finished_since_halving += finished
        if self.rows < self._most_rows and self._finished_since_halving >= GROW_AFTER * self.rows:
            self.rows = min(2 * self.rows, self._most_rows)
            self._finished_since_halving = 0

    def _record(self, ready: _Ready, completion: Completion) -> dict[str, Any]:
        job, plan = ready.job, ready.request.plan
        record = completion.as_dict(self._engine.name)
        del record["steering"]
        record["domain"] = "+".join(job.steering.domain) if plan is not None and plan.vector is not None else None
        return {
            "job": f"{ready.key:016x}",
            "id": job.id,
            "line": job.line,
            "sample": job.sample,
            **record,
            "dtype": self._engine.dtype,
            "force": _listed(plan, "force"),
            "ban": _listed(plan, "ban"),
            **({"special_tokens": True} if job.special_tokens else {}),
            **({} if job.meta is None else {"meta": job.meta}),
        }


def _listed(plan: SteeringPlan | None, name: str) -> list[str]:
    return [f"{layer}:{expert}" for layer, expert in getattr(plan, name)] if plan else []


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters; its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
