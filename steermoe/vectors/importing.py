"""Vectors out of the files of other tools: the shape of a file is recognised by its content."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from steermoe.errors import VectorError
from steermoe.routing.shape import RoutingShape
from steermoe.vectors.file import check_domain_name
from steermoe.vectors.formats import ds4, dsmoe, easysteer, table
from steermoe.vectors.formats.cells import Cells, strongest
from steermoe.vectors.formats.content import json_of, read_content, text_of
from steermoe.vectors.formats.ranking import read_ranking
from steermoe.vectors.formats.routervector import read_routervector
from steermoe.vectors.matrix import NPY, ZIP, matrix_content, matrix_vector
from steermoe.vectors.vector import SteeringVector, VectorInfo

ImportFormat: TypeAlias = Literal["matrix", "csv", "easysteer", "steermoe", "dsmoe", "ds4", "gguf"]
IMPORT_FORMATS: tuple[ImportFormat, ...] = get_args(ImportFormat)
SCORES = ("csv", "steermoe", "dsmoe")
"""Formats that may list scores of all experts, out of which papers steer with the best."""
PICKLE = re.compile(rb"\x80[\x02-\x05]")


def import_vector(
    path: Path,
    domain: str,
    *,
    shape: RoutingShape | None = None,
    format: ImportFormat | None = None,
    cluster: str | None = None,
    top: int | None = None,
    bottom: int | None = None,
) -> SteeringVector:
    """Read a vector from a file of another tool; nothing in the file is ever run.

    The modules of `steermoe.vectors.formats` describe each format. A vector gets the formula and the strength of the
    tool whose file it is, if a formula does the same.

    Args:
        path: the file.
        domain: name of the vector.
        shape: the model's that it is for, which must fit; None if it is unknown.
        format: the format; by default it is recognised.
        cluster: the key of the vector in a dictionary of several.
        top: of a list of scores, steer toward that many experts with the largest ones, as the papers do; without `top`
            and `bottom` the scores themselves are the weights.
        bottom: steer away from that many experts with the smallest scores.

    Raises:
        VectorError: no such file, not of this format, a size that it does not say, or numbers that no vector has.
        CompatibilityError: it does not fit the model.
    """
    domain = check_domain_name(domain)
    content = read_content(path)
    kind, parsed = (format, None) if format is not None else recognise(path, content)
    if cluster is not None and kind != "matrix":
        raise VectorError(f"'{path}' holds one vector ({kind}), no clusters: leave out --cluster")
    if (top, bottom) != (None, None) and kind not in SCORES:
        raise VectorError(f"'{path}' holds no scores ({kind}): --top and --bottom are for {', '.join(SCORES)}")
    if kind == "matrix":
        own = matrix_content(path, content) if parsed is None else parsed
        layers, experts = (None, None) if shape is None else (shape.layers, shape.num_experts)
        info = VectorInfo() if shape is None else VectorInfo.of(shape)
        vector = matrix_vector(path, own, domain, layers, experts, info, cluster)
    else:
        cells = _cells(str(path), kind, content, parsed, shape)
        if (top, bottom) != (None, None):
            most = min((router.top_k for router in shape.routers), default=None) if shape is not None else None
            cells = strongest(str(path), cells, top, bottom, most)
        vector = cells.vector(str(path), domain, shape)
    if shape is not None:
        vector.check_fits(shape)
    created_by = "steermoe vectors import" if kind == "matrix" else f"steermoe vectors import ({kind})"
    return replace(vector, info=replace(vector.info, created_by=created_by))


def recognise(path: Path, content: bytes) -> tuple[ImportFormat, Any]:
    """The format of a file, by its content; and the content as JSON, if it is.

    Raises:
        VectorError: it is of none.
    """
    if content.startswith((NPY, ZIP)):
        return "matrix", None
    if content.startswith(b"GGUF"):
        return "gguf", None
    if PICKLE.match(content):
        return "steermoe", None
    if len(content) == ds4.BYTES and b"\0" in content:
        return "ds4", None
    text = text_of(str(path), content)
    if table.HEADER.match(text):
        return "csv", None
    parsed = json_of(str(path), content)
    if isinstance(parsed, dict):
        if easysteer.KEY in parsed:
            return "easysteer", parsed
        if dsmoe.KEY in parsed:
            return "dsmoe", parsed
        if ds4.is_report(parsed):
            return "ds4", parsed
    return "matrix", parsed


def _cells(name: str, kind: str, content: bytes, parsed: Any, shape: RoutingShape | None) -> Cells:
    of_json: dict[str, Callable[[str, Any], Cells]] = {"easysteer": easysteer.read_easysteer, "dsmoe": dsmoe.read_dsmoe}
    if kind in of_json:
        return of_json[kind](name, json_of(name, content) if parsed is None else parsed)
    if kind == "csv":
        return table.read_csv(name, text_of(name, content))
    if kind == "ds4":
        if content.lstrip().startswith(b"{") and len(content) != ds4.BYTES:
            return ds4.read_ds4_report(name, json_of(name, content) if parsed is None else parsed)
        return ds4.read_ds4(name, content, shape)
    return read_ranking(name, content) if kind == "steermoe" else read_routervector(name, content)
