"""Draws a comparison: columns side by side if the terminal is wide enough, else one below the other."""

import io
import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from steermoe.cli.terminal.console import line, out, printable
from steermoe.errors import SteerMoEError, count_of
from steermoe.evaluation.comparison import Column
from steermoe.files import atomic_path

MIN_COLUMN_WIDTH = 36
SVG_COLUMN_WIDTH = 52


def print_columns(prompt: str, columns: Sequence[Column], console: Console = out) -> None:
    """Print the prompt, then all columns, as many side by side as fit."""
    console.print(Text(printable(prompt), style="bold"))
    per_line = max(1, min(len(columns), console.width // MIN_COLUMN_WIDTH))
    if per_line == 1:
        for column in columns:
            console.print(_panel(column))
        return
    for start in range(0, len(columns), per_line):
        table = Table.grid(expand=True)
        chosen = columns[start : start + per_line]
        for _ in range(per_line):
            table.add_column(ratio=1)
        table.add_row(*[_panel(column) for column in chosen])
        console.print(table)


def save_svg(prompt: str, columns: Sequence[Column], path: Path) -> None:
    """Draw the comparison as a picture that loads nothing from the network.

    Raises:
        SteerMoEError: the file can't be written.
    """
    console = Console(
        record=True,
        width=SVG_COLUMN_WIDTH * len(columns),
        file=io.StringIO(),
        markup=False,
        emoji=False,
        highlight=False,
    )
    print_columns(prompt, columns, console)
    picture = re.sub(r"@font-face \{.*?\}", "", console.export_svg(title="steermoe compare"), flags=re.DOTALL)
    try:
        with atomic_path(path) as partial:
            partial.write_text(picture, encoding="utf-8")
    except OSError as error:
        raise SteerMoEError(f"can't write '{path}': {error.strerror}; name another file") from error


def _panel(column: Column) -> Panel:
    story = Text(printable(column.completion.text).strip())
    if len(story.plain) == len(column.completion.text.strip()):
        shift = len(column.completion.text) - len(column.completion.text.lstrip())
        for start, end in column.words:
            story.stylize("bold yellow", start - shift, end - shift)
    figures = Table.grid(padding=(0, 1))
    for domain, share in column.shares.items():
        words = column.word_count.get(domain)
        counted = "" if words is None else f", {count_of(words, 'word')}"
        figures.add_row(Text(line(domain)), _bar(share), Text(f"{share:.0%}{counted}", no_wrap=True))
    body = Group(story, Text(), figures) if column.shares else story
    return Panel(
        body,
        title=Text(line(column.label), style="bold"),
        subtitle=Text(line(column.detail)) if column.detail else None,
        title_align="left",
    )


def _bar(share: float, width: int = 8) -> Text:
    filled = round(share * width)
    return Text("\u2588" * filled + "\u2591" * (width - filled))
