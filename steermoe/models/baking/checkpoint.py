"""Bake steering into a checkpoint folder: c E is added to a bias of its routers, everything else is copied.

The tensors keep their types and places, so files differ only in the bytes of the biases. `RECORD`, a file beside them,
has the original bytes; without it the folder is an ordinary checkpoint for any engine.
"""

import errno
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from steermoe.errors import ModelError, count_of, reason
from steermoe.files import atomic_folder, why_not_written
from steermoe.models.baking.found import RECORD, record_of
from steermoe.models.baking.record import (
    CHOICE_INSTEAD,
    NO_LOGIT_BIAS,
    RUN_IT,
    Baked,
    Change,
    Kept,
    Steering,
    check_unchanged,
    read_record,
    record_text,
    size_of,
    with_push,
)
from steermoe.models.checkpoint import _locate
from steermoe.models.description import built_empty, stored_shape
from steermoe.models.stored import Place, local_folder, tensors_of, weight_files
from steermoe.routing.architectures import LAYER_NUMBER
from steermoe.routing.biases import Bias, Kind, bias_of
from steermoe.routing.routers import find_routers

STORED_CHOICE = re.compile(r"(^|[._])(correction_bias|expert_bias|router_bias|balancing_biases|gate\.bias)$")
"""What checkpoints call a bias on scores; transformers renames some of them."""
NOT_A_STACK = re.compile(r"(^|\.)(mtp|vision|visual|audio|talker)")
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}
"""Endings of files that may hold weights."""
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a damaged checkpoint raises."""


class Checkpoint:
    """A checkpoint in safetensors files on this machine.

    Args:
        model: a folder, or a hub id whose files are in the cache.
        trust_remote_code: run model code that comes with it.

    Attributes:
        shape: what vectors must fit.

    Raises:
        ModelError: there is none, or it is baked already. UnsupportedModel: it has no routers.
    """

    def __init__(self, model: str | Path | None, trust_remote_code: bool = False) -> None:
        self.name, where, extra = _locate(model)
        config, self._built = built_empty(self.name, where, extra, trust_remote_code)
        self._routers = find_routers(self._built)
        self._family = config.model_type
        self._where = Path(where)
        self.shape = stored_shape(self.name, self._built, self._routers, self._where)

    def check(self, kind: Kind) -> None:
        """Raise ModelError if routers have no bias of that kind, or the checkpoint is baked already."""
        self.biases(kind)
        folder = local_folder(self._where)
        if folder is not None and (folder / RECORD).exists():
            raise ModelError(f"'{self.name}' is baked already: take that out first, with `steermoe models bake --undo`")

    def check_output(self, output: Path) -> None:
        """Raise ModelError for a place where no folder can be written."""
        _check_output(local_folder(self._where) or self._where, output)

    def biases(self, kind: Kind) -> list[Bias]:
        """The bias of each router.

        Raises:
            ModelError: they have none of that kind.
        """
        found = {one: self._of(one) for one in (kind, _other(kind))}
        if (own := found[kind]) is not None:
            return own
        what = f"'{self.name}' ({self._family})"
        if kind == "choice":
            if found["logits"] is not None:
                raise ModelError(f"{what} can be baked exactly, by formula (3): leave --choice-only out")
            raise ModelError(
                f"{what} can't be baked: its routers add no bias, neither to logits nor to scores; {RUN_IT}"
            )
        instead = "" if found["choice"] is None else f"; {CHOICE_INSTEAD}"
        raise ModelError(f"{what} can't be baked: its routers {NO_LOGIT_BIAS}; {RUN_IT}{instead}")

    def _of(self, kind: Kind) -> list[Bias] | None:
        found = [bias_of(self._built, router, kind) for router in self._routers]
        return None if None in found else [bias for bias in found if bias is not None]

    def bake(self, steering: Steering, pushes: Sequence[Tensor], output: Path) -> Baked:
        """Write the steered checkpoint.

        Args:
            steering: what is baked in, for the record.
            pushes: c E of each router, [N] each.
            output: a folder that is not there yet.

        Raises:
            ModelError: the checkpoint is not here or damaged, has other tensors than its model, or can't be written.
        """
        self.check(steering.kind)
        biases = self.biases(steering.kind)
        folder, files = self._files()
        changes, places, rounding = [], {}, 0.0
        try:
            tensors = {name: place for file in files for name, place in tensors_of(file).items()}
            for bias, push in zip(biases, pushes, strict=True):
                if not bool(push.any()):
                    continue
                name = _stored_name(bias, tensors, steering.kind)
                place = places[name] = tensors[name]
                before = _bytes(place)
                after, error = with_push(name, place.kind, before, push)
                rounding = max(rounding, error)
                changes.append(Change(name, place.path.name, before, after))
        except DAMAGED as error:
            raise ModelError(f"can't read the tensors of '{self.name}': its files are damaged, get it again") from error
        with _written(folder, output) as partial:
            left_out = _copy(folder, partial, files)
            for change in changes:
                _patch(partial / change.file, places[change.name].start, change.after)
            (partial / RECORD).write_text(record_text(steering, changes), encoding="utf-8")
        types = ", ".join(sorted({places[change.name].kind for change in changes}))
        return Baked(output, len(changes), rounding, types, left_out)

    def _files(self) -> tuple[Path, list[Path]]:
        """The checkpoint's folder and its weight files."""
        folder = local_folder(self._where)
        if folder is None:
            raise ModelError(f"the files of '{self.name}' are not on this machine: run `hf download {self.name}` first")
        try:
            files = weight_files(folder)
        except DAMAGED as error:
            raise ModelError(f"can't read the index of '{self.name}': it is damaged, get it again") from error
        if not files:
            raise ModelError(f"'{self.name}' has no .safetensors files: load it in transformers and save it again")
        if missing := [file.name for file in files if not file.is_file()]:
            raise ModelError(
                f"'{self.name}' lacks {count_of(len(missing), 'file')}, such as {missing[0]}: get it again"
            )
        return folder, files


