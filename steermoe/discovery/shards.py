"""The files of one shard of embeddings, written whole or not at all and checked when read. Knows no models.

A shard is a few matrices and lines of text, and a record with the SHA-256 of each of these files. The record is renamed
into place last: a shard that has one is complete. Folders of format version 1 have no records; there the texts come
last, and only the form of the files can be checked.

Shapes: B texts, L MoE layers, N experts per layer, H hidden size.
"""

import hashlib
import io
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steermoe.errors import CorpusError
from steermoe.files import atomic_path, lock, read_npy

logger = logging.getLogger(__name__)

Floats = NDArray[np.float32]

KINDS = {"shard": "json", "embeddings": "npy", "hidden": "npy", "texts": "jsonl"}
"""The files of a shard, each with the ending of its name."""
ROW_SUM_TOLERANCE = 1e-3
REPAIR = "run `steermoe embed` again, with the same corpus, to repair it"


@dataclass(frozen=True)
class Text:
    """One text of a corpus.

    Attributes:
        id: unique in the corpus, such as "sport/a.txt" or "stories.jsonl:17".
        label: its known domain or source; "" if unknown.
    """

    id: str
    text: str
    label: str = ""


@dataclass(frozen=True, eq=False)
class Shard:
    """Some texts with their embeddings.

    Attributes:
        tokens: [B], tokens read of each text.
        frequency: F [B, L, N] float32, each row summing to 1.
        hidden: mean hidden states [B, H] float32, or None.
        left_out: texts that have no tokens, as `identity` writes them.
    """

    texts: Sequence[Text]
    tokens: Sequence[int]
    frequency: Floats
    hidden: Floats | None = None
    left_out: Sequence[str] = ()


def shard_path(folder: Path, kind: str, number: int) -> Path:
    """Where a file of a shard is."""
    return folder / f"{kind}-{number:05d}.{KINDS[kind]}"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def identity(text: Text, occurrence: int = 0) -> str:
    """Hashes of a text's id, content and label, in hexadecimal digits: 32, 32 and 16.

    Args:
        text: the text.
        occurrence: how many earlier texts have the same id.
    """
    place = _short_hash(f"{occurrence} {text.id}", 16)
    return place + _short_hash(text.text, 16) + _short_hash(text.label, 8)


def _short_hash(text: str, size: int) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).hexdigest()


# ---- writing ----


def write_shard(folder: Path, number: int, shard: Shard, *, recorded: bool = True) -> None:
    """Write a shard whole or not at all.

    Args:
        folder: where.
        number: its number.
        shard: its content.
        recorded: write the record; False for a folder of format version 1.

    Raises:
        CorpusError: an embedding is not one, the disk is full, or the folder can't be written to.
    """
    if wrong := what_is_wrong(shard):
        raise CorpusError(f"can't store embeddings in '{folder}': {wrong}; check the model, or use --dtype float32")
    contents = {"embeddings": _npy(shard.frequency)}
    if shard.hidden is not None:
        contents["hidden"] = _npy(shard.hidden)
    contents["texts"] = b"".join(_line(text, count) for text, count in zip(shard.texts, shard.tokens, strict=True))
    if recorded:
        record = {
            "number": number,
            "texts": len(shard.texts),
            "left_out": list(shard.left_out),
            "sha256": {kind: sha256(content) for kind, content in contents.items()},
        }
        contents["shard"] = (json.dumps(record, indent=1) + "\n").encode()
    try:
        for kind, content in contents.items():
            with atomic_path(shard_path(folder, kind, number)) as partial:
                partial.write_bytes(content)
    except OSError as error:
        raise CorpusError(
            f"can't write to '{folder}': {error.strerror or error}; finished shards stay, run again to resume"
        ) from error


def _line(text: Text, tokens: int) -> bytes:
    record = {"id": text.id, "label": text.label, "tokens": int(tokens), "text": text.text}
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _npy(matrix: Floats) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, matrix)
    return buffer.getvalue()


