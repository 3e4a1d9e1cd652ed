"""Prints an answer while it comes: the answer on stdout, the thinking before it dimmed on stderr."""

import sys

from steermoe.cli.terminal.console import dim, write
from steermoe.engines.messages import Chat, Part, Splitter


class AnswerPrinter:
    """Takes the pieces of an answer as `on_text`; call `end` after the last one.

    Thinking is shown only where stderr is a terminal, since it belongs to nothing that is asked for.

    Args:
        chat: what is answered.
    """

    def __init__(self, chat: Chat) -> None:
        self._splitter = Splitter(chat)
        self._shows_thinking = sys.stderr.isatty()
        self._is_after_thinking = False

    def __call__(self, text: str) -> None:
        self._print(self._splitter.add(text))

    def end(self) -> None:
        """Print what is held back, and end the line."""
        self._print(self._splitter.rest())
        self._separate()
        write("\n")

    def _print(self, parts: list[Part]) -> None:
        for part in parts:
            if part.is_thinking:
                if self._shows_thinking:
                    dim(part.text)
                    self._is_after_thinking = True
            else:
                self._separate()
                write(part.text)

    def _separate(self) -> None:
        """An empty line between the thinking and the answer."""
        if self._is_after_thinking:
            dim("\n\n")
        self._is_after_thinking = False
