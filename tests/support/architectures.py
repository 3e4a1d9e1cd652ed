"""Steers a tiny file of each given architecture in llama.cpp, and prints a JSON line for each: what is wrong, if any.

A program, since llama.cpp ends the process where it can't go on. What it is compared with knows nothing of steermoe's
callback: one in Python that changes the logits in numpy, and leaves the choice to llama.cpp.
"""

import ctypes
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from numpy.typing import NDArray

from steermoe.engines.llamacpp import layout
from steermoe.engines.llamacpp.context import Context
from steermoe.engines.llamacpp.engine import LlamaCppEngine
from steermoe.engines.llamacpp.state import Reach
from steermoe.models.gguf.bake import NAMES
from steermoe.models.gguf.header import read_gguf
from steermoe.steering.plans import SteeringPlan
from steermoe.vectors.vector import SteeringVector
from tests.support import any_gguf
from tests.support.any_gguf import EXPERTS, TOP_K

TOKENS = [5, 17, 40, 200, 9, 88, 131, 3, 60, 77]
CELLS = 64
STRENGTH = 6.0
FORCED, BANNED = (2,), (0, 1, 3, 6)
REACHES: tuple[Reach, ...] = ("graph", "pieces")
NODES = ("ffn_moe_logits", "ffn_moe_logits_biased", "ffn_moe_probs", "ffn_moe_topk")

Numbers = NDArray[np.float32]


class Wrong(Exception):
    """What is wrong with an architecture."""


def expect(condition: Any, what: str) -> None:
    if not condition:
        raise Wrong(what)


