"""What a person with a GPU starts: whether steering is right on it, and what it costs. `make gpu-check`, or

    python -m benchmarks.gpu_check [--device cuda] [--only verify families decode vllm] [--small] [--seconds 360]
                                   [--json FILE]

It takes six minutes at most: what does not fit any more is named as not run. Nothing is downloaded; `verify` and `vllm`
need the default model (`steermoe models pull`). With `--device cpu --small` it runs anywhere, which tests this script.

verify: the checks of `steermoe verify`. families: a tiny random model of every family, its steered logits on the device
against those on the CPU. decode: steps of random models of the shape of OLMoE-1B-7B and Qwen3-30B-A3B, made on the
device; by the engine that `generate` and `batch` use, and as CUDA graphs, where one graph is replayed for other plans.
vllm: a steered text through vLLM, if it is installed.

Shapes: B rows, R routers.
"""

import argparse
import copy
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from steermoe.engines.decoding import complete
from steermoe.engines.hf.compiled.step import DecodeStep
from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.memory import free_memory
from steermoe.engines.request import Request, Sampling
from steermoe.errors import SteerMoEError, reason
from steermoe.evaluation.verification import Outcome, Verification, random_vector
from steermoe.models.loading import LoadedModel, load
from steermoe.routing.families import list_families
from steermoe.routing.routers import shape_of
from steermoe.steering.banks import banks_for
from steermoe.steering.editing_graph import Edits
from steermoe.steering.handle import attach
from steermoe.steering.plans import SteeringPlan
from tests.support import tiny_models
from tests.support.steering_models import byte_tokenizer

PARTS = ("verify", "families", "decode", "vllm")
SECONDS = 360
LOGITS_ERROR = 1e-3
"""Between devices, in float32, relative to the norm of the logits."""
ROWS, FEW_ROWS = (1, 16, 64), (1, 3)
COLUMNS, STEPS, FEW_STEPS, ROUNDS = 256, 32, 4, 3
"""Columns of the cache; decode steps of a round; rounds, of which the median counts."""
STEERED_TO_UNSTEERED = 0.5
"""Speed below which something is wrong. What to expect is not known yet: in eager mode Python decides, and in a graph
the edit computes every formula and all lists, whatever a row's plan is."""
SPARE = 1.2
"""Memory that a model may need, times that of its weights."""

OLMOE: dict[str, Any] = {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "pad_token_id": 0,
}
QWEN3: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "pad_token_id": 0,
}
SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "eos_token_id": 2,
}
SHAPES: dict[str, Callable[[dict[str, Any]], tuple[Any, Any]]] = {
    "OLMoE-1B-7B": lambda changes: (OlmoeForCausalLM, OlmoeConfig(**OLMOE | changes)),
    "Qwen3-30B-A3B": lambda changes: (Qwen3MoeForCausalLM, Qwen3MoeConfig(**QWEN3 | changes)),
}
"""Random models: the class and the configuration, with some changes."""


@dataclass(frozen=True)
class Line:
    """One line of the report.

    Attributes:
        part: one of PARTS.
        name: what was checked or measured.
        passed: None if it could not run here.
        found: what was measured, or why it could not run.
        expected: "" where there is no bound.
        seconds: how long it took.
    """

    part: str
    name: str
    passed: bool | None
    found: str
    expected: str
    seconds: float


@dataclass(frozen=True)
class Setting:
    """What the whole run has in common; `until` is the end, by `time.monotonic`."""

    device: torch.device
    small: bool
    until: float
    model: str | None

    @property
    def rounds(self) -> int:
        return 1 if self.small else ROUNDS


def line(part: str, name: str, check: Callable[[], Outcome], setting: Setting) -> Line:
    """Run one check; an error is a failure of that check alone."""
    started = time.monotonic()
    if started > setting.until:
        return Line(part, name, None, "no time left", "", 0.0)
    try:
        passed, found, expected = check()
    except Exception as error:  # a driver, a kernel or a library raises anything
        passed, found, expected = False, f"{type(error).__name__}: {reason(error)}"[:300], "no error"
    return Line(part, name, passed, found, expected, round(time.monotonic() - started, 2))


