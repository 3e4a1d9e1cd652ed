"""Tells stories in an engine: rows are refilled as they are finished, and a batch that was too large for the memory is
halved. Knows no files.
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
from steermoe.engines.request import Completion, Request
from steermoe.errors import BatchError, SteerMoEError
from steermoe.steering.plans import SteeringPlan
from steermoe.steering.report import SteeringReport

WINDOW = 1024
"""Stories that are looked at together, to put those of similar length side by side."""
REFILL_SHARE = 16
"""New rows begin when a sixteenth of all are free: one by one, each would make all others wait for its prompt."""
GROW_AFTER = 16
"""Times as many stories as rows have to go well before a batch that was halved is doubled again."""

LeaveOut = Callable[[Job, str], None]
"""Called with a story that can't be told, and why."""


@dataclass(frozen=True, eq=False)
class Story:
    """A job that is not told yet, with its key and its plan."""

    job: Job
    key: int
    plan: SteeringPlan | None


class Teller(Protocol):
    """Tells stories, here or elsewhere."""

    @property
    def rows(self) -> int:
        """Rows at once, at most."""

    @property
    def report(self) -> SteeringReport | None:
        """What was steered, once all is told; None if nothing was to be."""

    def tell(self, stories: Iterator[Story], leave_out: LeaveOut) -> Generator[dict[str, Any], None, None]:
        """The record of each story, as they are finished.

        Raises:
            SteeringError: steering that was asked for did not happen.
        """


@dataclass(eq=False)
class _Ready:
    """A job with its request and the tokens of its prompt."""

    job: Job
    key: int
    request: Request
    prompt: list[int]

    @property
    def tokens(self) -> int:
        """That it may come to."""
        return len(self.prompt) + self.request.sampling.max_new_tokens


class EngineTeller:
    """Tells stories in an engine of this process.

    Args:
        rows: rows at once; None for what the memory allows.
    """

    def __init__(self, engine: Engine, rows: int | None = None) -> None:
        if rows is not None and rows < 1:
            raise BatchError(f"batch size {rows} is out of range: expected 1 or more")
        self._engine = engine
        self._finished_since_halving = 0
        self._most_rows = engine.most_rows if rows is None else rows
        self.rows = self._most_rows
        self.report: SteeringReport | None = None
        self._room = engine.room() if rows is None else None

    def tell(self, stories: Iterator[Story], leave_out: LeaveOut) -> Generator[dict[str, Any], None, None]:
        """As `Teller.tell`."""
        decoder = self._engine.decoder(self._most_rows)
        try:
            for ready, completion in self._complete(decoder, self._ready(stories, leave_out), leave_out):
                yield self._record(ready, completion)
            self.report = decoder.report()
        finally:
            decoder.close()

    def _ready(self, fresh: Iterator[Story], leave_out: LeaveOut) -> Iterator[_Ready]:
        """Stories to tell, those of similar length side by side, as far as a window reaches; the longest first."""
        while window := list(islice(fresh, WINDOW)):
            ready, prompts = [], dict[str, list[int]]()
            for story in window:
                job = story.job
                request = Request(job.prompt, story.plan, job.sampling)
                try:
                    prompt = self._engine.encode(request, prompts.get(job.prompt))
                except SteerMoEError as error:
                    leave_out(job, str(error))
                    continue
                prompts[job.prompt] = prompt
                ready.append(_Ready(job, story.key, request, prompt))
            yield from sorted(ready, key=lambda one: -one.tokens)

    def _complete(
        self, decoder: Decoder, stories: Iterator[_Ready], leave_out: LeaveOut
    ) -> Iterator[tuple[_Ready, Completion]]:
        """Bring stories through the decoder, each as soon as there is room for it."""
        flying: dict[Request, _Ready] = {}
        waiting: deque[_Ready] = deque()
        while True:
            waiting.extend(islice(stories, max(0, self.rows - len(waiting))))
            beginning = self._next(flying, waiting)
            try:
                if beginning:
                    flying.update((one.request, one) for one in beginning)
                    decoder.start([one.request for one in beginning], [one.prompt for one in beginning])
                done = decoder.step()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failed = first_line(error)
                done = None
            if done is None:  # outside of `except`, where the error would hold on to the memory
                decoder.clear()
                self._halve(flying, waiting, failed, leave_out)
                continue
            self._grow(len(done))
            for completion in done:
                yield flying.pop(completion.request), completion
            if not flying and not waiting:
                waiting.extend(islice(stories, 1))
                if not waiting:
                    return

    def _next(self, flying: dict[Request, _Ready], waiting: deque[_Ready]) -> list[_Ready]:
        """The stories to begin now: all that there is room for, if it is worth making the others wait."""
        free = self.rows - len(flying)
        if flying and free < min(self.rows // REFILL_SHARE, len(waiting)):
            return []
        found: list[_Ready] = []
        longest = max((one.tokens for one in flying.values()), default=0)
        while waiting and len(found) < free:
            longest = max(longest, waiting[0].tokens)
            if self._room is not None and self._room.rows(longest) <= len(flying) + len(found) and (flying or found):
                break
            found.append(waiting.popleft())
        return found

    def _halve(self, flying: dict[Request, _Ready], waiting: deque[_Ready], failed: str, leave_out: LeaveOut) -> None:
        """Begin again with half as many rows; a story for which memory is short all alone is left out."""
        begun = list(flying.values())
        flying.clear()
        if len(begun) == 1:
            leave_out(begun.pop().job, f"there is not enough memory for this story alone ({failed})")
        self.rows = max(1, min(self.rows, len(begun)) // 2)
        self._finished_since_halving = 0
        waiting.extendleft(reversed(begun))
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    def _grow(self, finished: int) -> None:
        """Take more rows again when all went well for long: it may have been a single long story."""
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
            **({} if job.meta is None else {"meta": job.meta}),
        }


def _listed(plan: SteeringPlan | None, name: str) -> list[str]:
    return [f"{layer}:{expert}" for layer, expert in getattr(plan, name)] if plan else []


def first_line(error: BaseException) -> str:
    """What an error says, short; its type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
