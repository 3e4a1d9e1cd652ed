"""The consoles of stdout and stderr, progress, and text that is safe to print."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

out = Console(highlight=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)


def printable(text: str) -> str:
    """The text without control characters, which could move a terminal's cursor or change its colours."""
    return "".join(char for char in text if char in "\n\t" or (ord(char) >= 32 and not 127 <= ord(char) < 160))


def write(text: str) -> None:
    """Write story text to stdout as it is, at once."""
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def write_json(record: Any) -> None:
    """One JSON value on one line of stdout."""
    sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def quiet_transformers() -> None:
    """Keep the progress bars of transformers off the terminal; steermoe shows its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on stderr; nothing if stderr is not a terminal."""
    with err.status(what):
        yield


@contextmanager
def counting(what: str, things: str, total: int, done: int = 0) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, with things done, tokens per second and time left.

    Yields a function to call with the numbers of (things, tokens) done since its last call. If stderr is not a
    terminal, progress is a line every `LINE_SECONDS`. `done` things were finished before.
    """
    from rich import progress

    if not err.is_terminal:
        yield _lines(what, things, total, done)
        return

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TextColumn("{task.completed}/{task.total} " + things),
        progress.TextColumn("{task.fields[rate]}"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=err) as bar:
        task = bar.add_task(what, total=total, completed=done, rate="")
        start, tokens_done = time.monotonic(), 0

        def advance(done: int, tokens: int) -> None:
            nonlocal tokens_done
            tokens_done += tokens
            rate = tokens_done / max(time.monotonic() - start, 1e-9)
            bar.update(task, advance=done, rate=f"{rate:,.0f} tokens/s" if tokens_done else "")

        yield advance


LINE_SECONDS = 30.0
"""Between two lines of progress if stderr is not a terminal."""


def _lines(what: str, things: str, total: int, done: int) -> Callable[[int, int], None]:
    """Progress as lines, for logs; quick work prints none."""
    start = shown = time.monotonic()
    before, tokens_done = done, 0

    def advance(more: int, tokens: int) -> None:
        nonlocal done, tokens_done, shown
        done, tokens_done = done + more, tokens_done + tokens
        now = time.monotonic()
        if now - shown >= LINE_SECONDS and done > before:
            shown = now
            left = (total - done) * (now - start) / (done - before)
            rate = f", {tokens_done / (now - start):,.0f} tokens/s" if tokens_done else ""
            err.print(f"{what}: {done}/{total} {things}{rate}, {left / 60:,.0f} min left", soft_wrap=True)

    return advance
