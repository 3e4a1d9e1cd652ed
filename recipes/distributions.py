"""Checks what `make dist` built: what is in the wheel and in the sdist, their sizes, and that the wheel alone steers.

Needs only the standard library. Run it from the top folder: `python -m recipes.distributions dist`.
"""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
PACKAGE, VECTORS = "steermoe", "steering_vectors"
TRAINED_PART = "steermoe/models/default/trained_part.safetensors"
IGNORED = {"__pycache__", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache"}
"""Folders that no distribution contains."""
ALWAYS_IN_SDIST = {"PKG-INFO", ".gitignore", "pyproject.toml"}
"""What hatchling puts into every sdist."""
LARGEST = 3
"""How many of the largest files are printed."""

Sizes = Mapping[str, int]
"""Bytes by path, without the folder that an sdist wraps around everything."""


def files_of_wheel(path: Path) -> Sizes:
    with zipfile.ZipFile(path) as archive:
        return {one.filename: one.file_size for one in archive.infolist() if not one.is_dir()}


def files_of_sdist(path: Path) -> Sizes:
    with tarfile.open(path) as archive:
        return {one.name.partition("/")[2]: one.size for one in archive.getmembers() if one.isfile()}


def expected_in_wheel() -> set[str]:
    """The package's files, and the vectors inside the package: code, texts, stories, trained part."""
    package = {path.relative_to(ROOT).as_posix() for path in _files(ROOT / PACKAGE)}
    return package | {f"{PACKAGE}/{path.relative_to(ROOT).as_posix()}" for path in _files(ROOT / VECTORS)}


def expected_in_sdist() -> set[str]:
    """Everything that pyproject.toml includes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    return {path.relative_to(ROOT).as_posix() for name in included for path in _files(ROOT / name)}


def _files(place: Path) -> Iterator[Path]:
    found = [place] if place.is_file() else place.rglob("*")
    return (path for path in found if path.is_file() and IGNORED.isdisjoint(path.parts))


def wheel_problems(files: Iterable[str]) -> list[str]:
    """What a wheel lacks, and what it should not contain."""
    given = {name for name in files if not PurePosixPath(name).parts[0].endswith(".dist-info")}
    return _differences(given, expected_in_wheel())


def sdist_problems(files: Iterable[str]) -> list[str]:
    """What an sdist lacks, and what it should not contain."""
    given = set(files) - ALWAYS_IN_SDIST
    twice = [f"twice: {name}" for name in given if name != TRAINED_PART and name.endswith(Path(TRAINED_PART).name)]
    return _differences(given, expected_in_sdist()) + twice


def _differences(given: set[str], expected: set[str]) -> list[str]:
    missing = (f"missing: {name}" for name in expected - given)
    return sorted([*missing, *(f"not expected: {name}" for name in given - expected)])


def summary(path: Path, files: Sizes) -> str:
    """A distribution's size and its largest files."""
    largest = sorted(files, key=lambda name: files[name], reverse=True)[:LARGEST]
    listed = ", ".join(f"{name} {_mib(files[name])}" for name in largest)
    unpacked = _mib(sum(files.values()))
    return f"{path.name}: {_mib(path.stat().st_size)}, {len(files)} files, unpacked {unpacked}; largest: {listed}"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def run_alone(wheel: Path, folder: Path) -> None:
    """Install a wheel into an environment of its own, and steer a text with nothing else around.

    The default model is taken from the cache, or pulled into it.

    Raises:
        SystemExit: a command fails, or the vectors are not those of the wheel.
    """
    environment, empty = folder / "environment", folder / "empty"
    empty.mkdir()
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    options = ["--quiet", "--disable-pip-version-check", "--constraint", ROOT / "constraints.txt"]
    _output([python, "-m", "pip", "install", *options, wheel.resolve()], empty)
    steermoe = environment / "bin" / "steermoe"
    listed = json.loads(_output([steermoe, "vectors", "list", "--json"], empty))
    own = {Path(one["path"]).parent.parent for one in listed}
    if not own or not all(place.is_relative_to(environment) for place in own):
        sys.exit(f"the vectors are in {sorted(map(str, own))}, expected only the wheel's: see force-include")
    print(f"vectors of the wheel: {' '.join(one['domain'] for one in listed)}")
    text = _output([steermoe, "generate", "--domain", "sport", "--max-new-tokens", "10"], empty)
    if len(text.split()) < 10:
        sys.exit(f"`steermoe generate` printed {text!r}, expected a text")
    print(text.strip())


def _output(command: list[str | Path], folder: Path) -> str:
    """What a command prints, run in a folder with no vectors of a user around."""
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "STEERMOE_VECTORS")}
    known = {**outside, "HF_HUB_OFFLINE": "1", "XDG_DATA_HOME": str(folder)}
    done = subprocess.run([*map(str, command)], cwd=folder, env=known, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"`{' '.join(map(str, command))}` ended with {done.returncode}, expected 0: its message is above")
    return done.stdout


def main(folder: Path) -> None:
    wheel, sdist = _only(folder, "*.whl"), _only(folder, "*.tar.gz")
    for path, files, find in (
        (wheel, files_of_wheel(wheel), wheel_problems),
        (sdist, files_of_sdist(sdist), sdist_problems),
    ):
        print(summary(path, files))
        if problems := find(files):
            sys.exit(f"{path.name} is wrong: {'; '.join(problems)}")
    with tempfile.TemporaryDirectory() as scratch:
        run_alone(wheel, Path(scratch))


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"{folder} has {len(found)} files {pattern}, expected 1: run `make dist`, which builds it anew")
    return found[0]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