class Watcher:
    """A callback in Python: sees the routers' nodes, and adds numbers to one of them.

    Args:
        added: what to add to the logits of each layer, [N].
        node: the node that it is added to.

    Attributes:
        seen: the numbers of each node by name, logits as they were before.
    """

    def __init__(self, added: dict[int, Numbers], node: str) -> None:
        self.seen: dict[str, Any] = {}
        places = layout.find_layout(llama_cpp.llama_cpp._lib)

        def on_node(tensor: int, asks: bool, data: Any) -> bool:
            name = ctypes.string_at(tensor + places.name).decode()
            kind, _, layer = name.rpartition("-")
            wanted = kind in NODES and layer.isdigit()
            if asks or not wanted:
                return wanted or not asks
            sizes = (ctypes.c_int64 * 2).from_address(tensor + places.ne)
            strides = (ctypes.c_int64 * 2).from_address(tensor + places.nb)
            address = ctypes.c_uint64.from_address(tensor + places.data).value
            number = np.int32 if kind == "ffn_moe_topk" else np.float32
            flat = np.ctypeslib.as_array((ctypes.c_uint8 * (sizes[1] * strides[1])).from_address(address))
            values = flat.view(number).reshape(sizes[1], strides[1] // 4)[:, : sizes[0]]
            self.seen[name] = values.copy()
            if kind == node and int(layer) in added:
                values += added[int(layer)]
            return True

        self.callback = llama_cpp.ggml_backend_sched_eval_callback(on_node)


def logits_of(engine: LlamaCppEngine, context: Context) -> Numbers:
    """[T, V], of all tokens."""
    count = len(TOKENS)
    context.clear()
    context.forward(TOKENS, range(count), [0] * count, None)
    engine.state.verify()
    return np.stack([context.logits(token).copy() for token in range(count)])


def watched(engine: LlamaCppEngine, watcher: Watcher) -> Numbers:
    """As `logits_of`, with another callback than steermoe's."""
    params = llama_cpp.llama_context_default_params

    def with_callback() -> Any:
        made = params()
        made.cb_eval = watcher.callback
        return made

    llama_cpp.llama_context_default_params = with_callback
    try:
        context = Context(engine._model, 1, CELLS, 1, None, "f32")
    finally:
        llama_cpp.llama_context_default_params = params
    logits = logits_of(engine, context)
    context.close()
    return logits


def vector_of(layers: tuple[int, ...]) -> SteeringVector:
    """Two experts of each layer with different weights, other ones than in the layer before."""
    weights = torch.zeros(len(layers), EXPERTS)
    for row in range(len(layers)):
        weights[row, (1 + row) % EXPERTS], weights[row, (5 + 2 * row) % EXPERTS] = 0.5, 0.3
    return SteeringVector("test", None, layers, weights=weights)


def check(architecture: str, path: Path) -> dict[str, Any] | None:
    """Steer a file of the architecture; None if it has no routers.

    Raises:
        Wrong, or an error of steermoe: it can't be steered, or not correctly.
    """
    made = any_gguf.make(path, architecture)
    if made is None:
        return None
    tensors = made[1]
    layers = tuple(layer for layer in range(made[0]["block_count"]) if any_gguf.ROUTER.format(layer) in tensors)
    file = read_gguf(path)
    expect(file.layers == layers, f"its routers are said to be in layers {list(file.layers)}, not {list(layers)}")
    unsteered = LlamaCppEngine(str(path), threads=1, cache="f32", callback=False)
    plain = logits_of(unsteered, unsteered.context(1, CELLS))
    expect(np.isfinite(plain).all(), "its logits are not finite")
    vector = vector_of(layers)
    added = dict(zip(layers, STRENGTH * vector.experts.numpy().astype(np.float32), strict=True))
    before, after = Watcher({}, ""), Watcher(added, file.node)
    expect(np.array_equal(watched(unsteered, before), plain), "watching it changes its logits")
    expected = watched(unsteered, after)
    named = [layer for layer in layers if f"{file.node}-{layer}" in before.seen]
    expect(tuple(named) == layers, f"it computes no node {file.node} in layers {sorted(set(layers) - set(named))}")
    check_first_choice(path, tensors, layers[0], file.node, before, after, added[layers[0]])
    for reach in REACHES:
        check_engine(path, reach, vector, plain, expected, (before, after))
    has = {kind: name.format(layers[0]) in tensors for kind, name in NAMES.items()}
    return {"layers": list(layers), "node": file.node, "biased": has["choice"], "logits_biased": has["logits"]}


def check_first_choice(
    path: Path, tensors: Any, layer: int, node: str, before: Watcher, after: Watcher, added: Numbers
) -> None:
    """The first router's choice after the edit, in numpy; later ones get other inputs."""
    logits, probabilities = before.seen[f"{node}-{layer}"], before.seen.get(f"ffn_moe_probs-{layer}")
    scorings = {
        "softmax": lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True),
        "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
        "square root of softplus": lambda z: np.sqrt(np.log1p(np.exp(z))),
        "none": lambda z: z,
    }
    found = [score for score in scorings.values() if np.allclose(score(logits), probabilities, atol=1e-5)]
    expect(found, "its scores are no known function of its logits")
    bias = f"blk.{layer}.exp_probs_b.bias"
    biases = tensor_of(path, bias) if bias in tensors else 0
    changed = 0
    for extra, watcher in ((0, before), (added, after)):
        order = np.argsort(-(found[0](logits + extra) + biases), axis=-1, kind="stable")[:, :TOP_K]
        chosen = watcher.seen[f"ffn_moe_topk-{layer}"]
        expect(np.array_equal(np.sort(order), np.sort(chosen)), "its choice is not that of the largest scores")
        changed += int((np.sort(before.seen[f"ffn_moe_topk-{layer}"]) != np.sort(chosen)).sum())
    expect(changed, "the edit changes no choice")


def check_trace(
    engine: LlamaCppEngine, context: Context, layers: tuple[int, ...], before: Watcher, after: Watcher
) -> None:
    """What was chosen, and in the first layer, which nothing steered comes before, what would have been."""
    state, count = engine.state, len(TOKENS)
    state.trace(range(count))
    state.steer([0] * count, [1.0] * count, range(count))
    logits_of(engine, context)
    chosen, unsteered = state.take_traced()
    state.trace([])
    for place, layer in enumerate(layers):
        expect(same(chosen[:, place], after.seen[f"ffn_moe_topk-{layer}"]), f"layer {layer} of its trace is wrong")
    first = before.seen[f"ffn_moe_topk-{layers[0]}"]
    expect(same(unsteered[:, 0], first), "its trace does not have what it would choose without steering")
    expect((np.sort(chosen) != np.sort(unsteered)).any((0, 2)).all(), "its trace lacks what was moved")


