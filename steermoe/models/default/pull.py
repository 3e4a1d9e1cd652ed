"""Pull the default model: fetch its base, assemble it once, keep it in the cache, repair it if it is damaged."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from steermoe.errors import ModelError
from steermoe.files import cache_folder, lock
from steermoe.models.default import spec
from steermoe.models.default.record import find_damage, write_record

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


def check_intact() -> None:
    """Check the files of the pulled model as far as that is cheap.

    Raises:
        ModelError: they are damaged.
    """
    folder = default_model_folder()
    if damage := find_damage(folder):
        raise ModelError(
            f"the default model in '{folder}' is damaged, {damage}: run `steermoe models pull`, which repairs it"
        )


def pull(base: Path | str | None = None, force: bool = False) -> Path:
    """Assemble the default model in the cache, unless it is there and undamaged, and return its folder.

    Processes that pull at the same time take turns; what a killed one left is removed.

    Args:
        base: the dense base (GGUF file, folder, hub id); by default it is downloaded.
        force: assemble it again.

    Raises:
        ModelError: the base is not available, or the cache can't be written. What was there before stays.
    """
    from steermoe.models.default.assemble import assemble
    from steermoe.models.default.base import fetch

    folder = default_model_folder()
    if not force and _is_whole(folder):
        _clean_up(folder.parent)
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.parent):
            if not force and _is_whole(folder):  # another process pulled it meanwhile
                return folder
            with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder.parent) as scratch:
                source = base if base is not None else fetch(Path(scratch))
                made = Path(scratch) / folder.name
                assemble(source, made)
                write_record(made)
                _exchange(folder, made, Path(scratch) / "before")
    except OSError as error:
        raise ModelError(
            f"can't write the model to '{folder.parent}' ({error.strerror or error}); set STEERMOE_CACHE to another "
            "folder"
        ) from error
    return folder


SCRATCH, LOCK = ".pull-", ".pull.lock"
"""The beginning of the folder in which a model is made, and the file that processes lock to take turns."""


def _is_whole(folder: Path) -> bool:
    return is_pulled() and not find_damage(folder, whole=True)


@contextlib.contextmanager
def _alone(models: Path) -> Iterator[None]:
    """Wait until no other process pulls, and remove what killed ones left; without locks, neither."""
    with (models.parent / LOCK).open("a") as file:
        if lock(file.fileno(), wait=True):
            _remove_leftovers(models)
        yield


def _clean_up(models: Path) -> None:
    """Remove what killed processes left, if there is anything, it can be removed, and no process pulls."""
    if any(models.glob(f"{SCRATCH}*")):
        with contextlib.suppress(OSError), (models.parent / LOCK).open("a") as file:
            if lock(file.fileno()):
                _remove_leftovers(models)


def _remove_leftovers(models: Path) -> None:
    for leftover in models.glob(f"{SCRATCH}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _exchange(folder: Path, made: Path, before: Path) -> None:
    """Put a folder in the place of another one, which moves to `before`; processes that read it go on."""
    if folder.exists():
        folder.replace(before)
    try:
        made.replace(folder)
    except BaseException:
        if before.exists():
            before.replace(folder)
        raise
