"""Brings jobs through an engine and their stories into a file: what is told already is passed over, rows are refilled
as they are finished, and a batch that was too large for the memory is halved.
"""

import gc
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steermoe.batch.jobs import KEPT_TEXT, STEERING_FIELDS, Job, Problem, PromptFile, Settings
from steermoe.batch.output import ErrorFile, StoryFile
from steermoe.batch.plans import PlanBook
from steermoe.engines.base import Completion, Decoder, Engine, Request, Sampling
from steermoe.engines.memory import is_out_of_memory
from steermoe.errors import BatchError, SteerMoEError
from steermoe.plans import SteeringPlan
from steermoe.steering import SteeringReport

WINDOW = 1024
"""Stories that are looked at together, to put those of similar length side by side."""
REFILL_SHARE = 16
"""New rows begin when a sixteenth of all are free: one by one, each would make all others wait for its prompt."""
GROW_AFTER = 16
"""Times as many stories as rows have to go well before a batch that was halved is doubled again."""

Progress = Callable[[int, int], None]
"""Called with the stories and tokens done since the last call."""


@dataclass(frozen=True)
class Summary:
    """What became of a batch.

    Attributes:
        stories: those asked for that are in the file now. new: told by this run. already: found there.
        lines_left_out: lines that could not be used, or that repeat others. failed: stories of good lines that could
            not be told.
        tokens, seconds: of the new ones.
        rows: rows at once, after halving if memory was short.
    """

    stories: int
    new: int
    already: int
    lines_left_out: int
    failed: int
    tokens: int
    seconds: float
    rows: int
    report: SteeringReport | None

    def as_dict(self) -> dict[str, Any]:
        rate = self.tokens / self.seconds if self.seconds else 0.0
        found = {**asdict(self), "seconds": round(self.seconds, 3), "tokens_per_second": round(rate, 1)}
        found["steering"] = found.pop("report")
        return found


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


