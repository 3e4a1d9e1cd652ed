"""How long a new process takes to the first token of a text, each figure with its target:
`python benchmarks/start.py [--rounds 5] [--gguf FILE --gguf-python PYTHON] [--json FILE]`.

Whole processes that take turns (A B A B ...) after one round to warm up: `steermoe generate`, and a script that loads
the same checkpoint with transformers. The first token is there when it can be read from the process's
standard output. CPU seconds, of all its threads until then, say more than seconds on a machine that does other work;
ratios are taken within each round. With --gguf it also starts `generate --engine llamacpp` on that file, by a Python
that has llama.cpp.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from steermoe.models.default.pull import default_model_folder

PROMPT = "Once upon a time there was a dog who"
BARE = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
out = model.generate(**tokenizer(sys.argv[2], return_tensors="pt"), max_new_tokens=1)
print(tokenizer.decode(out[0], skip_special_tokens=True), flush=True)
"""
OF_BARE, AT_REST, OF_LLAMACPP = 0.6, 2.5, 1.0
"""The most that our first token may cost: as a share of the script's, in seconds, and in seconds with llama.cpp."""
TICK = os.sysconf("SC_CLK_TCK")


class Cost(NamedTuple):
    """What a process took until its first token."""

    seconds: float
    cpu: float


def first_token(command: Sequence[str]) -> Cost:
    """Start a process, and wait until it has printed more than the prompt."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "STEERMOE_COMPILE": "off"}  # nothing runs beside the next one
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout is not None
        seen = b""
        while len(seen.strip()) <= len(PROMPT):
            piece = os.read(process.stdout.fileno(), 4096)
            if not piece:
                raise SystemExit(f"this printed no token: {' '.join(command)}")
            seen += piece
        seconds = time.perf_counter() - started
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        cost = Cost(seconds, (int(fields[11]) + int(fields[12])) / TICK)
        process.stdout.read()
    if process.returncode:
        raise SystemExit(f"this failed: {' '.join(command)}")
    return cost


def generate(python: str, *options: str) -> list[str]:
    words = ["generate", PROMPT, "--domain", "sport", "--stream", "--max-new-tokens", "2", *options]
    return [python, "-m", "steermoe", *words]


def measure(commands: dict[str, list[str]], rounds: int) -> dict[str, list[Cost]]:
    """The costs of each command, round by round."""
    found: dict[str, list[Cost]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, command in commands.items():
            cost = first_token(command)
            if number:
                found[name].append(cost)
            print(f"{name}: {cost.seconds:.2f} s, {cost.cpu:.2f} s of CPU", file=sys.stderr, flush=True)
    return found


def line(what: str, values: Sequence[float], bar: float | None = None) -> str:
    met = "" if bar is None else f"   wanted <= {bar:g}: {'yes' if statistics.median(values) <= bar else 'no'}"
    return f"{what:46} {statistics.median(values):6.2f}   ({min(values):.2f} to {max(values):.2f}){met}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gguf", type=Path, help="the default model as a GGUF file")
    parser.add_argument("--gguf-python", default=sys.executable, help="a Python with llama-cpp-python")
    parser.add_argument("--only-gguf", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    commands: dict[str, list[str]] = {}
    if not args.only_gguf:
        commands["script"] = [sys.executable, "-c", BARE, str(default_model_folder()), PROMPT]
        commands["generate"] = generate(sys.executable)
    if args.gguf:
        commands["llamacpp"] = generate(args.gguf_python, "--model", str(args.gguf), "--engine", "llamacpp")
    before = os.getloadavg()
    found = measure(commands, args.rounds)
    of: dict[str, Callable[[Cost], float]] = {"s": lambda cost: cost.seconds, "s of CPU": lambda cost: cost.cpu}
    bars = {("generate", "s"): AT_REST, ("llamacpp", "s"): OF_LLAMACPP}
    for name, costs in found.items():
        for unit, value in of.items():
            print(line(f"{name}, {unit}", list(map(value, costs)), bars.get((name, unit))))
    if "generate" in found:
        for unit, value in of.items():
            ratios = [value(own) / value(bare) for own, bare in zip(found["generate"], found["script"], strict=True)]
            print(line(f"generate / script, {unit}", ratios, OF_BARE))
    print(f"load average before {before[0]:.1f}, after {os.getloadavg()[0]:.1f}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
