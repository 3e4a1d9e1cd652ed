"""The examples of docs/chat.md, run as written on the default model, and its table of commands."""

import re
import subprocess
import sys
from functools import partial

import pytest

from steermoe.cli.terminal.commands import COMMANDS
from steermoe.models.default import pull
from tests.support.pages import code_blocks, read_page, run_console

PAGE = read_page("docs/chat.md")

blocks = partial(code_blocks, PAGE)


def test_every_command_is_in_the_table():
    rows = "\n".join(re.findall(r"^\| (`/.*?) \|", PAGE, flags=re.MULTILINE))
    assert set(re.findall(r"`/(\w+)", rows)) == set(COMMANDS)


@pytest.mark.slow
@pytest.mark.default_model
@pytest.mark.parametrize("block", blocks("console"))
def test_block_runs(block, tmp_path):
    if not pull.is_pulled():
        pytest.skip("the default model is not pulled: `make model`")
    assert len(run_console(block, tmp_path, "Hello\n").strip()) > 20


@pytest.mark.slow
@pytest.mark.default_model
def test_python_runs():
    if not pull.is_pulled():
        pytest.skip("the default model is not pulled: `make model`")
    (block,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > 20
