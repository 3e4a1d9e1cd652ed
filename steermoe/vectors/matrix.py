"""Import expert vectors from a JSON matrix of layers x experts, the format of the paper's authors."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from steermoe.errors import VectorError, VectorNotFound
from steermoe.vectors.file import check_domain_name
from steermoe.vectors.vector import ROW_SUM_TOLERANCE, SteeringVector, VectorInfo

if TYPE_CHECKING:
    from torch import Tensor


def import_matrix(
    path: Path, domain: str, *, layers: Sequence[int] | None = None, info: VectorInfo | None = None
) -> SteeringVector:
    """Read an expert vector in the format of the paper's authors: JSON, a list of L lists of N numbers.

    Rows that each sum to 1 are taken to be frequencies F, anything else to be E itself.

    Args:
        path: the JSON file.
        domain: name of the vector.
        layers: the decoder layer of each row; by default 0 to L-1.
        info: what else is known about it.

    Raises:
        VectorError: not JSON, not such a list, or invalid numbers.
    """
    matrix = _read(path)
    numbers = tuple(layers) if layers is not None else tuple(range(len(matrix)))
    if len(numbers) != len(matrix):
        raise VectorError(
            f"'{path}' has {len(matrix)} rows, expected one for each of {len(numbers)} layers: it is for another model"
        )
    if not matrix.any():
        raise VectorError(f"'{path}' contains only zeros: it would steer nothing")
    info = info or VectorInfo()
    is_frequency = bool(((matrix.sum(-1) - 1).abs() < ROW_SUM_TOLERANCE).all() and (matrix >= 0).all())
    return SteeringVector(
        check_domain_name(domain),
        matrix if is_frequency else None,
        numbers,
        weights=None if is_frequency else matrix,
        info=replace(info, created_by=info.created_by or "steermoe vectors import"),
    )


def _read(path: Path) -> "Tensor":
    """The matrix [L, N] in float32."""
    import torch

    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise VectorNotFound(f"can't read '{path}': {error.strerror}; give a JSON file") from error
    except (ValueError, RecursionError) as error:
        raise VectorError(f"'{path}' is not JSON: {error}") from error
    is_matrix = isinstance(rows, list) and rows and all(isinstance(row, list) for row in rows)
    if not is_matrix or not all(type(x) in (int, float) for row in rows for x in row):
        raise VectorError(f"'{path}' is not a matrix: expected a list of L lists of N numbers")
    if len({len(row) for row in rows}) != 1:
        raise VectorError(
            f"'{path}': its rows have different lengths {sorted({len(row) for row in rows})}, expected one"
        )
    try:
        return torch.tensor(rows, dtype=torch.float32)
    except (OverflowError, RuntimeError, ValueError) as error:
        raise VectorError(f"'{path}' contains a number that is too large for float32") from error
