"""How much faster a batch of mixed stories is than the same stories from single calls of `generate`.

    python benchmarks/batch.py [--stories 64] [--single 64] [--tokens 120] [--json FILE]
    python benchmarks/batch.py --faults [--rows 64 150] [--tokens 120] [--dtype float32]

Stories of all domains and of none, each sampled with its own seed. The two ways alternate; each is measured in wall
time and CPU time. It also counts the texts that are the same both ways: docs/batch.md says why not all are.

`--faults` shows what page faults cost while that number of rows is decoded, in processes that alternate: with the
limits of the C library that steermoe sets, and with the library's own.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import torch

from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.request import Completion, Request, Sampling
from steermoe.models import loading
from steermoe.models.default import spec
from steermoe.models.default.stories import openings
from steermoe.steering.plans import plan_for
from steermoe.vectors.library import load_vector


def mixed_requests(loaded: loading.LoadedModel, count: int, tokens: int) -> list[Request]:
    """Openings that nothing was trained on, in turn unsteered and steered toward each domain."""
    plans = [None, *(plan_for(load_vector(domain, loaded.model)) for domain in spec.DOMAINS)]
    return [
        Request(prompt, plans[i % len(plans)], Sampling(max_new_tokens=tokens, seed=i))
        for i, prompt in enumerate(openings("heldout", count))
    ]


def rolled(engine: HFEngine, requests: list[Request], rows: int) -> list[Completion]:
    decoder, waiting, done = engine.decoder(rows), deque(requests), {}
    try:
        while waiting or len(decoder):
            begun = [waiting.popleft() for _ in range(min(rows - len(decoder), len(waiting)))]
            if begun:
                decoder.start(begun, [engine.encode(request) for request in begun])
            done |= {completion.request: completion for completion in decoder.step()}
    finally:
        decoder.close()
    return [done[request] for request in requests]


def decode(rows: int, tokens: int, model: str | None, dtype: str) -> None:
    """Print the cost of decoding as many rows, without loading and the first batch, as JSON."""
    loaded = loading.load(model, dtype=dtype)
    engine = HFEngine(loaded)
    requests = mixed_requests(loaded, rows, tokens)
    rolled(engine, requests[:4], 4)
    before = resource.getrusage(resource.RUSAGE_SELF)
    new = sum(completion.new_tokens for completion in rolled(engine, requests, rows))
    after = resource.getrusage(resource.RUSAGE_SELF)
    user, kernel = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    status = Path("/proc/self/status").read_text()
    resident, peak = (int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 1024 for name in ("VmRSS", "VmHWM"))
    found = {"share": kernel / (user + kernel), "faults": after.ru_minflt - before.ru_minflt}
    print(json.dumps(found | {"per_cpu_second": new / (user + kernel), "resident": resident, "peak": peak}))


def faults(options: argparse.Namespace) -> None:
    """Compare processes with our limits of the C library and with its own, which naming one of them leaves alone."""
    for rows in options.rows:
        found: dict[str, list[dict]] = {"before": [], "after": []}
        command = [sys.executable, __file__, "--decode", "--rows", str(rows), "--tokens", str(options.tokens)]
        command += ["--dtype", options.dtype, *(["--model", options.model] if options.model else [])]
        for _ in range(options.repeats):
            for way, tunables in (("before", "glibc.malloc.perturb=0"), ("after", "")):
                environment = os.environ | {"GLIBC_TUNABLES": tunables}
                done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
                found[way].append(json.loads(done.stdout))
        for way, runs in found.items():
            median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
            print(
                f"{rows} rows, {way}: kernel's share {median['share']:.1%} (wanted < 5%), {median['faults']:,.0f} "
                f"page faults, {median['per_cpu_second']:.0f} tokens per CPU second, "
                f"{median['resident']:.0f} MiB resident, peak {median['peak']:.0f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stories", type=int, default=64)
    parser.add_argument("--single", type=int, default=64, help="how many of them to generate one by one")
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="+", default=[64])
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--decode", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", default=None)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.decode:
        decode(options.rows[0], options.tokens, options.model, options.dtype)
        return
    if options.faults:
        faults(options)
        return
    loaded = loading.load(options.model, dtype=options.dtype)
    engine = HFEngine(loaded)
    requests = mixed_requests(loaded, options.stories, options.tokens)
    engine.generate(requests[:1])  # warm up
    rates: dict[str, list[tuple[float, float]]] = {"single": [], "batch": []}
    same = 0
    for _ in range(options.repeats):
        results = {}
        for way in rates:
            wall, used = time.perf_counter(), time.process_time()
            if way == "batch":
                results[way] = rolled(engine, requests, options.rows[0])
            else:
                results[way] = [engine.generate([request])[0] for request in requests[: options.single]]
            tokens = sum(completion.new_tokens for completion in results[way])
            rates[way].append((tokens / (time.perf_counter() - wall), tokens / (time.process_time() - used)))
        same = sum(a.token_ids == b.token_ids for a, b in zip(results["single"], results["batch"], strict=False))
    found = {
        f"{way}_{kind}": statistics.median(pair[i] for pair in pairs)
        for way, pairs in rates.items()
        for i, kind in enumerate(("tokens_per_second", "tokens_per_cpu_second"))
    }
    found["ratio"] = found["batch_tokens_per_second"] / found["single_tokens_per_second"]
    found["ratio_of_cpu_seconds"] = found["batch_tokens_per_cpu_second"] / found["single_tokens_per_cpu_second"]
    found["same_texts"] = same / min(options.single, options.stories)
    print(f"{loaded.name}, {loaded.model.dtype}, {torch.get_num_threads()} threads, {options.stories} stories")
    for name, value in found.items():
        print(f"{name:30} {value:10.2f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
