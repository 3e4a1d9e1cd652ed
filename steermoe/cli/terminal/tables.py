"""Tables and cards on stdout; a cell is one line of text, never markup or a command to the terminal.

In a terminal rich fits them to its width. In a pipe each row is one line, which grep finds as a whole: columns are as
wide as their widest cell up to `WIDEST`, nothing is folded or padded at the end.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from steermoe.cli.terminal.console import line, out

GAP = "  "
"""Between two columns."""
WIDEST = 120
"""Columns are not padded beyond this: one long cell, which comes from a file, must not widen all rows."""


def print_table(titles: Sequence[str], rows: Iterable[Sequence[str]], wrapping: int = 1) -> None:
    """Rows under their titles; in a narrow terminal the cells of the last `wrapping` columns are folded."""
    if not sys.stdout.isatty():
        _print_lines([titles, *rows])
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_edge=False)
    for number, title in enumerate(titles):
        table.add_column(Text(line(title)), overflow="fold", no_wrap=number < len(titles) - wrapping)
    for row in rows:
        table.add_row(*map(_cell, row))
    out.print(table)


def print_facts(facts: Mapping[str, str]) -> None:
    """A card: a label and a fact per line."""
    if not sys.stdout.isatty():
        _print_lines(list(facts.items()))
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, fact in facts.items():
        table.add_row(_cell(label), _cell(fact))
    out.print(table)


def _cell(text: str) -> Text:
    return Text(line(text))


def _print_lines(rows: Sequence[Sequence[str]]) -> None:
    """Each row on a line of its own."""
    cells = [[line(cell) for cell in row] for row in rows]
    widths = [min(WIDEST, max(map(cell_len, column))) for column in zip(*cells, strict=True)]
    for row in cells:
        padded = (cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
        out.print(Text(GAP.join(padded).rstrip()), soft_wrap=True)