def undo(path: Path, output: Path) -> Baked:
    """Write a baked checkpoint, a folder or a hub id, as it was before, to a folder that is not there yet.

    Raises:
        ModelError: nothing was baked into it, its tensors were changed since, or it can't be written.
    """
    folder = local_folder(path)
    if folder is None:
        raise ModelError(
            f"no folder '{path}', and no hub id whose files are on this machine: name what was baked, or run "
            "`hf download` first"
        )
    path, text = folder, record_of(folder)
    if text is None:
        raise ModelError(f"'{path}' has no readable {RECORD}: nothing was baked into it, so nothing can be undone")
    _, kept = read_record(text, path)
    try:
        files = weight_files(path)
        found = list(_originals(path, files, kept))
    except DAMAGED as error:
        raise ModelError(f"can't read the tensors of '{path}': its files are damaged, get it again") from error
    with _written(path, output) as partial:
        left_out = _copy(path, partial, files, without=RECORD)
        for place, before in found:
            _patch(partial / place.path.name, place.start, before)
    return Baked(output, len(found), left_out=left_out)


def _originals(folder: Path, files: Sequence[Path], kept: Sequence[Kept]) -> Iterator[tuple[Place, bytes]]:
    """Where each tensor is that was changed, and its original bytes."""
    tensors = {file.name: tensors_of(file) for file in files}
    for one in kept:
        place = tensors[one.file][one.name]
        yield place, check_unchanged(one, _bytes(place), folder)


def _other(kind: Kind) -> Kind:
    return "choice" if kind == "logits" else "logits"


def _stored_name(bias: Bias, tensors: dict[str, Place], kind: Kind) -> str:
    """What a checkpoint calls a bias of its model.

    Raises:
        ModelError: no tensor, or several, can be it.
    """
    if bias.name in tensors and _size(tensors[bias.name]) == bias.size:
        return bias.name
    found = [
        name
        for name, place in tensors.items()
        if kind == "choice"
        and _size(place) == bias.size
        and (match := LAYER_NUMBER.search(name)) is not None
        and int(match[1]) == bias.layer
        and STORED_CHOICE.search(name)
        and NOT_A_STACK.search(name) is None
    ]
    if len(found) != 1:
        raise ModelError(
            f"the checkpoint has {count_of(len(found), 'tensor')} that could be the model's '{bias.name}' of "
            f"{bias.size} numbers, expected one: load it in transformers, save it again, and bake that"
        )
    return found[0]


def _size(place: Place) -> int:
    return math.prod(place.shape)


def _bytes(place: Place) -> bytes:
    """The content of a small tensor.

    Raises:
        ValueError: the file ends before it does.
    """
    size = size_of(place.kind, place.shape)
    if not 0 <= size <= place.path.stat().st_size:
        raise ValueError(size)
    with place.path.open("rb") as file:
        file.seek(place.start)
        content = file.read(size)
    if len(content) != size:
        raise ValueError(place.path.name)
    return content


def _patch(path: Path, start: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(content)


def _copy(folder: Path, target: Path, weights: Sequence[Path], without: str = "") -> tuple[str, ...]:
    """Copy a checkpoint; what may hold other weights of it, or is hidden, is left out and returned."""
    kept, left_out = {file.name for file in weights}, []
    for entry in sorted(folder.iterdir()):
        if entry.name == without:
            continue
        if entry.is_dir():
            if entry.name.startswith(".") or any(file.suffix in WEIGHTS for file in entry.rglob("*")):
                left_out.append(f"{entry.name}/")
            else:
                shutil.copytree(entry, target / entry.name)
        elif not entry.is_file():
            raise ModelError(f"'{entry}' is a link to nowhere or no regular file, which can't be copied: remove it")
        elif entry.name in kept or entry.suffix not in WEIGHTS:
            shutil.copyfile(entry, target / entry.name)
        else:
            left_out.append(entry.name)
    return tuple(left_out)


def _check_output(folder: Path, output: Path) -> None:
    """Raise ModelError unless a new folder can have that name: it is not there, nor in the checkpoint itself."""
    if output.suffix.lower() == ".gguf":
        raise ModelError(f"'{output}' ends as a GGUF file, a checkpoint is written as a folder: name it otherwise")
    if output.exists() or output.is_symlink():
        raise ModelError(f"'{output}' already exists: name a folder that is not there yet")
    if output.resolve().is_relative_to(folder.resolve()):
        raise ModelError(f"'{output}' is in the checkpoint's own folder: name another place")
    if not output.parent.is_dir():
        raise ModelError(f"can't write '{output}' ({os.strerror(errno.ENOENT)}): name another folder")


@contextmanager
def _written(folder: Path, output: Path) -> Iterator[Path]:
    """A folder that becomes `output`, whole or not at all.

    Raises:
        ModelError: as `_check_output`, or a file can't be read or written.
    """
    _check_output(folder, output)
    try:
        with atomic_folder(output) as partial:
            yield partial
    except FileExistsError as error:
        raise ModelError(f"'{output}' already exists: name a folder that is not there yet") from error
    except shutil.Error as error:  # of a folder inside, with the place and the reason of each file
        place, _, why = error.args[0][0]
        raise ModelError(f"can't copy '{place}' ({reason(Exception(why))}): mend or remove it") from error
    except OSError as error:
        raise ModelError(f"can't write '{output}' ({why_not_written(error)}): name another folder") from error
