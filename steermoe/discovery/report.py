"""A discovery as a folder: pages, pictures, tables and vector files. The discovery itself is made elsewhere.

DIR/index.html                 what was found, for reading
DIR/map.html                   the map, with the texts on hover
DIR/map_clusters.png           the map, coloured by cluster; map_sources.png by known label
DIR/heat_NAME.png              a cluster's frequencies, before and after the threshold
DIR/vectors/NAME.safetensors   its steering vector
DIR/clusters.csv               one line a text: id, label, cluster, name, x, y
DIR/report.json                all numbers and settings; written last, so a folder that has it is complete
"""

import csv
import html
import importlib.metadata
import importlib.util
import json
import platform
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steermoe import library
from steermoe.discovery import picture
from steermoe.discovery.discover import Cluster, Discovery
from steermoe.errors import CorpusError, SteerMoEError
from steermoe.library import atomic_path

REPORT, INDEX, MAP, TABLE = "report.json", "index.html", "map.html", "clusters.csv"
CLUSTERS_PNG, SOURCES_PNG = "map_clusters.png", "map_sources.png"
FIXED = (REPORT, INDEX, MAP, TABLE, CLUSTERS_PNG, SOURCES_PNG)
NAMED = re.compile(r"heat_[a-z0-9_-]+\.png|vectors/[a-z0-9_-]+\.safetensors")
"""Files that a report names after its clusters."""
LIBRARIES = {"umap": "umap-learn", "sklearn": "scikit-learn", "plotly": "plotly", "matplotlib": "matplotlib"}
"""Modules of the extra, and the packages that they come in."""
NUMPY_AND_US = ("steermoe", "numpy", "torch")
EXCERPT = 320
MAX_SOURCES, LEAST_SOURCE = 4, 0.01
"""So many known labels of a cluster are named, those of this share at least."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; }
h2 { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0; }
tr + tr { border-top: 1px solid var(--line); }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td.name { white-space: nowrap; }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 6px; }
blockquote { margin: .5rem 0; padding: .4rem .9rem; border-left: 3px solid var(--line); background: var(--soft); }
blockquote, code { overflow-wrap: anywhere; }
blockquote cite { display: block; font-size: .85em; opacity: .75; font-style: normal; }
code { background: var(--soft); padding: .1rem .3rem; border-radius: 4px; }
.note { font-style: italic; }
"""


def check_ready(folder: Path, force: bool = False) -> None:
    """Tell before the long work that a report can't be written: an extra is missing, or the folder has one already.

    Raises:
        SteerMoEError: a library is missing. CorpusError: a report is there and `force` is false, or `folder` is a file.
    """
    if missing := [package for module, package in LIBRARIES.items() if importlib.util.find_spec(module) is None]:
        raise SteerMoEError(f"discovery needs {' and '.join(missing)}: pip install 'steermoe[discover]'")
    _check_free(folder, FIXED, force)