# ---- reading ----


def read_shard(folder: Path, number: int, *, recorded: bool = True, hidden: bool = False) -> Shard:
    """Read a shard and check it: against its record, and that its rows are embeddings.

    Args:
        folder: where.
        number: its number.
        recorded: it has a record; False in a folder of format version 1.
        hidden: hidden states belong to it.

    Raises:
        CorpusError: a file is missing or damaged, or the files don't belong together.
    """
    record = _read_record(folder, number) if recorded else None
    contents = {}
    for kind in ("texts", "embeddings", *(["hidden"] if hidden else [])):
        path = shard_path(folder, kind, number)
        contents[kind] = _read_bytes(path)
        if record is not None and sha256(contents[kind]) != record["sha256"].get(kind):
            raise CorpusError(f"'{path}' has changed since it was written: {REPAIR}")
    lines = list(_parse_lines(shard_path(folder, "texts", number), contents["texts"]))
    shard = Shard(
        [text for text, _ in lines],
        [count for _, count in lines],
        _parse_matrix(shard_path(folder, "embeddings", number), contents["embeddings"], 3),
        _parse_matrix(shard_path(folder, "hidden", number), contents["hidden"], 2) if hidden else None,
        record["left_out"] if record is not None else (),
    )
    if record is not None and record["texts"] != len(lines):
        raise CorpusError(f"'{shard_path(folder, 'shard', number)}' is damaged (number of texts): {REPAIR}")
    if wrong := what_is_wrong(shard):
        raise CorpusError(f"'{shard_path(folder, 'embeddings', number)}' is damaged: {wrong}; {REPAIR}")
    return shard


def what_is_wrong(shard: Shard) -> str:
    """Why a shard's matrices can't be the embeddings of its texts; "" if they can."""
    for name, matrix in (("embeddings", shard.frequency), ("hidden states", shard.hidden)):
        if matrix is None:
            continue
        if len(matrix) != len(shard.texts):
            return f"it has {len(shard.texts)} texts and {len(matrix)} {name}"
        if not np.isfinite(matrix).all():
            return f"its {name} contain NaN or infinity"
    if shard.frequency.size == 0:
        return ""
    if (shard.frequency < 0).any():
        return "its embeddings contain negative numbers"
    sums = shard.frequency.sum(-1, dtype=np.float64)
    worst = float(sums.flat[int(np.abs(sums - 1).argmax())])
    return "" if math.isclose(worst, 1, abs_tol=ROW_SUM_TOLERANCE) else f"a row sums to {worst:.4g}, expected 1"


def _read_record(folder: Path, number: int) -> dict[str, Any]:
    path = shard_path(folder, "shard", number)
    try:
        record = json.loads(_read_bytes(path))
        if record["number"] != number or type(record["texts"]) is not int or not isinstance(record["sha256"], dict):
            raise ValueError(f"it is the record of shard {record['number']}")
        if not all(isinstance(text, str) for text in record["left_out"]):
            raise TypeError("left_out")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorpusError(f"'{path}' is damaged ({_one_line(error)}): {REPAIR}") from error
    found: dict[str, Any] = record
    return found


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorpusError(f"can't read '{path}' ({error.strerror or error}): {REPAIR}") from error


