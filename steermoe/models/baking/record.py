"""What was baked into a file: the record that takes it out again, and the arithmetic of a bias. Knows no file format.

Shapes: N experts of a router.
"""

import base64
import binascii
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steermoe import __version__
from steermoe.errors import ModelError, shown
from steermoe.routing.biases import Kind, changed

FORMAT = 1
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of biases, by the names that safetensors uses."""
RUN_IT = "steer it while it runs, as `steermoe generate`, `steermoe serve` and the vLLM plugin do"
NO_LOGIT_BIAS = "add no bias to their logits, which formula (3) needs"
CHOICE_INSTEAD = "--choice-only moves which experts are chosen, not their weights"
FORMULAS: dict[Kind, str] = {"logits": "additive", "choice": "choice only"}
"""How the record names what was done to the routers."""


@dataclass(frozen=True)
class Steering:
    """What is baked in, for the record.

    Attributes:
        kind: what c E is added to.
        domain: name of the vector, or of the mixture.
        strength: c.
        vector_sha256: of its expert vector E.
        layers: the decoder layers that are steered, first and last; None for all.
    """

    kind: Kind
    domain: str
    strength: float
    vector_sha256: str
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Change:
    """One tensor that is changed or added.

    Attributes:
        name: in its file.
        file: the file's name in its folder; "" if there is only one.
        before, after: its bytes; `before` is None for a tensor that is added.
    """

    name: str
    file: str
    before: bytes | None
    after: bytes


@dataclass(frozen=True)
class Kept:
    """What a record says about one tensor: as `Change`, but of its new bytes only the hash."""

    name: str
    file: str
    before: bytes | None
    after_sha256: str


@dataclass(frozen=True)
class Baked:
    """What was written.

    Attributes:
        path: the folder or file.
        tensors: how many biases were changed or added.
        rounding: the largest difference that rounding to a bias's own type makes to c E.
        dtype: the types of the biases.
        left_out: parts of the checkpoint that were not copied, since they may hold unsteered weights.
    """

    path: Path
    tensors: int
    rounding: float = 0.0
    dtype: str = ""
    left_out: tuple[str, ...] = ()


def tensor_of(name: str, dtype: str, content: bytes) -> Tensor:
    """The numbers of a bias.

    Raises:
        ModelError: its type is none of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise ModelError(
            f"the bias '{name}' is of type {shown(dtype)}, expected {', '.join(DTYPES)}: it can't be baked"
        )
    return torch.frombuffer(bytearray(content), dtype=DTYPES[dtype])


def with_push(name: str, dtype: str, before: bytes, push: Tensor) -> tuple[bytes, float]:
    """The bytes of a bias with c E [N] added, and the largest error of rounding.

    Raises:
        ModelError: its type is not known, or too small for the sum.
    """
    values = tensor_of(name, dtype, before)
    after = changed(values, push)
    if not bool(after.isfinite().all()):
        raise ModelError(
            f"strength times vector is too large for the bias '{name}' of type {dtype}: lower the strength"
        )
    exact = changed(values.double(), push)
    return after.view(torch.uint8).numpy().tobytes(), float((after.double() - exact).abs().max())


def record_text(steering: Steering, changes: Sequence[Change], **more: Any) -> str:
    """The record, as JSON; it holds the original bytes of what was changed."""
    fields = asdict(steering)
    kind = fields.pop("kind")
    tensors = [
        {
            "name": change.name,
            "file": change.file,
            "before": None if change.before is None else base64.b64encode(change.before).decode("ascii"),
            "after_sha256": hashlib.sha256(change.after).hexdigest(),
        }
        for change in changes
    ]
    about = {"format": FORMAT, "created_by": f"steermoe {__version__}", "kind": kind, "formula": FORMULAS[kind]}
    return json.dumps(about | fields | {"positions": "all", "schedule": "constant"} | more | {"tensors": tensors})


def read_record(text: str, where: Path) -> tuple[dict[str, Any], list[Kept]]:
    """A record, and what it says about tensors.

    Raises:
        ModelError: it is none, or damaged.
    """
    try:
        record = json.loads(text)
        if record["format"] != FORMAT:
            raise ModelError(
                f"'{where}' was baked by another version of steermoe ({shown(record['format'])}): use that"
            )
        kept = [_kept(one) for one in record["tensors"]]
        if not kept:
            raise ValueError("no tensors")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"the record of what was baked into '{where}' is damaged: take the original checkpoint instead"
        ) from error
    return record, kept


def _kept(one: Mapping[str, Any]) -> Kept:
    texts = [one["name"], one["file"], one["after_sha256"]]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(texts)
    try:
        before = None if one["before"] is None else base64.b64decode(one["before"], validate=True)
    except binascii.Error as error:
        raise ValueError(one["name"]) from error
    return Kept(texts[0], texts[1], before, texts[2])


def check_unchanged(kept: Kept, now: bytes, where: Path) -> bytes:
    """The original bytes of a tensor that still holds what was baked into it.

    Raises:
        ModelError: it does not.
    """
    is_same = hashlib.sha256(now).hexdigest() == kept.after_sha256
    if not is_same or kept.before is None or len(kept.before) != len(now):
        raise ModelError(
            f"'{kept.name}' in '{where}' is not what was baked: somebody changed it since; take the original checkpoint"
        )
    return kept.before


def size_of(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a bias; 0 if its type is unknown."""
    return math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else 0
