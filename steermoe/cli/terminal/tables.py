"""Tables and cards on stdout. Every text in them is made safe to show."""

import sys
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from steermoe.cli.terminal.console import out, printable

UNLIMITED = 10_000
"""Width of a table that is not for a terminal: in a pipe a row is one line, so that grep finds all of it."""


def print_table(titles: Sequence[str], rows: Iterable[Sequence[str]], wrapping: int = 1) -> None:
    """Rows under their titles; in a narrow terminal the cells of the last columns, `wrapping` many, are folded."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_edge=False)
    for number, title in enumerate(titles):
        table.add_column(title, overflow="fold", no_wrap=number < len(titles) - wrapping)
    for row in rows:
        table.add_row(*map(printable, row))
    _print(table)


def print_facts(facts: Mapping[str, str]) -> None:
    """A card: what a fact is called, and the fact."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, fact in facts.items():
        table.add_row(label, printable(fact))
    _print(table)


def _print(table: Table) -> None:
    console = out if sys.stdout.isatty() else Console(file=out.file, width=UNLIMITED, highlight=False, emoji=False)
    console.print(table)
