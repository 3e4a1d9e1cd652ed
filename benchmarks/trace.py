"""What a trace costs: `python benchmarks/trace.py [--gguf FILE | --compiled] [--before DIR] [--rounds N]`.

Tokens per second of CPU time of the default model in transformers, or of a GGUF file of it in llama.cpp: steered,
with a trace and without, one text and eight together. `--compiled` takes the steps that `steermoe models compile`
made with one thread (OMP_NUM_THREADS=1), `--before` also measures the checkout of an earlier version, without a trace.
The variants take turns, so that a machine with other work is fair to all; medians of their ratios. CPU time, since
other work would show in the time that passes. One thread.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from steermoe.engines.engine import Engine
from steermoe.engines.request import Request, Sampling
from steermoe.steering.plans import plan_for
from steermoe.vectors.library import load_vector

PROMPT = "Once upon a time there was a brown dog named Milo who lived by the river."
TOKENS = 64
ROWS = (1, 8)


def opened(gguf: str | None, compiled: bool) -> Engine:
    if gguf is not None:
        from steermoe.engines.llamacpp.engine import LlamaCppEngine

        return LlamaCppEngine(gguf, threads=1)
    from steermoe.engines.hf.engine import HFEngine
    from steermoe.models.loading import load

    engine = HFEngine(load(None), compiled=compiled)
    steps = engine.compiled_steps()
    if compiled and (steps is None or not all(map(steps.serves, ROWS))):
        raise SystemExit("there are no compiled steps: OMP_NUM_THREADS=1 steermoe models compile")
    return engine


def rate(engine: Engine, rows: int, **trace: bool) -> float:
    """Tokens per second of CPU time."""
    plan = plan_for(load_vector("sport", engine.shape))
    sampling = [Sampling(max_new_tokens=TOKENS, min_new_tokens=TOKENS, seed=row) for row in range(rows)]
    requests = [Request(PROMPT, plan, one, **trace) for one in sampling]
    started = time.process_time()
    done = engine.generate(requests)
    return sum(one.new_tokens for one in done) / (time.process_time() - started)


class Before:
    """An earlier version, in a process that measures one rate for each number of rows that it gets.

    Args:
        checkout: its folder.
        arguments: of this script, which that process gets too.
    """

    def __init__(self, checkout: Path, arguments: list[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        command = [sys.executable, __file__, "--answer", *arguments]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True)

    def rate(self, rows: int) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{rows}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())


def measure(engine: Engine, rounds: int, before: Before | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for rows in ROWS:
        variants: dict[str, Callable[[], float]] = {
            "without": lambda rows=rows: rate(engine, rows),
            "with": lambda rows=rows: rate(engine, rows, trace=True),
        }
        if before is not None:
            variants["before"] = lambda rows=rows: before.rate(rows)
        for variant in variants.values():
            variant()
        turns = [{name: variant() for name, variant in variants.items()} for _ in range(rounds)]
        medians = {name: round(statistics.median(turn[name] for turn in turns), 1) for name in variants}
        ratios = {"ratio": ("with", "without")} | ({"to before": ("without", "before")} if before else {})
        for name, (one, other) in ratios.items():
            medians[name] = round(statistics.median(turn[one] / turn[other] for turn in turns), 3)
        found[f"{rows} rows"] = medians
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--before", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    engine = opened(options.gguf, options.compiled)
    if options.answer:
        for line in sys.stdin:
            print(rate(engine, int(line)), flush=True)
        return
    kind = ["--gguf", options.gguf] if options.gguf else ["--compiled"] * options.compiled
    found = measure(engine, options.rounds, options.before and Before(options.before, kind))
    for name, figures in found.items():
        print(name, *(f"{key} {value}" for key, value in figures.items()))
    if options.json is not None:
        options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
