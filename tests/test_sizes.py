"""Functions stay small: they fit on a screen, and outside the command line they take few parameters.

ruff checks the third limit, the complexity of a function (C901).
"""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "steermoe"
MOST_LINES, MOST_PARAMETERS = 60, 7

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(source: str) -> Iterator[Function]:
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, Function))


def parameters(function: Function) -> int:
    """The number of parameters without `self` and `cls`; `*args` and `**kwargs` count as one each."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    is_method = bool(named) and named[0].arg in ("self", "cls")
    return len(named) - is_method + (given.vararg is not None) + (given.kwarg is not None)


def too_large(place: str, source: str, *, is_command: bool = False) -> list[str]:
    found = []
    for function in functions(source):
        lines = (function.end_lineno or 0) - function.lineno + 1
        if lines > MOST_LINES:
            found.append(f"{place}: {function.name} has {lines} lines, at most {MOST_LINES}")
        if parameters(function) > MOST_PARAMETERS and not is_command:
            found.append(f"{place}: {function.name} has {parameters(function)} parameters, at most {MOST_PARAMETERS}")
    return found


def test_no_function_is_too_large():
    assert [
        problem
        for path in sorted(PACKAGE.rglob("*.py"))
        for problem in too_large(
            str(path.relative_to(PACKAGE)), path.read_text(), is_command=path.is_relative_to(PACKAGE / "cli")
        )
    ] == []


def test_a_function_that_is_too_large_is_found():
    long = "def long():\n" + "    pass\n" * MOST_LINES
    wide = "def wide(self, a, b, c, d, *, e, f, g, **h): ..."
    assert too_large("x.py", long) == ["x.py: long has 61 lines, at most 60"]
    assert too_large("x.py", wide) == ["x.py: wide has 8 parameters, at most 7"]
    assert too_large("x.py", wide, is_command=True) == []
    assert too_large("x.py", wide.replace(", **h", "")) == []
