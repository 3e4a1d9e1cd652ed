"""The examples of docs/chat.md, run as written on the default model, and its table of commands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from steermoe.cli.terminal.commands import COMMANDS
from steermoe.models.default import pull

PAGE = (Path(__file__).parents[2] / "docs" / "chat.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


def test_every_command_is_in_the_table():
    rows = "\n".join(re.findall(r"^\| (`/.*?) \|", PAGE, flags=re.MULTILINE))
    assert set(re.findall(r"`/(\w+)", rows)) == set(COMMANDS)


@pytest.mark.slow
@pytest.mark.default_model
@pytest.mark.parametrize("block", blocks("console"))
def test_block_runs(block, tmp_path):
    if not pull.is_pulled():
        pytest.skip("the default model is not pulled: `make model`")
    script = f'steermoe() {{ "{sys.executable}" -m steermoe "$@"; }}\nset -e\n{block}'
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, input="Hello\n", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > 20


@pytest.mark.slow
@pytest.mark.default_model
def test_python_runs():
    if not pull.is_pulled():
        pytest.skip("the default model is not pulled: `make model`")
    (block,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > 20