def write_report(
    discovery: Discovery, folder: Path, *, force: bool = False, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Write all files of a report; each appears complete or not at all.

    Args:
        discovery: what was found.
        folder: made if it isn't there; other files in it are left alone.
        force: replace an earlier report, of which no file is left.
        progress: is told in a few words what is being done.

    Returns:
        The content of report.json.

    Raises:
        CorpusError: an earlier report is there and `force` is false, or the folder can't be written to.
        SteerMoEError: a library or the disk's space is missing.
    """
    tell = progress or (lambda what: None)
    record = describe(discovery)
    _check_free(folder, record["files"], force)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        earlier = _earlier_files(folder)
        (folder / REPORT).unlink(missing_ok=True)
        for cluster in discovery.clusters:
            if cluster.vector is not None:
                tell(f"Drawing {cluster.name} ...")
                _write_vector(cluster, folder)
        tell("Drawing the map ...")
        _draw_maps(discovery, folder)
        _write_table(discovery, folder / TABLE)
        _write_text(folder / INDEX, _page(discovery, record))
        for name in earlier - set(record["files"]):
            (folder / name).unlink(missing_ok=True)
        _write_text(folder / REPORT, json.dumps(record, ensure_ascii=False, indent=1) + "\n")
    except OSError as error:
        raise CorpusError(f"can't write the report to '{folder}': {error.strerror}; name another folder") from error
    return record


def _check_free(folder: Path, names: Iterable[str], force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise CorpusError(f"'{folder}' is a file, the report needs a folder: name another one")
    if not force and (there := [name for name in names if (folder / name).exists()]):
        raise CorpusError(
            f"'{folder}' holds a report already ({there[0]}): pass --force to replace it, or name another folder"
        )


def _earlier_files(folder: Path) -> set[str]:
    """The files of a report that is there, by its own word; whatever it says, only names that a report can have."""
    try:
        names = json.loads((folder / REPORT).read_text(encoding="utf-8"))["files"]
        return {name for name in names if name in FIXED or NAMED.fullmatch(name)}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


# ---- numbers ----


def describe(discovery: Discovery) -> dict[str, Any]:
    """All of a discovery but its matrices and texts, for JSON."""
    maps = [CLUSTERS_PNG, *([SOURCES_PNG] if any(discovery.embedded.labels) else [])]
    clusters = [_describe_cluster(cluster) for cluster in discovery.clusters]
    named = [record[key] for key in ("picture", "vector") for record in clusters if record[key]]
    return {
        "embeddings": asdict(discovery.embedded.meta),
        "settings": asdict(discovery.settings),
        "texts": len(discovery.embedded),
        "noise": discovery.noise,
        "adjusted_rand": discovery.adjusted_rand,
        "clusters": clusters,
        "files": [INDEX, MAP, *maps, TABLE, *named, REPORT],
        "versions": _versions(),
    }


def _describe_cluster(cluster: Cluster) -> dict[str, Any]:
    vector = cluster.vector
    return {
        "number": cluster.number,
        "name": cluster.name,
        "size": cluster.size,
        "keywords": [asdict(keyword) for keyword in cluster.keywords],
        "examples": list(cluster.examples),
        "labels": cluster.labels,
        "purity": cluster.purity,
        "experts": int((vector.experts > 0).sum()) if vector else 0,
        "layers": int((vector.experts > 0).any(-1).sum()) if vector else 0,
        "relative": vector.relative if vector else None,
        "note": cluster.note,
        "vector": f"vectors/{cluster.name}{library.SUFFIX}" if vector else None,
        "picture": f"heat_{cluster.name}.png" if vector else None,
    }


def _versions() -> dict[str, str]:
    packages = (*NUMPY_AND_US, *LIBRARIES.values())
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


# ---- files ----


def _write_vector(cluster: Cluster, folder: Path) -> None:
    from steermoe.plots import draw_vector

    assert cluster.vector is not None
    library.write_vector(cluster.vector, folder / "vectors" / f"{cluster.name}{library.SUFFIX}")
    draw_vector(cluster.vector, folder / f"heat_{cluster.name}.png")


def _draw_maps(discovery: Discovery, folder: Path) -> None:
    title = f"{discovery.embedded.meta.model}: {len(discovery.embedded):,} texts, {_clusters(discovery)}"
    picture.draw_map(discovery, picture.cluster_groups(discovery), f"{title}, by cluster", folder / CLUSTERS_PNG)
    if sources := picture.source_groups(discovery):
        picture.draw_map(discovery, sources, f"{title}, by source", folder / SOURCES_PNG)
    picture.write_map(discovery, title, folder / MAP)


def _write_table(discovery: Discovery, path: Path) -> None:
    found = discovery.clustering
    with atomic_path(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("id", "label", "cluster", "name", "x", "y"))
        for text, label, (x, y) in zip(discovery.embedded.texts, found.labels, found.map_B2, strict=True):
            table.writerow((text.id, text.label, int(label), discovery.name_of(int(label)), f"{x:.4f}", f"{y:.4f}"))


def _write_text(path: Path, content: str) -> None:
    with atomic_path(path) as partial:
        partial.write_text(content, encoding="utf-8")


# ---- page ----


def _page(discovery: Discovery, record: Mapping[str, Any]) -> str:
    texts = {text.id: text.text for text in discovery.embedded.texts}
    meta = discovery.embedded.meta
    title = f"Domains in {len(discovery.embedded):,} texts, as {meta.model} routes them"
    maps = "".join(
        f'<a href="{name}"><img src="{name}" alt="{alt}"></a>\n'
        for name, alt in ((CLUSTERS_PNG, "map coloured by cluster"), (SOURCES_PNG, "map coloured by source"))
        if name in record["files"]
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<p>{html.escape(_summary(discovery))}</p>
<div class="maps">
{maps}</div>
<p><a href="{MAP}">Map with the texts on hover</a>, <a href="{TABLE}">cluster of each text</a> (CSV),
<a href="{REPORT}">all numbers</a> (JSON)</p>
{_table(record["clusters"])}
{"".join(_section(cluster, texts) for cluster in record["clusters"])}
<h2>How it was made</h2>
<table>{"".join(_row(name, value) for name, value in _facts(record).items())}</table>
</body>
</html>
"""


def _summary(discovery: Discovery) -> str:
    noise = discovery.noise / len(discovery.embedded)
    words = f"{_clusters(discovery)}; {discovery.noise:,} texts ({noise:.0%}) are in none."
    if discovery.adjusted_rand is not None:
        words += (
            f" Agreement with the known sources: adjusted Rand index {discovery.adjusted_rand:.2f} "
            "(1: the same groups, 0: as by chance)."
        )
    if not discovery.embedded.meta.complete:
        words += " The embeddings are not complete: this is a part of the corpus."
    return words


def _clusters(discovery: Discovery) -> str:
    count = len(discovery.clusters)
    return f"{count} cluster{'' if count == 1 else 's'}"


def _table(clusters: Iterable[Mapping[str, Any]]) -> str:
    rows = "".join(
        f'<tr><td class="n">{cluster["number"]}</td>'
        f'<td class="name"><a href="#{cluster["name"]}">{html.escape(cluster["name"])}</a></td>'
        f'<td class="n">{cluster["size"]:,}</td><td>{html.escape(_keywords(cluster))}</td>'
        f"<td>{html.escape(sources(cluster))}</td></tr>\n"
        for cluster in clusters
    )
    head = '<tr><th class="n">no.</th><th>name</th><th class="n">texts</th><th>keywords</th><th>sources</th></tr>'
    return f'<div class="wide"><table>\n{head}\n{rows}</table></div>' if rows else "<p>No cluster was found.</p>"


def _section(cluster: Mapping[str, Any], texts: Mapping[str, str]) -> str:
    name = html.escape(cluster["name"])
    examples = "".join(
        f"<blockquote>{html.escape(picture.excerpt(texts[id_], EXCERPT))}<cite>{html.escape(id_)}</cite></blockquote>\n"
        for id_ in cluster["examples"]
    )
    note = f'<p class="note">{html.escape(cluster["note"].capitalize())}.</p>\n' if cluster["note"] else ""
    vector = (
        f'<p><a href="{cluster["vector"]}">Steering vector</a>: {cluster["experts"]} experts '
        f"in {cluster['layers']} layers. In this folder, steer with "
        f"<code>steermoe generate --domain {cluster['vector']}</code></p>\n"
        f'<img loading="lazy" src="{cluster["picture"]}" alt="frequencies of {name} before and after the threshold">\n'
        if cluster["vector"]
        else ""
    )
    known = f"<p>Sources: {html.escape(sources(cluster))}</p>\n" if cluster["labels"] else ""
    return (
        f'<h2 id="{name}">{name} <small>({cluster["size"]:,} texts)</small></h2>\n'
        f"<p>{html.escape(_keywords(cluster))}</p>\n{known}"
        f"<p>Texts nearest to its middle:</p>\n{examples}{note}{vector}"
    )


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    meta = record["embeddings"]
    facts = {
        "model": f"{meta['model']} ({meta['architecture']})",
        "shape": f"{len(meta['layers'])} layers x {meta['num_experts']} experts",
        "embeddings": f"{meta['features']} over {meta['tokens']} tokens, at most {meta['max_tokens']} a text"
        + (", with hidden states" if meta["hidden"] else ""),
    }
    settings = {name.replace("_", " "): value for name, value in record["settings"].items()}
    return (
        facts | settings | {"versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items())}
    )


def _row(name: str, value: Any) -> str:
    return f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>\n"


def _keywords(cluster: Mapping[str, Any]) -> str:
    return ", ".join(keyword["word"] for keyword in cluster["keywords"])


def sources(cluster: Mapping[str, Any], most: int = MAX_SOURCES) -> str:
    """The labels of a cluster's record with their shares of all its texts, such as "sport 95%, food 3%"."""
    shares = {label: count / cluster["size"] for label, count in list(cluster["labels"].items())[:most]}
    shown = [f"{label} {share:.0%}" for label, share in shares.items() if share >= LEAST_SOURCE]
    return ", ".join(shown + (["..."] if most > 1 and len(shown) < len(cluster["labels"]) else []))
