"""Runs commands, and says what came of them as values that JSON can hold. Knows no case."""

import contextlib
import hashlib
import io
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Cases = Iterator[tuple[str, Callable[[], Any]]]
"""Names, each with a function that runs the case."""


def cli(*arguments: Any) -> str:
    """What a command writes to stdout, run in this process as its console script runs it."""
    from steermoe.cli import app

    sys.argv = ["steermoe", *map(str, arguments)]
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app.main()
        except SystemExit as end:
            code = end.code
    if code:
        raise RuntimeError(f"exit code {code}: {err.getvalue()[-2000:]}")
    return out.getvalue()


def command(*arguments: Any) -> str:
    """The same in a process of its own."""
    started = [sys.executable, "-m", "steermoe.cli.app", *map(str, arguments)]
    alone = os.environ | {"STEERMOE_COMPILE": "off"}
    done = subprocess.run(started, capture_output=True, text=True, check=False, env=alone)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def answers(*arguments: Any, run: Callable[..., str] = cli) -> list[Any]:
    """The JSON lines that a command answers with."""
    return [json.loads(line) for line in run(*arguments, "--json").splitlines()]


def exit_code(line: str) -> str:
    try:
        cli(*shlex.split(line))
    except RuntimeError as error:
        return str(error).partition(":")[0]
    return "exit code 0"


def lines_of(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def sha256(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()


def tensor_hash(tensor: Any) -> str | None:
    if tensor is None:
        return None
    return f"{tensor.dtype} {list(tensor.shape)} {sha256(tensor.detach().cpu().contiguous().numpy().tobytes())}"


def report_of(report: Any) -> dict[str, Any] | None:
    names = ("router_calls", "tokens_seen", "tokens_steered", "vector_share")
    return None if report is None else {name: getattr(report, name) for name in names}


def vector_file(path: Path) -> dict[str, Any]:
    """Metadata and the hashes of its matrices."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = {name: json.loads(value) for name, value in file.metadata().items()}
        return {**metadata, "tensors": {name: tensor_hash(file.get_tensor(name)) for name in file.keys()}}  # noqa: SIM118


def files_in(path: Path) -> dict[str, Any]:
    """What a file holds, or each file of a folder; pictures, pages and tables are left out."""
    readers: dict[str, Callable[[Path], Any]] = {
        ".safetensors": vector_file,
        ".json": lambda path: json.loads(path.read_text(encoding="utf-8")),
        ".jsonl": lines_of,
        ".npy": lambda path: sha256(path.read_bytes()),
    }
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return {str(file): readers[file.suffix](file) for file in files if file.suffix in readers}
