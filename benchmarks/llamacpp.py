"""Speed of the llama.cpp engine with and without steering, and its agreement with transformers: `make bench-llamacpp`,
or `python benchmarks/llamacpp.py [--only speed agreement] [--server PATH] [--json FILE]`.

On the default model, batch 1. Speeds are of decoding alone, medians over rounds in which the variants take turns (A B A
B). The server is llama.cpp's own, unsteered, with the same quantisation; without --server PATH it is left out.
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


def speed_of(engine, plan: SteeringPlan | None) -> float:
    """Tokens per second of decoding."""
    seconds = []
    for tokens in (SHORT, LONG):
        sampling = Sampling(max_new_tokens=tokens, min_new_tokens=tokens, seed=1)
        (done,) = engine.generate([Request(PROMPT, plan, sampling)])
        seconds.append(done.seconds)
    return (LONG - SHORT) / (seconds[1] - seconds[0])


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

    def speed(self) -> float:
        """Like `speed_of`, by the server's own clock."""
        seconds = [self._seconds(tokens) for tokens in (SHORT, LONG)]
        return (LONG - SHORT) / (seconds[1] - seconds[0])

    def _seconds(self, tokens: int) -> float:
        wanted = {"prompt": PROMPT, "n_predict": tokens, "temperature": 0.7, "seed": 1, "ignore_eos": True}
        body = json.dumps({**wanted, "cache_prompt": False}).encode()
        request = urllib.request.Request(f"{self.address}/completion", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            timings = json.load(answer)["timings"]
        assert timings["predicted_n"] == tokens, timings
        return timings["predicted_ms"] / 1000


def measure_speed(files: dict[str, Path], plan, rounds: int, server: Path | None, skip_hf: bool) -> dict:
    """Tokens per second of every variant, round by round."""
    ways: dict[str, Callable[[], float]] = {}
    servers = []
    for name, path in files.items():
        bare = LlamaCppEngine(str(path), callback=False)
        ours = LlamaCppEngine(str(path))
        pieces = LlamaCppEngine(str(path), reach="pieces")
        ways[f"{name}, no callback"] = lambda engine=bare: speed_of(engine, None)
        ways[f"{name}, steered"] = lambda engine=ours: speed_of(engine, plan)
        ways[f"{name}, callback, unsteered"] = lambda engine=ours: speed_of(engine, None)
        ways[f"{name}, steered between pieces"] = lambda engine=pieces: speed_of(engine, plan)
        if server is not None:
            servers.append(Server(server, path, ours.threads))
            ways[f"{name}, llama.cpp's server"] = servers[-1].speed
    if not skip_hf:
        eager = HFEngine(load(dtype="bfloat16"))
        ways["transformers bfloat16"] = lambda: speed_of(eager, None)
        single = HFEngine(load(dtype="float32"))
        ways["transformers float32"] = lambda: speed_of(single, None)
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    try:
        for turn in range(rounds + 1):
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
    median = {way: statistics.median(values) for way, values in figures["speeds"].items()}
    for way, values in figures["speeds"].items():
        table.add_row(f"{way}, tokens/s", f"{median[way]:.1f} ({min(values):.1f}-{max(values):.1f})", "")
    ratios = {}
    for name in names:
        steered = median[f"{name}, steered"]
        ratios[f"{name}, steered / no callback"] = (steered / median[f"{name}, no callback"], 0.97)
        if f"{name}, llama.cpp's server" in median:
            ratios[f"{name}, steered / llama.cpp's server"] = (steered / median[f"{name}, llama.cpp's server"], 0.95)
        hf = max((median[way] for way in median if way.startswith("transformers")), default=None)
        if hf:
            ratios[f"{name}, steered / faster transformers"] = (steered / hf, 4.0)
    figures["ratios"] = {what: ratio for what, (ratio, _) in ratios.items()}
    for what, (ratio, wanted) in ratios.items():
        table.add_row(what, f"{ratio:.3f}", f">= {wanted:g}: {'met' if ratio >= wanted else 'missed'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "steermoe-bench-llamacpp")
    parser.add_argument("--only", nargs="+", choices=("speed", "agreement"), default=("speed", "agreement"))
    parser.add_argument("--quantizations", nargs="+", default=("bf16", "q8_0", "q4_1"))
    parser.add_argument("--rounds", type=int, default=7)
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
    figures: dict = {"threads": torch.get_num_threads(), "load before": os.getloadavg()}
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
        figures["speeds"] = measure_speed(timed, plan_for(vector), args.rounds, args.server, args.skip_hf)
        report_speed(figures, list(timed), table)
    figures["load after"] = os.getloadavg()
    Console(width=130).print(table)
    print(f"load average before {figures['load before'][0]:.1f}, after {figures['load after'][0]:.1f}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
