"""Writes the tables of the docs that follow from the code, between the comments that name them: `make docs`."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from steermoe.routing.positions import EXTENT, POSITIONS
from steermoe.steering.plans import SCHEDULES
from steermoe.steering.spec import FIELDS, SteeringSpec

DOCS = Path(__file__).parents[1] / "docs"


def steering_fields() -> str:
    """The fields of `SteeringSpec`."""
    hints = get_type_hints(SteeringSpec)
    rows = [("option", "field of a JSON line and of the server", "what it does", "default")]
    for one in FIELDS:
        known = one.metadata
        options = ", ".join(f"`{flag}`" for flag in known["flags"] or (f"--{one.name.replace('_', '-')}",))
        choices = ", ".join(f"`{choice}`" for choice in _choices(hints[one.name]))
        what = known["help"].partition(" Default: ")[0]
        rows.append(
            (
                options,
                f"`{json.dumps(one.name)}: {json.dumps(known['example'])}`",
                f"{what[:-1]}: {choices}." if choices else what,
                known["unset"] or f"`{one.default}`",
            )
        )
    return _table(rows)


def positions() -> str:
    """Which tokens each position steers."""
    return _table(
        [
            ("position", "first steered token", "last steered token", "number 0 of schedules"),
            *((f"`{name}`", *EXTENT[name]) for name in POSITIONS),
        ]
    )


def schedules() -> str:
    """What each schedule does."""
    return _table([("schedule", "strength"), *((f"`{name}`", what) for name, what in SCHEDULES.items())])


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _choices(hint: Any) -> Iterator[str]:
    """What a type such as `Literal["a", "b"] | None` lets one choose from."""
    for part in get_args(hint):
        if get_origin(hint) is Literal:
            yield part
        else:
            yield from _choices(part)


TABLES: dict[str, tuple[Callable[[], str], ...]] = {"steering.md": (steering_fields, positions, schedules)}
"""The functions that make the tables of a page."""


def with_table(text: str, table: Callable[[], str]) -> str:
    """The page with one of its tables made anew.

    Raises:
        ValueError: the page has no place for it.
    """
    begin, end = f"<!-- {table.__name__}: written by `make docs` -->", "<!-- end -->"
    found = re.search(f"{re.escape(begin)}.*?{end}", text, flags=re.DOTALL)
    if found is None:
        raise ValueError(f"the page has no place for its table: write {begin} and {end} around it")
    return f"{text[: found.start()]}{begin}\n\n{table()}\n\n{end}{text[found.end() :]}"


def main() -> None:
    for name, tables in TABLES.items():
        page = DOCS / name
        text = page.read_text(encoding="utf-8")
        for table in tables:
            text = with_table(text, table)
            print(f"{page.name}: {table.__name__}")
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
