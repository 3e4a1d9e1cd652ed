"""Files: written whole or not at all, and where those belong that steermoe keeps for itself."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and vanishes otherwise."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o644)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Where models are kept: $STEERMOE_CACHE, or the user's cache folder."""
    from platformdirs import user_cache_path

    return Path(os.environ["STEERMOE_CACHE"]) if os.environ.get("STEERMOE_CACHE") else user_cache_path("steermoe")
