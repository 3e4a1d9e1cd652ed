"""The examples of docs/trace.md, run as written but on a tiny random model."""

import re
import shlex
from dataclasses import fields
from functools import partial

import pytest

from steermoe.engines.trace import Trace
from steermoe.vectors.file import write_vector
from tests.support.pages import code_blocks, read_page

PAGE = read_page("docs/trace.md")

blocks = partial(code_blocks, PAGE)
COMMANDS = [line for block in blocks("console") for line in block.splitlines()]


@pytest.fixture
def vectors(bare_search_path, make_vector):
    for domain in ("sport", "food"):
        write_vector(make_vector(domain), bare_search_path / "steering_vectors" / "tiny" / f"{domain}.safetensors")
    return bare_search_path


def test_commands_and_python_run(run, vectors, tiny_checkpoint, capsys):
    assert len(COMMANDS) == 6
    for command in COMMANDS:
        if command.startswith("printf"):
            text = shlex.split(command)[1].encode().decode("unicode_escape")
            (vectors / "prompts.txt").write_text(text)
            continue
        arguments = [*shlex.split(command)[1:], "--model", str(tiny_checkpoint), "--max-new-tokens", "4"]
        found = run(*arguments)
        assert found.code == 0, (command, found.err)
        if "--trace" in command:
            written = vectors / shlex.split(command)[-1]
            assert (len(list(written.iterdir())) == 4) if written.is_dir() else written.stat().st_size
    code = blocks("python")[0].replace("steermoe.load()", f"steermoe.load({str(tiny_checkpoint)!r})")
    exec(compile(code, "trace.md", "exec"), {})
    assert ", 3, 2)" in capsys.readouterr().out


def test_the_table_names_every_field():
    named = re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")))
    assert sorted(named) == sorted(field.name for field in fields(Trace))
