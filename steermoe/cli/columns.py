"""Draw a comparison: columns side by side where the terminal is wide enough, one below the other where it isn't."""

from collections.abc import Sequence

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from steermoe.cli.console import out, printable
from steermoe.comparison import Column

MIN_COLUMN_WIDTH = 36


def print_columns(prompt: str, columns: Sequence[Column]) -> None:
    """Print the prompt, then all columns, as many beside each other as fit."""
    out.print(Text(printable(prompt), style="bold"))
    beside = max(1, min(len(columns), out.width // MIN_COLUMN_WIDTH))
    if beside == 1:
        for column in columns:
            out.print(_panel(column))
        return
    for start in range(0, len(columns), beside):
        table = Table.grid(expand=True)
        chosen = columns[start : start + beside]
        for _ in range(beside):
            table.add_column(ratio=1)
        table.add_row(*[_panel(column) for column in chosen])
        out.print(table)


def _panel(column: Column) -> Panel:
    story = Text(printable(column.completion.text).strip())
    if len(story.plain) == len(column.completion.text.strip()):
        shift = len(column.completion.text) - len(column.completion.text.lstrip())
        for start, end in column.words:
            story.stylize("bold yellow", start - shift, end - shift)
    figures = Table.grid(padding=(0, 1))
    for domain, share in column.shares.items():
        words = column.word_count.get(domain)
        counted = "" if words is None else f"{words} {domain} words"
        figures.add_row(Text(f"{domain} experts"), _bar(share), Text(f"{share:4.0%}"), Text(counted))
    body = Group(story, Text(), figures) if column.shares else story
    return Panel(body, title=Text(column.label, style="bold"), subtitle=Text(column.detail or " "), title_align="left")


def _bar(share: float, width: int = 8) -> Text:
    filled = round(share * width)
    return Text("\u2588" * filled + "\u2591" * (width - filled))
