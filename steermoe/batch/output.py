"""The file of stories: one JSON object per line, only ever appended to, so a kill loses no finished story.

Each story is written in one call, and the file is forced to the disk every few seconds. A line that a kill cut short is
removed when the file is opened again, one that a full disk cut short at once.
"""

import json
import os
import stat
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from steermoe.errors import BatchError

SYNC_SECONDS = 5.0
"""How much a power failure can cost; a kill costs nothing."""
BEGINNING = b'{"job": "'
"""Of every line; it distinguishes a line cut short from a file that is not ours."""


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
        self._was_there = path.exists()
        try:
            self._fd = os.open(path, _flags(path), 0o644)
        except OSError as error:
            raise BatchError(f"can't write '{path}': {error.strerror}; name another file") from error
        self.is_regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
        if self.is_regular and not _lock(self._fd):
            os.close(self._fd)
            raise BatchError(f"'{path}' is being written by another run: wait for it, or name another file")

    def __enter__(self) -> "StoryFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it; a file that was created and stayed empty is removed."""
        if self._fd < 0:
            return
        is_empty = self.is_regular and os.fstat(self._fd).st_size == 0
        if is_empty and not self._was_there:
            self.path.unlink(missing_ok=True)
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
        rest = content.rstrip(b"\n").rstrip(b"\0")
        return os.fstat(self._fd).st_size == self._scanned and rest[: len(BEGINNING)] == BEGINNING[: len(rest)]

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        """Number, offset and content of each line."""
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
            BatchError: it can't be written, for example because the disk is full.
        """
        self._write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Force what is written to the disk."""
        self._synced = time.monotonic()
        if self.is_regular:
            try:
                os.fsync(self._fd)
            except OSError as error:
                raise self._failed(error) from error

    def _write(self, content: bytes) -> None:
        before = os.fstat(self._fd).st_size if self.is_regular else 0
        try:
            done = 0
            while done < len(content):
                done += os.write(self._fd, content[done:])
        except BaseException as error:
            if self.is_regular:
                self._cut(before)
            if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
                raise self._failed(error) from error
            raise

    def _cut(self, size: int) -> None:
        os.ftruncate(self._fd, size)

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
        copy = self.path.with_name(f".{self.path.name}.sorting")
        try:
            with self.path.open("rb") as source, copy.open("wb") as target:
                for number in order.tolist():
                    source.seek(offsets[number])
                    target.write(source.readline())
                target.flush()
                os.fsync(target.fileno())
            copy.chmod(stat.S_IMODE(os.fstat(self._fd).st_mode))
            copy.replace(self.path)
        except OSError as error:
            copy.unlink(missing_ok=True)
            raise BatchError(
                f"'{self.path}' is complete, but there is no room to sort it ({error.strerror}); make room and run "
                "again, or use the stories in the order in which they were finished"
            ) from error


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

    def add(self, record: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        except OSError as error:
            raise BatchError(f"can't write the errors to '{self._path}': {error.strerror}") from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def check_apart(prompts: str, output: Path, errors: Path | None) -> None:
    """Make sure that no file is written over another.

    Raises:
        BatchError: two of them are the same.
    """
    named = [("prompts", Path(prompts)), ("stories", output), *([("errors", errors)] if errors else [])]
    for number, (kind, path) in enumerate(named):
        for other_kind, other in named[:number]:
            if path == other or (path.exists() and other.exists() and path.samefile(other)):
                raise BatchError(f"the {kind} would overwrite the {other_kind} in '{path}': name another file")


def _story(content: bytes) -> dict[str, Any] | None:
    """The story in a line; None if it holds none."""
    try:
        record = json.loads(content)
        int(record["job"], 16)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return record


def _flags(path: Path) -> int:
    is_special = path.exists() and not path.is_file()
    return (os.O_WRONLY if is_special else os.O_RDWR | os.O_CREAT) | os.O_APPEND


def _lock(fd: int) -> bool:
    """Whether no other run has the file; always true on systems without locks."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
