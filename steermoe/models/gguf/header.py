"""Describe a GGUF file from its header: architecture, routers, context length.

`gguf.GGUFReader` creates an object for every token of the vocabulary, which takes seconds; this skips them. Whatever a
header claims, reading it takes a bounded time and memory, and a file that is cut off anywhere is an error.
"""

import functools
import math
import mmap
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from steermoe.errors import ModelError, UnsupportedModel, reason, shown
from steermoe.routing.fingerprint import fingerprint, read_numbers
from steermoe.routing.shape import RouterShape, RoutingShape
from steermoe.vectors.vector import MAX_EXPERTS, MAX_LAYERS

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's kinds of values as struct formats."""
MAX_KEPT = 1024
"""Longer arrays, such as the vocabulary, are skipped."""
MAX_TEXT = 2**20
"""Longer texts are skipped, in bytes."""
MAX_KEYS, MAX_TENSORS, MAX_DIMENSIONS = 2**16, 2**18, 4
MAX_TOTAL_TEXTS, MAX_TOTAL_VALUES, MAX_TOTAL_BYTES = 2**22, 2**17, 2**24
"""Texts in skipped arrays, values in arrays that are kept, and bytes of texts that are kept, over the whole header. The
largest vocabularies have less than a tenth of it."""
DEFAULT_ALIGNMENT = 32
MAX_NUMBER = 2**63 - 1
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""Of an architecture or a model type."""

MODEL_TYPES = {
    "granitemoe": ("granitemoe", "granitemoeshared"),
    "llama": ("mixtral",),
    "qwen2moe": ("qwen2_moe",),
    "qwen3moe": ("qwen3_moe",),
    "deepseek2": ("deepseek_v3", "deepseek_v2"),
    "gpt-oss": ("gpt_oss",),
}
"""What transformers calls some of llama.cpp's architectures; the other names are equal apart from - and _."""

ROUTER = re.compile(r"blk\.([0-9]{1,9})\.ffn_gate_inp\.weight")
PLAIN = {0: "F32", 1: "F16", 30: "BF16"}
"""GGUF's types whose numbers are not quantised, by the names that safetensors has for them."""
LOGITS_ARE_PROBABILITIES = {"gpt-oss"}
"""Architectures where llama.cpp takes the top-k of the logits themselves and names them like the probabilities."""


@dataclass(frozen=True)
class GGUFModel:
    """A GGUF file of a Mixture-of-Experts model.

    Attributes:
        path, name: the file, and its name without the suffix.
        architecture: llama.cpp's name for it.
        model_types: what transformers calls it, the most likely name first.
        routers: in layer order.
        context_length: the longest context that it was trained on, in tokens.
        node: name of the graph node that top-k reads: `ffn_moe_logits`, with a bias `ffn_moe_logits_biased`, ...
        chooses_by_logits: whether the experts with the largest logits are chosen: no bias on scores, no groups.
        cache_numbers: numbers in the attention cache per token, all layers together, at most.
        file_type: GGUF's number for how most matrices are stored; None if the file doesn't say.
        known_as: the name inside the file, if there is one.
        fingerprint: of the routers' weights; "" if they are quantised.
    """

    path: Path
    name: str
    architecture: str
    model_types: tuple[str, ...]
    routers: tuple[RouterShape, ...]
    context_length: int
    node: str
    chooses_by_logits: bool
    cache_numbers: int = 0
    file_type: int | None = None
    known_as: tuple[str, ...] = ()
    fingerprint: str = ""

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(router.layer for router in self.routers)

    @property
    def model_type(self) -> str:
        return self.model_types[0]

    @property
    def shape(self) -> RoutingShape:
        """What vectors must fit; those built for the same model in transformers do."""
        types = (*self.model_types, self.architecture)
        return RoutingShape(self.name, types, self.routers, self.known_as, self.fingerprint)


