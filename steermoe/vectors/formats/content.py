"""What a file holds, read with a limit on its size: bytes, text, JSON, and the numbers in it."""

import json
import re
from pathlib import Path
from typing import Any

from steermoe.errors import VectorError, VectorNotFound, reason, shown

MAX_BYTES = 2**26
"""Of a file that is imported: 100 clusters of 60 layers x 256 experts as JSON have half of it."""
FORMATS = "JSON, .npy, .npz, .csv, .f32, .gguf or SteerMoE's .pkl"


def read_content(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        VectorNotFound: it can't be read. VectorError: it is larger than `MAX_BYTES`.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        why = getattr(error, "strerror", None) or error
        raise VectorNotFound(f"can't read '{path}': {why}; give a file of one of {FORMATS}") from error
    if len(content) > MAX_BYTES:
        raise VectorError(
            f"'{path}' has more than {MAX_BYTES} bytes, which no vector needs: it is something else, or give one "
            "cluster in a file of its own"
        )
    return content


def text_of(name: str, content: bytes) -> str:
    """A file's content as text.

    Raises:
        VectorError: it is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise VectorError(
            f"'{name}' is neither JSON nor .npy, .npz, .csv, .f32, .gguf or .pkl: give a matrix of layers x experts as "
            "one of them"
        ) from error


def json_of(name: str, content: bytes) -> Any:
    """A file's content as JSON.

    Raises:
        VectorError: it is not JSON, or an object has a key twice, of which JSON keeps the last one alone.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise VectorError(
                    f"'{name}': the key {shown(key)} is there twice in one object, expected each once: keep one"
                )
            found[key] = value
        return found

    try:
        return json.loads(text_of(name, content), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise VectorError(f"'{name}' is not JSON: {reason(error)}") from error


def whole_number(name: str, value: Any, what: str) -> int:
    """A layer or an expert, as a number or as digits.

    Raises:
        VectorError: it is none.
    """
    if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value):
        return int(value)
    if type(value) is int and 0 <= value < 10**9:
        return value
    raise VectorError(f"'{name}': {what} is {shown(value)}, expected a whole number from 0 on")


def numbered(name: str, entries: dict[str, Any], what: str) -> dict[int, Any]:
    """Entries by layer or by expert.

    Raises:
        VectorError: a key is no number, or two are the same one, such as "7" and "07".
    """
    found: dict[int, Any] = {}
    for key, entry in entries.items():
        place = whole_number(name, key, what)
        if place in found:
            raise VectorError(
                f"'{name}': {what} is {shown(key)}, but {place} is there already, expected each once: keep one"
            )
        found[place] = entry
    return found


def number(name: str, value: Any, what: str) -> float:
    """A weight.

    Raises:
        VectorError: it is none.
    """
    if type(value) in (int, float):
        try:
            return float(value)
        except OverflowError:
            pass
    raise VectorError(f"'{name}': {what} is {shown(value)}, expected a number of float32")
