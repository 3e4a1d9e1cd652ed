"""The examples of docs/your_model.md, run as written on a tiny random model, with a few of the packaged texts."""

import shlex
from functools import partial

import pytest

from steermoe.discovery import packaged, packaged_vectors
from steermoe.evaluation import provision, verification
from tests.support.pages import code_blocks, read_page

PAGE = read_page("docs/your_model.md")

blocks = partial(code_blocks, PAGE)
COMMANDS = [line for block in blocks("console") for line in block.splitlines() if line.startswith("steermoe ")]


@pytest.fixture
def few_texts(monkeypatch, bare_search_path, tmp_path, tiny_checkpoint):
    """The working folder, with `my-model` in it; vectors and caches are the test's own."""
    monkeypatch.setattr(packaged, "TEXTS", 2)
    monkeypatch.setattr(packaged, "NEUTRAL_TEXTS", 2)
    monkeypatch.setattr(packaged_vectors, "MAX_TOKENS", 40)
    monkeypatch.setattr(provision, "CALIBRATION_TEXTS", 2)
    monkeypatch.setattr(verification, "STEP_SECONDS", 10.0)
    monkeypatch.setenv("STEERMOE_CACHE", str(tmp_path / "cache"))
    (bare_search_path / "my-model").symlink_to(tiny_checkpoint)
    return bare_search_path


def test_the_page_has_examples():
    assert len(COMMANDS) >= 10
    assert COMMANDS[1].endswith("--model my-model --domain sport")


def test_commands_and_python_run(run, few_texts, capsys):
    for command in COMMANDS:
        if ".gguf" in command:
            continue
        arguments = shlex.split(command)[1:]
        if arguments[0] in ("generate", "compare"):
            arguments += ["--max-new-tokens", "4"]
        if arguments[0] == "calibrate":
            arguments += ["--texts", "2"]
        found = run(*arguments)
        assert found.code == 0, (command, found.err)
        assert found.out.strip()
    exec(compile(blocks("python")[0].replace("max_new_tokens=20", "max_new_tokens=4"), "your_model.md", "exec"), {})
    assert "The old bus" in capsys.readouterr().out
