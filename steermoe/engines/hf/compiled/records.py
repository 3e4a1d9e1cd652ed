"""What became of steps that were to be compiled: a record beside each one's folder, and the lock of whoever compiles.

A record outlives its process: a step that failed, or whose process was killed, is not tried again and again unasked.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from steermoe.errors import SteerMoEError
from steermoe.files import atomic_path, cache_folder, lock
from steermoe.models.checkpoint import _locate

logger = logging.getLogger(__name__)

State = Literal["compiling", "compiled", "failed"]
COMPILERS = ("g++", "clang++")
MOST_ATTEMPTS = 2
"""How often a step is begun unasked, if nothing says why it was not finished."""
SCRATCH = ".compile-"
"""What folders of work in progress are called; they are deleted when they are older than this many seconds."""
OLD = 3600.0


@dataclass(frozen=True)
class Record:
    """What became of one step.

    Attributes:
        model: its folder, file or hub id.
        dtype: of its weights.
        kind: for one row, or for many.
        state: "compiling" also if the process that did it has ended unexpectedly.
        reason: why it failed, in one line.
        attempts: how often in a row it has been begun.
        compiler: which one was there.
        speedup: of the compiled step.
    """

    model: str
    dtype: str
    kind: str
    state: State = "compiling"
    reason: str = ""
    attempts: int = 1
    compiler: str = ""
    speedup: float | None = None

    @property
    def why_not_again(self) -> str:
        """Why the step should not be compiled again unless that is asked for; "" if it may be."""
        if self.compiler != compiler():
            return ""
        if self.state == "failed":
            return self.reason
        if self.state == "compiling" and self.attempts >= MOST_ATTEMPTS:
            return f"it was begun {self.attempts} times and never finished"
        return ""


def compiler() -> str:
    """The C++ compiler that would be used, with the time of its file, so that another one is noticed; "" for none."""
    for name in COMPILERS:
        if found := shutil.which(name):
            with suppress(OSError):
                return f"{found} {Path(found).stat().st_mtime_ns}"
    return ""


def _place(target: Path) -> Path:
    return target.with_name(f"{target.name}.json")


def read_record(target: Path) -> Record | None:
    """The record of the step whose folder this is; None if there is none that can be read."""
    return _read(_place(target))


def whereabouts(source: str) -> str:
    """A model's folder or file as a record names it, wherever the command was run; a hub id as it is."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def records_of(model: str | Path | None) -> list[Record]:
    """The newest record of each kind of step and dtype of a model, named as for `load`; none if it is unknown."""
    try:
        _, where, _ = _locate(model)
    except SteerMoEError:
        return []
    found: dict[tuple[str, str], Record] = {}
    for record, _ in records_in(cache_folder() / "compiled"):
        if record.model == whereabouts(where):
            found[record.kind, record.dtype] = record
    return list(found.values())


def records_in(folder: Path) -> list[tuple[Record, bool]]:
    """The records in a folder, the newest last, each with whether its step is there."""
    with suppress(OSError):
        found = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
        read = ((path, _read(path)) for path in found)
        return [(record, path.with_suffix("").is_dir()) for path, record in read if record is not None]
    return []


def _read(path: Path) -> Record | None:
    try:
        record = Record(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    texts = (record.model, record.dtype, record.kind, record.reason, record.compiler)
    is_right = all(type(text) is str for text in texts) and type(record.attempts) is int
    is_number = record.speedup is None or type(record.speedup) in (int, float)
    return record if is_right and is_number and record.state in get_args(State) else None


def write_record(target: Path, record: Record) -> None:
    """Write the record of the step whose folder this is. Raises OSError."""
    with atomic_path(_place(target)) as path:
        path.write_text(json.dumps(asdict(record)) + "\n", encoding="utf-8")


@contextmanager
def turn_to_compile(folder: Path, *, wait: bool) -> Iterator[bool | None]:
    """Hold the lock of whoever compiles steps in a folder; work that others left behind is deleted first.

    Args:
        folder: it must exist.
        wait: wait for another process that compiles.

    Yields:
        whether it is held; None if the file system has no locks.

    Raises:
        OSError: the lock's file can't be opened.
    """
    fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        held = lock(fd)
        if held is False and wait:
            logger.warning("another process compiles a step: waiting until it is done")
            held = lock(fd, wait=True)
        if held:
            _clear(folder)
        yield held
    finally:
        os.close(fd)


def is_busy(folder: Path) -> bool | None:
    """Whether a process compiles steps in a folder now; None if that can't be known."""
    try:
        with turn_to_compile(folder, wait=False) as held:
            return None if held is None else not held
    except OSError:
        return None


def _clear(folder: Path) -> None:
    with suppress(OSError):
        for left in folder.glob(f"{SCRATCH}*"):
            if time.time() - left.stat().st_mtime > OLD:
                shutil.rmtree(left, ignore_errors=True)
