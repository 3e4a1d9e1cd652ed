"""The tree of errors is the one that its docstring draws."""

import inspect

import pytest

from steermoe import errors
from steermoe.errors import SteerMoEError

ALL = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == errors.__name__]


def drawn_tree() -> dict[str, str | None]:
    """Each class in the docstring's drawing and its parent there."""
    parents: dict[str, str | None] = {}
    path: list[tuple[int, str]] = []
    for line in errors.__doc__.splitlines():
        name = line.replace("|", " ").replace("+--", "   ").strip().split(" ")[0]
        if "+--" in line or name == "SteerMoEError":
            depth = line.index(name)
            path = [(column, parent) for column, parent in path if column < depth]
            parents[name] = path[-1][1] if path else None
            path.append((depth, name))
    return parents


def test_the_drawing_shows_the_classes():
    real = {cls.__name__: cls.__base__.__name__ if cls is not SteerMoEError else None for cls in ALL}
    assert drawn_tree() == real


@pytest.mark.parametrize("cls", ALL)
def test_all_errors_have_one_root(cls):
    assert issubclass(cls, SteerMoEError)
    assert cls.__doc__


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("one"), "one"),
        (ValueError("one\n\n  two\r\n"), "one two"),
        (ValueError(), "ValueError"),
        (ValueError("x" * 1000), "x" * 300),
        (ValueError("two\nlines \x07"), "two lines \\x07"),
    ],
)
def test_the_reason_that_another_library_gives_is_one_line(error, text):
    assert errors.reason(error) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\x1b[31m", "'a\\x1b[31m'"),
        (True, "True"),
        ([1, "2"], "[1, '2']"),
        (10**400, f"{10**59}..."),
        (10**5000, "a int"),
    ],
    ids=["escape", "flag", "list", "long number", "number too long for Python"],
)
def test_values_in_messages_are_short_and_printable(value, text):
    assert errors.shown(value) == text


def test_counts_have_the_right_number():
    counts = [errors.count_of(number, thing) for number in (0, 1, 1436) for thing in ("text", "story")]
    assert counts == ["0 texts", "0 stories", "1 text", "1 story", "1,436 texts", "1,436 stories"]


def test_the_root_is_only_an_exception():
    assert SteerMoEError.__bases__ == (Exception,)
