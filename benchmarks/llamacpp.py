"""Speed of the llama.cpp engine with and without steering, and its agreement with transformers: `make bench-llamacpp`,
or `python benchmarks/llamacpp.py [--only speed agreement] [--server PATH] [--threads N] [--json FILE]`.

On the default model, batch 1. Speeds are of decoding alone, medians over rounds in which the variants take turns (A B A
B); ratios are medians of each round's. The server is llama.cpp's own, unsteered, with the same quantisation; without
--server PATH it is left out. Speeds are also given by CPU time, of the server's process too: with `--threads 1`, where
no thread waits for another, other work on the machine hardly changes their ratio.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.llamacpp.engine import LlamaCppEngine
from steermoe.engines.request import Request, Sampling
from steermoe.models.default.pull import default_model_folder
from steermoe.models.default.stories import load_stories
from steermoe.models.gguf.export import export_gguf
from steermoe.models.loading import load
from steermoe.routing.routers import chosen_experts, find_routers
from steermoe.steering.handle import attach
from steermoe.steering.plans import SteeringPlan, plan_for
from steermoe.vectors.library import load_vector

PROMPT = "Once upon a time there was a brown dog named Milo who lived by the river."
SHORT, LONG = 16, 144
"""New tokens of two runs; their difference is decoding alone."""
AGREEMENT_TOKENS = 2000


Speed = tuple[float, float]
"""Tokens per second of decoding, by the clock and by CPU time."""


def speed_of(engine, plan: SteeringPlan | None) -> Speed:
    seconds = []
    for tokens in (SHORT, LONG):
        sampling = Sampling(max_new_tokens=tokens, min_new_tokens=tokens, seed=1)
        begun = time.process_time()
        (done,) = engine.generate([Request(PROMPT, plan, sampling)])
        seconds.append((done.seconds, time.process_time() - begun))
    return between(*seconds)


def between(short: Speed, long: Speed) -> Speed:
    """The speed from the seconds, by both clocks, of the short and of the long run."""
    return (LONG - SHORT) / (long[0] - short[0]), (LONG - SHORT) / (long[1] - short[1])


class Server:
    """llama.cpp's own server on a local port, and its own timing of decoding."""

    def __init__(self, binary: Path, model: Path, threads: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        command = [binary, "-m", model, "-t", threads, "-c", "512", "--parallel", "1", "--port", port, "--no-warmup"]
        self.process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.address}/health").close()
                return
            except OSError:
                time.sleep(0.2)
        raise SystemExit("the server does not answer")

    def speed(self) -> Speed:
        """Like `speed_of`, by the server's own clock."""
        return between(self._seconds(SHORT), self._seconds(LONG))

    def _cpu(self) -> float:
        """Seconds that all its threads have run."""
        threads = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9

    def _seconds(self, tokens: int) -> Speed:
        wanted = {"prompt": PROMPT, "n_predict": tokens, "temperature": 0.7, "seed": 1, "ignore_eos": True}
        body = json.dumps({**wanted, "cache_prompt": False}).encode()
        request = urllib.request.Request(f"{self.address}/completion", body, {"Content-Type": "application/json"})
        begun = self._cpu()
        with urllib.request.urlopen(request) as answer:
            timings = json.load(answer)["timings"]
        assert timings["predicted_n"] == tokens, timings
        return timings["predicted_ms"] / 1000, self._cpu() - begun


def measure_speed(files: dict[str, Path], plan, args: argparse.Namespace) -> dict[str, list[Speed]]:
    """The speed of every variant, round by round."""
    ways: dict[str, Callable[[], Speed]] = {}
    servers = []
    for name, path in files.items():
        bare = LlamaCppEngine(str(path), callback=False, threads=args.threads)
        ours = LlamaCppEngine(str(path), threads=args.threads)
        pieces = LlamaCppEngine(str(path), reach="pieces", threads=args.threads)
        ways[f"{name}, no callback"] = lambda engine=bare: speed_of(engine, None)
        ways[f"{name}, steered"] = lambda engine=ours: speed_of(engine, plan)
        ways[f"{name}, callback, unsteered"] = lambda engine=ours: speed_of(engine, None)
        ways[f"{name}, steered between pieces"] = lambda engine=pieces: speed_of(engine, plan)
        if args.server is not None:
            servers.append(Server(args.server, path, ours.threads))
            ways[f"{name}, llama.cpp's server"] = servers[-1].speed
    if not args.skip_hf:
        eager = HFEngine(load(dtype="bfloat16"))
        ways["transformers bfloat16"] = lambda: speed_of(eager, None)
        single = HFEngine(load(dtype="float32"))
        ways["transformers float32"] = lambda: speed_of(single, None)
    speeds: dict[str, list[Speed]] = {way: [] for way in ways}
    try:
        for turn in range(args.rounds + 1):
            for way, run in ways.items():
                found = run()
                if turn:  # the first round warms up
                    speeds[way].append(found)
    finally:
        for each in servers:
            each.process.terminate()
            each.process.wait()
    return speeds


