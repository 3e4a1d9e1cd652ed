"""Write files whole or not at all, find steermoe's cache folder, and make cells of CSV files safe."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from steermoe.errors import SteerMoEError

FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What formulas of spreadsheets begin with, in their full-width forms too."""


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it if the block succeeds, and is deleted otherwise."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o644)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def reason(error: OSError) -> str:
    """Why a file can't be written, in one line; libraries that notice a short write give no reason of their own."""
    if error.strerror:
        return error.strerror
    said = " ".join(str(error).split())
    return f"the disk may be full ({said})" if said else "the disk may be full"


def cache_folder() -> Path:
    """Where models are kept: $STEERMOE_CACHE, or the user's cache folder.

    Raises:
        SteerMoEError: the user has no home folder.
    """
    from platformdirs import user_cache_path

    if os.environ.get("STEERMOE_CACHE"):
        return Path(os.environ["STEERMOE_CACHE"])
    with contextlib.suppress(RuntimeError):  # of recent versions; older ones leave the sign as it is
        folder = user_cache_path("steermoe")
        if folder.parts[0] != "~":
            return folder
    raise SteerMoEError("there is no home folder for the cache: set HOME, or STEERMOE_CACHE to a folder")


def csv_cell(value: Any) -> Any:
    """A value for a CSV file: text that a spreadsheet would run as a formula gets a quote before it."""
    if not isinstance(value, str) or not value.startswith(FORMULA_SIGNS):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value
