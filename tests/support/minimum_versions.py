"""Print the lowest version of every package that pyproject.toml accepts, as constraints for pip.

`make test-minimum` installs with them and runs the quick tests, so that every lower bound there was really run. Needs
only the standard library, as nothing is installed yet when it runs.
"""

import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
LOWER_BOUND = re.compile(r"(?P<name>[\w.-]+)(\[[\w,-]+\])?>=(?P<version>[\w.]+)(,<[\w.]+)?")


def lowest(requirements: Iterable[str]) -> dict[str, str]:
    """The lower bound of each package.

    Raises:
        ValueError: a requirement has no lower bound, or two requirements of one package have different ones.
    """
    versions: dict[str, str] = {}
    for requirement in requirements:
        match = LOWER_BOUND.fullmatch(requirement)
        if match is None:
            raise ValueError(f"'{requirement}' has no lower bound: write it as 'name>=version'")
        name, version = match["name"], match["version"]
        if versions.setdefault(name, version) != version:
            raise ValueError(f"{name} has lower bounds {versions[name]} and {version}: write one of them everywhere")
    return versions


def requirements() -> list[str]:
    """Everything that pyproject.toml asks for: to build, to run, and in every extra."""
    pyproject = tomllib.loads(PYPROJECT.read_text())
    project = pyproject["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    return [*pyproject["build-system"]["requires"], *project["dependencies"], *extras]


if __name__ == "__main__":
    sys.stdout.writelines(f"{name}=={version}\n" for name, version in sorted(lowest(requirements()).items()))
