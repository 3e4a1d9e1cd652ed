"""A vector as a file of another tool."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from steermoe.errors import VectorError
from steermoe.vectors.file import write_whole
from steermoe.vectors.formats.easysteer import write_easysteer
from steermoe.vectors.formats.routervector import write_routervector
from steermoe.vectors.formats.table import write_csv
from steermoe.vectors.matrix import write_json
from steermoe.vectors.vector import SteeringVector

ExportFormat: TypeAlias = Literal["json", "csv", "easysteer", "gguf"]
EXPORT_FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)
ENDINGS: dict[ExportFormat, str] = {"json": ".json", "csv": ".csv", "easysteer": ".json", "gguf": ".gguf"}


def exported(vector: SteeringVector, format: ExportFormat) -> tuple[bytes, int]:
    """The content of a file of another tool with a vector's expert vector E.

    Returns:
        the content, and how many experts of E are not in it: EasySteer activates at most k in a layer, if k is known.

    Raises:
        VectorError: E is 0 everywhere.
    """
    if not vector.experts.any():
        raise VectorError(
            f"vector '{vector.domain}' has no expert above its threshold {vector.threshold:g}: there is nothing to "
            "export; lower the threshold"
        )
    if format == "easysteer":
        return write_easysteer(vector, vector.info.top_k)
    writers: dict[str, Callable[[SteeringVector], bytes]] = {
        "json": write_json,
        "csv": write_csv,
        "gguf": write_routervector,
    }
    return writers[format](vector), 0


def export_vector(vector: SteeringVector, path: Path, format: ExportFormat) -> int:
    """Write such a file, whole or not at all.

    Returns:
        how many experts are not in it, as `exported`.

    Raises:
        VectorError: as `exported`, or the file can't be written.
    """
    content, left_out = exported(vector, format)
    write_whole(content, path)
    return left_out