def read_gguf(path: Path | str) -> GGUFModel:
    """Describe a GGUF file.

    Raises:
        ModelError: not a GGUF file, a damaged one, or one with settings that can't be. UnsupportedModel: it has no
            routers.
    """
    path = Path(path)
    metadata, tensors = _read(path)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    settings = _Settings(path, metadata)
    architecture = settings.architecture
    routers = _routers(settings, shapes)
    if not routers:
        raise UnsupportedModel(
            f"'{path}' ({architecture or 'no architecture'}) has no router to steer: it is not a Mixture-of-Experts "
            "model"
        )
    kinds = MODEL_TYPES.get(architecture, (architecture,))
    written, inside = settings.name("steermoe.model_type"), metadata.get("general.name")
    has_bias = f"blk.{routers[-1].layer}.ffn_gate_inp.bias" in shapes
    scores_biased = any(re.fullmatch(r"blk\.\d+\.exp_probs_b\.bias", name) for name in shapes)
    file_type = metadata.get("general.file_type")
    return GGUFModel(
        path=path,
        name=path.stem,
        architecture=architecture,
        model_types=tuple(dict.fromkeys([written, *kinds])) if written else kinds,
        routers=routers,
        context_length=settings.number("context_length", 0),
        node="ffn_moe_probs"
        if architecture in LOGITS_ARE_PROBABILITIES
        else "ffn_moe_logits_biased"
        if has_bias
        else "ffn_moe_logits",
        chooses_by_logits=not scores_biased and settings.number("expert_group_count", 0) <= 1,
        cache_numbers=_cache_numbers(settings),
        file_type=file_type if type(file_type) is int else None,
        known_as=(inside,) if isinstance(inside, str) and inside else (),
        fingerprint=_fingerprint(path, routers, tensors),
    )


def _fingerprint(path: Path, routers: Sequence[RouterShape], tensors: "dict[str, _Tensor]") -> str:
    """The fingerprint of the routers; "" if their weights are quantised."""
    gates = [tensors[f"blk.{router.layer}.ffn_gate_inp.weight"] for router in routers]
    if any(gate.kind not in PLAIN for gate in gates):
        return ""
    with path.open("rb") as file:
        return fingerprint(
            ((gate.shape[1], gate.shape[0]), read_numbers(file, PLAIN[gate.kind], math.prod(gate.shape), gate.start))
            for gate in gates
        )


def _routers(settings: "_Settings", shapes: dict[str, tuple[int, ...]]) -> tuple[RouterShape, ...]:
    """The routers that can be steered: neither those of layers that only draft, nor hash routers, without logits."""
    last = settings.number("block_count", MAX_LAYERS) - settings.number("nextn_predict_layers", 0)
    numbers = sorted(int(match[1]) for match in map(ROUTER.fullmatch, shapes) if match)
    layers = [n for n in numbers if n < last and f"blk.{n}.ffn_gate_tid2eid.weight" not in shapes]
    if layers and layers[-1] >= MAX_LAYERS:
        raise settings.wrong(f"router in layer {layers[-1]}", f"layers below {MAX_LAYERS}")
    top_k = settings.numbers("expert_used_count", 1)
    routers = []
    for layer in layers:
        shape = shapes[f"blk.{layer}.ffn_gate_inp.weight"]
        if len(shape) != 2 or not 1 <= shape[-1] <= MAX_EXPERTS:
            raise settings.wrong(
                f"router in layer {layer} has the shape {list(shape)}", f"hidden size x 1 to {MAX_EXPERTS} experts"
            )
        if isinstance(top_k, list) and layer >= len(top_k):
            raise settings.wrong(f"expert_used_count has {len(top_k)} numbers", f"one for each layer up to {layer}")
        chosen = top_k[layer] if isinstance(top_k, list) else top_k
        if not 1 <= chosen <= shape[-1]:
            raise settings.wrong(f"expert_used_count is {chosen}", f"1 to {shape[-1]}, which are all experts")
        routers.append(RouterShape(layer, shape[-1], shape[-1], chosen))
    return tuple(routers)


def _cache_numbers(settings: "_Settings") -> int:
    heads = settings.numbers("attention.head_count", 1)
    pairs = settings.numbers("attention.head_count_kv", heads)
    width = settings.number("embedding_length", 0) // max(1, max(heads) if isinstance(heads, list) else heads)
    keys, values = (settings.numbers(f"attention.{name}_length", width) for name in ("key", "value"))
    per_head = sum(max(each) if isinstance(each, list) else each for each in (keys, values))
    return (sum(pairs) if isinstance(pairs, list) else settings.number("block_count", 0) * pairs) * per_head


