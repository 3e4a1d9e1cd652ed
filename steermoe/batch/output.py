"""The file of stories: one JSON object per line, only ever appended to, so a kill loses no finished story.

Each story is written in one call, and the file is forced to the disk every few seconds. A line that a kill cut short is
removed when the file is opened again, one that a full disk cut short at once. A file that another program replaces,
removes or rewrites meanwhile ends the run, because stories would be lost.
"""

import contextlib
import json
import logging
import os
import re
import stat
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from steermoe.errors import BatchError
from steermoe.files import hidden_beside, lock, new_file

logger = logging.getLogger(__name__)

SYNC_SECONDS = 5.0
"""How much a power failure can cost; a kill costs nothing."""
BEGINNING = b'{"job": "'
"""Of every line; it distinguishes a line cut short from a file that is not ours."""
KEY = re.compile(r"[0-9a-f]{16}")
"""The hash of everything that decides a story, 64 bits."""
MAX_OPENINGS = 100
"""Of a file that other runs replace, as they do at the end of `--ordered`, between its opening and its locking."""


class StoryFile:
    """A file of stories, open for appending; use it in a `with` block.

    Args:
        path: a new file, or one to resume. Anything else that can be written to, such as a named pipe, takes stories
            but is never read.
        overwrite: drop what is in it, once `begin` is called.

    Raises:
        BatchError: it can't be opened, or another run writes to it.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        self.path = path
        self._overwrite = overwrite
        self._synced = time.monotonic()
        self._fd = self._open()
        self._size = os.fstat(self._fd).st_size if self.is_regular else 0

    def _open(self) -> int:
        """The descriptor of the file, locked; opened again if another run replaced the file before it was locked."""
        for attempt in range(MAX_OPENINGS):
            try:
                if attempt == 0:
                    self._was_there = self.path.exists()
                fd = os.open(self.path, _flags(self.path), 0o666)
            except OSError as error:
                raise BatchError(f"can't write '{self.path}': {error.strerror}; name another file") from error
            self.is_regular = stat.S_ISREG(os.fstat(fd).st_mode)
            is_locked = lock(fd) if self.is_regular else True
            if is_locked is False:
                os.close(fd)
                raise BatchError(f"'{self.path}' is being written by another run: wait for it, or name another file")
            if not self.is_regular or _same_file(fd, self.path):
                if is_locked is None:
                    logger.warning("'%s' can't be locked here: make sure that no other run writes to it", self.path)
                return fd
            os.close(fd)
        raise BatchError(f"another program keeps replacing '{self.path}': stop it, or name another file")

    def __enter__(self) -> "StoryFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it; a file that was created and stayed empty is removed."""
        if self._fd < 0:
            return
        is_empty = self.is_regular and self._size == os.fstat(self._fd).st_size == 0
        if is_empty and not self._was_there and _same_file(self._fd, self.path):
            self.path.resolve().unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = -1

    # ---- existing stories ----

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The stories so far, each with its line number; none if they are to be overwritten. Changes nothing.

        Raises:
            BatchError: a line is not a story, and not just cut short at the end of the file.
        """
        if self.is_regular and not self._overwrite:
            for number, _, content in self._lines():
                record = _story(content)
                if record is not None:
                    yield number, record
                elif not self._is_torn(content):
                    raise BatchError(
                        f"line {number} of '{self.path}' is not a story: name another file, or replace this one with "
                        "--overwrite"
                    )

    def begin(self) -> None:
        """Prepare it for new stories: empty it if it is to be overwritten, complete or remove a last line cut short."""
        if not self.is_regular:
            return
        self._check_unchanged()
        self._sorted_copy().unlink(missing_ok=True)  # of a run that was killed while it sorted
        if self._overwrite:
            self._cut(0)
            return
        end, last = 0, b""
        for _, offset, content in self._lines():
            end, last = offset, content
        if last and _story(last) is None:
            self._cut(end)
        elif last and not last.endswith(b"\n"):
            self._write(b"\n")

    def _is_torn(self, content: bytes) -> bool:
        """Whether a line is the last one and only the beginning of a story, or space that a crash left unwritten."""
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(content)
            return False  # a whole value, which is not ours
        rest = content.rstrip(b"\n").rstrip(b"\0")
        return os.fstat(self._fd).st_size == self._scanned and rest[: len(BEGINNING)] == BEGINNING[: len(rest)]

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        """Number, offset and content of each line."""
        self._check_unchanged()
        offset = 0
        with self.path.open("rb") as file:
            for number, content in enumerate(file, 1):
                self._scanned = offset + len(content)
                yield number, offset, content
                offset = self._scanned

    # ---- new stories ----

    def append(self, record: dict[str, Any]) -> None:
        """Add a story, whole or not at all.

        Raises:
            BatchError: it can't be written, for example because the disk is full, or another program changed the file.
        """
        self._check_unchanged()
        self._write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Force what is written to the disk.

        Raises:
            BatchError: that fails, or another program changed the file.
        """
        self._synced = time.monotonic()
        self._check_unchanged()
        if self.is_regular:
            try:
                os.fsync(self._fd)
            except OSError as error:
                raise self._failed(error) from error

    def _write(self, content: bytes) -> None:
        try:
            done = 0
            while done < len(content):
                done += os.write(self._fd, content[done:])
        except BaseException as error:
            if self.is_regular:
                self._cut(self._size)
            if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
                raise self._failed(error) from error
            raise
        self._size += len(content)

    def _cut(self, size: int) -> None:
        os.ftruncate(self._fd, size)
        self._size = size

    def _check_unchanged(self) -> None:
        """Make sure that the path still leads to the open file, and that only this run wrote to it.

        Raises:
            BatchError: another program replaced, removed or rewrote it; editors do when they save.
        """
        if not self.is_regular:
            return
        if not _same_file(self._fd, self.path):
            change = "replaced" if self.path.exists() else "removed"
        elif (size := os.fstat(self._fd).st_size) != self._size:
            change = f"changed from {self._size} to {size} bytes"
        else:
            return
        raise BatchError(
            f"'{self.path}' was {change} by another program during the run: leave it alone and run again, which "
            "generates the stories that it lacks"
        )

    def _failed(self, error: OSError) -> BatchError:
        stays = "; the stories in it are complete: make room and run again to resume" if self.is_regular else ""
        return BatchError(f"can't write '{self.path}': {error.strerror}{stays}")

    # ---- sorting ----

    def sort(self, place: Callable[[int], int]) -> None:
        """Sort the stories, completely or not at all; nothing can be appended afterwards.

        Args:
            place: the place of a key in the order; stories of equal place keep their order.

        Raises:
            BatchError: no room for the sorted copy; the file stays as it is.
        """
        places, offsets = array("q"), array("q")
        for _, offset, content in self._lines():
            places.append(place(int(json.loads(content)["job"], 16)))
            offsets.append(offset)
        order = np.argsort(np.array(places), kind="stable")
        if (np.diff(order) == 1).all():
            return
        copy = self._sorted_copy()
        try:
            copy.unlink(missing_ok=True)
            with self.path.open("rb") as source, new_file(copy, 0o600).open("r+b") as target:
                for number in order.tolist():
                    source.seek(offsets[number])
                    target.write(source.readline())
                target.flush()
                os.fsync(target.fileno())
            copy.chmod(stat.S_IMODE(os.fstat(self._fd).st_mode))
            self._check_unchanged()
            copy.replace(self.path.resolve())
        except OSError as error:
            copy.unlink(missing_ok=True)
            raise BatchError(
                f"'{self.path}' is complete, but there is no room to sort it ({error.strerror}); make room and run "
                "again, or use the stories in the order in which they were finished"
            ) from error

    def _sorted_copy(self) -> Path:
        """The copy that is being sorted, beside the file itself even if `path` is a link to it."""
        return hidden_beside(self.path.resolve(), "sorting")


