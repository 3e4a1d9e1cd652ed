"""The reference pages of the site, made from the code: each command from its `--help`, each public name of the library.

Knows Markdown and the directives of mkdocstrings, not how a site is built.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer

import steermoe
from steermoe.cli.app import app

DOCS = Path(__file__).parents[1] / "docs"
ROOMS = {
    "models": "load a model, and see what can be steered",
    "steering": "attach steering to a model, plan it, read its report",
    "vectors": "read, write, mix, import and export vectors",
    "engines": "requests, completions and traces",
    "discovery": "routing embeddings, and vectors from texts",
    "evaluation": "vectors of domains and topics, built where they are missing",
    "serving": "one model for many clients at once",
    "routing": "routers, and the experts that they choose",
    "batch": "many texts, resumable",
    "tracing": "traces as pages and files",
    "errors": "what the library raises",
}
"""The pages about the library, by the rooms whose public names they show, in reading order."""
IMPORT = re.compile(r"^ *from (steermoe\.[\w.]+) import (\([^)]*\)|[\w, ]+)", re.MULTILINE)


def reference() -> dict[str, str]:
    """The text of every reference page, by its path in the site."""
    return {**commands(), **library()}


# ---- the commands ----


def commands() -> dict[str, str]:
    """A page for the commands of `steermoe` itself, and one for each group of commands."""
    root = typer.main.get_command(app)
    context = root.context_class(root, info_name=root.name)
    groups = [(root, context), *((one, inner) for one, inner in _children(root, context) if _is_group(one))]
    return {f"commands/{group.name}.md": _group_page(group, inner) for group, inner in groups}


def _group_page(group: Any, context: Any) -> str:
    """What the group itself prints with `--help`, then a section for each of its commands."""
    children = list(_children(group, context))
    lists = (
        f"- [`{inner.command_path}`]({_place(one, inner)}): {_plain(one.get_short_help_str(200))}"
        for one, inner in children
    )
    sections = (f"## {inner.command_path}\n\n{_section(one, inner)}" for one, inner in children if not _is_group(one))
    parts = [f"# {context.command_path}", _section(group, context), "**Commands**", "\n".join(lists), *sections]
    return "\n\n".join(parts) + "\n"


def _section(command: Any, context: Any) -> str:
    """One command: what it does, its usage, its arguments and options by their headings, its examples."""
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    panels: dict[str, list[str]] = {}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            given, what = record
            is_argument = parameter.param_type_name == "argument"
            heading = "Arguments" if is_argument else getattr(parameter, "rich_help_panel", None) or "Options"
            panels.setdefault(heading, []).append(f"`{given}`\n:   {_plain(what)}")
    lists = [part for heading, entries in panels.items() for part in (f"**{heading}**", *entries)]
    return "\n\n".join([_plain(command.help), f"```text\n{usage}\n```", *lists, *_examples(command.epilog or "")])


def _examples(epilog: str) -> Iterator[str]:
    """The commands at the end of a help, in one block."""
    _, *paragraphs = (part.strip() for part in epilog.removeprefix("Example:").split("\n\n"))
    lines = [line for line in paragraphs if line] or [epilog.removeprefix("Example: ").strip()]
    if any(lines):
        yield "**Examples**\n\n```sh\n{}\n```".format("\n".join(lines))


def _children(group: Any, context: Any) -> Iterator[tuple[Any, Any]]:
    """The commands of a group with their contexts, which know their full names."""
    for name, command in group.commands.items():
        if not command.hidden:
            yield command, command.context_class(command, info_name=name, parent=context)


def _is_group(command: Any) -> bool:
    return hasattr(command, "commands")


def _place(command: Any, context: Any) -> str:
    """Where a command is described, from the page of its group."""
    return f"{command.name}.md" if _is_group(command) else f"#{context.command_path.replace(' ', '-')}"


def _plain(text: str) -> str:
    """A text whose characters mean nothing to Markdown, except backticks."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_<\[\]])", r"\\\1", part) for part in parts)


# ---- the library ----


