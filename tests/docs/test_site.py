"""The site of the docs: it has every page, command and public name, its links work, and it asks no other host."""

import re
import shutil
import subprocess
import sys

import pytest
import typer
import yaml

import steermoe
from recipes.docs_reference import ROOMS, commands, imported_in, library, with_a_line_each
from recipes.docs_site import DOCUMENTS, foreign_loads, with_links_of_the_site
from steermoe.cli.app import app
from tests.support.pages import ROOT

SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def leaves(entries):
    """All pages and folders of a navigation."""
    for entry in entries:
        for target in entry.values():
            yield from leaves(target) if isinstance(target, list) else [target]


def command_tree():
    """Every command and group by its full name, with its context."""
    root = typer.main.get_command(app)
    waiting = [(root, root.context_class(root, info_name=root.name))]
    while waiting:
        command, context = waiting.pop()
        yield context.command_path, command, context
        for name, child in getattr(command, "commands", {}).items():
            waiting.append((child, child.context_class(child, info_name=name, parent=context)))


def test_every_page_is_in_the_navigation():
    listed = list(leaves(SITE["nav"]))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").glob("*.md")}
    assert pages | set(DOCUMENTS.values()) == {page for page in listed if not page.endswith("/")}
    assert {page for page in listed if page.endswith("/")} == {"commands/", "api/", "decisions/"}


def test_every_command_has_its_section_with_all_of_its_help():
    pages = commands()
    for path, command, context in command_tree():
        group = context if hasattr(command, "commands") else context.parent
        page = pages[f"commands/{group.info_name}.md"]
        (section,) = re.findall(rf"^#+ {path}$(.*?)(?=^#|\Z)", page, re.MULTILINE | re.DOTALL)
        records = [record for one in command.get_params(context) if (record := one.get_help_record(context))]
        assert [record[0] for record in records if f"`{record[0]}`\n:   " not in section] == []
        examples = [line for line in (command.epilog or "").split("\n\n") if line.startswith(context.command_path)]
        assert [line for line in examples if line.strip() not in section] == []


def test_what_means_something_to_markdown_is_escaped():
    page = commands()["commands/steermoe.md"]
    assert r"Below 1 sharpens, above 1 flattens the distribution of the next token.  \[default: 0.7\]" in page
    assert "Use the steps that `steermoe models compile` compiled." in page


def test_every_public_name_is_on_one_page():
    pages = library()
    shown = re.findall(r"^::: (\S+)$", "\n".join(pages.values()), re.MULTILINE)
    public = {f"steermoe.{name}" for name in steermoe.__all__ if name != "SteerMoEError"}
    assert set(shown) == public | set(imported_in((ROOT / "docs").rglob("*.md"))) | {"steermoe.errors"}
    assert len(shown) == len(set(shown))


def test_examples_that_import_from_modules_are_found(tmp_path):
    page = tmp_path / "page.md"
    lines = (
        "from steermoe import mix",
        "from steermoe.a.b import C as D, mix  # both",
        "from steermoe.e import (\n  F,)",
    )
    page.write_text("```python\n{}\n```\nfrom steermoe.g import H\n".format("\n".join(lines)))
    assert imported_in([page]) == ["steermoe.a.b.C", "steermoe.e.F"]


def test_a_room_without_a_description_is_refused(monkeypatch):
    monkeypatch.delitem(ROOMS, "vectors")
    with pytest.raises(ValueError, match=r"rooms \['vectors'\] have public names, but no page: describe them in ROOMS"):
        library()


def test_docstrings_get_a_line_for_each_name():
    docstring = """What, and why: this. That: too.

Args:
    top_k, top_p: 0 and 1.0
        turn them off.
    seed: of A, B: both.

Raises:
    ModelError: it can't be found, or
        has no weights. UnsupportedModel: it has
        no routers.
    ValueError, KeyError: it is damaged.

Not a section, a, b: so it stays. Error: too.
"""
    assert (
        with_a_line_each(docstring)
        == """What, and why: this. That: too.

Args:
    top_k: 0 and 1.0
        turn them off.
    top_p: 0 and 1.0
        turn them off.
    seed: of A, B: both.

Raises:
    ModelError: it can't be found, or
        has no weights.
    UnsupportedModel: it has
        no routers.
    ValueError: it is damaged.
    KeyError: it is damaged.

Not a section, a, b: so it stays. Error: too.
"""
    )


@pytest.mark.parametrize(
    ("place", "link", "expected"),
    [
        ("index.md", "docs/steering.md", "steering.md"),
        ("index.md", "SECURITY.md", "security.md"),
        ("index.md", "docs/batch.md#what-a-story-depends-on", "batch.md#what-a-story-depends-on"),
        ("share.md", "../SECURITY.md", "security.md"),
        ("decisions/README.md", "../../CONTRIBUTING.md#floors", "../contributing.md#floors"),
        ("decisions/README.md", "../log.md", "../log.md"),
        ("api/index.md", "models.md", "models.md"),
        ("serve.md", "https://example.org/docs/x.md", "https://example.org/docs/x.md"),
        ("serve.md", "../recipes/docs_site.py", "../recipes/docs_site.py"),
    ],
)
def test_links_lead_to_pages_of_the_site(place, link, expected):
    assert with_links_of_the_site(f"see [this]({link}).", place) == f"see [this]({expected})."


def test_what_is_loaded_from_another_host_is_found(tmp_path):
    (tmp_path / "page.html").write_text(
        '<link rel="canonical" href="https://a.org/"><a href="https://b.org/">b</a><img src="here.png">'
        '<script src="https://c.org/x.js"></script><link rel="stylesheet" href="//d.org/x.css">'
    )
    (tmp_path / "style.css").write_text("@import 'https://e.org/x.css'; p { background: url(data:image/png;base64,) }")
    assert foreign_loads(tmp_path) == [
        "page.html: //d.org/x.css",
        "page.html: https://c.org/x.js",
        "style.css: https://e.org/x.css",
    ]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` does."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: make docs")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]  # --quiet hides warnings
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_site_is_whole(site):
    for page in (*leaves(SITE["nav"]), *commands(), *library()):
        assert page.endswith("/") or (site / page).with_suffix(".html").is_file(), page
    text = (site / "commands" / "vectors.html").read_text(encoding="utf-8")
    assert 'id="steermoe-vectors-build"' in text
    assert 'id="steermoe.steer"' in (site / "api" / "steering.html").read_text(encoding="utf-8")
    assert foreign_loads(site) == []


@pytest.mark.slow
def test_a_broken_link_fails_the_build(site, tmp_path):
    for name in ("docs", "recipes", "steermoe", *DOCUMENTS, "mkdocs.yml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    chat = tmp_path / "docs" / "chat.md"
    chat.write_text(f"{chat.read_text(encoding='utf-8')}\n[nowhere](steering.md#nowhere)\n", encoding="utf-8")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "'steering.md#nowhere'" in done.stderr
