"""Writes a tiny GGUF file for any architecture of llama.cpp: its loader says what is missing, until nothing is.

Nothing here knows which architectures there are: `names` finds them in llama.cpp's library. `HINTS` and `NEEDED` have
the few settings and tensors that its messages do not lead to.
"""

import re
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from gguf.constants import MODEL_ARCH_NAMES

from steermoe.engines.llamacpp.context import messages, on_message

LAYERS, EXPERTS, TOP_K, HIDDEN = 2, 8, 2, 32
MOST_TRIES = 1000

LETTERS = [*range(33, 127), *range(161, 173), *range(174, 324)]
WORDS = ["<pad>", "<s>", "</s>", *map(chr, LETTERS)]
VOCABULARY: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.tokens": WORDS,
    "tokenizer.ggml.token_type": [3] * 3 + [1] * len(LETTERS),
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.token_type_count": 1,
}
ALWAYS: dict[str, Any] = {
    "block_count": LAYERS,
    "context_length": 256,
    "embedding_length": HIDDEN,
    "feed_forward_length": 32,
    "attention.head_count": 2,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "expert_count": EXPERTS,
    "expert_used_count": TOP_K,
    "expert_feed_forward_length": 16,
    "expert_gating_func": 2,
}
IF_ASKED: dict[str, Any] = {
    "attention.layer_norm_epsilon": 1e-5,
    "attention.sliding_window": 64,
    "attention.q_lora_rank": 16,
    "attention.kv_lora_rank": 16,
    "rope.dimension_count": 16,
    "rope.dimension_sections": [4, 4, 0, 0],
    "leading_dense_block_count": 0,
    "expert_shared_feed_forward_length": 16,
    "vocab_size": len(WORDS),
}
"""Values of settings that an architecture asks for; 1 for all others."""

LATENT: dict[str, Any] = {
    "attention.key_length_mla": 16,
    "attention.value_length_mla": 16,
    "attention.key_length": 24,
    "attention.value_length": 16,
    "attention.kv_lora_rank": 16,
    "attention.q_lora_rank": 16,
    "attention.head_count_kv": 1,
    "rope.dimension_count": 8,
}
INDEXER: dict[str, Any] = {
    "attention.indexer.head_count": 2,
    "attention.indexer.key_length": 64,
    "attention.indexer.top_k": 64,
}
RECURRENT: dict[str, Any] = {
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 2 * HIDDEN,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 8,
    "ssm.group_count": 1,
    "attention.head_count_kv": [0, 2],
}
DELTA: dict[str, Any] = LATENT | {
    "attention.head_count_kv": [0, 1],
    "kda.head_dim": 16,
    "kda.gate_lower_bound": -5.0,
    "ssm.conv_kernel": 4,
}
DELTA_NET: dict[str, Any] = {
    "block_count": 4,
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 64,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 4,
    "ssm.group_count": 2,
}
TWO_KINDS: dict[str, Any] = {"block_count": 4}
"""Where only every fourth layer has full attention."""
HINTS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            *("exaone-moe", "gpt-oss", "laguna", "llama4", "mimo2"),
            *("smallthinker", "step35"),
        ),
        TWO_KINDS,
    ),
    "afmoe": TWO_KINDS | {"attention.sliding_window": 64},
    "bailingmoe3": DELTA,
    "deepseek2": LATENT,
    "deepseek32": LATENT | INDEXER,
    "deepseek4": INDEXER
    | {
        "expert_gating_func": 4,
        "attention.compress_ratios": [0, 4],
        "hash_layer_count": 0,
        "hyper_connection.count": 4,
    },
    "dots3note": LATENT
    | INDEXER
    | {
        "attention.kv_lora_rank_swa": 16,
        "attention.key_length_mla_swa": 16,
        "attention.value_length_mla_swa": 16,
        "attention.key_length_swa": 24,
        "attention.value_length_swa": 16,
        "rope.dimension_count_swa": 8,
        "block_count": 4,
        "attention.sliding_window_pattern": [True, True, True, False],
    },
    "gemma4": {
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.key_length_swa": 16,
        "attention.value_length_swa": 16,
        "attention.sliding_window_pattern": [True, False],
        "embedding_length_per_layer_input": 0,
        "rope.dimension_count_swa": 16,
    },
    "glm-dsa": LATENT | INDEXER,
    "glm5-next": DELTA
    | INDEXER
    | {"rope.dimension_count": 0, "attention.indexer.kpool": 2, "hyper_connection.count": 4},
    "granitehybrid": RECURRENT,
    "hy_v4": LATENT | INDEXER | {"attention.indexer.types": [True, True], "hyper_connection.count": 2},
    "jamba": RECURRENT,
    "nemotron_h_moe": RECURRENT
    | {
        "block_count": 3,
        "attention.head_count_kv": [0, 2, 0],
        "feed_forward_length": [0, 0, 32],
        "expert_shared_feed_forward_length": 16,
    },
    "nomic-bert-moe": {"moe_every_n_layers": 2},
    "lfm2moe": {"attention.head_count_kv": [0, 2], "shortconv.l_cache": 3},
    "kimi-k3": DELTA,
    "kimi-linear": DELTA,
    "mistral4": LATENT,
    "minimax-m3": INDEXER,
    "minimax-01": TWO_KINDS | {"full_attention_interval": 4},
    "qwen3next": DELTA_NET,
    "qwen35moe": DELTA_NET,
    "qwen4exp": TWO_KINDS | {"hyper_connection.count": 4},
}

