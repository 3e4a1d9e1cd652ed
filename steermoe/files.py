"""Write files whole or not at all, and find steermoe's cache folder."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


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
    """Where models are kept: $STEERMOE_CACHE, or the user's cache folder."""
    from platformdirs import user_cache_path

    return Path(os.environ["STEERMOE_CACHE"]) if os.environ.get("STEERMOE_CACHE") else user_cache_path("steermoe")