def lines(parts: Sequence[str], setting: Setting) -> Iterator[Line]:
    """The whole report, each line as soon as it is known."""
    run = {"verify": verify, "families": families, "decode": decode, "vllm": vllm}
    for part in parts:
        yield from run[part](setting)
        free(setting.device)


def free(device: torch.device) -> None:
    """Give the memory of models that are gone back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- verify ----


def verify(setting: Setting) -> Iterator[Line]:
    """The checks of `steermoe verify`."""

    def loaded(dtype: str) -> LoadedModel:
        return load(setting.model, dtype=dtype, device_map=str(setting.device))

    try:
        checks = Verification(loaded("float32"), loaded, lambda: loaded("auto")).run()
    except SteerMoEError as error:
        yield Line("verify", "steermoe verify", None if setting.model is None else False, reason(error), "", 0.0)
        return
    for check in checks:
        yield Line("verify", check.name, check.passed, check.found, check.expected, round(check.seconds, 2))
        if time.monotonic() > setting.until:
            yield Line("verify", "the rest", None, "no time left", "", 0.0)
            return


# ---- families ----


def families(setting: Setting) -> Iterator[Line]:
    """Every family's steered logits on the device against the same on the CPU."""
    names = [family.family for family in list_families() if family.steerable]
    for name in names[:: len(names) // 2] if setting.small else names:
        yield line("families", name, partial(on_both, name, setting.device), setting)


def on_both(family: str, device: torch.device) -> Outcome:
    """The largest difference between the devices, over logits with and without steering."""
    here = tiny_models.build(family)
    there = copy.deepcopy(here).to(device)
    inputs = tiny_models.tokens(here, rows=3)
    plain, steered = (both(here, there, inputs, plan) for plan in (None, plan_of(here)))
    off = max(difference for _, difference in (plain, steered))
    moved = float((steered[0] - plain[0]).norm() / plain[0].norm())
    found = f"logits {off:.1e} off, steering moves them by {moved:.1e}"
    return off <= LOGITS_ERROR < moved, found, f"{LOGITS_ERROR:.0e} at most, and more"


def both(here: Any, there: Any, inputs: dict[str, Tensor], plan: SteeringPlan | None) -> tuple[Tensor, float]:
    """The logits of the first model, and how far those of the second are from them."""
    found = []
    for model in (here, there):
        given = {name: ids.to(next(model.parameters()).device) for name, ids in inputs.items()}
        handle = None if plan is None else attach(model, plan)
        found.append(tiny_models.run(model, given).float().cpu())
        if handle is not None:
            handle.verify()
            handle.remove()
    return found[0], float((found[0] - found[1]).norm() / found[0].norm())


def plan_of(model: PreTrainedModel, seed: int = 0, **fields: Any) -> SteeringPlan:
    loaded = LoadedModel("random", model, byte_tokenizer())
    return SteeringPlan(random_vector(loaded, seed), 2.0, **{"positions": "all", **fields})


# ---- decode ----


def decode(setting: Setting) -> Iterator[Line]:
    """Tokens per second of random models, steered and unsteered."""
    for name, shape in SHAPES.items():
        yield from measured(name, *shape(SMALL if setting.small else {}), setting)
        free(setting.device)


def measured(name: str, kind: Any, config: Any, setting: Setting) -> Iterator[Line]:
    """The lines of one model, which is gone at the end."""
    needed, room = int(SPARE * bytes_of(kind, config)), free_memory(setting.device)
    if needed > room:
        yield Line("decode", name, None, f"needs {needed / 1e9:.0f} GB, {room / 1e9:.0f} GB are free", "", 0.0)
        return
    made: list[PreTrainedModel] = []
    yield line("decode", f"{name}, made", partial(make, made, kind, config, setting), setting)
    for model in made:
        for rows in FEW_ROWS if setting.small else ROWS:
            for way, measure in (("as generated", by_engine), ("CUDA graphs", by_graph)):
                yield line("decode", f"{name}, {rows} rows, {way}", partial(measure, model, rows, setting), setting)


def bytes_of(kind: Any, config: Any) -> int:
    with torch.device("meta"):
        return sum(2 * weight.numel() for weight in kind(config).parameters())


def make(made: list[PreTrainedModel], kind: Any, config: Any, setting: Setting) -> Outcome:
    """A model with random weights, made on the device."""
    dtype = torch.float32 if setting.device.type == "cpu" else torch.bfloat16
    with torch.device(setting.device):
        model = kind._from_config(config, dtype=dtype).eval()
    made.append(model)
    return True, f"{sum(weight.numel() for weight in model.parameters()) / 1e9:.1f} billion weights, {dtype}", ""


def by_engine(model: PreTrainedModel, rows: int, setting: Setting) -> Outcome:
    """What `generate` and `batch` do, with one plan per row, and without."""
    engine = HFEngine(LoadedModel("random", model, byte_tokenizer()), compiled=False)
    steps = FEW_STEPS if setting.small else STEPS
    sampling = Sampling(max_new_tokens=steps + 1, min_new_tokens=steps + 1, do_sample=False)
    plans = [plan_of(model, seed, positions="generated") for seed in range(min(rows, 8))]

    def seconds(is_steered: bool) -> float:
        requests = [
            Request(f"Once upon a time {row}", plans[row % len(plans)] if is_steered else None, sampling)
            for row in range(rows)
        ]
        ids = [engine.encode(request) for request in requests]
        decoder = engine.decoder(rows)
        synchronise(setting.device)
        started = time.perf_counter()
        complete(decoder, requests, ids)
        synchronise(setting.device)
        return time.perf_counter() - started

    return compared(seconds, rows * steps, setting)


def by_graph(model: PreTrainedModel, rows: int, setting: Setting) -> Outcome:
    """Decode steps that are captured once; without CUDA the same steps, not captured."""
    steps = FEW_STEPS if setting.small else STEPS
    step = DecodeStep(model)
    shape = shape_of(model, step.routers, sizes_only=True)
    plans = [plan_of(model, seed) for seed in range(4)]

    def edits(plans: Sequence[SteeringPlan], factor: float) -> list[Tensor]:
        numbers = [row % len(plans) for row in range(rows)]
        found = Edits.of(plans, banks_for(shape, plans), numbers, torch.full((rows,), factor))
        return [tensor.to(setting.device) for tensor in found.tensors()]

    with torch.inference_mode():
        inputs, given = inputs_of(model, rows, setting.device), edits(plans[:2], 1.0)
        with step.traceable("grouped_mm"):
            steered, logits = captured(lambda: step(*inputs, given)[0], setting.device)
            seen = []
            for others in (edits(plans[:2], 1.0), edits(plans[2:], 1.0), edits(plans[:2], 0.0)):
                for tensor, other in zip(given, others, strict=True):
                    tensor.copy_(other)
                steered()
                seen.append(logits().clone())
            own = float((seen[2] - step(*inputs, given)[0]).norm() / seen[2].norm())
            times = {True: [timed(steered, steps, setting.device) for _ in range(setting.rounds)]}
        implementation: Any = model.config
        before = implementation._experts_implementation
        model.set_experts_implementation("grouped_mm")
        try:
            plain, _ = captured(lambda: step.next_logits(*inputs), setting.device)
            times[False] = [timed(plain, steps, setting.device) for _ in range(setting.rounds)]
        finally:
            model.set_experts_implementation(before)
    differ = all(not torch.equal(one, other) for one, other in ((seen[0], seen[1]), (seen[0], seen[2])))
    passed, found, expected = compared(lambda is_steered: statistics.median(times[is_steered]), rows * steps, setting)
    replayed = "" if differ else "; other plans changed NOTHING"
    return passed and differ and own < LOGITS_ERROR, f"{found}{replayed}; replayed {own:.0e} off", expected


def inputs_of(model: Any, rows: int, device: torch.device) -> tuple[Any, ...]:
    """Those of `DecodeStep.next_logits`, with a cache of random keys and values that is full but for one column."""
    config = model.config.get_text_config()
    heads = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (rows, config.num_key_value_heads, COLUMNS, heads)
    states = [torch.randn(shape, dtype=model.dtype, device=device) for _ in range(2 * config.num_hidden_layers)]
    tokens = torch.randint(config.vocab_size, (rows, 1), device=device)
    last = torch.full((rows, 1), COLUMNS - 1, device=device)
    mask = torch.ones(rows, COLUMNS, dtype=torch.long, device=device)
    return tokens, last, mask, torch.tensor([COLUMNS - 1], device=device), states


def captured(step: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], Any], Callable[[], Tensor]]:
    """What replays a step, and what returns the logits of the last time; without CUDA, the step itself."""
    if device.type != "cuda":
        last: list[Tensor] = [step()]

        def again() -> None:
            last[0] = step()

        return again, lambda: last[0]
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    return graph.replay, lambda: logits


