"""How much faster a batch of mixed stories is than the same stories from single calls of `generate`.

    python benchmarks/batch.py [--stories 64] [--single 64] [--tokens 120] [--json FILE]

Stories of all domains and of none, each sampled with its own seed. The two ways alternate; each is measured in wall
time and CPU time. It also counts the texts that are the same both ways: docs/batch.md says why not all are.
"""

import argparse
import json
import statistics
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stories", type=int, default=64)
    parser.add_argument("--single", type=int, default=64, help="how many of them to generate one by one")
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--model", default=None)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
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
                results[way] = rolled(engine, requests, options.rows)
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