class ErrorFile:
    """What was skipped, one JSON object per line; without a path nothing is written.

    Raises:
        BatchError: it can't be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        try:
            self._file = None if path is None else path.open("wb", buffering=0)
        except OSError as error:
            raise BatchError(f"can't write the errors to '{path}': {error.strerror}; name another file") from error
        self._is_regular = self._file is not None and stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)

    def add(self, record: dict[str, Any]) -> None:
        if self._file is None:
            return
        if self._is_regular and self._path is not None and not _same_file(self._file.fileno(), self._path):
            raise BatchError(
                f"the file of errors '{self._path}' was replaced or removed by another program during the run: leave "
                "it alone and run again"
            )
        try:
            self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        except OSError as error:
            raise BatchError(f"can't write the errors to '{self._path}': {error.strerror}") from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


STREAMS = {1: "stdout", 2: "stderr"}
"""By their descriptors."""


def check_apart(prompts: str, output: Path, errors: Path | None) -> None:
    """Make sure that no file is written over another.

    Raises:
        BatchError: two of them are the same, or one takes stdout or stderr too, which are written to as well.
    """
    named = [("prompts", Path(prompts)), ("stories", output), *([("errors", errors)] if errors else [])]
    for number, (kind, path) in enumerate(named):
        for other_kind, other in named[:number]:
            if path == other or _are_same(path, other):
                raise BatchError(f"the {kind} would overwrite the {other_kind} in '{path}': name another file")
        for descriptor, stream in STREAMS.items() if path.is_file() and kind != "prompts" else ():
            if _same_file(descriptor, path):
                raise BatchError(
                    f"{stream} goes to '{path}' too, where it would overwrite the {kind}: name another file, or send "
                    f"{stream} elsewhere"
                )


def _story(content: bytes) -> dict[str, Any] | None:
    """The story in a line; None if it holds none."""
    try:
        record = json.loads(content)
        is_story = KEY.fullmatch(record["job"]) is not None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return record if is_story else None


def _flags(path: Path) -> int:
    is_special = path.exists() and not path.is_file()
    return (os.O_WRONLY if is_special else os.O_RDWR | os.O_CREAT) | os.O_APPEND


def _are_same(path: Path, other: Path) -> bool:
    """Whether two paths lead to one file."""
    try:
        return path.samefile(other)
    except OSError:  # one of them is not there, or can't be
        return False


def _same_file(fd: int, path: Path) -> bool:
    """Whether a path leads to an open file."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except OSError:
        return False
