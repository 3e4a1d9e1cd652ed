"""The fingerprint of a checkpoint's routers, read from its files: a few bytes of each gate, no weights are loaded.

Names of tensors in a checkpoint can differ from those of the modules that transformers makes of them. A gate is found
by its module's name, else by the number of its layer, its shape, and a name that only gates have; what could be two
tensors is none.
"""

import json
import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steermoe.errors import ModelError
from steermoe.models.gguf.header import read_gguf
from steermoe.routing.architectures import LAYER_NUMBER
from steermoe.routing.fingerprint import fingerprint, read_numbers

if TYPE_CHECKING:
    from steermoe.routing.routers import Gate

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES, MAX_INDEX_BYTES = 100_000_000, 2**28
"""The first is safetensors' own limit."""
GATE = re.compile(r"(^|[._])(gate|gating|router|classifier|wg)([._]|$)")
NOT_A_GATE = re.compile(r"gate_(up_)?proj|experts\.|shared|attn|attention|vision|visual|audio|(^|\.)mtp|talker|_gate\b")
"""Tensors of experts, of other towers, and of layers that only draft."""


@dataclass(frozen=True)
class Place:
    """Where a tensor is: its file, its type by the name that safetensors uses, its shape, and its first byte."""

    path: Path
    kind: str
    shape: tuple[int, ...]
    start: int


def stored_fingerprint(where: Path | str, gates: "Sequence[Gate]") -> str:
    """The fingerprint of a checkpoint folder, of a GGUF file, or of a hub id whose files are here already.

    Args:
        where: the checkpoint; nothing is downloaded.
        gates: what to look for in it; a GGUF file names its gates itself.

    Returns:
        "" if the numbers are unknown: other kinds of files, quantised gates, none or several tensors that fit.
    """
    if Path(where).suffix.lower() == ".gguf":
        try:
            return read_gguf(where).fingerprint
        except ModelError:
            return ""
    folder = local_folder(where)
    if folder is None:
        return ""
    try:
        tensors = _tensors(folder)
        return fingerprint([(gate.shape, _read(_find(gate, tensors))) for gate in gates])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error):
        return ""  # whatever is wrong with a file is said when it is loaded


def local_folder(where: Path | str) -> Path | None:
    """The folder of a checkpoint: itself, or where the hub's client keeps it; None if it is not on this machine."""
    if Path(where).is_dir():
        return Path(where)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(str(where), "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _find(gate: "Gate", tensors: dict[str, Place]) -> Place:
    """The tensor of a gate.

    Raises:
        KeyError: none, or several that could be it.
    """
    if gate.name in tensors and tensors[gate.name].shape == gate.shape:
        return tensors[gate.name]
    found = [
        place
        for name, place in tensors.items()
        if place.shape == gate.shape and _number(name) == gate.layer and _is_gate(name)
    ]
    if len(found) != 1:
        raise KeyError(gate.name)
    return found[0]


def _is_gate(name: str) -> bool:
    rest = name[match.end() :] if (match := LAYER_NUMBER.search(name)) else ""
    return GATE.search(rest) is not None and NOT_A_GATE.search(name) is None and not rest.endswith("bias")


def _number(name: str) -> int | None:
    match = LAYER_NUMBER.search(name)
    return int(match[1]) if match else None


def weight_files(folder: Path, wanted: re.Pattern[str] | None = None) -> list[Path]:
    """The files that hold a checkpoint's tensors; of a sharded one, those that its index names.

    Args:
        folder: the checkpoint.
        wanted: of a sharded one, only files with a tensor of such a name.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError: the index is damaged.
    """
    index, whole = folder / INDEX, folder / "model.safetensors"
    if index.is_file() and index.stat().st_size <= MAX_INDEX_BYTES:
        names = json.loads(index.read_bytes())["weight_map"]
        chosen = dict.fromkeys(file for name, file in names.items() if wanted is None or wanted.search(name))
        return [folder / Path(file).name for file in chosen]
    return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))


def _tensors(folder: Path) -> dict[str, Place]:
    """All matrices of a checkpoint that could be gates, by name."""
    return {
        name: place
        for file in weight_files(folder, GATE)
        for name, place in tensors_of(file).items()
        if GATE.search(name) and len(place.shape) == 2
    }


def tensors_of(path: Path) -> dict[str, Place]:
    """The tensors of a safetensors file by name, from its header.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: it is none.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(length)
        header: dict[str, Any] = json.loads(file.read(length))
    return {
        name: Place(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _read(place: Place) -> list[float]:
    with place.path.open("rb") as file:
        return read_numbers(file, place.kind, math.prod(place.shape), place.start)