def library() -> dict[str, str]:
    """A page for each room that has public names, and one that lists all names.

    Raises:
        ValueError: a name of a room that `ROOMS` lacks.
    """
    places = {name: f"steermoe.{name}" for name in steermoe.__all__}
    places |= {path.rpartition(".")[2]: path for path in imported_in(DOCS.rglob("*.md"))}
    homes = {path: _room(name, path) for name, path in places.items()}
    used = {*homes.values(), "errors"}
    if unknown := sorted(used - ROOMS.keys()):
        raise ValueError(f"rooms {unknown} have public names, but no page: describe them in ROOMS")
    pages = {f"api/{room}.md": _room_page(room, homes) for room in ROOMS if room in used}
    return {"api/index.md": _index(places, homes), **pages}


def imported_in(pages: Iterable[Path]) -> list[str]:
    """The names that Python examples import from modules of steermoe, with their modules.

    Names that `steermoe` itself has are left out.
    """
    found = set()
    for page in pages:
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            for module, names in IMPORT.findall(block):
                found |= {f"{module}.{name.split()[0]}" for name in names.strip("()").split(",") if name.strip()}
    return sorted(path for path in found if path.rpartition(".")[2] not in steermoe.__all__)


def _room(name: str, path: str) -> str:
    """The room of a public name: of what `steermoe` itself has, the room of its module."""
    return (steermoe._HOME[name] if path == f"steermoe.{name}" else path.removeprefix("steermoe.")).partition(".")[0]


def _room_page(room: str, homes: dict[str, str]) -> str:
    """All names of a room; of errors all classes, since guides and docstrings name more than the root."""
    heading = f"# {room.title()}\n\n{ROOMS[room].capitalize()}.\n\n"
    if room == "errors":
        options = '{show_root_heading: false, filters: ["!^[_a-z]", "!^[A-Z]+$"]}'
        return f"{heading}::: steermoe.errors\n    options: {options}\n"
    return heading + "".join(f"::: {path}\n\n" for path, home in homes.items() if home == room)


def _index(places: dict[str, str], homes: dict[str, str]) -> str:
    """The list of all names, by room."""
    lines = [
        "# Python",
        "",
        "`import steermoe` costs nothing: each name is loaded at its first use. The names in `steermoe` are the",
        "library's interface. What the guides import from other modules is listed with its module.",
        "",
    ]
    for room, about in ROOMS.items():
        if room not in ("errors", *homes.values()):
            continue
        names = (name if path == f"steermoe.{name}" else path for name, path in places.items() if homes[path] == room)
        listed = ", ".join(f"[`{name}`][{name if '.' in name else f'steermoe.{name}'}]" for name in names)
        lines.append(f"- [{room.title()}]({room}.md), {about}" + (f": {listed}" if room != "errors" else ""))
    return "\n".join(lines) + "\n"


SECTION = re.compile(r"^(?P<heading>Args|Attributes|Raises):\n(?P<entries>(?:[ \t]+.*\n?|\n(?=[ \t]))+)", re.MULTILINE)
NAMES = re.compile(r"^(?P<indent>[ ]+)(?P<names>\w+(?:, \w+)+): (?P<what>(?:.|\n(?P=indent)[ ])*)", re.MULTILINE)
NEXT_ERROR = re.compile(r"(?<=\.)\s+(?=[A-Z]\w+: )")


def with_a_line_each(docstring: str) -> str:
    """A docstring whose sections have a line for each name, where ours have `a, b: what` and `A: why. B: why.`"""

    def entries(section: re.Match[str]) -> str:
        text = section["entries"]
        if section["heading"] == "Raises":
            indent = text[: len(text) - len(text.lstrip(" "))]
            text = NEXT_ERROR.sub(f"\n{indent}", text)
        text = NAMES.sub(
            lambda one: "\n".join(f"{one['indent']}{name}: {one['what']}" for name in one["names"].split(", ")), text
        )
        return f"{section['heading']}:\n{text}"

    return SECTION.sub(entries, docstring)
