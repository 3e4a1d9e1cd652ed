"""The lines that a user writes: typed at a terminal, with editing and a history, or from a pipe.

The only importer of prompt_toolkit, which it loads for a terminal alone.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from steermoe.cli.terminal import console
from steermoe.cli.terminal.commands import COMMANDS
from steermoe.errors import GenerationError
from steermoe.files import new_file

HISTORY = "chat_history"


def are_typed() -> bool:
    """Whether lines come from a person at a terminal."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def typed(prompt: Callable[[], str]) -> Iterator[str]:
    """Lines typed at a terminal, until Ctrl-D, or Ctrl-C twice; Alt-Enter begins a new line within one.

    Args:
        prompt: what stands before the next line.
    """
    session = _session()
    was_interrupted = False
    while True:
        try:
            yield session.prompt([("class:mark", prompt())])
            was_interrupted = False
        except KeyboardInterrupt:
            if was_interrupted:
                return
            console.note("Ctrl-C again, or Ctrl-D, ends the chat", "dim")
            was_interrupted = True
        except EOFError:
            return


def piped() -> Iterator[str]:
    """Lines from stdin, without their ends.

    Raises:
        GenerationError: stdin is closed or can't be read.
    """
    if sys.stdin is None:
        raise GenerationError("stdin is closed: pipe messages into it, one on a line")
    with suppress(AttributeError, ValueError):  # bytes that are not UTF-8 become an error of their line alone
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    try:
        for line in sys.stdin:
            yield line.rstrip("\r\n")
    except OSError as error:
        raise GenerationError(f"can't read stdin: {error.strerror}; pipe messages into it, one on a line") from error


def _session() -> Any:
    """A session of prompt_toolkit, which writes to stderr."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import create_output
    from prompt_toolkit.styles import Style

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    path = history_file()
    return PromptSession(
        history=InMemoryHistory() if path is None else FileHistory(str(path)),
        completer=WordCompleter([f"/{name}" for name in COMMANDS], sentence=True),
        complete_while_typing=False,
        key_bindings=keys,
        style=Style.from_dict({"mark": "bold ansicyan"}),
        output=create_output(stdout=sys.stderr),
    )


def history_file() -> Path | None:
    """The file of what was typed before, which only its owner can read; None if there is no place for it."""
    from platformdirs import user_state_path

    try:
        folder = user_state_path("steermoe")
        if folder.parts[0] == "~":
            return None
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / HISTORY
        if not path.exists():
            new_file(path, 0o600)
        path.chmod(0o600)
    except (OSError, RuntimeError):
        return None
    return path