Shape = tuple[int, ...]


class CannotWrite(Exception):
    """llama.cpp refuses every file that was tried; the message is its last one."""


# ---- the format ----


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """A setting with its kind: bool 7, uint32 4, float32 6, string 8, and lists, whose whole numbers are int32 5."""
    if isinstance(value, list):
        kind = 7 if isinstance(value[0], bool) else {int: 5, float: 6, str: 8}[type(value[0])]
        return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(_value(item)[4:] for item in value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    kind, form = (7, "?") if isinstance(value, bool) else (6, "f") if isinstance(value, float) else (4, "i")
    return struct.pack(f"<I{form}", kind, value)


VOCABULARY_BYTES = b"".join(_text(name) + _value(value) for name, value in VOCABULARY.items())


def _beginning(tensors: int, settings: dict[str, Any], more: bytes, count: int = 0) -> bytes:
    """A file up to its settings: the given ones, and `count` more."""
    head = b"".join(_text(name) + _value(value) for name, value in settings.items())
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(settings) + count) + head + more


def write(
    path: Path, architecture: str, settings: dict[str, Any], tensors: dict[str, Shape], filled: bool = False
) -> None:
    """Write a file of float32 tensors, random if `filled`, else a hole in the file.

    Each tensor's shape has the fastest dimension first.
    """
    named = {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in settings.items()}
    infos, end = b"", 0
    for name, shape in tensors.items():
        infos += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, end)
        end += -(-4 * int(np.prod(shape)) // 32) * 32
    start = _beginning(len(tensors), named, VOCABULARY_BYTES, len(VOCABULARY)) + infos
    start += bytes(-len(start) % 32)
    generator = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(start)
        for name, shape in tensors.items() if filled else ():
            file.write(_random(generator, name, shape).tobytes())
            file.write(bytes(-file.tell() % 32))
        file.truncate(len(start) + end)


def _random(generator: np.random.Generator, name: str, shape: Shape) -> Any:
    noise = generator.standard_normal(int(np.prod(shape))).astype(np.float32)
    if name.endswith(".bias"):
        return np.float32(0.05) * noise
    if "norm" in name:
        return 1 + np.float32(0.1) * noise
    if "ffn_gate_inp" in name:
        return noise * np.float32(2 * shape[0] ** -0.5)
    return noise * np.float32(shape[0] ** -0.5)


# ---- what llama.cpp says about a file ----


def load(path: Path) -> str:
    """Load a file and free it: what llama.cpp says against it, "" if nothing."""
    messages.clear()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if model:
        llama_cpp.llama_model_free(model)
        return ""
    said = next((text for text in messages if "error loading" in text), "it gave no reason")
    return said.rpartition("error loading model: ")[2].removeprefix("error loading model hyperparameters: ")


def start() -> None:
    llama_cpp.llama_log_set(on_message, None)
    llama_cpp.llama_backend_init()


LITERAL = re.compile(rb"[a-z0-9_.-]{2,30}(?=\0)")


def names(folder: Path) -> list[str]:
    """The architectures that this llama.cpp knows, of all the texts in its library and the names of the gguf package.

    A linker keeps a text that ends another one only there, so what follows -, _ and . in a text is tried too.
    """
    library = Path(llama_cpp.__file__).parent / "lib" / "libllama.so"
    texts = {text.decode() for text in LITERAL.findall(library.read_bytes())}
    endings = {text[at.end() :] for text in texts for at in re.finditer("[-_.]", text)}
    candidates = {text for text in texts | endings | set(MODEL_ARCH_NAMES.values()) if re.match("[a-z].", text)}
    path = folder / "name.gguf"
    known = []
    for name in sorted(candidates):
        path.write_bytes(_beginning(0, {"general.architecture": name}, b""))
        if "unknown model architecture" not in load(path):
            known.append(name)
    return known


SHAPES: dict[str, Shape] = {"blk.N.attn_gate.weight": (HIDDEN, 2)}
"""What tensors turned out to be, by their names without numbers, to be tried first."""


def _kind(name: str) -> str:
    return re.sub(r"\.\d+\.", ".N.", name)


def complete(path: Path, architecture: str, tensors: dict[str, Shape]) -> tuple[dict[str, Any], dict[str, Shape]]:
    """The settings and tensors of a file that llama.cpp loads, the given tensors among them.

    Raises:
        CannotWrite: there is none.
    """
    settings, tensors = ALWAYS | HINTS.get(architecture, {}), dict(tensors)
    changed: set[Any] = set()
    for _ in range(MOST_TRIES):
        write(path, architecture, settings, tensors)
        said = load(path)
        if not said:
            return settings, tensors
        change = _next_change(architecture, said, settings, tensors)
        if change is None or str(change) in changed:
            raise CannotWrite(said)
        changed.add(str(change))
        kind, name, value = change
        (settings if kind == "setting" else tensors)[name] = value
        if kind == "shape":
            SHAPES[_kind(name)] = value
    raise CannotWrite(said)


def _next_change(
    architecture: str, said: str, settings: dict[str, Any], tensors: dict[str, Shape]
) -> tuple[str, str, Any] | None:
    """What a message asks for: a new tensor or setting, or another shape or kind of one."""
    if found := re.search(r"missing tensor '([^']+)'|tensor '([^']+)' not found", said):
        name = found[1] or found[2]
        return "tensor", name, SHAPES.get(_kind(name), (1,))
    if found := re.search(r"tensor '([^']+)' has wrong shape; expected ([\d, ]+), got", said):
        shape = [int(size) for size in found[2].split(",")]
        while len(shape) > 1 and shape[-1] == 1:
            shape.pop()
        return "shape", found[1], tuple(shape)
    if found := re.search(r"(array )?key not found in model: ([\w.-]+)", said):
        key = found[2].removeprefix(f"{architecture}.")
        value = IF_ASKED.get(key, 1)
        return "setting", key, [value] * settings["block_count"] if found[1] and not isinstance(value, list) else value
    if found := re.search(r"key ([\w.-]+) has wrong type \w+ but expected type (\w+)", said):
        key = found[1].removeprefix(f"{architecture}.")
        value = settings.get(key, 1)
        kinds = {"f32": float, "bool": bool, "u32": int, "arr": lambda value: [value] * settings["block_count"]}
        return None if isinstance(value, list) else ("setting", key, kinds.get(found[2], str)(value))
    return None


EXPERT_PARTS = ("ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight")
INDEXER_PARTS = ("k_norm.weight", "k_norm.bias", "proj.weight", "attn_k.weight", "attn_q_b.weight")
NEEDED: dict[str, tuple[str, ...]] = {
    "afmoe": (*EXPERT_PARTS, "attn_gate.weight", *(f"ffn_{part}_shexp.weight" for part in ("gate", "up", "down"))),
    "glm-dsa": (*EXPERT_PARTS, *(f"indexer.{part}" for part in INDEXER_PARTS)),
    "granitehybrid": (*EXPERT_PARTS, "ssm_conv1d.bias"),
    "hy_v3": EXPERT_PARTS,
    "nemotron_h_moe": ("ssm_conv1d.bias",),
    "mimo2": EXPERT_PARTS,
    "qwen35moe": (*EXPERT_PARTS, "attn_qkv.weight", "attn_gate.weight"),
    "qwen3next": (*EXPERT_PARTS, "attn_qkv.weight", "attn_gate.weight"),
    "step35": EXPERT_PARTS,
}
"""Of a layer: what the graph of an architecture can't do without, though the loader does not ask for it."""
ROUTER = "blk.{}.ffn_gate_inp.weight"
OPTIONAL = ("blk.{}.ffn_gate_inp.bias", "blk.{}.exp_probs_b.bias")
"""Of a router: llama.cpp does not ask for them, but takes them where its graph has them."""


def make(path: Path, architecture: str) -> tuple[dict[str, Any], dict[str, Shape]] | None:
    """Write a tiny random model of the architecture with as many routers as it takes; None if it takes none.

    Returns:
        its settings and tensors.

    Raises:
        CannotWrite: llama.cpp takes no file that was tried.
    """
    settings, tensors = complete(path, architecture, {})
    if not any("ffn_gate_inp." in name for name in tensors):  # some take a layer's router only if it is there
        routers = {ROUTER.format(layer): (HIDDEN, EXPERTS) for layer in range(settings["block_count"])}
        try:
            settings, tensors = complete(path, architecture, routers)
        except CannotWrite:
            return None
    for name in NEEDED.get(architecture, ()):
        for layer in range(settings["block_count"]):
            with suppress(CannotWrite):
                settings, tensors = complete(path, architecture, {f"blk.{layer}.{name}": (1,)} | tensors)
    for name in OPTIONAL:
        more = tensors | {
            name.format(layer): (EXPERTS,)
            for layer in range(settings["block_count"])
            if ROUTER.format(layer) in tensors and name.format(layer) not in tensors
        }
        write(path, architecture, settings, more)
        if not load(path):
            tensors = more
    write(path, architecture, settings, tensors, filled=True)
    return settings, tensors
