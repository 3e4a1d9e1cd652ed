"""Speed of the transformers engine, each figure with its target: `make bench`, or
`python benchmarks/speed.py [--only decode steering paired bandwidth notebook start batch
unasked] [--rounds 5] [--json FILE]`.

On the default model, greedy, whole calls from text to text, including the prompt. The variants alternate in one process
(A B A B ...) after a warm-up round. It prints the median, smallest and largest of the rounds; ratios are taken within
each round. Decode steps that are not compiled yet are compiled first, which takes minutes, once.
"""

import argparse
import copy
import inspect
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from steermoe.engines.hf.compiled.artifacts import Kind, compile_step, facts_of
from steermoe.engines.hf.compiled.records import records_in
from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.request import Request, Sampling
from steermoe.files import cache_folder
from steermoe.formulas import FORMULAS, Formula
from steermoe.models.default.stories import openings
from steermoe.models.loading import LoadedModel, load
from steermoe.routing.routers import Router, find_routers
from steermoe.steering.handle import attach
from steermoe.steering.plans import SteeringPlan, plan_for
from steermoe.vectors.library import load_vector
from steermoe.vectors.vector import SteeringVector

DOMAIN, OTHER_STRENGTH = "sport", 4.0
"""The vector, and its strength for formulas that it was not calibrated for."""
FASTER_THAN_GENERATE = {1: 1.6, 16: 1.5}
INT8_FASTER_THAN_GENERATE = 3.0
STEERED_TO_UNSTEERED = 0.98
SHARE_OF_BANDWIDTH = 0.5
UNASKED_TO_ASKED = 0.7
FIRST_SIGN = 120.0
"""Seconds within which a process in the background begins to compile: it loads the model first."""
FASTER_THAN_NOTEBOOK = 2.0
COMMANDS: dict[tuple[str, ...], float] = {
    ("--help",): 0.2,
    ("vectors", "list"): 0.4,
    ("generate", "--domain", DOMAIN, "--max-new-tokens", "2"): 6.0,
}
"""The most seconds that a whole process may take."""
SHAPES = ((49152, 576), (3072, 576))
"""The weights for measuring memory bandwidth: an output layer's and a feed-forward layer's."""
MOST_CACHED = 80
"""Tokens after which steps in turns begin anew."""
WORKING_SET, PASSES = 220 * 2**20, 5
"""Bytes of different weights in one pass, more than fit in caches; passes per round."""
STORIES, SINGLE = 64, 16
"""Stories in the batch, and how many of them to generate one by one."""

Work = Callable[[], float]
"""Does something and returns how much: tokens, bytes, runs."""


@dataclass(frozen=True)
class Figure:
    """One line of a table.

    Attributes:
        what: what is measured.
        rounds: the value of each round.
        unit: of the values.
        bar: the target for the median.
        is_ceiling: the bar is a maximum, not a minimum.
    """

    what: str
    rounds: tuple[float, ...]
    unit: str = ""
    bar: float | None = None
    is_ceiling: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def is_met(self) -> bool | None:
        if self.bar is None:
            return None
        return self.median <= self.bar if self.is_ceiling else self.median >= self.bar

    def cells(self) -> tuple[str, ...]:
        bar = "" if self.bar is None else f"{'<=' if self.is_ceiling else '>='} {self.bar:g}"
        met = {None: "", True: "yes", False: "no"}[self.is_met]
        spread = f"{_short(min(self.rounds))} - {_short(max(self.rounds))}"
        return self.what, f"{_short(self.median)} {self.unit}".strip(), spread, bar, met


@dataclass(frozen=True)
class Bench:
    """What all sections measure on.

    Attributes:
        rows: batch sizes.
        tokens: new tokens per row.
    """

    loaded: LoadedModel
    vector: SteeringVector
    dtype: str
    rows: Sequence[int]
    tokens: int
    rounds: int

    def engines(self) -> dict[str, HFEngine]:
        return {name: HFEngine(self.loaded, compiled=name == "compiled") for name in ("eager", "compiled")}

    def plan(self, formula: Formula, **fields: Any) -> SteeringPlan:
        """With the vector's own strength, if it has one for the formula."""
        strength = None if formula == self.vector.info.formula else OTHER_STRENGTH
        return plan_for(self.vector, strength, formula=formula, **fields)


def _short(number: float) -> str:
    return f"{number:.1f}" if number >= 10 else f"{number:.3f}"


