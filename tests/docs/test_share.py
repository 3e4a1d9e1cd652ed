"""The examples of docs/share.md, run as written on the default model and a stand-in for the Hub."""

import re
import shlex
from functools import partial

import pytest

from steermoe.models.default import pull
from steermoe.vectors.file import read_vector
from steermoe.vectors.library import packaged_vectors
from steermoe.vectors.pushing import Push, preview
from tests.support.pages import code_blocks, read_page

pytest.importorskip("matplotlib")

PAGE = read_page("docs/share.md")

blocks = partial(code_blocks, PAGE.replace("USER/", "me/"))
COMMANDS = [line for block in blocks("console") for line in block.splitlines()]
SLOW = [command for command in COMMANDS if "evaluation" in command]
QUICK = [command for command in COMMANDS if command not in SLOW]


@pytest.fixture
def pack(hub, tmp_path, monkeypatch):
    """`me/my-vectors` with sport and its card, and an empty working folder."""
    monkeypatch.chdir(tmp_path)
    (path,) = packaged_vectors().glob("*/sport.safetensors")
    card = preview([read_vector(path)], "me/my-vectors", Push())
    return hub.add("me/my-vectors", {"sport.safetensors": path.read_bytes(), "README.md": card.encode()})


def test_the_page_has_examples():
    assert len(QUICK) == 13
    assert len(SLOW) == 2
    assert len(blocks("python")) == 1


def marked(command: str) -> object:
    """One command that runs the model is enough for the quick tests."""
    return pytest.param(command, marks=pytest.mark.slow) if re.search("compare|=0.7", command) else command


@pytest.mark.parametrize("command", list(map(marked, QUICK)))
def test_command_runs(command, pack, run):
    arguments = shlex.split(command)[1:]
    generates = arguments[0] in ("generate", "compare")
    if (generates or "smollm2-moe" in arguments) and not pull.is_pulled():
        pytest.skip("the default model is not pulled: `make model`")
    done = run(*arguments, *(["--max-new-tokens", "3"] if generates else []))
    assert done.code == 0, done.err
    assert done.out.strip()


@pytest.mark.slow
@pytest.mark.default_model
def test_success_on_the_card(pack, run):
    if not pull.is_pulled():
        pytest.skip("the default model is not pulled: `make model`")
    for command in SLOW:
        done = run(*shlex.split(command)[1:])
        assert done.code == 0, done.err
    card = pack.files["README.md"].decode()
    assert re.search(
        r"^\| sport \| 25\.5 \| 0 to 64 \| 0\.79 nats \| \d+% \(\d+% to \d+%\) of 12 texts \| \d+% \|", card, re.M
    )


def test_python_runs(pack, capsys):
    exec(compile(blocks("python")[0], "share.md", "exec"), {})
    assert re.fullmatch(r"hub:me/my-vectors/sport@[0-9a-f]{40}\n", capsys.readouterr().out)