class _Settings:
    """The settings of a file's architecture, each checked when it is asked for."""

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self._path = path
        self._metadata = metadata
        self.architecture = self.name("general.architecture")

    def wrong(self, found: str, expected: str) -> ModelError:
        return ModelError(f"'{self._path}': its {found}, expected {expected}: the file is damaged, get it again")

    def name(self, key: str) -> str:
        """The name of an architecture; "" if there is none."""
        value = self._metadata.get(key, "")
        if not isinstance(value, str) or (value and not NAME.fullmatch(value)):
            raise self.wrong(f"{key} is {shown(value)}", "a name of letters, digits, ., _ and -")
        return value

    def number(self, name: str, default: int) -> int:
        """A whole number, 0 or more."""
        value = self._metadata.get(f"{self.architecture}.{name}", default)
        if not _is_number(value):
            raise self.wrong(f"{name} is {shown(value)}", "a whole number, 0 or more")
        return value

    def numbers(self, name: str, default: int | list[int]) -> int | list[int]:
        """A whole number, 0 or more, or one for each layer."""
        value = self._metadata.get(f"{self.architecture}.{name}", default)
        if not (_is_number(value) or (isinstance(value, list) and value and all(map(_is_number, value)))):
            raise self.wrong(f"{name} is {shown(value)}", "a whole number, 0 or more, or one for each layer")
        return value


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_NUMBER


def is_moe(path: Path | str) -> bool:
    """Whether a file is a readable GGUF file of a model with routers."""
    try:
        read_gguf(path)
    except ModelError:
        return False
    return True


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """A file's metadata without long arrays and texts (None), and the shape of each tensor, fastest dimension first.

    Raises:
        ModelError: not a GGUF file, or a damaged one: its header is cut off or claims too much, or its tensors are cut
            off.
    """
    metadata, tensors = _read(path)
    return metadata, {name: tensor.shape for name, tensor in tensors.items()}


def _read(path: Path) -> "tuple[dict[str, Any], dict[str, _Tensor]]":
    """As `read_header`, with all that it says about each tensor."""
    return read_layout(path)[:2]


