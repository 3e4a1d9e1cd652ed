"""Import expert vectors from a matrix of layers x experts: JSON in the forms of the paper's authors, .npy or .npz."""

import io
import json
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steermoe.errors import VectorError, quoted, reason
from steermoe.files import read_npy
from steermoe.vectors.file import check_domain_name
from steermoe.vectors.formats.cells import MAX_NUMBERS
from steermoe.vectors.formats.content import MAX_BYTES, json_of, read_content, whole_number
from steermoe.vectors.vector import ROW_SUM_TOLERANCE, SteeringVector, VectorInfo, format_layers

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDING = "embedding"
"""The key of the numbers in a dictionary."""
WEIGHTS, LAYERS = "weights", "layers"
"""Keys of the matrices that this package writes: that the numbers are E itself, and the decoder layer of each row."""
NPY, ZIP = b"\x93NUMPY", b"PK\x03\x04"
"""What .npy and .npz files begin with."""
MAX_ARRAYS = 2**14
SHOWN_KEYS = 8


def import_matrix(
    path: Path,
    domain: str,
    *,
    layers: Sequence[int] | None = None,
    experts: int | None = None,
    info: VectorInfo | None = None,
    cluster: str | None = None,
) -> SteeringVector:
    """Read an expert vector: a JSON list of L lists of N numbers, the format of the paper's authors, or such a matrix.

    Also read: a flat list of L*N numbers, layer by layer, if `layers` are known; {"embedding": ...}; a dictionary of
    several vectors; a .npy file; and a .npz file, as such a dictionary. Rows that each sum to 1 are taken to be
    frequencies F, anything else to be E itself. If there are rows for all decoder layers up to the last of `layers`,
    and those of the others hold only zeros, they are left out.

    Args:
        path: the file.
        domain: name of the vector.
        layers: the decoder layer of each row; by default 0 to L-1.
        experts: N, if it is known, to cut a flat list.
        info: what else is known about it.
        cluster: the key in a dictionary of vectors; by default the domain, or the only one.

    Raises:
        VectorError: not such a file, not such a matrix, no such cluster, or invalid numbers.
    """
    return matrix_vector(path, matrix_content(path, read_content(path)), domain, layers, experts, info, cluster)


def matrix_vector(
    path: Path,
    content: Any,
    domain: str,
    layers: Sequence[int] | None,
    experts: int | None,
    info: VectorInfo | None,
    cluster: str | None,
) -> SteeringVector:
    """As `import_matrix`, for the content of the file."""
    layers = _layers(path, content, layers)
    is_weights = isinstance(content, dict) and content.get(WEIGHTS) is True
    matrix = _without_dense_layers(_read(path, _chosen(path, content, cluster, domain), layers, experts), layers)
    numbers = tuple(layers) if layers is not None else tuple(range(len(matrix)))
    if len(numbers) != len(matrix):
        raise VectorError(
            f"'{path}' has {len(matrix)} rows, expected one for each of {len(numbers)} layers: it is for another model"
        )
    if not matrix.any():
        raise VectorError(f"'{path}' contains only zeros: it would steer nothing")
    info = info or VectorInfo()
    is_distribution = bool(((matrix.sum(-1) - 1).abs() < ROW_SUM_TOLERANCE).all() and (matrix >= 0).all())
    is_frequency = is_distribution and not is_weights
    return SteeringVector(
        check_domain_name(domain),
        matrix if is_frequency else None,
        numbers,
        weights=None if is_frequency else matrix,
        info=replace(info, created_by=info.created_by or "steermoe vectors import"),
    )


def _layers(path: Path, content: Any, layers: Sequence[int] | None) -> Sequence[int] | None:
    """The decoder layer of each row, if the caller or the file says it; rows for dense layers may come on top."""
    own = own_layers(path, content)
    if own == [] and layers is None:
        raise VectorError(f"'{path}' lists the layers none, expected the decoder layer of each row: leave the list out")
    if layers is None or own is None:
        return own if layers is None else layers
    if own not in (list(layers), list(range(max(layers) + 1))):
        said = quoted(format_layers(own)) if own else "none"
        raise VectorError(
            f"'{path}' lists the layers {said}, expected {format_layers(layers)}: it is for another model"
        )
    return layers


def _without_dense_layers(matrix: "Tensor", layers: Sequence[int] | None) -> "Tensor":
    """The rows of the layers with routers, if the matrix has one for each decoder layer and the others are zero."""
    if layers is None or len(matrix) <= max(layers):
        return matrix
    dense = [layer for layer in range(len(matrix)) if layer not in set(layers)]
    return matrix if matrix[dense].any() else matrix[list(layers)]


def _read(path: Path, content: Any, layers: Sequence[int] | None, experts: int | None) -> "Tensor":
    """The matrix [L, N] in float32."""
    import torch

    rows = _as_rows(path, content, layers, experts)
    if len({len(row) for row in rows}) != 1:
        raise VectorError(
            f"'{path}': its rows have different lengths {sorted({len(row) for row in rows})}, expected one"
        )
    try:
        return torch.tensor(rows, dtype=torch.float32)
    except (OverflowError, RuntimeError, ValueError) as error:
        raise VectorError(f"'{path}' contains a number that is too large for float32") from error


