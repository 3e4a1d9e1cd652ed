"""What is baked into a model: its record, found in a checkpoint folder or in a GGUF file, and what it says."""

from pathlib import Path
from typing import Any

from steermoe.errors import ModelError, reason
from steermoe.models.baking.record import FORMULAS, read_record
from steermoe.models.gguf.header import read_header

RECORD = "steermoe_bake.json"
"""The file with the record, in a checkpoint folder."""
KEY = "steermoe.bake"
"""The setting with the record, in a GGUF file."""
MAX_RECORD_BYTES = 2**26


def record_of(source: Path) -> str | None:
    """The text of a model's record; None if nothing was baked into it.

    Raises:
        ModelError: it can't be read.
    """
    if source.suffix.lower() == ".gguf" and not source.is_dir():
        text = read_header(source)[0].get(KEY)
        return text if isinstance(text, str) else None
    place = source / RECORD
    try:
        if not place.is_file():
            return None
        if place.stat().st_size > MAX_RECORD_BYTES:
            raise ModelError(f"'{place}' is larger than any record: it is none, take the original checkpoint instead")
        return place.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"can't read '{place}' ({reason(error)}): take the original checkpoint instead") from error


def baked_into(source: Path) -> dict[str, Any] | None:
    """What a model's record says: `formula`, `domain`, `strength` and `layers`; `error` alone if it can't be read.

    None if nothing was baked into it.
    """
    try:
        text = record_of(source)
        if text is None:
            return None
        record, _ = read_record(text, source)
        said = {name: record.get(name) for name in ("formula", "domain", "strength", "layers")}
        if not _is_sound(said):
            raise ModelError(f"the record of what was baked into '{source}' is damaged")
    except ModelError as error:
        return {"error": str(error)}
    return said


def _is_sound(said: dict[str, Any]) -> bool:
    layers = said["layers"]
    are_layers = layers is None or (
        isinstance(layers, list) and len(layers) == 2 and all(type(layer) is int for layer in layers)
    )
    is_named = isinstance(said["domain"], str) and said["formula"] in FORMULAS.values()
    return is_named and type(said["strength"]) in (int, float) and are_layers
