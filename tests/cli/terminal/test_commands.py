"""How commands of a chat are written."""

import pytest

from steermoe.cli.terminal import commands
from steermoe.cli.terminal.commands import Command, parse
from steermoe.cli.terminal.talk import Talk
from steermoe.errors import GenerationError


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("Hello /domain", "Hello /domain"),
        (" /domain", " /domain"),
        ("//etc is a folder", "/etc is a folder"),
        ("/domain sport=0.7  food=0.3 ", Command("domain", "sport=0.7  food=0.3")),
        ("/Save! a b.txt", Command("save", "a b.txt", True)),
        ("/exit", Command("quit")),
        ("/undo ", Command("undo")),
    ],
)
def test_lines(line, found):
    assert parse(line) == found


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/domian sport", "/domian is no command: did you mean /domain?"),
        ("/", "/ is no command: /help lists the commands"),
        ("/etc/passwd", "written with //"),
        ("/undo! 2", "/undo! is no command"),
        ("/undo 2", "/undo takes nothing after it, not '2'"),
    ],
)
def test_wrong_lines_are_one_line_of_error(line, error):
    with pytest.raises(GenerationError) as caught:
        parse(line)
    assert error in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["x", "nan", "inf", "1e999", ""])
def test_no_strengths(text):
    with pytest.raises(GenerationError, match="that is no number"):
        commands.read_number(text)


@pytest.mark.parametrize("text", ["-1", "1.5", "\u0661", "9" * 50, ""])
def test_no_seeds(text):
    with pytest.raises(GenerationError, match="that is no seed"):
        commands.read_seed(text)


def test_every_command_is_there_and_in_the_help():
    for name in commands.COMMANDS:
        assert name == "quit" or hasattr(Talk, f"_do_{name}")
        assert any(line.startswith(f"/{name}") for line in commands.help_lines())
