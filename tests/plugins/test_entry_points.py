"""The entry points by which other programs find the plugins."""

import tomllib
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import pytest

GROUPS = {"llm": "llm", "inspect_ai": "inspect"}
"""Groups of entry points, and the extras that install who reads them."""
PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("group", GROUPS)
def test_a_plugin_is_there_and_has_its_extra(group):
    (module,) = PROJECT["entry-points"][group].values()
    assert find_spec(module) is not None
    assert any(one.startswith(f"{group}>=") for one in PROJECT["optional-dependencies"][GROUPS[group]])


@pytest.mark.parametrize("group", GROUPS)
def test_the_installed_package_has_the_entry_point(group):
    points = distribution("steermoe").entry_points
    if "plugins" not in str(points):
        pytest.skip("steermoe was installed before it had plugins: make install")
    assert [point.value for point in points.select(group=group)] == list(PROJECT["entry-points"][group].values())
