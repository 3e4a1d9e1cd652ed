"""A hook of mkdocs, named in mkdocs.yml: pages of the site that have no file in docs/, and links that lead to them.

Documents beside docs/ become pages, the reference is made from the code, and a site that would load anything from
another host is refused. Run it from the top folder, as `make docs` does: `python -m mkdocs build --strict`.
"""

import posixpath
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.docs_reference import reference

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCUMENTS = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
"""Documents beside docs/, with their places in the site."""
SOURCES = {place: name for name, place in DOCUMENTS.items()}
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)\s#]+)(?=[)#])")
"""The path of a link or picture within the repository."""
LOADED = {
    "audio": ("src",),
    "embed": ("src",),
    "iframe": ("src",),
    "img": ("src", "srcset"),
    "link": ("href",),
    "object": ("data",),
    "script": ("src",),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
}
"""Attributes from which a browser loads something without being asked."""


# ---- events of mkdocs ----


def on_config(config: "MkDocsConfig") -> None:
    from pymdownx.slugs import slugify

    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")  # anchors as on forges, so that links work on both
    config.nav = [_with_pages(entry, Path(config.docs_dir)) for entry in config.nav or ()]


def on_files(files: "Files", config: "MkDocsConfig") -> None:
    from mkdocs.structure.files import File

    for name, place in DOCUMENTS.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / name)))
    for place, text in reference().items():
        files.append(File.generated(config, place, content=text))


def on_page_markdown(markdown: str, page: "Page", **_: Any) -> str:
    return with_links_of_the_site(markdown, page.file.src_uri)


def on_post_build(config: "MkDocsConfig") -> None:
    from mkdocs.exceptions import PluginError

    if loads := foreign_loads(Path(config.site_dir)):
        raise PluginError(f"the site would load from other hosts: {'; '.join(loads)}")


# ---- their parts ----


def _with_pages(entry: dict[str, Any], docs: Path) -> dict[str, Any]:
    """An entry of the navigation, with a folder replaced by its pages."""
    ((title, target),) = entry.items()
    if not isinstance(target, str) or not target.endswith("/"):
        return entry
    made = [place for place in reference() if place.startswith(target)]
    return {title: made or sorted(path.relative_to(docs).as_posix() for path in (docs / target).glob("*.md"))}


def with_links_of_the_site(markdown: str, place: str) -> str:
    """A page with the links of its file in the repository turned into links from its place in the site."""
    folder = posixpath.dirname(SOURCES.get(place, f"docs/{place}"))

    def of_the_site(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, found[1]))
        target = DOCUMENTS.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        return posixpath.relpath(target, posixpath.dirname(place) or ".") if target else found[1]

    return LINK.sub(of_the_site, markdown)


class _Loads(HTMLParser):
    """Gathers what a page loads without being asked."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if (given.get("rel") or "") not in ("canonical", "next", "prev", "alternate"):
            self.found += [value for name in LOADED.get(tag, ()) if (value := given.get(name))]


def foreign_loads(site: Path) -> list[str]:
    """What pages and style sheets load from other hosts, with their files."""
    return sorted({f"{path.relative_to(site)}: {url}" for path, url in _loads(site) if re.match(r"\s*(\w+:)?//", url)})


def _loads(site: Path) -> Iterator[tuple[Path, str]]:
    for path in site.rglob("*.html"):
        parser = _Loads()
        parser.feed(path.read_text(encoding="utf-8"))
        yield from ((path, url) for url in parser.found)
    for path in (*site.rglob("*.html"), *site.rglob("*.css")):
        for url in re.findall(r"""(?:url\(|@import\s)\s*["']?([^"')\s]+)""", path.read_text(encoding="utf-8")):
            yield path, url
