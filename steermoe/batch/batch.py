"""Brings a file of prompts into a file of stories: what is told already is passed over, a teller tells the rest."""

import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from steermoe.batch.jobs import KEPT_TEXT, STEERING_FIELDS, Job, Problem, PromptFile, Settings
from steermoe.batch.keys import StoryKeys
from steermoe.batch.output import ErrorFile, StoryFile
from steermoe.batch.worker import EngineTeller, Story, Teller
from steermoe.engines.engine import Engine
from steermoe.engines.request import Sampling
from steermoe.errors import BatchError, SteerMoEError
from steermoe.steering.report import SteeringReport
from steermoe.steering.resolver import PlanResolver

OTHERWISE = ("layers", "force", "ban")
"""Fields that a story has in another form than the options."""
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
        teller: tells the stories; None for the engine itself.
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
        teller: Teller | None = None,
    ) -> None:
        self._engine = engine
        self._prompts, self._settings, self._output = prompts, settings, output
        self._resolver = PlanResolver(engine.shape, vectors)
        self._keys = StoryKeys(engine.fingerprint())
        self._keep, self._errors, self._on_problem = keep, errors or ErrorFile(None), on_problem
        self._asked = _Numbers(array("Q"))
        self._told = _Numbers(array("Q"))
        self._lines_left_out = self._failed = 0
        self._last_left_out = (0, "")
        self._teller = EngineTeller(engine, rows) if teller is None else teller

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
        for steering in self._settings.steerings():  # the options' own mistakes are no line's
            self._resolver.plan(steering)
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
                keys = [int(self._keys.key(job, self._resolver.plan(job.steering)), 16) for job in line]
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

        def leave_out(job: Job, reason: str) -> None:
            self._leave_out_story(job, reason)
            progress(1, 0)

        with closing(self._teller.tell(self._fresh(), leave_out)) as told:
            for record in told:
                self._output.append(record)
                new, tokens = new + 1, tokens + record["new_tokens"]
                progress(1, record["new_tokens"])
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
            rows=self._teller.rows,
            report=self._teller.report,
        )

    def _fresh(self) -> Iterator[Story]:
        """Stories that are not in the file; a story that another line asks for too is told once."""
        last_line = 0
        for number, (job, key) in enumerate(self._jobs()):
            first = self._asked.place(key)
            if first == number and key not in self._told:
                yield Story(job, key, self._resolver.plan(job.steering))
            elif 0 <= first < number and job.line != last_line:
                last_line = job.line
                reason = "asks for a story that is asked for already: give it a seed or an id"
                self._leave_out_line(Problem(job.line, reason, job.prompt[:KEPT_TEXT]))


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


def _difference(record: dict[str, Any], settings: Settings, engine: Engine) -> str:
    """In what a story differs from what is asked for now, as far as the settings of all lines tell."""
    now: dict[str, Any] = {"model": engine.name, "dtype": engine.dtype}
    now |= {f.name: getattr(settings.sampling, f.name) for f in fields(Sampling) if f.name != "seed"}
    if record.get("domain") is not None:
        now |= {name: getattr(settings.steering, name) for name in STEERING_FIELDS if name not in OTHERWISE}
    for name, value in now.items():
        if value is not None and name in record and record[name] != value:
            return f"was told with {name} {record[name]}, not {value}"
    return "has another prompt, domain, seed, vector, model or engine"
