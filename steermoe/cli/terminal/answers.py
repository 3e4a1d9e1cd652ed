"""Prints an answer while it comes: the answer on stdout, the thinking before it dimmed on stderr."""

import re
import sys
from collections.abc import Callable

from steermoe.cli.terminal.console import dim, out, printable, write
from steermoe.engines.messages import Chat, Part, Splitter


class AnswerPrinter:
    """Takes the pieces of an answer as `on_text`; call `end` after the last one.

    Thinking is shown only where stderr is a terminal, since it is no part of what is asked for.

    Args:
        chat: what is answered.
        wraps: break lines between words, at the width of the terminal.
        print_answer: prints a piece of the answer.
    """

    def __init__(self, chat: Chat, *, wraps: bool = False, print_answer: Callable[[str], None] = write) -> None:
        self._splitter = Splitter(chat)
        self._shows_thinking = sys.stderr.isatty()
        self._answer = WordWrap(print_answer, out.width) if wraps else Plain(print_answer)
        self._thinking = WordWrap(dim, out.width) if wraps else Plain(dim)
        self._is_after_thinking = False

    def __call__(self, text: str) -> None:
        self._print(self._splitter.add(text))

    def end(self) -> None:
        """Print what is held back, and end the line."""
        self._print(self._splitter.rest())
        self._separate()
        self._answer.rest()
        write("\n")

    def _print(self, parts: list[Part]) -> None:
        for part in parts:
            if not part.is_thinking:
                self._separate()
                self._answer.add(part.text)
            elif self._shows_thinking:
                self._thinking.add(part.text)
                self._is_after_thinking = True

    def _separate(self) -> None:
        """An empty line between the thinking and the answer."""
        if self._is_after_thinking:
            self._thinking.rest()
            dim("\n\n")
        self._is_after_thinking = False


class Plain:
    """Prints pieces as they come."""

    def __init__(self, print_piece: Callable[[str], None]) -> None:
        self._print = print_piece

    def add(self, text: str) -> None:
        self._print(text)

    def rest(self) -> None:
        """Nothing is held back."""


class WordWrap:
    """Prints pieces word by word, and begins a new line where a word does not fit into the rest of one.

    Args:
        print_piece: prints a piece.
        width: cells of a line.
    """

    def __init__(self, print_piece: Callable[[str], None], width: int) -> None:
        self._print = print_piece
        self._width = width
        self._column = 0
        self._held = ""

    def add(self, text: str) -> None:
        """Print all words that are complete."""
        *words, self._held = re.split(r"(?<=\s)(?=\S)", self._held + printable(text))
        if self._held[-1:].isspace():
            words, self._held = [*words, self._held], ""
        for word in words:
            self._put(word)

    def rest(self) -> None:
        """Print the last word."""
        self._put(self._held)
        self._held = ""

    def _put(self, word: str) -> None:
        """A word with the white space after it."""
        from rich.cells import cell_len

        length = cell_len(word.rstrip())
        if self._column and self._column + length > self._width:
            self._print("\n")
            self._column = 0
        if "\n" in word:
            self._print(word)
            self._column = cell_len(word.rpartition("\n")[2])
        else:
            at_end = self._column + cell_len(word) >= self._width
            self._print(word.rstrip() if at_end else word)  # white space at the end would begin a line of its own
            if at_end and word[-1:].isspace():
                self._print("\n")
            self._column = 0 if at_end and word[-1:].isspace() else self._column + cell_len(word)