class Batch:
    """A file of prompts on its way into a file of stories: `prepare` first, then `run`.

    Args:
        engine: the model in its engine.
        prompts: what to tell. settings: how, where a line doesn't say.
        output: where to.
        vectors: a folder of vectors to search first.
        keep: go on with a file that holds other stories too, instead of refusing it.
        errors: takes what is left out.
        on_problem: told of each line or story that is left out.
        rows: rows at once; None for what the memory allows.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: PromptFile,
        settings: Settings,
        output: StoryFile,
        *,
        vectors: Path | None = None,
        keep: bool = False,
        errors: ErrorFile | None = None,
        on_problem: Callable[[Problem], None] = lambda problem: None,
        rows: int | None = None,
    ) -> None:
        if rows is not None and rows < 1:
            raise BatchError(f"batch size {rows} is out of range: expected 1 or more")
        self._engine = engine
        self._prompts, self._settings, self._output = prompts, settings, output
        self._book = PlanBook(engine, vectors)
        self._keep, self._errors, self._on_problem = keep, errors or ErrorFile(None), on_problem
        self._asked = _Numbers(array("Q"))
        self._told = _Numbers(array("Q"))
        self._lines_left_out = self._failed = 0
        self._finished_since_halving = 0
        self._last_left_out = (0, "")
        self._most_rows = engine.most_rows if rows is None else rows
        self.rows = self._most_rows
        """Rows at once, at most."""
        self._room = engine.room() if rows is None else None

    # ---- before ----

    @property
    def total(self) -> int:
        """Stories that are asked for."""
        return len(self._asked)

    @property
    def already(self) -> int:
        """How many of them are in the file."""
        return len(self._told)

    def prepare(self) -> None:
        """Read all prompts and the stories so far; of each only a number is kept.

        Raises:
            BatchError: no line can be used, or the file holds stories that are not asked for.
            SteerMoEError: what holds for all lines can't be read, found, or fitted to the model.
        """
        for domain in self._settings.domains:  # the options' own mistakes are no line's
            self._book.plan(replace(self._settings.steering, domain=domain))
        self._asked = _Numbers(array("Q", (key for _, key in self._jobs(self._leave_out_line))))
        if not self.total:
            left_out = f" that can be used ({self._lines_left_out} can't)" if self._lines_left_out else ""
            raise BatchError(f"'{self._prompts.name}' holds no prompts{left_out}: write one a line, or JSON lines")
        self._told = _Numbers(array("Q", self._told_keys()))
        self._output.begin()

    def _jobs(self, on_problem: Callable[[Problem], None] = lambda problem: None) -> Iterator[tuple[Job, int]]:
        """All stories of all good lines, with their keys."""
        for line in self._prompts.jobs(self._settings):
            if isinstance(line, Problem):
                on_problem(line)
                continue
            try:
                keys = [int(self._book.key(job), 16) for job in line]
            except SteerMoEError as error:
                on_problem(Problem(line[0].line, str(error), line[0].prompt[:KEPT_TEXT]))
            else:
                yield from zip(line, keys, strict=True)

    def _told_keys(self) -> Iterator[int]:
        foreign, first = 0, ""
        for number, record in self._output.records():
            key = int(record["job"], 16)
            if key in self._asked:
                yield key
            else:
                foreign += 1
                first = first or f"line {number} {_difference(record, self._settings, self._engine)}"
        if foreign and not self._keep:
            raise BatchError(
                f"'{self._output.path}' holds {foreign} stories that are not asked for now ({first}): name another "
                "file, go on with it by --keep, or start it anew with --overwrite"
            )

    # ---- what is left out ----

    def _leave_out_line(self, problem: Problem) -> None:
        self._lines_left_out += 1
        self._tell(problem)

    def _leave_out_story(self, job: Job, reason: str) -> None:
        self._failed += 1
        if self._last_left_out != (job.line, reason):  # once for all stories of a prompt that is too long
            self._tell(Problem(job.line, reason, job.prompt[:KEPT_TEXT]))
        self._last_left_out = (job.line, reason)

    def _tell(self, problem: Problem) -> None:
        self._errors.add({"line": problem.line, "error": problem.reason, "text": problem.text})
        self._on_problem(problem)

    # ---- running ----

    def run(self, progress: Progress = lambda stories, tokens: None, *, ordered: bool = False) -> Summary:
        """Tell all stories that are not told yet.

        Args:
            progress: see there; also called with (1, 0) for a story that fails.
            ordered: put the file into the order of the prompts when all is told.

        Raises:
            BatchError: the output can't be written. SteeringError: steering that was asked for did not happen.
        """
        started, new, tokens = time.perf_counter(), 0, 0
        decoder = self._engine.decoder(self._most_rows)
        try:
            for ready, completion in self._complete(decoder, self._ready(progress), progress):
                self._output.append(self._record(ready, completion))
                new, tokens = new + 1, tokens + completion.new_tokens
                progress(1, completion.new_tokens)
            report = decoder.report()
        finally:
            decoder.close()
        self._output.sync()
        seconds = time.perf_counter() - started
        if ordered:
            self._output.sort(self._asked.place)
        return Summary(
            stories=self.already + new,
            new=new,
            already=self.already,
            lines_left_out=self._lines_left_out,
            failed=self._failed,
            tokens=tokens,
            seconds=seconds,
            rows=self.rows,
            report=report,
        )

    def _ready(self, progress: Progress) -> Iterator[_Ready]:
        """Stories to tell, those of similar length side by side, as far as a window reaches; the longest first."""
        fresh = self._fresh()
        while window := list(islice(fresh, WINDOW)):
            ready, prompts = [], dict[str, list[int]]()
            for job, key in window:
                request = Request(job.prompt, self._book.plan(job.steering), job.sampling)
                try:
                    prompt = self._engine.encode(request, prompts.get(job.prompt))
                except SteerMoEError as error:
                    self._leave_out_story(job, str(error))
                    progress(1, 0)
                    continue
                prompts[job.prompt] = prompt
                ready.append(_Ready(job, key, request, prompt))
            yield from sorted(ready, key=lambda one: -one.tokens)

    def _fresh(self) -> Iterator[tuple[Job, int]]:
        """Stories that are not in the file; a story that another line asks for too is told once."""
        last_line = 0
        for number, (job, key) in enumerate(self._jobs()):
            first = self._asked.place(key)
            if first == number and key not in self._told:
                yield job, key
            elif 0 <= first < number and job.line != last_line:
                last_line = job.line
                reason = "asks for a story that is asked for already: give it a seed or an id"
                self._leave_out_line(Problem(job.line, reason, job.prompt[:KEPT_TEXT]))

    def _complete(
        self, decoder: Decoder, stories: Iterator[_Ready], progress: Progress
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
                failed = (str(error).splitlines() or [type(error).__name__])[0][:200]
                done = None
            if done is None:  # outside of `except`, where the error would hold on to the memory
                decoder.clear()
                self._halve(flying, waiting, failed, progress)
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

    def _halve(self, flying: dict[Request, _Ready], waiting: deque[_Ready], failed: str, progress: Progress) -> None:
        """Begin again with half as many rows; a story for which memory is short all alone is left out."""
        begun = list(flying.values())
        flying.clear()
        if len(begun) == 1:
            self._leave_out_story(begun.pop().job, f"there is not enough memory for this story alone ({failed})")
            progress(1, 0)
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
        record["domain"] = job.steering.domain if plan is not None and plan.vector is not None else None
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


class _Numbers:
    """A set of 64-bit numbers in 16 bytes each, that knows where in the sequence each stood first."""

    def __init__(self, sequence: "array[int]") -> None:
        self._sorted, self._first = np.unique(np.asarray(sequence, np.uint64), return_index=True)

    def __len__(self) -> int:
        return len(self._sorted)

    def __contains__(self, number: int) -> bool:
        return self.place(number) >= 0

    def place(self, number: int) -> int:
        """-1 for what is not in it."""
        wanted = np.uint64(number)
        position = int(np.searchsorted(self._sorted, wanted))
        is_there = position < len(self._sorted) and self._sorted[position] == wanted
        return int(self._first[position]) if is_there else -1


def _listed(plan: SteeringPlan | None, name: str) -> list[str]:
    return [f"{layer}:{expert}" for layer, expert in getattr(plan, name)] if plan else []


def _difference(record: dict[str, Any], settings: Settings, engine: Engine) -> str:
    """In what a story differs from what is asked for now, as far as the settings of all lines tell."""
    now: dict[str, Any] = {"model": engine.name, "dtype": engine.dtype}
    now |= {f.name: getattr(settings.sampling, f.name) for f in fields(Sampling) if f.name != "seed"}
    if record.get("domain") is not None:
        now |= {name: getattr(settings.steering, name) for name in STEERING_FIELDS if name != "layers"}
    for name, value in now.items():
        if value is not None and name in record and record[name] != value:
            return f"was told with {name} {record[name]}, not {value}"
    return "has another prompt, domain, seed, vector, model or engine"
