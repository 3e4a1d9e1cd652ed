"""Vectors as GGUF: `general.architecture` is `routervector`, and each layer has a tensor `router.LAYER`.

Control vectors of llama.cpp are GGUF too, with tensors `direction.LAYER` that it adds to the residual. A vector of
experts must never be taken for one, so nothing in these files has that name. Every number is a float32.
"""

import re
import struct
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from steermoe.errors import VectorError, shown
from steermoe.vectors.formats.cells import Cells
from steermoe.vectors.formats.content import whole_number
from steermoe.vectors.vector import MAX_EXPERTS, MAX_LAYERS, SteeringVector

ARCHITECTURE = "routervector"
TENSOR = re.compile(r"router\.([0-9]{1,9})")
VERSION = 3
"""Of GGUF."""
STRING, ARRAY, F32 = 8, 9, 0
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's kinds of values as struct formats."""
MAX_KEYS, MAX_TEXT, MAX_DIMENSIONS = 2**10, 2**16, 4


def write_routervector(vector: SteeringVector) -> bytes:
    """The content of such a file."""
    import numpy as np
    from gguf import GGUFWriter

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vector.gguf"
        writer = GGUFWriter(path, ARCHITECTURE)
        writer.add_string("general.name", vector.domain)
        writer.add_string(f"{ARCHITECTURE}.model_hint", vector.info.model)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(vector.layers))
        writer.add_uint32(f"{ARCHITECTURE}.expert_count", vector.num_experts)
        if vector.info.formula is not None:
            writer.add_string(f"{ARCHITECTURE}.formula", vector.info.formula)
        if vector.info.strength is not None:
            writer.add_float64(f"{ARCHITECTURE}.strength", float(vector.info.strength))
        for layer, row in zip(vector.layers, vector.experts, strict=True):
            writer.add_tensor(f"router.{layer}", row.detach().cpu().numpy().astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


class _Tensor(NamedTuple):
    kind: int
    sizes: tuple[int, ...]
    offset: int


class _Reader:
    """Reads values one after another.

    Raises (from its methods):
        struct.error: the file ends before. ValueError: a value is too long.
    """

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.place = 0

    def number(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self.content, self.place)
        self.place += struct.calcsize(f"<{kind}")
        return value

    def count(self, most: int) -> int:
        found: int = self.number("Q")
        if found > most:
            raise ValueError(f"{found} where at most {most} are expected")
        return found

    def text(self) -> str:
        size = self.count(MAX_TEXT)
        value = self.content[self.place : self.place + size]
        self.place += size
        return value.decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            inner = self.number("I")
            if inner == ARRAY:
                raise ValueError("lists of lists")
            return [self.value(inner) for _ in range(self.count(MAX_TEXT))]
        return self.number(SCALARS[kind])


def read_routervector(name: str, content: bytes) -> Cells:
    """The weights in such a file.

    Args:
        name: the file, for messages.
        content: its bytes.

    Raises:
        VectorError: a damaged file, a model, a control vector, or tensors that are no rows of weights.
    """
    try:
        metadata, tensors, start = _header(content)
    except (struct.error, ValueError, KeyError, OverflowError) as error:
        raise VectorError(f"'{name}' is a damaged GGUF file, or one of a model: expected a vector") from error
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        what = "a control vector, for the residual" if architecture == "controlvector" else "something else"
        raise VectorError(
            f"'{name}' has the architecture {shown(architecture)}, expected '{ARCHITECTURE}': it is {what}, not for "
            "routers"
        )
    weights: dict[tuple[int, int], float] = {}
    sizes = set()
    if 4 * sum(tensor.sizes[0] for tensor in tensors.values() if tensor.sizes) > len(content):
        raise VectorError(f"'{name}' says that its tensors are larger than the file is: get it again")
    for key, tensor in tensors.items():
        match = TENSOR.fullmatch(key)
        if match is None or tensor.kind != F32 or len(tensor.sizes) != 1 or not 0 < tensor.sizes[0] <= MAX_EXPERTS:
            raise VectorError(f"'{name}' has a tensor {shown(key)}, expected router.LAYER with one float32 per expert")
        layer = whole_number(name, match[1], "a layer")
        at, size = start + tensor.offset, tensor.sizes[0]
        if at + 4 * size > len(content) or layer >= MAX_LAYERS:
            raise VectorError(f"'{name}' ends inside of the tensor {shown(key)}, or numbers no layer: get it again")
        if (layer, 0) in weights:
            raise VectorError(
                f"'{name}' has a tensor {shown(key)}, but one of layer {layer} is there already, expected each once: "
                "keep one"
            )
        row = struct.unpack_from(f"<{size}f", content, at)
        weights |= {(layer, expert): weight for expert, weight in enumerate(row)}
        sizes.add(size)
    if len(sizes) != 1:
        raise VectorError(f"'{name}' has rows of {sorted(sizes) or 'no'} experts, expected the same number in all")
    return Cells(weights, experts=sizes.pop(), **_how(metadata))


def _how(metadata: dict[str, Any]) -> dict[str, Any]:
    from steermoe.formulas import FORMULAS

    formula, strength = (metadata.get(f"{ARCHITECTURE}.{key}") for key in ("formula", "strength"))
    return {
        "formula": formula if formula in FORMULAS else None,
        "strength": strength if isinstance(strength, float) and abs(strength) < float("inf") else None,
    }


def _header(content: bytes) -> tuple[dict[str, Any], dict[str, _Tensor], int]:
    """The metadata, the tensors by name, and where their numbers begin."""
    reader = _Reader(content)
    magic, version = reader.number("4s"), reader.number("I")
    if magic != b"GGUF" or version not in (2, VERSION):
        raise ValueError
    tensor_count, key_count = reader.count(MAX_LAYERS), reader.count(MAX_KEYS)
    metadata = {}
    for _ in range(key_count):
        key = reader.text()
        metadata[key] = reader.value(reader.number("I"))
    tensors = {}
    for _ in range(tensor_count):
        key = reader.text()
        if key in tensors:
            raise ValueError(f"{shown(key)} is there twice")
        sizes = tuple(reader.number("Q") for _ in range(min(reader.number("I"), MAX_DIMENSIONS)))
        tensors[key] = _Tensor(reader.number("I"), sizes, reader.number("Q"))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 2**16:
        raise ValueError
    return metadata, tensors, -(-reader.place // alignment) * alignment