def report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def alternate(ways: Mapping[str, Work], rounds: int) -> dict[str, tuple[float, ...]]:
    """Work per second of every variant, round by round, after a warm-up round."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        report(f"  round {turn} of {rounds}")
        for name, run in ways.items():
            started = time.perf_counter()
            work = run()
            if turn:
                rates[name].append(work / (time.perf_counter() - started))
    return {name: tuple(found) for name, found in rates.items()}


def ratio(what: str, above: Sequence[float], below: Sequence[float], bar: float | None = None) -> Figure:
    return Figure(what, tuple(a / b for a, b in zip(above, below, strict=True)), "", bar)


def ready_steps(loaded: LoadedModel, rows: Sequence[int]) -> None:
    """Compile the steps for these numbers of rows if they are missing."""
    kinds: list[Kind] = sorted({"one" if count == 1 else "many" for count in rows}, reverse=True)
    for kind in kinds:
        facts = facts_of(loaded.model, kind)
        if facts is None:
            report(f"compiling the step for {kind} of {loaded.name}: a minute or two, once")
            facts = compile_step(loaded.model, kind)
        if not facts.pays:
            report(f"the compiled step for {kind} is no faster ({facts.speedup}): eager steps run in its place")


# ---- ways to generate ----


def greedy(tokens: int) -> Sampling:
    return Sampling(do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)


def ours(engine: HFEngine, rows: int, tokens: int, plan: SteeringPlan | None = None) -> float:
    """New tokens."""
    done = engine.generate([Request(prompt, plan, greedy(tokens)) for prompt in openings("heldout", rows)])
    return sum(completion.new_tokens for completion in done)


def plain(loaded: LoadedModel, rows: int, tokens: int) -> float:
    """New tokens, by the model's own `generate`."""
    return float(plain_tokens(loaded, rows, tokens).numel())


def plain_tokens(loaded: LoadedModel, rows: int, tokens: int) -> Tensor:
    """What `generate` adds to the prompts, [rows, tokens]."""
    prompts = openings("heldout", rows)
    inputs = loaded.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    model: Any = loaded.model
    with torch.inference_mode():
        output = model.generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
        )
    new: Tensor = output[:, inputs["input_ids"].shape[1] :]
    assert new.shape == (rows, tokens), new.shape
    return new


@contextmanager
def notebook_routers(model: torch.nn.Module, vector: SteeringVector, strength: float) -> Iterator[None]:
    """Routers whose forward is replaced in Python, as notebooks do it."""
    with ExitStack() as undo:
        for router, experts in zip(find_routers(model), vector.experts, strict=True):
            undo.callback(delattr, router.module, "forward")
            router.module.forward = partial(notebook_forward, router, experts, strength)
        yield


