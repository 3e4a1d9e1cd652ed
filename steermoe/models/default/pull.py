"""Pull the default model: fetch its base, assemble it once, keep it in the cache."""

import shutil
import tempfile
from pathlib import Path

from steermoe.errors import ModelError
from steermoe.files import cache_folder
from steermoe.models.default import spec

DEFAULT_MODEL = spec.NAME


def default_model_folder() -> Path:
    """Where the default model is, or will be once it is pulled. Each version of the trained part has its own folder."""
    return cache_folder() / "models" / f"{spec.NAME}-{trained_part_version()}"


def trained_part_version() -> str:
    """First digits of the trained part's sha256, so that an upgraded package never runs the old model.

    Raises:
        ModelError: the package has no trained part.
    """
    import hashlib

    try:
        return hashlib.sha256(spec.TRAINED_PART.read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise ModelError(f"can't read the trained part '{spec.TRAINED_PART}': install steermoe again") from error


def is_pulled() -> bool:
    return (default_model_folder() / "config.json").is_file()


def pull(base: Path | str | None = None, force: bool = False) -> Path:
    """Assemble the default model in the cache, unless it is there already, and return its folder.

    Args:
        base: the dense base (GGUF file, folder, hub id); by default it is downloaded.
        force: assemble it again.

    Raises:
        ModelError: the base is not available, or the cache can't be written. What was there before stays.
    """
    from steermoe.models.default.assemble import assemble
    from steermoe.models.default.base import fetch

    folder = default_model_folder()
    if is_pulled() and not force:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder.parent) as scratch:
            source = base if base is not None else fetch(Path(scratch))
            made = Path(scratch) / folder.name
            assemble(source, made)
            shutil.rmtree(folder, ignore_errors=True)
            made.replace(folder)
    except OSError as error:
        raise ModelError(
            f"can't write the model to '{folder.parent}' ({error}); set STEERMOE_CACHE to another folder"
        ) from error
    return folder
