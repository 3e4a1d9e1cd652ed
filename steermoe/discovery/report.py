"""A discovery as a folder: pages, pictures, tables and vector files. The discovery itself is made elsewhere.

DIR/index.html                 what was found, for reading
DIR/map.html                   the map, with the texts on hover
DIR/map_clusters.png           the map, coloured by cluster; map_sources.png by known label
DIR/heat_NAME.png              a cluster's frequencies, before and after the threshold
DIR/vectors/NAME.safetensors   its steering vector
DIR/clusters.csv               one line per text: id, label, cluster, name, x, y
DIR/report.json                all numbers and settings; written last, so a folder that has it is complete
"""

import csv
import importlib.metadata
import importlib.util
import json
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steermoe.discovery import picture
from steermoe.discovery.discover import Cluster, Discovery
from steermoe.discovery.page import CLUSTERS_PNG, INDEX, MAP, REPORT, SOURCES_PNG, TABLE, _clusters, _page
from steermoe.errors import CorpusError, SteerMoEError
from steermoe.files import atomic_path, csv_cell, why_not_written
from steermoe.vectors import file
from steermoe.vectors.file import normal_name

FIXED = (REPORT, INDEX, MAP, TABLE, CLUSTERS_PNG, SOURCES_PNG)
NAMED = re.compile(r"heat_(.+)\.png|vectors/(.+)\.safetensors")
"""Files that a report names after its clusters."""
UNFINISHED = ".unfinished-report"
"""The subfolder in which a report is made, so that the folder has the whole report or nothing of it."""
LIBRARIES = {"umap": "umap-learn", "sklearn": "scikit-learn", "plotly": "plotly", "matplotlib": "matplotlib"}
"""Modules of the extra, and the packages that they come in."""
NUMPY_AND_US = ("steermoe", "numpy", "torch")


def check_ready(folder: Path, force: bool = False) -> None:
    """Fail before the long work if a report can't be written: an extra is missing, or the folder has a report already.

    Raises:
        SteerMoEError: a library is missing. CorpusError: there is a report and `force` is false, or `folder` is a file.
    """
    if missing := [package for module, package in LIBRARIES.items() if importlib.util.find_spec(module) is None]:
        raise SteerMoEError(f"discovery needs {' and '.join(missing)}: pip install 'steermoe[discover]'")
    _check_free(folder, FIXED, force)


def write_report(
    discovery: Discovery, folder: Path, *, force: bool = False, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Write all files of a report, or none of them: a run that fails leaves an earlier report as it was.

    Args:
        discovery: what was found.
        folder: created if necessary; other files in it are left alone.
        force: replace an earlier report and remove all its files.
        progress: called with a short description of each step.

    Returns:
        the content of report.json.

    Raises:
        CorpusError: there is an earlier report and `force` is false, or the folder can't be written to.
        SteerMoEError: a library is missing, or a picture can't be written.
    """
    notify = progress or (lambda step: None)
    record = describe(discovery)
    _check_free(folder, record["files"], force)
    made = folder / UNFINISHED
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder)
        made.mkdir()
        for cluster in discovery.clusters:
            if cluster.vector is not None:
                notify(f"Drawing {cluster.name} ...")
                _write_vector(cluster, made)
        notify("Drawing the map ...")
        _draw_maps(discovery, made)
        _write_table(discovery, made / TABLE)
        _write_text(made / INDEX, _page(discovery, record))
        _write_text(made / REPORT, json.dumps(record, ensure_ascii=False, indent=1) + "\n")
        _put_in_place(folder, record["files"])
    except OSError as error:
        why = why_not_written(error)
        raise CorpusError(f"can't write the report to '{folder}': {why}; name another folder") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return record


def _check_free(folder: Path, names: Iterable[str], force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise CorpusError(f"'{folder}' is a file, the report needs a folder: name another one")
    moved = _listed_files(folder / UNFINISHED)
    if not force and (there := [name for name in names if (folder / name).exists() and name not in moved]):
        what = "already has a report" if (folder / REPORT).exists() else "has files where the report would be"
        raise CorpusError(f"'{folder}' {what} ({there[0]}): pass --force to replace it, or name another folder")


def _put_in_place(folder: Path, names: Sequence[str]) -> None:
    """Move the files of a finished report to their places, report.json last, and remove those of an earlier one."""
    earlier = _listed_files(folder)
    (folder / REPORT).unlink(missing_ok=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        if name != REPORT:
            (folder / UNFINISHED / name).replace(folder / name)
    for name in earlier - set(names):
        (folder / name).unlink(missing_ok=True)
    (folder / UNFINISHED / REPORT).replace(folder / REPORT)


def _remove_unfinished(folder: Path) -> None:
    """Remove what a killed run left, also the files that it had moved to their places already."""
    left = folder / UNFINISHED
    for name in _listed_files(left):
        if not (left / name).exists():
            (folder / name).unlink(missing_ok=True)
    if left.exists():
        shutil.rmtree(left)


def _listed_files(folder: Path) -> set[str]:
    """The files that a folder's report lists, but only names that a report can have."""
    try:
        names = json.loads((folder / REPORT).read_text(encoding="utf-8"))["files"]
        return {name for name in names if name in FIXED or _is_named(name)}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()


def _is_named(name: str) -> bool:
    match = NAMED.fullmatch(name)
    return match is not None and normal_name(match[1] or match[2]) is not None


# ---- numbers ----


def describe(discovery: Discovery) -> dict[str, Any]:
    """Everything in a discovery but its matrices and texts, for JSON."""
    maps = [CLUSTERS_PNG, *([SOURCES_PNG] if any(discovery.embedded.labels) else [])]
    clusters = [_describe_cluster(cluster) for cluster in discovery.clusters]
    named = [record[key] for key in ("picture", "vector") for record in clusters if record[key]]
    return {
        "embeddings": asdict(discovery.embedded.meta),
        "settings": asdict(discovery.options),
        "texts": len(discovery.embedded),
        "noise": discovery.noise,
        "adjusted_rand": discovery.adjusted_rand,
        "stability": discovery.stability,
        "wording": None if discovery.wording is None else asdict(discovery.wording),
        "warnings": list(discovery.warnings),
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
        "threshold": vector.threshold if vector else None,
        "relative": vector.relative if vector else None,
        "note": cluster.note,
        "vector": f"vectors/{cluster.name}{file.SUFFIX}" if vector else None,
        "picture": f"heat_{cluster.name}.png" if vector else None,
    }


def _versions() -> dict[str, str]:
    packages = (*NUMPY_AND_US, *LIBRARIES.values())
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


# ---- files ----


def _write_vector(cluster: Cluster, folder: Path) -> None:
    from steermoe.vectors.picture import draw_vector

    assert cluster.vector is not None
    file.write_vector(cluster.vector, folder / "vectors" / f"{cluster.name}{file.SUFFIX}")
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
            row = (text.id, text.label, int(label), discovery.name_of(int(label)), f"{x:.4f}", f"{y:.4f}")
            table.writerow(map(csv_cell, row))


def _write_text(path: Path, content: str) -> None:
    with atomic_path(path) as partial:
        partial.write_text(content, encoding="utf-8")
