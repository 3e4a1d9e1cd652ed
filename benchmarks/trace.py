"""What a trace costs: `python benchmarks/trace.py [--gguf FILE] [--rounds N] [--json FILE]`.

Tokens per second of CPU time of the default model in transformers, or of a GGUF file of it in llama.cpp: steered,
with a trace and without, one text and eight together. The variants take turns, so that a machine with other work is
fair to both; medians of their ratios. CPU time, since other work would show in the time that passes. One thread.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from steermoe.engines.engine import Engine
from steermoe.engines.request import Request, Sampling
from steermoe.steering.plans import plan_for
from steermoe.vectors.library import load_vector

PROMPT = "Once upon a time there was a brown dog named Milo who lived by the river."
TOKENS = 64


def opened(gguf: str | None) -> Engine:
    if gguf is not None:
        from steermoe.engines.llamacpp.engine import LlamaCppEngine

        return LlamaCppEngine(gguf, threads=1)
    from steermoe.engines.hf.engine import HFEngine
    from steermoe.models.loading import load

    return HFEngine(load(None), compiled=False)


def rate(engine: Engine, rows: int, **trace: bool) -> float:
    """Tokens per second of CPU time."""
    plan = plan_for(load_vector("sport", engine.shape))
    sampling = [Sampling(max_new_tokens=TOKENS, min_new_tokens=TOKENS, seed=row) for row in range(rows)]
    requests = [Request(PROMPT, plan, one, **trace) for one in sampling]
    started = time.process_time()
    done = engine.generate(requests)
    return sum(one.new_tokens for one in done) / (time.process_time() - started)


def measure(engine: Engine, rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for rows in (1, 8):
        rate(engine, rows, trace=True)
        pairs = [(rate(engine, rows), rate(engine, rows, trace=True)) for _ in range(rounds)]
        found[f"{rows} rows"] = {
            "without": round(statistics.median(one for one, _ in pairs), 1),
            "with": round(statistics.median(one for _, one in pairs), 1),
            "ratio": round(statistics.median(traced / plain for plain, traced in pairs), 3),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(opened(options.gguf), options.rounds)
    for name, figures in found.items():
        print(name, *(f"{key} {value}" for key, value in figures.items()))
    if options.json is not None:
        options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
