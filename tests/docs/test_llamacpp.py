"""The examples of docs/llamacpp.md, run as written on the default model: `steermoe` commands and Python."""

import re
import subprocess
import sys
from functools import partial

import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make llamacpp")
pytest.importorskip("numba", reason="numba is not installed: make llamacpp")

from steermoe.models import loading
from steermoe.models.default import pull
from steermoe.models.default.stories import load_stories
from tests.support.pages import code_blocks, read_page

PAGE = read_page("docs/llamacpp.md")
FILE = "smollm2-moe-q8_0.gguf"

blocks = partial(code_blocks, PAGE)
COMMANDS = [
    line for block in blocks("console") for line in block.splitlines() if line.startswith(("steermoe ", "printf "))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with some texts, in which all commands run in order."""
    if not pull.is_pulled():
        pytest.skip("the default model is not pulled: `make model`")
    folder = tmp_path_factory.mktemp("docs")
    for topic in ("sport", "food"):
        (folder / "texts" / topic).mkdir(parents=True)
        for story in load_stories("train", topic)[:4]:
            (folder / "texts" / topic / f"{story.id}.txt").write_text(" ".join(story.rest.split()[:20]))
    return folder


def test_the_page_has_examples():
    assert len(COMMANDS) >= 9
    assert COMMANDS[0] == "steermoe models export --gguf q8_0"
    assert len(blocks("python")) == 1


@pytest.mark.default_model
@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command, folder):
    if not (folder / FILE).is_file() and not command.startswith(("steermoe models export", "printf ")):
        from steermoe.models.gguf.export import export_gguf

        export_gguf(loading.load(), folder / FILE, "q8_0")
    if "PATH_OR_HUB_ID" in command:
        pytest.skip("your own model")
    command = re.sub(r"^steermoe ", f"{sys.executable} -m steermoe.cli.app ", command)
    if re.search(r"app (generate|compare)", command):
        command += " --max-new-tokens 12"
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() or command.startswith("printf ")


@pytest.mark.default_model
def test_python_runs(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    if not (folder / FILE).is_file():
        from steermoe.models.gguf.export import export_gguf

        export_gguf(loading.load(), folder / FILE, "q8_0")
    exec(compile(blocks("python")[0], "llamacpp.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) >= 2
