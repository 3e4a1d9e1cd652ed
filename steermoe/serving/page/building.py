"""Watching how the vector of a new topic is built, from the page of a visitor, who may stop it."""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from steermoe.errors import SteerMoEError

log = logging.getLogger(__name__)
EVERY = 0.25
"""Seconds between two looks at the progress."""


class Stopped(SteerMoEError):
    """A visitor stopped the work. What was written is kept: the next time it goes on."""


class Progress:
    """What is being done, in one line. The engine's thread writes it.

    Attributes:
        line: what is being done now.
        is_stopped: set it to end the work at its next report.
    """

    def __init__(self) -> None:
        self.line = "Waiting for the texts that are being written ..."
        self.is_stopped = False

    def note(self, text: str, style: str = "", /) -> None:
        """Leave a note to the log: it names folders and options of commands, which visitors do not have."""
        log.info("%s", text)

    @contextmanager
    def counting(self, what: str, things: str, total: int, /) -> Iterator[Callable[[int, int], None]]:
        """As `Reports.counting`."""
        done, began = 0, time.monotonic()

        def count(more: int, tokens: int) -> None:
            nonlocal done
            done += more
            left = (time.monotonic() - began) / max(done, 1) * (total - done)
            self._show(
                f"{what}: {done} of {total} {things}" + (f", about {left:.0f} s left" if 0 < done < total else "")
            )

        self._show(f"{what} ...")
        yield count

    @contextmanager
    def working(self, what: str, /) -> Iterator[Callable[[str], None]]:
        """As `Reports.working`."""
        self._show(what)
        yield self._show

    def _show(self, line: str) -> None:
        if self.is_stopped:
            raise Stopped("stopped: build it again, and the work resumes")
        self.line = line


class Reports(Protocol):
    """What is done, as `Progress` shows it; `Watcher` of the rooms that build."""

    def note(self, text: str, style: str = "", /) -> None:
        """One line."""

    def counting(self, what: str, things: str, total: int, /) -> AbstractContextManager[Callable[[int, int], None]]:
        """How many things and tokens are done."""

    def working(self, what: str, /) -> AbstractContextManager[Callable[[str], None]]:
        """What is being worked on."""


class Topics(Protocol):
    """What builds, calibrates and keeps vectors; `evaluation.new_topics` does."""

    def described(self, topic: str, progress: Reports) -> Callable[[], str]:
        """What builds the vector of a topic in words, and returns its name.

        Raises:
            SteerMoEError: it is no topic.
        """

    def pasted(self, name: str, pasted: str, progress: Reports) -> Callable[[], str]:
        """What builds a vector from texts that are separated by empty lines, and returns its name.

        Raises:
            SteerMoEError: a name that is not allowed, or too few texts.
        """


def watched(future: "Future[str]", progress: Progress) -> Iterator[str]:
    """The lines of progress, until the work is done; raises as the work does."""
    last = ""
    while True:
        try:
            future.result(EVERY)
            return
        except NotYet:
            if future.done():
                raise
            if progress.line != last:
                last = progress.line
                yield last
