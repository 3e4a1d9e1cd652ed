"""Tables in a terminal and in a pipe."""

import io

import pytest
from rich.console import Console

from steermoe.cli.terminal import tables

LONG = "a very long text " * 20
ROWS = [("[bold]x[/bold]", "1", "short"), ("two\nlines\tand a tab", "22", LONG), ("中文 \x1b[31m", "", "")]


@pytest.fixture
def printed(monkeypatch):
    """What is printed into a stream of some width; `terminal` is what it says of itself."""

    def print_into(function, *arguments, terminal, width=60):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
        monkeypatch.setattr("sys.stdout", stream)
        options = {"markup": False, "emoji": False, "highlight": False, "color_system": None}
        monkeypatch.setattr(tables, "out", Console(file=stream, width=width, **options))
        function(*arguments)
        return stream.getvalue()

    return print_into


def test_in_a_pipe_a_row_is_one_line_and_columns_have_their_own_width(printed):
    lines = printed(tables.print_table, ("name", "n", "text"), ROWS, terminal=False).split("\n")
    assert lines == [
        "name                 n   text",
        "[bold]x[/bold]       1   short",
        f"two lines and a tab  22  {LONG.rstrip()}",
        "中文 \\x1b[31m",
        "",
    ]


def test_in_a_pipe_a_long_cell_widens_no_other_row(printed):
    rows = [("a", "m" * 100_000, "x"), ("b", "short", "y")]
    lines = printed(tables.print_table, ("name", "model", "file"), rows, terminal=False).split("\n")
    assert lines[1] == f"a     {'m' * 100_000}  x"
    assert lines[2] == f"b     {'short'.ljust(tables.WIDEST)}  y"


def test_a_card_in_a_pipe(printed):
    facts = {"file": "/a/[b]/c", "title of it": ":smile: " + LONG}
    lines = printed(tables.print_facts, facts, terminal=False).split("\n")
    assert lines == ["file         /a/[b]/c", f"title of it  :smile: {LONG.rstrip()}", ""]


def test_in_a_terminal_the_last_column_is_folded_into_its_width(printed):
    lines = printed(tables.print_table, ("name", "n", "text"), ROWS, terminal=True).splitlines()
    assert max(map(len, lines)) <= 60
    assert len(lines) > len(ROWS) + 3
    assert any(line.startswith("[bold]x[/bold]") for line in lines)


def test_a_card_in_a_terminal(printed):
    lines = printed(tables.print_facts, {"file": "/a/[b]/c", "title": LONG}, terminal=True).splitlines()
    assert lines[0].rstrip() == "file   /a/[b]/c"
    assert len(lines) > 3
    assert max(map(len, lines)) <= 60


@pytest.mark.parametrize("command", [("models", "list"), ("vectors", "list"), ("vectors", "show", "sport")])
def test_commands_print_no_spaces_at_the_end_into_a_pipe(run, command):
    result = run(*command)
    assert result.code == 0
    assert not [line for line in result.out.splitlines() if line != line.rstrip()]
