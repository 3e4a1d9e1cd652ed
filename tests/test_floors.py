"""The rule of floors: a room imports only from rooms below it, and no modules import each other in a circle.

A room is a folder directly in steermoe/; the files next to the folders are the ground. Imports inside functions and for
type checking count too.
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "steermoe"
FLOORS = (
    ("cli", "plugins"),
    ("evaluation", "serving"),
    ("batch", "discovery"),
    ("tracing",),
    ("engines",),
    ("steering",),
    ("models",),
    ("vectors",),
    ("routing",),
    ("figures",),
    ("files", "formulas", "hub"),
    ("errors",),
)
"""From top to bottom; rooms on one floor don't import each other."""
FLOOR = {room: len(FLOORS) - number for number, rooms in enumerate(FLOORS) for room in rooms}
DEEPEST = 8
"""The most imports on a path from room to room; the ground counts as one room."""
GROUND = {"errors", "files", "figures", "formulas", "hub"}
OUTSIDE = {"steermoe", "steermoe.__main__"}
"""The package itself may import any room."""


def sources() -> dict[str, str]:
    """The package's modules by their dotted names; a folder's `__init__` is the folder."""
    return {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path.read_text()
        for path in PACKAGE.rglob("*.py")
    }


def imports(source: str, modules: Mapping[str, str]) -> Iterator[str]:
    """The modules of the package that a source imports anywhere."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else node.module


def arrows(modules: Mapping[str, str]) -> dict[str, set[str]]:
    """The modules that each module imports."""
    return {
        name: set(imports(source, modules)) - {name, "steermoe"}
        for name, source in modules.items()
        if name not in OUTSIDE
    }


def room(module: str) -> str:
    return module.split(".")[1]


def upward(modules: Mapping[str, str]) -> list[str]:
    """The imports that break the rule."""
    return [
        f"{name} imports {other}: {room(other)} does not lie below {room(name)}"
        for name, others in arrows(modules).items()
        for other in sorted(others)
        if room(name) != room(other) and FLOOR[room(other)] >= FLOOR[room(name)]
    ]


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """A circle of imports; empty if there is none."""
    state: dict[str, int] = {}

    def visit(name: str, way: list[str]) -> list[str]:
        state[name] = 1
        for other in sorted(graph.get(name, ())):
            if state.get(other) == 1:
                return [*way[way.index(other) :], other]
            if other not in state and (found := visit(other, [*way, other])):
                return found
        state[name] = 2
        return []

    return next((found for name in sorted(graph) if name not in state and (found := visit(name, [name]))), [])


def depth(modules: Mapping[str, str]) -> int:
    """The number of imports on the longest path between rooms."""
    ways: dict[str, set[str]] = {}
    for name, others in arrows(modules).items():
        here = "ground" if room(name) in GROUND else room(name)
        there = {"ground" if room(other) in GROUND else room(other) for other in others}
        ways.setdefault(here, set()).update(there - {here})

    def longest(name: str) -> int:
        return max((1 + longest(other) for other in ways.get(name, ())), default=0)

    return max(map(longest, ways))


def test_every_room_has_its_floor():
    rooms = {room(name) for name in sources() if name not in OUTSIDE}
    assert rooms == set(FLOOR)


def test_no_import_goes_upward():
    assert upward(sources()) == []


def test_no_modules_import_each_other_in_a_circle():
    assert circle(arrows(sources())) == []


def test_the_house_is_not_too_deep():
    assert depth(sources()) <= DEEPEST


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("steermoe.routing.routers", "from steermoe.vectors.vector import SteeringVector"),
        ("steermoe.steering.plans", "def late():\n    from steermoe.engines import auto"),
        ("steermoe.batch.jobs", "import steermoe.discovery.corpus"),
    ],
)
def test_a_planted_import_is_found(module, line):
    planted = sources()
    planted[module] += f"\n{line}\n"
    (problem,) = set(upward(planted)) - set(upward(sources()))
    assert problem.startswith(f"{module} imports ")


def test_a_planted_circle_is_found():
    planted = sources()
    planted["steermoe.routing.shape"] += "\ndef late():\n    import steermoe.routing.routers\n"
    assert set(circle(arrows(planted))) == {"steermoe.routing.shape", "steermoe.routing.routers"}