def own_layers(path: Path, content: Any) -> list[int] | None:
    """The decoder layers that a dictionary of ours lists; None for all other content."""
    if not isinstance(content, dict) or content.get(WEIGHTS) is not True or LAYERS not in content:
        return None
    listed = content[LAYERS]
    if not isinstance(listed, list):
        raise VectorError(f"'{path}': its layers are no list, expected the decoder layer of each row")
    return [whole_number(str(path), layer, "a layer") for layer in listed]


def write_json(vector: SteeringVector) -> bytes:
    """A vector's expert vector E in the authors' form {"embedding": ...}, with what else a reader needs."""
    content = {
        "domain": vector.domain,
        "model": vector.info.model,
        WEIGHTS: True,
        LAYERS: list(vector.layers),
        EMBEDDING: vector.experts.tolist(),
    }
    return f"{json.dumps(content)}\n".encode()


def matrix_content(path: Path, content: bytes) -> Any:
    """What the file holds: numbers in lists and dictionaries."""
    if content.startswith(NPY):
        return _content_of_npy(path, content)
    return _content_of_npz(path, content) if content.startswith(ZIP) else json_of(str(path), content)


def _content_of_npz(path: Path, content: bytes) -> dict[str, Any]:
    """A dictionary of the .npy files in it, as bytes; none is unpacked before its size is known."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_ARRAYS or sum(entry.file_size for entry in entries) > MAX_BYTES:
                raise VectorError(
                    f"'{path}' holds {len(entries)} arrays of {sum(entry.file_size for entry in entries)} bytes, "
                    f"expected at most {MAX_ARRAYS} and {MAX_BYTES}: save fewer in one file"
                )
            names = [entry.filename.removesuffix(".npy") for entry in entries]
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise VectorError(f"'{path}' holds two arrays '{quoted(twice[0])}', expected each once: keep one")
            return {name: _unpacked(archive, entry) for name, entry in zip(names, entries, strict=True)}
    except VectorError:
        raise
    except Exception as error:  # a damaged archive can make zipfile raise anything
        raise VectorError(f"'{path}' is a damaged .npz file ({reason(error, 200)}): save it again") from error


def _unpacked(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    with archive.open(entry) as file:
        return file.read(entry.file_size)


def _content_of_npy(path: Path, content: bytes) -> Any:
    try:
        matrix = read_npy(content)
    except Exception as error:  # a hostile header can make numpy raise anything
        raise VectorError(
            f"'{path}' is a damaged .npy file, or one of objects ({reason(error, 200)}): save numbers"
        ) from error
    if matrix.dtype.kind not in "fiu" or matrix.ndim not in (1, 2):
        raise VectorError(
            f"'{path}' holds {matrix.ndim} dimensions of {matrix.dtype}, expected L layers x N experts of numbers"
        )
    if matrix.size > MAX_NUMBERS:
        raise VectorError(f"'{path}' holds {matrix.size:,} numbers, expected at most {MAX_NUMBERS:,}")
    return matrix.tolist()


def _chosen(path: Path, content: Any, cluster: str | None, domain: str) -> Any:
    """The numbers of one vector, out of the dictionary that they may be in."""
    if isinstance(content, dict) and EMBEDDING not in content:
        names = [quoted(str(key)) for key in content]
        wanted = cluster if cluster is not None else domain if domain in content else None
        if wanted is None and len(names) == 1:
            (wanted,) = content
        if wanted not in content:
            shown = ", ".join(f"'{name}'" for name in names[:SHOWN_KEYS]) + (", ..." if len(names) > SHOWN_KEYS else "")
            what = "names no cluster to take" if wanted is None else f"has no cluster '{quoted(wanted)}'"
            raise VectorError(f"'{path}' {what}, there are {shown or 'none'}: pass --cluster")
        content = content[wanted]
    elif cluster is not None:
        raise VectorError(f"'{path}' holds one vector, no clusters: leave out --cluster")
    found = content[EMBEDDING] if isinstance(content, dict) and EMBEDDING in content else content
    return _content_of_npy(path, found) if isinstance(found, bytes) else found


def _as_rows(path: Path, content: Any, layers: Sequence[int] | None, experts: int | None) -> list[list[float]]:
    """L lists of N numbers."""
    if isinstance(content, list) and content and all(type(x) in (int, float) for x in content):
        flat = f"'{path}' is a flat list of {len(content):,} numbers, expected a list of L lists of N numbers"
        if layers is None:
            raise VectorError(f"{flat}: pass --model, which says how many layers they are for")
        counts = [count for count in (len(layers), max(layers) + 1) if len(content) % count == 0]
        if experts is not None:
            counts = [count for count in counts if len(content) == count * experts]
        if not counts:
            of = f" and {experts} experts" if experts is not None else ""
            raise VectorError(f"{flat} for {len(layers)} layers{of}: it is for another model")
        width = len(content) // counts[0]
        return [content[start : start + width] for start in range(0, len(content), width)]
    is_matrix = isinstance(content, list) and content and all(isinstance(row, list) for row in content)
    if not is_matrix or not all(type(x) in (int, float) for row in content for x in row):
        raise VectorError(f"'{path}' is not a matrix: expected a list of L lists of N numbers")
    matrix: list[list[float]] = content
    return matrix
