"""The record of the assembled default model: size and hash of each file, so that damage in the cache is found.

A load checks what is cheap: all sizes, and the hashes of all files but the weights. `steermoe models pull` checks all.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from steermoe.models.default import spec

RECORD = "steermoe.json"
NEEDED = ("config.json", "model.safetensors")
"""Files without which there is no model."""
CHEAP_BYTES = 2**23
"""Files up to this size are hashed at every load, which takes milliseconds."""


def write_record(folder: Path) -> None:
    """Record all files of a folder, and give them the permissions that the umask leaves."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name != RECORD)
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256_of(path)} for path in paths}
    record = folder / RECORD
    record.write_text(json.dumps({"format_version": 1, "files": files}, indent=1) + "\n", encoding="utf-8")
    mode = record.stat().st_mode & 0o777
    for path in paths:
        path.chmod(mode)


def find_damage(folder: Path, *, whole: bool = False) -> str:
    """What is wrong with the files of an assembled model; "" if nothing is.

    Args:
        folder: where it is. One that steermoe 0.2.0 assembled has no record: its form is checked alone.
        whole: also hash the weights, which takes a second.
    """
    try:
        text = (folder / RECORD).read_text(encoding="utf-8")
    except FileNotFoundError:
        return _wrong_form(folder)
    except (OSError, ValueError) as error:
        return f"its record '{RECORD}' can't be read ({type(error).__name__})"
    try:
        files = {
            str(name): (int(each["bytes"]), str(each["sha256"])) for name, each in json.loads(text)["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return f"its record '{RECORD}' is garbled"
    if missing := [name for name in NEEDED if name not in files]:
        return f"its record '{RECORD}' lacks '{missing[0]}'"
    for name, (size, sha256) in files.items():
        path = folder / Path(name).name
        try:
            found = path.stat()
            if found.st_size != size:
                return f"'{path.name}' has {found.st_size} bytes instead of {size}"
            is_hashed = whole or size <= CHEAP_BYTES
            if is_hashed and _sha256_once(path, found.st_ino, found.st_size, found.st_mtime_ns) != sha256:
                return f"'{path.name}' has other content than it was assembled with"
        except FileNotFoundError:
            return f"'{path.name}' is missing"
        except OSError as error:
            return f"'{path.name}' can't be read ({error.strerror})"
    return ""


def _wrong_form(folder: Path) -> str:
    """What shows without a record: weights that are cut off, or another number of experts."""
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        experts = (config["num_local_experts"], config["num_experts_per_tok"])
        if experts != (spec.NUM_EXPERTS, spec.TOP_K):
            return f"its config.json has {experts} experts and top-k, expected {(spec.NUM_EXPERTS, spec.TOP_K)}"
        weights = folder / "model.safetensors"
        with weights.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(min(length, 2**24)))
        needed = 8 + length + max(each["data_offsets"][1] for name, each in entries.items() if name != "__metadata__")
        size = weights.stat().st_size
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"its files can't be read ({type(error).__name__})"
    return "" if size == needed else f"'{weights.name}' has {size} bytes instead of {needed}"


@functools.cache
def _sha256_once(path: Path, inode: int, size: int, mtime_ns: int) -> str:
    """The hash of a file, computed again only if the file changes."""
    return _sha256_of(path)


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
