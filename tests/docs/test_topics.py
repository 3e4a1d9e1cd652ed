"""The examples of docs/topics.md, run as written but on a tiny random model, with fewer texts."""

import shlex
from functools import partial
from pathlib import Path

import pytest

from steermoe.evaluation import provision
from tests.support.pages import code_blocks, read_page

PAGE = read_page("docs/topics.md")

blocks = partial(code_blocks, PAGE)
COMMANDS = [line for block in blocks("console") for line in block.splitlines() if not line.startswith("#")]


@pytest.fixture
def cache(monkeypatch, bare_search_path, tmp_path):
    monkeypatch.setattr(provision, "CALIBRATION_TEXTS", 2)
    monkeypatch.setenv("STEERMOE_CACHE", str(tmp_path / "cache"))
    return bare_search_path


def test_commands_and_python_run(run, cache, tiny_checkpoint, capsys):
    assert len(COMMANDS) == 6
    for command in COMMANDS:
        arguments = shlex.split(command)
        if arguments[0] == "head":
            assert Path(arguments[-1]).read_text(encoding="utf-8").count("\n") == 6
            continue
        arguments = arguments[1:]
        if "show" not in arguments:
            arguments += ["--model", str(tiny_checkpoint)]
        if "--topic" in arguments:
            arguments += ["--texts-per-topic", "6"]
        if arguments[0] in ("generate", "compare"):
            arguments += ["--max-new-tokens", "4"]
        found = run(*arguments)
        assert found.code == 0, (command, found.err)
        assert found.out.strip()
    code = blocks("python")[0].replace("steermoe.load()", f"steermoe.load({str(tiny_checkpoint)!r})")
    exec(compile(code, "topics.md", "exec"), {})
    assert "pirates at sea, from" in capsys.readouterr().out
