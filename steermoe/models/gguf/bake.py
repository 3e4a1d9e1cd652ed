"""Bake steering into a GGUF file: c E is added to a bias of its routers, all other tensors keep their bytes.

A bias that the file has is changed in its place. One that it lacks is added, if llama.cpp reads it where it is there.
The record of what was done is the last setting of the file's header, so that taking it out gives the original file
back, to the byte.
"""

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from steermoe.errors import ModelError
from steermoe.files import atomic_path, why_not_written
from steermoe.models.baking.found import KEY
from steermoe.models.baking.record import (
    CHOICE_INSTEAD,
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
from steermoe.models.gguf.header import (
    MAGIC,
    MAX_TEXT,
    PLAIN,
    STRING,
    Layout,
    _Tensor,
    read_gguf,
    read_layout,
)
from steermoe.routing.biases import Kind

NAMES: dict[Kind, str] = {"logits": "blk.{}.ffn_gate_inp.bias", "choice": "blk.{}.exp_probs_b.bias"}
READS_CHOICE_BIAS = {
    *("afmoe", "bailingmoe2", "bailingmoe3", "deepseek2", "deepseek2-ocr", "deepseek32", "dots1", "ernie4_5-moe"),
    *("exaone-moe", "glm-dsa", "glm4moe", "hy_v4", "kimi-k3", "kimi-linear", "laguna", "lfm2moe", "mimo2"),
    *("minimax-m2", "minimax-m3", "mistral4", "nemotron_h_moe", "step35"),
}
"""Architectures whose routers choose by scores plus a bias, if the file has one. llama.cpp loads no file with a tensor
that it doesn't read, so a name that is wrong here is an error there, not an unsteered model."""
F32 = 0
BEGINNING = struct.Struct("<4sIQQ")
"""The magic bytes, the version, and the numbers of tensors and settings."""
COPIED_BYTES = 2**22


class GGUFFile:
    """A GGUF file of a Mixture-of-Experts model.

    Attributes:
        shape: what vectors must fit.

    Raises:
        ModelError: there is none, it is damaged, or is one of several parts. UnsupportedModel: it has no routers.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._model = read_gguf(self._path)
        self._metadata, self._tensors, self._layout = read_layout(self._path)
        self.shape = self._model.shape
        if isinstance(parts := self._metadata.get("split.count", 0), int) and parts > 1:
            raise ModelError(
                f"'{self._path}' is one of {parts} parts: make one file of them with `llama-gguf-split --merge` first"
            )

    def check(self, kind: Kind) -> None:
        """Raise ModelError if llama.cpp adds no such bias to what its routers compute."""
        architecture = self._model.architecture
        if self._has(kind) or (kind == "choice" and architecture in READS_CHOICE_BIAS):
            return
        what = f"'{self._path.name}' ({architecture})"
        if kind == "choice":
            if self._has("logits"):
                raise ModelError(f"{what} can be baked exactly, by formula (3): leave --choice-only out")
            raise ModelError(f"{what} can't be baked: llama.cpp adds no bias in its routers; {RUN_IT}")
        can_choose = self._has("choice") or architecture in READS_CHOICE_BIAS
        instead = f"; {CHOICE_INSTEAD}" if can_choose else ""
        raise ModelError(
            f"{what} can't be baked: llama.cpp adds no bias to its routers' logits, which formula (3) needs; "
            f"{RUN_IT}{instead}"
        )

    def check_output(self, output: Path) -> None:
        """Raise ModelError for a place where no GGUF file can be written."""
        _check_output(self._path, output)

    def _has(self, kind: Kind) -> bool:
        return all(NAMES[kind].format(router.layer) in self._tensors for router in self._model.routers)

    def bake(self, steering: Steering, pushes: Sequence[Tensor], output: Path) -> Baked:
        """Write the steered file; arguments as for `Checkpoint.bake`.

        Raises:
            ModelError: as `check`, or the file is baked already, or the new one is there already or can't be written.
        """
        self.check(steering.kind)
        if KEY in self._metadata:
            raise ModelError(
                f"'{self._path}' is baked already: take that out first, with `steermoe models bake --undo`"
            )
        changes, rounding = [], 0.0
        types = set()
        for router, push in zip(self._model.routers, pushes, strict=True):
            name = NAMES[steering.kind].format(router.layer)
            tensor = self._tensors.get(name)
            if tensor is not None and not bool(push.any()):
                continue
            if tensor is not None and tensor.shape != (router.num_experts,):
                raise ModelError(
                    f"'{name}' in '{self._path}' is of shape {list(tensor.shape)}, expected one per expert"
                )
            kind = "F32" if tensor is None else PLAIN.get(tensor.kind, f"number {tensor.kind}")
            before = bytes(4 * router.width) if tensor is None else _content(self._path, name, tensor)
            after, error = with_push(name, kind, before, push)
            rounding = max(rounding, error)
            types.add(kind)
            changes.append(Change(name, "", None if tensor is None else before, after))
        text = record_text(steering, changes, data_bytes=self._path.stat().st_size - self._layout.first)
        if len(text.encode()) > MAX_TEXT:
            raise ModelError(f"'{self._path}' has too many routers: their record of {len(text):,} bytes is too long")
        with _written(self._path, output) as partial:
            _write(self._path, partial, self._layout, text, changes, self._tensors)
        return Baked(output, len(changes), rounding, ", ".join(sorted(types)))


def undo(path: Path, output: Path) -> Baked:
    """Write a baked file as it was before, to a file that is not there yet.

    Raises:
        ModelError: nothing was baked into it, it was changed since, or the new one can't be written.
    """
    metadata, tensors, layout = read_layout(path)
    text = metadata.get(KEY)
    if not isinstance(text, str):
        raise ModelError(f"'{path}' has no setting {KEY}: nothing was baked into it, so nothing can be undone")
    record, kept = read_record(text, path)
    size = record.get("data_bytes")
    rewritten = ModelError(f"'{path}' was rewritten after it was baked: take the original file instead")
    if not isinstance(size, int) or not all(one.name in tensors for one in kept):
        raise rewritten
    with path.open("rb") as file:
        head = file.read(layout.tensors_end)
    added = [one for one in kept if one.before is None]
    setting = _setting(text)
    infos = b"".join(_info(one.name, tensors[one.name], layout.first) for one in added)
    settings_end, infos_end = layout.settings_end - len(setting), layout.tensors_end - len(infos)
    is_whole = 0 <= size <= path.stat().st_size - layout.first
    if not is_whole or head[settings_end : layout.settings_end] != setting or head[infos_end:] != infos:
        raise rewritten
    patches = [
        (tensors[one.name].start, _before(path, one, tensors[one.name])) for one in kept if one.before is not None
    ]
    counts = layout.tensors - len(added), layout.settings - 1
    middle = head[BEGINNING.size : settings_end] + head[layout.settings_end : infos_end]
    with _written(path, output) as partial, partial.open("wb") as target, path.open("rb") as source:
        first = _begin(target, head, counts, middle, layout.alignment)
        source.seek(layout.first)
        _copy(source, target, size)
        for start, before in patches:
            target.seek(first + start - layout.first)
            target.write(before)
    return Baked(output, len(kept))


def _check_output(path: Path, output: Path) -> None:
    """Raise ModelError if a new file can't have that name: it is there already, or has another ending."""
    if output.suffix.lower() != ".gguf":
        raise ModelError(f"'{output}' does not end in .gguf, as '{path.name}' does: name such a file")
    if output.exists() or output.is_symlink():
        raise ModelError(f"'{output}' already exists: name a file that is not there yet")


@contextmanager
def _written(path: Path, output: Path) -> Iterator[Path]:
    """A file that becomes `output`, whole or not at all.

    Raises:
        ModelError: as `_check_output`, or it can't be written.
    """
    try:
        _check_output(path, output)
        with atomic_path(output) as partial:
            yield partial
    except OSError as error:
        raise ModelError(f"can't write '{output}' ({why_not_written(error)}): name another file") from error


def _before(path: Path, kept: Kept, tensor: _Tensor) -> bytes:
    return check_unchanged(kept, _content(path, kept.name, tensor), path)


def _content(path: Path, name: str, tensor: _Tensor) -> bytes:
    """A bias's bytes."""
    if len(tensor.shape) != 1 or tensor.kind not in PLAIN:
        raise ModelError(f"'{name}' in '{path}' is stored in a form that is not known: it can't be baked")
    with path.open("rb") as file:
        file.seek(tensor.start)
        return file.read(size_of(PLAIN[tensor.kind], tensor.shape))


def _write(
    path: Path, target_path: Path, layout: Layout, text: str, changes: Sequence[Change], tensors: dict[str, _Tensor]
) -> None:
    """Write the file with its record, changed tensors in their places, and new ones after all others."""
    new = [change for change in changes if change.before is None]
    data = path.stat().st_size - layout.first
    place, infos = _aligned(data, layout.alignment), b""
    for change in new:
        infos += _info(change.name, _Tensor((len(change.after) // 4,), F32, place), 0)
        place = _aligned(place + len(change.after), layout.alignment)
    with path.open("rb") as source, target_path.open("wb") as target:
        head = source.read(layout.tensors_end)
        middle = head[BEGINNING.size : layout.settings_end] + _setting(text) + head[layout.settings_end :] + infos
        first = _begin(target, head, (layout.tensors + len(new), layout.settings + 1), middle, layout.alignment)
        source.seek(layout.first)
        _copy(source, target, data)
        for change in new:
            _pad(target, first, layout.alignment)
            target.write(change.after)
        if new:
            _pad(target, first, layout.alignment)
        for change in changes:
            if change.before is not None:
                target.seek(first + tensors[change.name].start - layout.first)
                target.write(change.after)


def _begin(target: BinaryIO, head: bytes, counts: tuple[int, int], middle: bytes, alignment: int) -> int:
    """Write a header like another one, with other numbers of tensors and settings; returns where tensors begin."""
    _, version, *_ = BEGINNING.unpack_from(head)
    target.write(BEGINNING.pack(MAGIC, version, *counts) + middle)
    _pad(target, 0, alignment)
    return target.tell()


def _pad(target: BinaryIO, first: int, alignment: int) -> None:
    target.write(bytes(_aligned(target.tell() - first, alignment) - (target.tell() - first)))


def _aligned(place: int, alignment: int) -> int:
    return -(-place // alignment) * alignment


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    """Copy `size` bytes.

    Raises:
        ModelError: there are fewer.
    """
    while size:
        part = source.read(min(size, COPIED_BYTES))
        if not part:
            raise ModelError("the file became shorter while it was read: try again")
        target.write(part)
        size -= len(part)


def _text(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _setting(text: str) -> bytes:
    """The record as it is in the header."""
    return _text(KEY) + struct.pack("<I", STRING) + _text(text)


def _info(name: str, tensor: _Tensor, first: int) -> bytes:
    """What the header says about a tensor."""
    sizes = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
    return _text(name) + sizes + struct.pack("<IQ", tensor.kind, tensor.start - first)