def transformers_choices(loaded, ids: list[int], plan) -> torch.Tensor:
    """[T, L, N] bool."""
    routers = find_routers(loaded.model)
    seen: list[torch.Tensor] = []
    hooks = [
        router.module.register_forward_hook(
            lambda module, args, output, router=router: seen.append(chosen_experts(router, output).clone())
        )
        for router in routers
    ]
    handle = attach(loaded.model, plan) if plan is not None else None
    try:
        with torch.inference_mode():
            loaded.model(torch.tensor([ids]), use_cache=False)
    finally:
        if handle is not None:
            handle.remove()
        for hook in hooks:
            hook.remove()
    chosen = torch.zeros(len(ids), len(routers), routers[0].num_experts, dtype=torch.bool)
    for layer, chosen_Tk in enumerate(seen):
        chosen[:, layer].scatter_(1, chosen_Tk.long(), True)
    return chosen


def measure_agreement(loaded, files: dict[str, Path], plan) -> dict:
    """Share of (token, layer) whose top-k sets are equal, unsteered and with every token steered."""
    texts, total = [], 0
    for story in load_stories("heldout"):
        ids = loaded.tokenizer(f"{story.opening} {story.rest}")["input_ids"][: AGREEMENT_TOKENS - total]
        texts.append(ids)
        total += len(ids)
        if total >= AGREEMENT_TOKENS:
            break
    shares: dict[str, dict[str, float]] = {}
    for kind, steering in (("unsteered", None), ("steered", plan)):
        wanted = [transformers_choices(loaded, ids, steering) for ids in texts]
        for name, path in files.items():
            engine = LlamaCppEngine(str(path))
            found = [torch.from_numpy(engine.chosen(ids, steering)) > 0 for ids in texts]
            same = torch.cat([(a == b).all(-1) for a, b in zip(found, wanted, strict=True)])
            shares.setdefault(name, {})[kind] = same.float().mean().item()
    return {"tokens": total, "shares": shares}


def report_speed(figures: dict, names: list[str], table: Table) -> None:
    speeds: dict[str, list[Speed]] = figures["speeds"]
    for way, values in speeds.items():
        clock, cpu = zip(*values, strict=True)
        shown = f"{statistics.median(clock):.1f}, {min(clock):.1f}-{max(clock):.1f} ({statistics.median(cpu):.1f})"
        table.add_row(f"{way}, tokens/s (by CPU time)", shown, "")
    hf = [way for way in speeds if way.startswith("transformers")]
    fastest = max(hf, key=lambda way: statistics.median(clock for clock, _ in speeds[way]), default="")
    for name in names:
        for other, wanted in ((f"{name}, no callback", 0.97), (f"{name}, llama.cpp's server", 0.97), (fastest, 4.0)):
            if other in speeds:
                compare(figures, f"{name}, steered", other, wanted, table)


def compare(figures: dict, one: str, other: str, wanted: float, table: Table) -> None:
    """Add the ratio of two variants: the median of each round's, by the clock and by CPU time."""
    pairs = list(zip(figures["speeds"][one], figures["speeds"][other], strict=True))
    clock, cpu = ([a[which] / b[which] for a, b in pairs] for which in (0, 1))
    ratio = statistics.median(clock)
    what = f"{one} / {other.removeprefix(one.split(',')[0] + ', ')}"
    figures.setdefault("ratios", {})[what] = {"clock": clock, "cpu": cpu}
    table.add_row(
        what,
        f"{ratio:.3f}, {min(clock):.2f}-{max(clock):.2f} ({statistics.median(cpu):.3f}, {min(cpu):.2f}-{max(cpu):.2f})",
        f">= {wanted:g}: {'met' if ratio >= wanted else 'missed'} by the clock",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "steermoe-bench-llamacpp")
    parser.add_argument("--only", nargs="+", choices=("speed", "agreement"), default=("speed", "agreement"))
    parser.add_argument("--quantizations", nargs="+", default=("bf16", "q8_0", "q4_1"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of llama.cpp")
    parser.add_argument("--server", type=Path, help="llama.cpp's llama-server of the same version")
    parser.add_argument("--skip-hf", action="store_true", help="leave transformers out of the speeds")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    work = args.work / default_model_folder().name
    work.mkdir(parents=True, exist_ok=True)
    loaded = load(dtype="float32")
    files = {}
    for name in dict.fromkeys([*args.quantizations, *(("f32",) if "agreement" in args.only else ())]):
        files[name] = work / f"{name}.gguf"
        if not files[name].is_file():
            export_gguf(loaded, files[name], name)
    vector = load_vector("sport", loaded.model)
    figures: dict = {"threads": args.threads, "load before": os.getloadavg()}
    table = Table("measure", "reached", "wanted")
    if "agreement" in args.only:
        figures["agreement"] = measure_agreement(loaded, files, plan_for(vector, positions="all"))
        for name, shares in figures["agreement"]["shares"].items():
            for kind, share in shares.items():
                wanted = f">= 0.99: {'met' if share >= 0.99 else 'missed'}" if name in ("f32", "bf16") else ""
                table.add_row(f"same top-k sets, {name}, {kind}", f"{share:.4f}", wanted)
    del loaded
    if "speed" in args.only:
        timed = {name: files[name] for name in args.quantizations}
        figures["speeds"] = measure_speed(timed, plan_for(vector), args)
        report_speed(figures, list(timed), table)
    figures["load after"] = os.getloadavg()
    Console(width=130).print(table)
    print(f"load average before {figures['load before'][0]:.1f}, after {figures['load after'][0]:.1f}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
