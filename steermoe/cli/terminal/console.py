"""The consoles of stdout and stderr, progress, and text that is safe to print.

Text from files, models and other libraries passes through `printable` or `line`, or as JSON through `write_json`: it
can neither move a terminal's cursor, nor turn the order of the characters around it, nor be read as rich's markup.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

from rich.console import Console
from rich.text import Text

from steermoe.engines.text import CONTROLS, NOT_TEXT, REVERSING
from steermoe.engines.text import printable as printable  # for the commands

UNSEEN = r"\u00ad\u061c\u180e\u200b\u200e\u200f\u2060-\u2065\u206a-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
"""Characters without a width, which make two different names look alike."""
JOINERS = r"(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])"
"""Joiners where no script or emoji needs them: beside an ASCII character."""

_ESCAPED = re.compile(f"[{CONTROLS}{REVERSING}{NOT_TEXT}{UNSEEN}]|{JOINERS}")
_ESCAPED_IN_JSON = re.compile(f"[\x7f-\x9f{REVERSING}{NOT_TEXT}{UNSEEN}\u2028\u2029]")


class _Stderr:
    """The stderr of the moment, where a line that can't be written is lost: a full disk must not cost the answer."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream(), name)

    def write(self, text: str) -> None:
        with _lost_if_unwritable(self._stream()) as stream:
            stream.write(text)

    def flush(self) -> None:
        with _lost_if_unwritable(self._stream()) as stream:
            stream.flush()

    def _stream(self) -> Any:
        """While a spinner is shown, rich puts a stream of its own into the place of stderr."""
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)


class StdoutError(Exception):
    """The answer can't be written; its cause is an OSError. Not one itself, which typer and others would handle."""


class Stdout:
    """A stream whose errors are `StdoutError`, so that they are not taken for those of files and connections."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with _as_stdout_error():
            return int(self.stream.write(text))

    def flush(self) -> None:
        with _as_stdout_error():
            self.stream.flush()


@contextmanager
def _as_stdout_error() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StdoutError from error


@contextmanager
def _lost_if_unwritable(stream: Any) -> Iterator[Any]:
    try:
        yield stream
    except (OSError, ValueError, AttributeError):  # full or gone; closed; None
        discard(stream)


def discard(stream: Any) -> None:
    """Send what a stream still holds, and all that follows, to nowhere; or Python reports it again when it exits."""
    with suppress(OSError, ValueError, AttributeError):
        target = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, target)
        os.close(nowhere)


def forget_odd_sizes() -> None:
    """Remove sizes from the environment in which rich prints nothing at all, or which it can't read."""
    for name, least in (("COLUMNS", 20), ("LINES", 1)):
        value = os.environ.get(name, "")
        if value and not (value.isdecimal() and len(value) < 6 and int(value) >= least):
            del os.environ[name]


forget_odd_sizes()
out = Console(highlight=False, markup=False, emoji=False)
err = Console(file=cast("Any", _Stderr()), highlight=False, markup=False, emoji=False)


# ---- text ----


def line(text: str) -> str:
    r"""Names, titles, paths and messages in one line: breaks become spaces; what would do harm or hide, escapes."""
    parts = text.splitlines()
    if len(parts) > 1 or text.endswith(tuple("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")):
        text = " ".join(part.strip() for part in parts if part.strip())
    return _ESCAPED.sub(_escape, text.replace("\t", " "))


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _escape_in_json(match: re.Match[str]) -> str:
    return json.dumps(match[0])[1:-1] if match[0] != "\x7f" else "\\u007f"


# ---- stdout ----


def write(text: str) -> None:
    """Write story text to stdout as it is, at once."""
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def say(text: str) -> None:
    """One line of an answer."""
    write(f"{line(text)}\n")


def write_json(record: Any) -> None:
    """One JSON value on one line of stdout, in ASCII if the stream has no UTF-8."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("_", "-")
    text = json.dumps(record, ensure_ascii=encoding not in ("utf-8", "utf8"))
    sys.stdout.write(_ESCAPED_IN_JSON.sub(_escape_in_json, text) + "\n")
    sys.stdout.flush()


def heading(text: str) -> None:
    out.print(Text(line(text), style="bold"), soft_wrap=True)


# ---- stderr ----


def note(text: str, style: str = "") -> None:
    """One line on stderr; style "dim" for what is only of interest."""
    err.print(Text(line(text), style=style), soft_wrap=True)


def dim(text: str) -> None:
    """A piece of running text on stderr, dimmed, at once."""
    err.print(Text(printable(text), style="dim"), end="", soft_wrap=True)


def quiet_transformers() -> None:
    """Keep the progress bars of transformers off the terminal; steermoe shows its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr; nothing if stderr is not a terminal. Yields a function that changes its text."""
    with err.status(Text(line(what))) as status:
        yield lambda text: status.update(Text(line(text)))


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
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.TextColumn("{task.completed}/{task.total} " + things),
        progress.TextColumn("{task.fields[rate]}"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=err) as bar:
        task = bar.add_task(line(what), total=total, completed=done, rate="")
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
            note(f"{what}: {done}/{total} {things}{rate}, {left / 60:,.0f} min left")

    return advance