def read_layout(path: Path) -> "tuple[dict[str, Any], dict[str, _Tensor], Layout]":
    """As `read_header`, with all that it says about each tensor, and where the header's own parts end."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ModelError(f"can't read '{path}': it is no regular file; give a .gguf file")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(data).read()
    except FileNotFoundError as error:
        raise ModelError(f"no GGUF file '{path}': check the path") from error
    except OSError as error:
        raise ModelError(f"can't read '{path}': {error.strerror or error}; give a .gguf file") from error
    except (struct.error, IndexError) as error:
        raise ModelError(f"'{path}' is not a GGUF file or is cut off within its header: get it again") from error
    except (ValueError, MemoryError, OverflowError) as error:
        raise ModelError(f"'{path}' is not a GGUF file or is cut off ({reason(error)}): get it again") from error


class Layout(NamedTuple):
    """The parts of a file: its settings, then what it says about its tensors, then the tensors.

    Attributes:
        tensors, settings: how many there are.
        settings_end, tensors_end: the first byte after what the header says about them.
        first: the first byte of the tensors. alignment: of which all their places are multiples, counted from there.
    """

    tensors: int
    settings: int
    settings_end: int
    tensors_end: int
    first: int
    alignment: int


class _Tensor(NamedTuple):
    """A tensor's shape, fastest dimension first, GGUF's number for its type, and its first byte in the file."""

    shape: tuple[int, ...]
    kind: int
    start: int


_LENGTH = struct.Struct("<Q")


class _Header:
    """Reads a header from start to end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0
        self._texts = self._values = self._bytes = 0
        """Skipped texts, values of lists, and bytes of texts so far."""

    def read(self) -> tuple[dict[str, Any], dict[str, _Tensor], Layout]:
        if self._data[:4] != MAGIC:
            raise ValueError(f"it begins with {self._data[:4]!r}, not with {MAGIC!r}")
        self._at = 4
        version = self._take("I")
        if version not in VERSIONS:
            raise ValueError(f"format version {version}, expected {' or '.join(map(str, VERSIONS))}")
        count, pairs = self._take("Q"), self._take("Q")
        if count > MAX_TENSORS or pairs > MAX_KEYS:
            raise ValueError(
                f"it claims {count} tensors and {pairs} settings, expected at most {MAX_TENSORS} and {MAX_KEYS}"
            )
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._name(metadata)
            metadata[key] = self._value(self._take("I"))
        settings_end = self._at
        tensors: dict[str, _Tensor] = {}
        for _ in range(count):
            name = self._name(tensors)
            dimensions = self._take("I")
            if dimensions > MAX_DIMENSIONS:
                raise ValueError(f"tensor {shown(name)} has {dimensions} dimensions, expected at most {MAX_DIMENSIONS}")
            shape = tuple(self._take("Q") for _ in range(dimensions))
            tensors[name] = _Tensor(shape, self._take("I"), self._take("Q"))
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        first = self._first_byte(alignment)
        length = max(
            (tensor.start + _stored_bytes(tensor.shape, tensor.kind) for tensor in tensors.values()), default=0
        )
        needed = first + length if length else self._at
        if needed > len(self._data):
            raise ValueError(f"it has {len(self._data)} bytes, its tensors need {needed}")
        placed = {name: tensor._replace(start=first + tensor.start) for name, tensor in tensors.items()}
        return metadata, placed, Layout(count, pairs, settings_end, self._at, first, alignment)

    def _first_byte(self, alignment: Any) -> int:
        """Where the tensors begin: at the next multiple of the alignment after the header."""
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"its general.alignment is {shown(alignment)}, expected a whole number over 0")
        return -(-self._at // alignment) * alignment

    def _take(self, kind: str) -> Any:
        size = struct.calcsize(f"<{kind}")
        value = struct.unpack_from(f"<{kind}", self._data, self._at)[0]
        self._at += size
        return value

    def _name(self, taken: dict[str, Any]) -> str:
        """The key of a setting or the name of a tensor, which must be new."""
        name = self._string()
        if not name or name in taken:
            raise ValueError(f"the name {shown(name)} is empty, too long or there twice")
        return name

    def _string(self) -> str | None:
        """A text; None if it is too long to be kept."""
        length = self._take("Q")
        start, self._at = self._at, self._at + length
        if self._at > len(self._data):
            raise ValueError(f"a text of {length} bytes goes past the end of the file")
        if length > MAX_TEXT:
            return None
        self._bytes += length
        if self._bytes > MAX_TOTAL_BYTES:
            raise ValueError(f"its texts have more than {MAX_TOTAL_BYTES} bytes")
        return self._data[start : self._at].decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        """A text, a number, a list of them, or None for what is skipped."""
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._take(_scalar(kind))
        inner, length = self._take("I"), self._take("Q")
        if length > len(self._data):
            raise ValueError(f"a list of {length} values goes past the end of the file")
        if inner == ARRAY:
            raise ValueError("it holds a list of lists, which no model needs")
        if length <= MAX_KEPT:
            self._values += length
            if self._values > MAX_TOTAL_VALUES:
                raise ValueError(f"its lists have more than {MAX_TOTAL_VALUES} values")
            return [self._value(inner) for _ in range(length)]
        if inner == STRING:
            self._skip_texts(length)
        else:
            self._at += length * struct.calcsize(f"<{_scalar(inner)}")
        return None

    def _skip_texts(self, count: int) -> None:
        self._texts += count
        if self._texts > MAX_TOTAL_TEXTS:
            raise ValueError(f"its lists have more than {MAX_TOTAL_TEXTS} texts")
        at, data, unpack = self._at, self._data, _LENGTH.unpack_from
        for _ in range(count):
            at += 8 + unpack(data, at)[0]
        self._at = at


def _scalar(kind: int) -> str:
    """The struct format of a kind of number."""
    if kind not in SCALARS:
        raise ValueError(f"a value has the unknown kind {kind}")
    return SCALARS[kind]


def _stored_bytes(shape: tuple[int, ...], kind: int) -> int:
    """What a tensor takes in the file; 0 for a kind that the gguf package doesn't know."""
    block, size = _block_sizes().get(kind, (1, 0))
    return math.prod(shape) // block * size


@functools.cache
def _block_sizes() -> dict[int, tuple[int, int]]:
    """Numbers and bytes in a block of each kind of tensor."""
    from gguf.constants import GGML_QUANT_SIZES

    return {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
