"""Write files and folders whole or not at all, lock files, find steermoe's cache folder, check .npy and CSV files."""

import contextlib
import errno
import io
import math
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steermoe.errors import SteerMoEError

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What formulas of spreadsheets begin with, in their full-width forms too."""

MAX_NAME_BYTES = 255
"""Of a file's name on common file systems."""


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path that replaces `path` if the block succeeds, and is deleted otherwise.

    A new file gets the permissions that the umask leaves, a replaced one keeps its own. A link stays a link: the file
    that it points to is replaced. A device or a pipe is not replaced: the content is written into it.
    """
    is_there = path.exists()
    if is_there and not path.is_file() and not path.is_dir():
        with tempfile.TemporaryDirectory() as folder:
            partial = new_file(Path(folder) / "partial")
            yield partial
            with partial.open("rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
        return
    target_path = Path(os.path.realpath(path)) if path.is_symlink() else path
    partial = new_file(hidden_beside(target_path, secrets.token_hex(4)), 0o600 if is_there else 0o666)
    try:
        yield partial
        if is_there:
            partial.chmod(stat.S_IMODE(target_path.stat().st_mode))
        partial.replace(target_path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that gets its name if the block succeeds, and is deleted otherwise.

    Raises:
        FileExistsError: there is something at `path` already.
    """
    if path.exists() or path.is_symlink():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    partial = hidden_beside(path, secrets.token_hex(4))
    partial.mkdir()
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def why_not_written(error: OSError) -> str:
    """Why a file can't be written, in one line; libraries that notice a short write give no reason of their own."""
    if error.strerror:
        return error.strerror
    said = " ".join(str(error).split())
    return f"the disk may be full ({said})" if said else "the disk may be full"


def hidden_beside(path: Path, ending: str) -> Path:
    """A hidden name in the folder of `path` that begins like its own, and is never too long for a file."""
    room = MAX_NAME_BYTES - len(ending) - 2
    return path.with_name(f".{os.fsencode(path.name)[:room].decode(errors='ignore')}.{ending}")


def new_file(path: Path, mode: int = 0o666) -> Path:
    """Create an empty file with the permissions that the umask leaves of `mode`; follows no link at that place.

    Raises:
        FileExistsError: there is something already, even a link that points nowhere.
    """
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
    return path


def lock(fd: int, *, wait: bool = False) -> bool | None:
    """Lock an open file until it is closed or this process ends.

    Args:
        fd: the file's descriptor.
        wait: wait until another process gives it up.

    Returns:
        whether it is locked by this process now; None if the file system or the operating system has no locks.
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


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


def read_npy(content: bytes) -> "NDArray[Any]":
    """The array of a .npy file; its size must be that of the content before memory is taken for it.

    Raises:
        Exception: whatever a hostile header makes numpy raise; ValueError for objects, and for another size.
    """
    import numpy as np

    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(file)
    size = len(content) - file.tell()
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"its header claims {shape} of {dtype}, it has {size:,} bytes")
    values = np.frombuffer(content, dtype, offset=file.tell())
    return values.reshape(shape, order="F" if is_fortran else "C").copy(order="C")


def csv_cell(value: Any) -> Any:
    """A value for a CSV file: text that a spreadsheet would run as a formula gets a quote before it."""
    if not isinstance(value, str) or not value.startswith(FORMULA_SIGNS):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value
