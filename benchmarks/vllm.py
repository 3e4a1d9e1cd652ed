"""What steering costs in vLLM, and what vLLM gains over transformers, in one alternating run.

    python benchmarks/vllm.py [--rounds 16] [--cases NAME ...] [--quiet] [--compile] [--json FILE]

The engine without the plugin (VLLM_PLUGINS="") and the engine with it run in separate processes; they take turns, so
that other load on the machine affects both. Each turn generates 64 stories with the default model, greedy, of equal
length. Ratios are of tokens per second, by wall time and by CPU time. With --quiet, waiting threads sleep: then other
load changes CPU time least, but vLLM takes nearly twice as long.

Steered texts use more experts than unsteered ones, which costs vLLM's kernel more, however they are chosen. That cost
is measured separately: the kernel is run again on the choices of each case. What the ratio by CPU time should be by
that is printed beside what it is: a step without the plugin, over one with steering's time and the kernel's added.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# without this file's folder, where `import vllm` would find this file
sys.path = [place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parent]

QUIET = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
TEXTS = 64
CASES = {
    "none steered": (0.0, None),
    "half steered": (0.5, None),
    "all steered": (1.0, None),
    "half steered at strength 0.000001": (0.5, 1e-6),
    "all steered at strength 0.000001": (1.0, 1e-6),
}
"""The share of steered texts, and their strength if not the vector's own. The last two cases generate the same texts as
without steering: they include all its work, but choose no other experts."""
DOMAINS = ("sport", "food", "space", "music", "law", "medicine", "software", "biology")


def prompts(count: int) -> list[str]:
    from steermoe.models.default.stories import load_stories

    openings = [story.opening for story in load_stories() if story.split == "heldout"]
    return [openings[i % len(openings)] for i in range(count)]


# ---- a process with vLLM that generates stories on request ----


def work(with_plugin: bool, compiled: bool, tokens: int) -> None:
    """Answers each line of stdin: the share to steer, the strength, and whether to measure what takes how long."""
    started = time.perf_counter()
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
    }
    os.environ["VLLM_PLUGINS"] = "steermoe" if with_plugin else ""
    from vllm import LLM, SamplingParams

    from steermoe.engines.vllm.launch import cache_bytes
    from steermoe.models.checkpoint import find_source

    model = LLM(
        find_source(None, "auto").folder,
        dtype="bfloat16",
        enforce_eager=not compiled,
        max_model_len=1024,
        max_num_seqs=TEXTS,
        kv_cache_memory_bytes=min(cache_bytes(), 2 << 30),
        enable_prefix_caching=False,
        use_tqdm_on_load=False,
    )
    texts = prompts(TEXTS)

    def params(domain: str | None, strength: float | None) -> Any:
        extra = None if domain is None else {"steering": {"domain": domain, "strength": strength}}
        return SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, extra_args=extra)

    def run(share: float, strength: float | None = None) -> dict[str, float]:
        steered = round(TEXTS * share)
        asked = [params(DOMAINS[i % len(DOMAINS)] if i < steered else None, strength) for i in range(TEXTS)]
        clock, cpu = time.perf_counter(), time.process_time()
        made = model.generate(texts, asked, use_tqdm=False)
        clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
        new = sum(len(one.outputs[0].token_ids) for one in made)
        return {"clock": new / clock, "cpu": new / cpu}

    if with_plugin:
        run(1.0)  # vectors are read once
    run(0.0)
    say({"start": time.perf_counter() - started})
    for line in sys.stdin:
        share, strength, again = json.loads(line)
        generate = functools.partial(run, share, strength)
        say(
            generate() if not again else {"own": own_milliseconds(generate)} | ({} if compiled else kernel_of(generate))
        )


def own_milliseconds(generate: Callable[[], Any]) -> float:
    """CPU time of steering's own code in a step of a real run; alone in a loop, all of it would stay in the caches."""
    from steermoe.engines.vllm.steps import Steps

    spent = {name: [] for name in ("begin", "edit", "end")}

    def timed(method: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
        def timed_method(*args: Any) -> Any:
            begun = time.thread_time()
            try:
                return method(*args)
            finally:
                seconds.append(time.thread_time() - begun)

        return timed_method

    methods = {name: getattr(Steps, name) for name in spent}
    for name, method in methods.items():
        setattr(Steps, name, timed(method, spent[name]))
    generate()
    for name, method in methods.items():
        setattr(Steps, name, method)
    return 1000 * sum(map(sum, spent.values())) / len(spent["begin"])


def kernel_of(generate: Callable[[], Any], rounds: int = 5) -> dict[str, float]:
    """CPU time of the experts' kernel on the choices of a run's decode steps, and the number of experts they use."""
    import torch
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    kernel, calls = cpu_moe.cpu_fused_moe, []

    def record(output: torch.Tensor, hidden: torch.Tensor, *rest: Any) -> None:
        if len(hidden) == TEXTS:
            calls.append((torch.empty_like(output), hidden.clone(), *rest))
        kernel(output, hidden, *rest)

    cpu_moe.cpu_fused_moe = record
    generate()
    cpu_moe.cpu_fused_moe = kernel
    seconds = []
    for _ in range(rounds):
        begun = time.process_time()
        for call in calls:
            kernel(*call)
        seconds.append(time.process_time() - begun)
    layers = len({call[2].data_ptr() for call in calls})
    visited = statistics.mean(len(call[7].unique()) for call in calls)
    return {"ms": 1000 * statistics.median(seconds) * layers / len(calls), "visited": visited}


def say(record: dict[str, float]) -> None:
    print("ANSWER " + json.dumps(record), flush=True)


class Worker:
    """Starts such a process and talks to it."""

    def __init__(self, *arguments: str, environment: dict[str, str]) -> None:
        command = [sys.executable, __file__, "--work", *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.start = self.answer()["start"]

    def answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        assert self.process.stderr is not None
        raise SystemExit(f"the worker ended:\n{self.process.stderr.read()[-3000:]}")

    def ask(self, share: float = 0.0, strength: float | None = None, again: bool = False) -> dict[str, float]:
        """Tokens per second by wall time and by CPU time; or the time of steering and of the kernel in a step."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([share, strength, again]) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


# ---- the comparison ----


def alternate(rounds: int, cases: list[str], options: list[str], quiet: bool) -> dict[str, Any]:
    """Tokens per second with and without the plugin, in turns, and what a step's CPU time is spent on."""
    environment = os.environ | (QUIET if quiet else {})
    without = Worker("--without-plugin", *options, environment=environment)
    plugin = Worker(*options, environment=environment)
    rates: dict[str, dict[str, list[dict[str, float]]]] = {case: {"with": [], "without": []} for case in cases}
    try:
        for number in range(rounds):
            for case in cases:
                asked = CASES[case]
                for which in ("with", "without") if number % 2 else ("without", "with"):
                    rates[case][which].append(plugin.ask(*asked) if which == "with" else without.ask())
                ours, theirs = (rates[case][which][-1] for which in ("with", "without"))
                ratios = ours["clock"] / theirs["clock"], ours["cpu"] / theirs["cpu"]
                print(f"round {number + 1}, {case}: {ratios[0]:.3f} ({ratios[1]:.3f})", file=sys.stderr)
        costs = {case: plugin.ask(*CASES[case], True) for case in dict.fromkeys(["none steered", *cases])}
    finally:
        without.close()
        plugin.close()
    found: dict[str, Any] = {"start": {"with": plugin.start, "without": without.start}, "cases": {}}
    for case, rate in rates.items():
        pairs = list(zip(rate["with"], rate["without"], strict=True))
        ratios = [a["clock"] / b["clock"] for a, b in pairs]
        found["cases"][case] = {
            **{which: statistics.median(one["clock"] for one in rate[which]) for which in ("with", "without")},
            "ratio": statistics.median(ratios),
            "ratios": [round(ratio, 3) for ratio in ratios],
            "cpu_ratio": statistics.median(a["cpu"] / b["cpu"] for a, b in pairs),
            "costs": costs[case],
        }
        if "ms" in costs[case]:
            step = 1000 * TEXTS / statistics.median(one["cpu"] for one in rate["without"])
            added = costs[case]["own"] + costs[case]["ms"] - costs["none steered"]["ms"]
            found["cases"][case]["expected"] = step / (step + added)
    return found


def transformers_rate(tokens: int) -> float:
    """Tokens per second of the hf engine, all steered, as `steermoe batch` runs it: rows come and go."""
    from steermoe.engines.hf.engine import HFEngine
    from steermoe.engines.request import Request, Sampling
    from steermoe.models.loading import load
    from steermoe.steering.resolver import PlanResolver
    from steermoe.steering.spec import SteeringSpec

    engine = HFEngine(load(dtype="bfloat16"))
    resolver = PlanResolver(engine.shape)
    plans = [resolver.plan(SteeringSpec(domain)) for domain in DOMAINS]
    sampling = Sampling(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    asked = [Request(text, plans[i % len(plans)], sampling) for i, text in enumerate(prompts(TEXTS))]
    decoder = engine.decoder(len(asked))
    begun, made = time.perf_counter(), 0
    decoder.start(asked, [engine.encode(request) for request in asked])
    while len(decoder):
        made += sum(completion.new_tokens for completion in decoder.step())
    return made / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--quiet", action="store_true", help="let waiting threads sleep")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the model")
    parser.add_argument(
        "--no-hf", action="store_true", help="leave transformers out, which is compared with `all steered`"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--without-plugin", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(not args.without_plugin, args.compile, args.tokens)
        return
    options = ["--tokens", str(args.tokens), *(["--compile"] if args.compile else [])]
    found = alternate(args.rounds, args.cases, options, args.quiet)
    start = found["start"]
    print(f"start to the first texts: {start['with']:.1f} s, without the plugin {start['without']:.1f} s")
    print(f"{TEXTS} texts; medians of {args.rounds}; tokens/s, their ratio by wall time (by CPU time)")
    for case, row in found["cases"].items():
        print(
            f"{case}: {row['with']:.0f} with steermoe, {row['without']:.0f} without; "
            f"{row['ratio']:.3f} ({row['cpu_ratio']:.3f}), each {row['ratios']}"
        )
        print(f"    of a step, steering's own code {row['costs']['own']:.2f} ms", end="")
        if not args.compile:
            experts = row["costs"]["visited"]
            print(f"; the kernel with {experts:.1f} experts per layer {row['costs']['ms']:.2f} ms", end="")
            print(f": by that the ratio by CPU time is {row['expected']:.3f}", end="")
        print()
    if not args.no_hf and "all steered" in found["cases"]:
        found["hf"] = transformers_rate(args.tokens)
        gain = found["cases"]["all steered"]["with"] / found["hf"]
        print(f"hf engine, all steered: {found['hf']:.0f} tokens/s; vLLM is {gain:.2f} times as fast")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