def notebook_forward(router: Router, experts: Tensor, strength: float, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Equation (4) with the sign of the largest logit, then top-k and softmax as in Granite's router."""
    weight: Any = router.module.weight
    logits = F.linear(hidden, weight).float()
    logits = logits + logits.max(-1, keepdim=True).values * strength * experts
    top, index = logits.topk(router.top_k, dim=-1)
    return logits, torch.softmax(top, dim=-1).type_as(hidden), index


def notebook_tokens(loaded: LoadedModel, plan: SteeringPlan, tokens: int) -> Tensor:
    """What `generate` adds to one prompt with those routers, [1, tokens]."""
    assert plan.vector is not None
    with notebook_routers(loaded.model, plan.vector, plan.strength):
        return plain_tokens(loaded, 1, tokens)


def check_notebook(plan: SteeringPlan, tokens: int) -> None:
    """Check that those routers steer as we do, eager and compiled.

    Raises:
        SystemExit: in float32 the tokens differ.
    """
    loaded = load(dtype="float32")
    (wanted,) = notebook_tokens(loaded, plan, tokens).tolist()
    (unsteered,) = plain_tokens(loaded, 1, tokens).tolist()
    if wanted == unsteered:
        raise SystemExit("the notebook's routers steer nothing: the comparison would say nothing")
    for compiled in (False, True):
        (done,) = HFEngine(loaded, compiled).generate([Request(openings("heldout", 1)[0], plan, greedy(tokens))])
        if list(done.token_ids) != wanted:
            raise SystemExit(f"the notebook's routers give other tokens than {compiled=}: {wanted}, {done.token_ids}")


# ---- sections ----


def decode(bench: Bench) -> list[Figure]:
    """Compared with plain `generate`, unsteered."""
    figures = []
    int8 = int8_engine(bench.dtype) if 1 in bench.rows else None
    for rows in bench.rows:
        ways: dict[str, Work] = {"transformers' generate": partial(plain, bench.loaded, rows, bench.tokens)}
        ways |= {f"ours, {how}": partial(ours, it, rows, bench.tokens) for how, it in bench.engines().items()}
        if rows == 1 and int8 is not None:
            ways["ours, int8"] = partial(ours, int8, rows, bench.tokens)
        rates = alternate(ways, bench.rounds)
        figures += [Figure(f"{way}, batch {rows}", found, "tokens/s") for way, found in rates.items()]
        bars = {"ours, compiled": FASTER_THAN_GENERATE.get(rows), "ours, int8": INT8_FASTER_THAN_GENERATE}
        (_, base), *others = rates.items()
        figures += [ratio(f"{way} / generate, batch {rows}", found, base, bars.get(way)) for way, found in others]
    return figures


def int8_engine(dtype: str) -> HFEngine | None:
    """None if models can't be loaded in int8."""
    if "quantize" not in inspect.signature(load).parameters:
        return None
    options: dict[str, Any] = {"dtype": dtype, "quantize": "int8"}
    loaded = load(**options)
    ready_steps(loaded, [1])
    return HFEngine(loaded)


def steering(bench: Bench) -> list[Figure]:
    """Compared with the same without steering."""
    figures = []
    for rows in bench.rows:
        for how, engine in bench.engines().items():
            run = partial(ours, engine, rows, bench.tokens)
            ways: dict[str, Work] = {"unsteered": run}
            ways |= {formula: partial(run, bench.plan(formula)) for formula in FORMULAS}
            base, *others = alternate(ways, bench.rounds).values()
            figures += [
                ratio(f"{formula} / unsteered, {how}, batch {rows}", found, base, STEERED_TO_UNSTEERED)
                for formula, found in zip(FORMULAS, others, strict=True)
            ]
    return figures


def paired(bench: Bench) -> list[Figure]:
    """Steered and unsteered steps in turns, not compiled, in CPU time: steady on a busy machine, with --threads 1."""
    plain: Any = bench.loaded.model
    shared = {id(tensor): tensor for tensor in (*plain.parameters(), *plain.buffers())}
    steered, figures = copy.deepcopy(plain, shared), []
    for rows in bench.rows:
        handle = attach(steered, bench.plan(FORMULAS[0]))
        turns = [TurnOfSteps(plain, rows), TurnOfSteps(steered, rows, handle.verify)]
        ratios: dict[str, list[float]] = {formula: [] for formula in FORMULAS}
        for turn in range(bench.rounds + 1):
            for formula in FORMULAS:
                handle.set(bench.plan(formula))
                turns[1].seconds()  # the first one with a plan lays it out
                (unsteered, mine), (again, mine_again) = ([one.seconds() for one in turns] for _ in range(2))
                if turn:
                    ratios[formula].append((unsteered + again) / (mine + mine_again))
        handle.remove()
        figures += [
            Figure(f"{formula} / unsteered, steps in turns, batch {rows}", tuple(found), "", STEERED_TO_UNSTEERED)
            for formula, found in ratios.items()
        ]
    return figures


class TurnOfSteps:
    """Greedy steps of a model one by one, each with the CPU seconds that it took."""

    def __init__(self, model: Any, rows: int, check: Callable[[], None] = lambda: None) -> None:
        self._model, self._check = model, check
        self._prompt = torch.arange(500, 500 + 24 * rows).view(rows, 24)
        self._tokens = self._prompt
        self._cache: Any = None

    @torch.inference_mode()
    def seconds(self) -> float:
        if self._cache is None or self._cache.get_seq_length() > MOST_CACHED:
            self._tokens, self._cache = self._prompt, None
            self._step()
        started = time.thread_time()
        self._step()
        return time.thread_time() - started

    def _step(self) -> None:
        output = self._model(input_ids=self._tokens, past_key_values=self._cache, use_cache=True)
        self._check()
        self._tokens, self._cache = output.logits[:, -1:].argmax(-1), output.past_key_values


def bandwidth(bench: Bench) -> list[Figure]:
    """Compared with memory bandwidth: every active weight is read once per token."""
    weights = active_bytes(bench.loaded)
    ways = {name: partial(run, PASSES) for name, run in matrix_vector_ways(bench.loaded.model.dtype).items()}
    rates = alternate({**ways, "decode": partial(ours, bench.engines()["compiled"], 1, bench.tokens)}, bench.rounds)
    best = max(ways, key=lambda name: statistics.median(rates[name]))
    limit = tuple(rate / weights for rate in rates[best])
    return [
        Figure("weights that are active for a token", (weights / 2**20,), "MiB"),
        Figure(f"fastest product ({best})", tuple(rate / 1e9 for rate in rates[best]), "GB/s"),
        Figure("limit", limit, "tokens/s"),
        Figure("ours, compiled, batch 1", rates["decode"], "tokens/s"),
        ratio("ours / limit", rates["decode"], limit, SHARE_OF_BANDWIDTH),
    ]


def active_bytes(loaded: LoadedModel) -> float:
    """Bytes of the matrices that a token uses: top-k of the experts, and the output layer; embeddings are looked up."""
    model: Any = loaded.model
    routers = find_routers(model)
    share = routers[0].top_k / routers[0].num_experts
    looked_up, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    total = 0.0
    for weight in model.parameters():
        if weight.ndim == 3:
            total += share * weight.nbytes
        elif weight.ndim == 2 and (weight is output or weight is not looked_up):
            total += weight.nbytes
    return total


def matrix_vector_ways(dtype: torch.dtype) -> dict[str, Callable[[int], float]]:
    """torch's matrix-vector products; each reads a working set a given number of times and returns the bytes read."""
    products: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "mv": torch.mv,
        "linear": lambda matrix, vector: F.linear(vector[None], matrix),
    }
    return {
        f"{name}, {str(each).removeprefix('torch.')}, {rows} x {columns}, oneDNN {'on' if onednn else 'off'}": partial(
            read_weights, product, matrices, onednn
        )
        for each in dict.fromkeys((dtype, torch.float32))
        for rows, columns in SHAPES
        for matrices in [torch.ones(-(-WORKING_SET // (rows * columns * each.itemsize)), rows, columns, dtype=each)]
        for name, product in products.items()
        for onednn in (True, False)
    }


@torch.inference_mode()
def read_weights(product: Callable[[Tensor, Tensor], Tensor], matrices: Tensor, onednn: bool, passes: int) -> float:
    vector = torch.ones(matrices.shape[-1], dtype=matrices.dtype)
    with torch.backends.mkldnn.flags(enabled=onednn):
        for _ in range(passes):
            for matrix in matrices:
                product(matrix, vector)
    return float(passes * matrices.nbytes)


def notebook(bench: Bench) -> list[Figure]:
    """Compared with routers replaced in Python under plain `generate`, as the authors of the formulas steer."""
    plan = bench.plan("max_scaled", scale="paper", positions="all")
    check_notebook(plan, bench.tokens)
    ways: dict[str, Work] = {
        "replaced routers": lambda: float(notebook_tokens(bench.loaded, plan, bench.tokens).numel()),
        "ours, compiled": partial(ours, bench.engines()["compiled"], 1, bench.tokens, plan),
    }
    rates = alternate(ways, bench.rounds)
    base, compiled = rates.values()
    return [
        *(Figure(f"{way}, steered, batch 1", found, "tokens/s") for way, found in rates.items()),
        ratio("ours / replaced routers", compiled, base, FASTER_THAN_NOTEBOOK),
    ]


def start(bench: Bench) -> list[Figure]:
    """Whole processes."""
    ways: dict[str, Work] = {f"steermoe {' '.join(words)}": partial(run_command, words) for words in COMMANDS}
    rates = alternate(ways, bench.rounds)
    return [
        Figure(what, tuple(1 / rate for rate in found), "s", bar, is_ceiling=True)
        for (what, found), bar in zip(rates.items(), COMMANDS.values(), strict=True)
    ]


def run_command(words: Sequence[str]) -> float:
    script = Path(sys.executable).with_name("steermoe")
    alone = {**os.environ, "STEERMOE_COMPILE": "off"}  # nothing may go on beside the next process
    subprocess.run([script, *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=alone)
    return 1.0


def batch(bench: Bench) -> list[Figure]:
    """Mixed stories in one batch compared with single calls."""
    try:
        from batch import mixed_requests, rolled
    except ImportError as error:
        report(f"benchmarks/batch.py can't be imported ({error}); run it separately: python benchmarks/batch.py")
        return []
    engine = bench.engines()["compiled"]
    requests = mixed_requests(bench.loaded, STORIES, 120)
    ways: dict[str, Work] = {
        "single calls": lambda: sum(engine.generate([request])[0].new_tokens for request in requests[:SINGLE]),
        f"batch of {STORIES}": lambda: sum(done.new_tokens for done in rolled(engine, requests, STORIES)),
    }
    rates = alternate(ways, bench.rounds)
    single, together = rates.values()
    return [
        *(Figure(way, found, "tokens/s") for way, found in rates.items()),
        ratio("batch / single calls", together, single),
    ]


def unasked(bench: Bench) -> list[Figure]:
    """A command that knows nothing of compiling, after a first run, beside one whose steps were compiled on purpose."""
    words = ("generate", "--domain", DOMAIN, "--no-stream", "--max-new-tokens", str(bench.tokens))
    ready_steps(bench.loaded, [1])
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "models").symlink_to(cache_folder() / "models")
        own = {"STEERMOE_CACHE": folder, "STEERMOE_COMPILE": "on"}
        first = tokens_per_second(words, own)
        started = time.perf_counter()
        while any(record.state == "compiling" for record, _ in records_in(Path(folder, "compiled"))) or (
            time.perf_counter() - started < FIRST_SIGN and not records_in(Path(folder, "compiled"))
        ):
            time.sleep(1)
        minutes = (time.perf_counter() - started) / 60
        ways = {"unasked": own, "on purpose": {"STEERMOE_COMPILE": "off"}}
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(bench.rounds):
            report(f"  round {turn + 1} of {bench.rounds}")
            for name, variables in ways.items():
                rates[name].append(tokens_per_second(words, variables))
    return [
        Figure("first run", (first,), "tokens/s"),
        Figure("then the background takes", (minutes,), "minutes"),
        *(Figure(f"steps compiled {name}", tuple(found), "tokens/s") for name, found in rates.items()),
        ratio("unasked / on purpose", rates["unasked"], rates["on purpose"], UNASKED_TO_ASKED),
    ]


def tokens_per_second(words: Sequence[str], variables: Mapping[str, str]) -> float:
    """What a whole process says on stderr, of the time from its prompt to its last token."""
    script = Path(sys.executable).with_name("steermoe")
    done = subprocess.run([script, *words], check=True, capture_output=True, text=True, env={**os.environ, **variables})
    match = re.search(r"([0-9.,]+) tokens/s", done.stderr)
    assert match is not None, done.stderr
    return float(match[1].replace(",", ""))


SECTIONS: dict[str, Callable[[Bench], list[Figure]]] = {
    "decode": decode,
    "steering": steering,
    "paired": paired,
    "bandwidth": bandwidth,
    "notebook": notebook,
    "start": start,
    "batch": batch,
    "unasked": unasked,
}


# ---- the run ----


def forget_peak() -> None:
    """Reset the peak of memory, if the system can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> Figure:
    """Of this process since `forget_peak`; NaN without /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return Figure("peak memory", (float("nan"),), "MiB")
    kibibytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return Figure("peak memory", (kibibytes / 1024,), "MiB")


def show(title: str, figures: Sequence[Figure]) -> None:
    table = Table("measure", "median", "smallest - largest", "bar", "met", title=title)
    for figure in figures:
        table.add_row(*figure.cells())
    Console(width=130).print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), default=tuple(SECTIONS), metavar="SECTION")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 16), help="batch sizes of `decode` and `steering`")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per row")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path, help="write the values of all rounds to this file")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    loaded = load(dtype=args.dtype)
    needed = {*(args.rows if {"decode", "steering"} & set(args.only) else ())}
    needed |= {1} if {"bandwidth", "notebook"} & set(args.only) else set()
    needed |= {1, STORIES} if "batch" in args.only else set()
    ready_steps(loaded, sorted(needed))
    vector = load_vector(DOMAIN, loaded.model)
    bench = Bench(loaded, vector, args.dtype, args.rows, args.tokens, args.rounds)
    settings = f"{loaded.name}, {args.dtype}, {args.threads} threads, {args.tokens} new tokens, {args.rounds} rounds"
    print(settings)
    before, found = os.getloadavg(), {}
    for name in args.only:
        report(name)
        forget_peak()
        found[name] = [*SECTIONS[name](bench), peak_memory()]
        title, _, _ = (SECTIONS[name].__doc__ or "").partition("\n")
        show(f"{name}: {title}", found[name])
    print(f"load average before {before[0]:.1f}, after {os.getloadavg()[0]:.1f}")
    if args.json:
        sections = {
            name: [asdict(f) | {"median": f.median, "met": f.is_met} for f in figures]
            for name, figures in found.items()
        }
        figures = {"settings": settings, "load": [before, os.getloadavg()], **sections}
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