def timed(run: Callable[[], Any], times: int, device: torch.device) -> float:
    """Seconds for this many calls."""
    synchronise(device)
    started = time.perf_counter()
    for _ in range(times):
        run()
    synchronise(device)
    return time.perf_counter() - started


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compared(seconds: Callable[[bool], float], tokens: int, setting: Setting) -> Outcome:
    """Steered and unsteered in turns, and the ratio of their speeds; on a small model that is no figure to hold."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for number in range(setting.rounds + 1):
        for is_steered in (False, True):
            needed = seconds(is_steered)
            if number:  # the first round warms up
                found[is_steered].append(needed)
    steered, plain = (statistics.median(found[is_steered]) for is_steered in (True, False))
    ratio = plain / steered
    text = f"{tokens / steered:,.0f} tokens/s steered, {tokens / plain:,.0f} unsteered, ratio {ratio:.2f}"
    if setting.small:
        return True, text, ""
    return ratio >= STEERED_TO_UNSTEERED, text, f"ratio {STEERED_TO_UNSTEERED} at least"


# ---- vLLM ----


def vllm(setting: Setting) -> Iterator[Line]:
    """A steered text through vLLM, in a process of its own."""
    if setting.device.type != "cuda" or importlib.util.find_spec("vllm") is None:
        yield Line("vllm", "a steered text", None, "vLLM for CUDA is not installed", "", 0.0)
        return

    def check() -> Outcome:
        command = [sys.executable, "-m", "steermoe", "generate", "--engine", "vllm", "--domain", "sport", "--json"]
        left = max(1.0, setting.until - time.monotonic())
        done = subprocess.run([*command, "--max-new-tokens", "32"], capture_output=True, text=True, timeout=left)
        if done.returncode:
            return False, (done.stderr.strip().splitlines() or ["no message"])[-1][:300], "exit code 0"
        report = json.loads(done.stdout.splitlines()[0])["report"]
        return report["tokens_steered"] > 0, f"{report['tokens_steered']} tokens steered", "more than 0"

    yield line("vllm", "a steered text", check, setting)


# ---- the report ----


@contextmanager
def exact() -> Iterator[None]:
    """Products of float32 in float32, without gradients."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def print_lines(found: Sequence[Line], console: Console) -> None:
    table = Table("part", "check", "", "found", "expected", "s")
    for one in found:
        mark = {True: "passed", False: "FAILED", None: "not run"}[one.passed]
        table.add_row(one.part, one.name, mark, one.found, one.expected, f"{one.seconds:.1f}")
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--small", action="store_true", help="tiny shapes and three families: tests this script")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--model", help="for verify; the default model if left out")
    parser.add_argument("--json", type=Path, help="write the report here too")
    given = parser.parse_args(arguments)
    try:
        device = torch.empty(0, device=given.device).device
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device '{given.device}' can't be used here: {reason(error)}; expected a device that torch has")
    setting = Setting(device, given.small, time.monotonic() + given.seconds, given.model)
    found: list[Line] = []
    with exact():
        for one in lines(given.only, setting):
            found.append(one)
            print(f"{one.part}: {one.name}: {one.found}", file=sys.stderr)
    print_lines(found, Console())
    failed = sum(one.passed is False for one in found)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    if given.json is not None:
        report = {"device": name, "torch": torch.__version__, "lines": [asdict(one) for one in found]}
        given.json.write_text(json.dumps({**report, "passed": not failed}, indent=1) + "\n")
    print(f"{name}: {sum(one.passed is True for one in found)} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
