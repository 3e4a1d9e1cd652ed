"""Shell completion: the generated script completes commands, options and values in bash."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BASH = shutil.which("bash")


@pytest.fixture
def shell(tmp_path):
    """Runs commands in bash, with `steermoe` on the PATH and an empty home folder; returns their output."""
    if BASH is None:
        pytest.skip("bash is not installed")
    command = tmp_path / "bin" / "steermoe"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m steermoe "$@"\n')
    command.chmod(0o755)
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",  # read the name of the shell from the command line
    }

    def run(script: str) -> str:
        arguments = [BASH, "--norc", "-c", script]
        done = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
        assert done.stderr == ""
        return done.stdout

    return run


def completed(line: str) -> str:
    """A script that completes the last word of a line as bash does for Tab, and prints the candidates."""
    words = line.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    return (
        f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; "
        'function=$(complete -p steermoe | sed "s/.*-F \\([^ ]*\\) .*/\\1/"); '
        '$function steermoe; printf "%s\\n" "${COMPREPLY[@]}"'
    )


def test_the_script_completes(shell):
    expected = {
        "steermoe gen": "generate",
        "steermoe vectors sh": "show",
        "steermoe generate --form": "--formula",
        "steermoe generate --formula max": "max_scaled",
        "steermoe models compile --q": "--quantize",
    }
    script = "; ".join(['eval "$(steermoe --show-completion bash)"', *map(completed, expected)])
    assert shell(script).splitlines() == list(expected.values())


def test_installed_completion_works_in_the_next_shell(shell, tmp_path):
    assert "completion installed" in shell("steermoe --install-completion bash")
    assert str(tmp_path) in (tmp_path / ".bashrc").read_text()
    assert shell(f"source ~/.bashrc; {completed('steermoe calib')}").splitlines() == ["calibrate"]


@pytest.mark.parametrize("name", ["zsh", "fish"])
def test_other_shells_have_a_script(shell, name):
    assert "_STEERMOE_COMPLETE=complete_" + name in shell(f"steermoe --show-completion {name}")
