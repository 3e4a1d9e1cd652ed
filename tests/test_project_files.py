"""Project documents are complete, and every path, test and make target that they name exists."""

import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml

import steermoe

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())
DECISIONS = ROOT / "docs" / "decisions"
RECORDS = sorted(path.name for path in DECISIONS.glob("0*.md"))
GUIDES = ("CONTRIBUTING.md", "docs/private_api.md", *(f"docs/decisions/{name}" for name in RECORDS))
FOLDERS = "steermoe|tests|docs|benchmarks|recipes|steering_vectors"
PATH = re.compile(rf"`((?:{FOLDERS})/[^`\s]*|[\w.]+\.(?:md|toml|txt)|Makefile)`")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@cache
def names_of_tests() -> set[str]:
    """All test functions in tests/."""
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    return {name for source in sources for name in re.findall(r"^(?:async )?def (test_\w+)\(", source, re.MULTILINE)}


def rows(name: str) -> list[list[str]]:
    """The cells of every row of a document's tables."""
    lines = [line for line in read(name).splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_citation_is_complete():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "version", "license", "references"} <= citation.keys()
    assert (citation["title"], citation["license"]) == ("steermoe", "Apache-2.0")
    (thesis,) = citation["references"]
    assert (thesis["type"], thesis["year"], thesis["authors"][0]["family-names"]) == ("thesis", 2024, "Shchukin")
    assert thesis["title"] in re.sub(r"\s+", " ", read("README.md"))


def test_all_files_name_one_version():
    version = tomllib.loads(read("pyproject.toml"))["project"]["version"]
    assert steermoe.__version__ == version
    assert yaml.safe_load(read("CITATION.cff"))["version"] == version
    released = re.findall(r"^## \[(\d[^\]]*)\] - \d{4}-\d{2}-\d{2}$", read("CHANGELOG.md"), re.MULTILINE)
    assert released[0] == version


def test_the_source_distribution_has_every_project_file():
    included = tomllib.loads(read("pyproject.toml"))["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert [name for name in included if not (ROOT / name).exists()] == []
    documents = {
        path.name
        for pattern in ("*.md", "*.cff", "*.txt", "*.yml", "Dockerfile", "LICENSE", "Makefile")
        for path in ROOT.glob(pattern)
    }
    assert documents | {".dockerignore", ".pre-commit-config.yaml"} <= set(included)


@pytest.mark.parametrize("guide", GUIDES)
def test_paths_exist(guide):
    assert [path for path in dict.fromkeys(PATH.findall(read(guide))) if not (ROOT / path).exists()] == []


def test_private_names_have_a_file_a_guard_and_a_test():
    found = [row for row in rows("docs/private_api.md") if row[0] != "name"]
    assert found
    for name, file, _, guard, test in found:
        assert PATH.findall(file), name
        assert guard, name
        tests = re.findall(r"`(\w+)`", test)
        assert tests or test == "none", name
        assert set(tests) <= names_of_tests(), name


def test_decisions_are_in_the_index_and_in_form():
    assert RECORDS
    assert re.findall(r"\]\((0[^)]*)\)", read("docs/decisions/README.md")) == RECORDS
    for number, name in enumerate(RECORDS, 1):
        text = (DECISIONS / name).read_text(encoding="utf-8")
        assert text.startswith(f"# {number:04} · ")
        assert name.startswith(f"{number:04}-")
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Context", "Decision", "Measured", "Consequences"]


@pytest.mark.parametrize("name", RECORDS)
def test_links_of_decisions_lead_somewhere(name):
    links = re.findall(r"\]\(([^)#]+)\)", (DECISIONS / name).read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (DECISIONS / link).is_file()] == []


def test_every_make_target_is_explained():
    targets = re.findall(r"^([a-z-]+):.*## ", read("Makefile"), re.MULTILINE)
    assert re.findall(r"^\| `make ([a-z-]+)` \|", read("CONTRIBUTING.md"), re.MULTILINE) == targets


def test_the_hook_runs_lint_and_downloads_nothing():
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    (hook,) = repository["hooks"]
    assert repository["repo"] == "local"
    assert (hook["entry"], hook["language"], hook["pass_filenames"]) == ("make lint", "system", False)