def same(one: NDArray[np.int32], other: NDArray[np.int32]) -> bool:
    """Whether the same experts are chosen, in any order."""
    return np.array_equal(np.sort(one), np.sort(other))


def tensor_of(path: Path, name: str) -> Numbers:
    from gguf import GGUFReader

    return next(tensor.data for tensor in GGUFReader(path).tensors if tensor.name == name)


def counts_of(watcher: Watcher, layers: tuple[int, ...]) -> NDArray[np.int64]:
    """[T, L, N], what a watched run chose."""
    chosen = [watcher.seen[f"ffn_moe_topk-{layer}"] for layer in layers]
    return np.stack([(one[..., None] == np.arange(EXPERTS)).sum(1) for one in chosen], 1)


def check_engine(
    path: Path, reach: Reach, vector: SteeringVector, plain: Numbers, expected: Numbers, seen: tuple[Watcher, Watcher]
) -> None:
    """Steered as by the watcher, forced and banned wherever asked, and otherwise the same to the bit."""
    engine = LlamaCppEngine(str(path), threads=1, reach=reach, cache="f32")
    layers, count, after = vector.layers, len(TOKENS), seen[1]
    context, state = engine.context(1, CELLS), engine.state
    plan = SteeringPlan(vector, STRENGTH, formula="additive", positions="all")
    state.install([plan])
    expect(np.array_equal(logits_of(engine, context), plain), f"its callback ({reach}) changes unsteered logits")
    state.steer([0] * count, [1.0] * count, range(count))
    steered = logits_of(engine, context)
    expect(state.verify() == len(layers), f"not every router was steered ({reach})")
    expect(np.abs(steered - plain).max() > 1e-3, f"steering changes nothing ({reach})")
    expect(np.allclose(steered, expected, atol=1e-4), f"steered logits are not those of the reference ({reach})")
    check_trace(engine, context, layers, *seen)
    state.steer([-1] * count, [0.0] * count, range(count))
    expect(np.array_equal(logits_of(engine, context), plain), f"after steering ({reach}) its logits are not as before")
    expect(np.array_equal(engine.chosen(TOKENS, plan), counts_of(after, layers)), f"its choice is not ({reach})")
    lists = [tuple((layer, n) for layer in layers for n in experts) for experts in (FORCED, BANNED)]
    for strength in (0.0, 1e4):
        listed = SteeringPlan(vector, strength, force=lists[0], ban=lists[1], positions="all")
        chosen = engine.chosen(TOKENS, listed)
        expect((chosen[:, :, FORCED] == 1).all(), f"a forced expert is left out ({reach}, strength {strength})")
        expect((chosen[:, :, BANNED] == 0).all(), f"a banned expert is chosen ({reach}, strength {strength})")
    engine.close()


def facts_of(architecture: str, folder: Path) -> dict[str, Any]:
    """What became of an architecture: its problem, or its routers; all empty if it has none."""
    any_gguf.start()
    try:
        return check(architecture, folder / f"{architecture}.gguf") or {}
    except any_gguf.CannotWrite as error:
        return {"problem": f"can't be written: {error}"}
    except Exception as error:  # whatever it is, the next architecture has its turn
        return {"problem": f"{type(error).__name__}: {error}".removeprefix("Wrong: ")}


def apart(architecture: str, folder: Path) -> dict[str, Any]:
    """As `facts_of`, in a process of its own."""
    result, errors = folder / "result.json", folder / "errors.txt"
    result.unlink(missing_ok=True)
    if (child := os.fork()) == 0:
        os.environ["GGML_NO_BACKTRACE"] = "1"  # ggml would call a debugger
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        result.write_text(json.dumps(facts_of(architecture, folder)))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if result.exists():
        return json.loads(result.read_text())
    said = re.findall(r"(GGML_\w+\(.*\) failed|fatal error)", errors.read_text())
    ending = said[0] if said else signal.Signals(os.WTERMSIG(status)).name
    return {"problem": f"llama.cpp ends the process: {ending}"}


def main(folder: Path, architectures: list[str]) -> None:
    if not architectures:
        any_gguf.start()
        architectures = any_gguf.names(folder)
    for architecture in architectures:
        line = json.dumps({"architecture": architecture} | apart(architecture, folder))
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