def _parse_lines(path: Path, content: bytes) -> Iterator[tuple[Text, int]]:
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            data = json.loads(line)
            text, tokens = Text(data["id"], data["text"], data["label"]), data["tokens"]
            if not all(isinstance(part, str) for part in (text.id, text.text, text.label)) or type(tokens) is not int:
                raise TypeError("id, text and label must be text, tokens a whole number")
            if not 0 < tokens < 2**63:
                raise ValueError(f"tokens is {tokens}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorpusError(f"line {number} of '{path}' is damaged ({_one_line(error)}): {REPAIR}") from error
        yield text, tokens
    if content and not content.endswith(b"\n"):
        raise CorpusError(f"'{path}' is cut short: {REPAIR}")


def _parse_matrix(path: Path, content: bytes, dimensions: int) -> Floats:
    try:
        matrix = read_npy(content)
        if matrix.dtype != np.float32 or matrix.ndim != dimensions:
            raise ValueError(f"it holds {matrix.dtype}, {matrix.ndim} dimensions; expected float32, {dimensions}")
    except Exception as error:  # a hostile header can make numpy raise anything
        raise CorpusError(f"'{path}' is damaged ({_one_line(error)}): {REPAIR}") from error
    return matrix


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


# ---- the shard that is being made ----


class Unfinished:
    """Embeddings of texts whose shard is not complete yet, in a file that each write replaces.

    A damaged file counts as none, and its texts are embedded again.

    Args:
        folder: of the embeddings.
    """

    NAME = "unfinished.npz"

    def __init__(self, folder: Path) -> None:
        self._path = folder / self.NAME
        self.rows: dict[str, tuple[int, Floats, Floats | None]] = {}
        with suppress(Exception):  # a damaged file can make numpy raise anything
            self._read(self._path.read_bytes())

    def _read(self, content: bytes) -> None:
        digest, content = content[:64], content[64:]
        if sha256(content).encode() != digest:
            return
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            hidden = arrays["hidden"] if "hidden" in arrays else [None] * len(arrays["names"])
            parts = zip(arrays["names"].tolist(), arrays["tokens"].tolist(), arrays["frequency"], hidden, strict=True)
            self.rows = {name: (tokens, frequency, states) for name, tokens, frequency, states in parts}

    def write(self) -> None:
        """Replace the file.

        Raises:
            CorpusError: the disk is full or the folder can't be written to.
        """
        if not self.rows:
            return
        arrays: dict[str, Any] = {
            "names": np.array(list(self.rows)),
            "tokens": np.array([row[0] for row in self.rows.values()], dtype=np.int64),
            "frequency": np.stack([row[1] for row in self.rows.values()]),
        }
        hidden = [row[2] for row in self.rows.values() if row[2] is not None]
        if hidden:
            arrays["hidden"] = np.stack(hidden)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        content = buffer.getvalue()
        try:
            with atomic_path(self._path) as partial:
                partial.write_bytes(sha256(content).encode() + content)
        except OSError as error:
            raise CorpusError(
                f"can't write to '{self._path.parent}': {error.strerror or error}; finished shards stay, run again "
                "to resume"
            ) from error

    def drop(self) -> None:
        """Forget all of it, once its shard is complete."""
        self.rows.clear()
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


LEFT_BY_A_KILL = re.compile(rf"\.(meta\.json|unfinished\.npz|({'|'.join(KINDS)})-\d+\.\w+)\.\w+")
"""Names of temporary files."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let no other run write to a folder, which is created if it is missing; remove what killed runs left there.

    Where there are no locks, that is logged, and nothing is protected.

    Raises:
        CorpusError: another run has it, or it can't be written.
    """
    handle = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _lock(folder)
        for path in folder.iterdir():
            if LEFT_BY_A_KILL.fullmatch(path.name):
                path.unlink(missing_ok=True)
        yield
    except OSError as error:
        raise CorpusError(f"can't write '{folder}': {error.strerror or error}; name another folder") from error
    finally:
        if handle is not None:
            os.close(handle)


def _lock(folder: Path) -> int:
    """What to close to release the folder."""
    handle = os.open(folder, os.O_RDONLY)
    is_locked = lock(handle)
    if is_locked is False:
        os.close(handle)
        raise CorpusError(f"'{folder}' is being written by another run: wait for it, or name another folder")
    if is_locked is None:
        logger.warning("'%s' can't be locked here: make sure that no other run writes to it", folder)
    return handle
