"""Describe a GGUF file from its header: architecture, routers, context length. Needs no libraries.

`gguf.GGUFReader` creates an object for every token of the vocabulary, which takes seconds; this skips them.
"""

import mmap
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steermoe.errors import ModelError, UnsupportedModel
from steermoe.routing.shape import RouterShape, RoutingShape

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's kinds of values as struct formats."""
MAX_KEPT = 1024
"""Longer arrays, such as the vocabulary, are skipped."""

MODEL_TYPES = {
    "granitemoe": ("granitemoe", "granitemoeshared"),
    "llama": ("mixtral",),
    "qwen2moe": ("qwen2_moe",),
    "qwen3moe": ("qwen3_moe",),
    "deepseek2": ("deepseek_v3", "deepseek_v2"),
    "gpt-oss": ("gpt_oss",),
}
"""What transformers calls some of llama.cpp's architectures; the other names are equal apart from - and _."""

ROUTER = re.compile(r"blk\.(\d+)\.ffn_gate_inp\.weight")
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

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(router.layer for router in self.routers)

    @property
    def model_type(self) -> str:
        return self.model_types[0]

    @property
    def shape(self) -> RoutingShape:
        """What vectors must fit; those built for the same model in transformers do."""
        return RoutingShape(self.name, (*self.model_types, self.architecture), self.routers, self.known_as)


def read_gguf(path: Path | str) -> GGUFModel:
    """Describe a GGUF file.

    Raises:
        ModelError: not a GGUF file, or a damaged one. UnsupportedModel: it has no routers.
    """
    path = Path(path)
    metadata, shapes = read_header(path)
    architecture = str(metadata.get("general.architecture", ""))

    def setting(name: str, default: Any = None) -> Any:
        return metadata.get(f"{architecture}.{name}", default)

    layers = sorted(int(match[1]) for name in shapes if (match := ROUTER.fullmatch(name)))
    last = int(setting("block_count", 1 << 31)) - int(setting("nextn_predict_layers", 0))
    layers = [
        layer for layer in layers if layer < last and f"blk.{layer}.ffn_gate_tid2eid.weight" not in shapes
    ]  # neither layers that only draft, nor hash routers, which have no logits
    if not layers:
        raise UnsupportedModel(
            f"'{path}' ({architecture or 'no architecture'}) has no router to steer: it is not a Mixture-of-Experts "
            "model"
        )
    top_k = setting("expert_used_count", 1)
    routers = tuple(
        RouterShape(layer, experts, experts, int(top_k[layer] if isinstance(top_k, list) else top_k))
        for layer, experts in ((layer, int(shapes[f"blk.{layer}.ffn_gate_inp.weight"][-1])) for layer in layers)
    )
    kinds = MODEL_TYPES.get(architecture, (architecture,))
    written, inside = metadata.get("steermoe.model_type"), metadata.get("general.name")
    has_bias = f"blk.{layers[-1]}.ffn_gate_inp.bias" in shapes
    scores_biased = any(re.fullmatch(r"blk\.\d+\.exp_probs_b\.bias", name) for name in shapes)
    return GGUFModel(
        path=path,
        name=path.stem,
        architecture=architecture,
        model_types=tuple(dict.fromkeys([written, *kinds])) if isinstance(written, str) else kinds,
        routers=routers,
        context_length=int(setting("context_length", 0)),
        node="ffn_moe_probs"
        if architecture in LOGITS_ARE_PROBABILITIES
        else "ffn_moe_logits_biased"
        if has_bias
        else "ffn_moe_logits",
        chooses_by_logits=not scores_biased and int(setting("expert_group_count", 0) or 0) <= 1,
        cache_numbers=_cache_numbers(setting),
        file_type=metadata.get("general.file_type"),
        known_as=(inside,) if isinstance(inside, str) and inside else (),
    )


def _cache_numbers(setting: Callable[..., Any]) -> int:
    blocks, heads = int(setting("block_count", 0)), setting("attention.head_count", 1)
    pairs = setting("attention.head_count_kv", heads)
    width = int(setting("embedding_length", 0)) // max(1, max(heads) if isinstance(heads, list) else int(heads))
    keys, values = setting("attention.key_length", width), setting("attention.value_length", width)
    return (sum(pairs) if isinstance(pairs, list) else blocks * int(pairs)) * (int(keys) + int(values))


def is_moe(path: Path | str) -> bool:
    """Whether a file is a readable GGUF file of a model with routers."""
    try:
        read_gguf(path)
    except ModelError:
        return False
    return True


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """A file's metadata without long arrays, and the shape of each tensor, fastest dimension first.

    Raises:
        ModelError: not a GGUF file, or a damaged one.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(data).read()
    except OSError as error:
        raise ModelError(f"can't read '{path}': {error.strerror or error}; give a .gguf file") from error
    except (struct.error, IndexError) as error:
        raise ModelError(f"'{path}' is not a GGUF file or is cut off within its header: get it again") from error
    except (ValueError, KeyError, UnicodeDecodeError, MemoryError, OverflowError) as error:
        raise ModelError(f"'{path}' is not a GGUF file or is cut off ({error}): get it again") from error


class _Header:
    """Reads a header from start to end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def read(self) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
        if self._data[:4] != MAGIC:
            raise ValueError(f"it begins with {self._data[:4]!r}, not with {MAGIC!r}")
        self._at = 4
        version = self._take("I")
        if version not in VERSIONS:
            raise ValueError(f"format version {version}, expected {' or '.join(map(str, VERSIONS))}")
        tensors, pairs = self._take("Q"), self._take("Q")
        metadata = {}
        for _ in range(pairs):
            key = self._string()
            metadata[key] = self._value(self._take("I"))
        shapes = {}
        for _ in range(tensors):
            name = self._string()
            shapes[name] = tuple(self._take("Q") for _ in range(self._take("I")))
            self._take("I"), self._take("Q")  # its type and its offset
        return metadata, shapes

    def _take(self, kind: str) -> Any:
        size = struct.calcsize(f"<{kind}")
        value = struct.unpack_from(f"<{kind}", self._data, self._at)[0]
        self._at += size
        return value

    def _string(self) -> str:
        length = self._take("Q")
        if self._at + length > len(self._data):
            raise ValueError(f"a text of {length} bytes goes past the end of the file")
        text = self._data[self._at : self._at + length].decode("utf-8", errors="replace")
        self._at += length
        return text

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._take(SCALARS[kind])
        inner, length = self._take("I"), self._take("Q")
        if length > len(self._data):
            raise ValueError(f"a list of {length} values goes past the end of the file")
        if length <= MAX_KEPT:
            return [self._value(inner) for _ in range(length)]
        if inner == STRING:
            for _ in range(length):
                self._at += 8 + struct.unpack_from("<Q", self._data, self._at)[0]
        elif inner == ARRAY:
            for _ in range(length):
                self._value(inner)
        else:
            self._at += length * struct.calcsize(f"<{SCALARS[inner]}")
        return None
