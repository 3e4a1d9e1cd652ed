"""The README's examples, run as written: every `steermoe` command of its console blocks, and its Python blocks."""

import io
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial

import pytest

from steermoe.discovery.corpus import Corpus
from steermoe.discovery.embed_corpus import embed_corpus
from steermoe.models import loading
from steermoe.models.default import pull, spec
from steermoe.models.default.stories import load_stories
from steermoe.models.gguf.export import export_gguf
from tests.support.pages import code_blocks, read_page

README = read_page("README.md")
PLACEHOLDER = "PATH_OR_HUB_ID"

blocks = partial(code_blocks, README)
COMMANDS = [
    line
    for block in blocks("console")
    for line in re.sub(r"\\\n\s*", "", block).splitlines()  # a backslash joins two lines, as in a shell
    if "steermoe " in line
]


def test_the_readme_has_examples():
    assert len(COMMANDS) >= 8
    assert len(blocks("python")) == 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with `texts/TOPIC/*.txt`, the beginnings of stories, and their `embeddings`."""
    folder = tmp_path_factory.mktemp("corpus")
    for topic in spec.TOPICS:
        (folder / "texts" / topic).mkdir(parents=True)
        for story in load_stories("train", topic)[:4]:
            (folder / "texts" / topic / f"{story.id}.txt").write_text(" ".join(story.rest.split()[:20]))
    embed_corpus(loading.load(), Corpus(folder / "texts"), folder / "embeddings")
    return folder


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """The default model as a GGUF file."""
    return export_gguf(loading.load(), tmp_path_factory.mktemp("gguf") / "smollm2-moe-q8_0.gguf", "q8_0")


@pytest.mark.default_model
@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command, tmp_path, tiny_checkpoint, make_vector, request, run, monkeypatch):
    """In this process, with what the pipe before it writes as stdin; the one that clusters in its own."""
    if not pull.is_pulled():
        pytest.skip("the default model is not pulled: `make model`")
    if re.search(r"\b(texts/|texts |embeddings )", command):
        folder = request.getfixturevalue("corpus")
        shutil.copytree(folder / "texts", tmp_path / "texts")
        if " discover " in command:
            shutil.copytree(folder / "embeddings", tmp_path / "embeddings")
    if PLACEHOLDER in command:  # "your own model" is the tiny one, with its own matrix and vector
        (tmp_path / "matrix.json").write_text(str(make_vector().frequency.tolist()))
        if "generate" in command or "calibrate" in command:
            from steermoe.vectors.file import write_vector

            write_vector(make_vector(), tmp_path / "steering_vectors" / "tiny-mixtral" / "sport.safetensors")
        # random routers prefer no expert in any domain, so `build` needs the trained model
        checkpoint = pull.default_model_folder() if " build " in command else tiny_checkpoint
        command = command.replace(PLACEHOLDER, str(checkpoint))
    if ".gguf" in command:
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make llamacpp")
        shutil.copy(request.getfixturevalue("gguf"), tmp_path / "smollm2-moe-q8_0.gguf")
    before, _, own = command.rpartition(" | ")
    if before:
        piped = subprocess.run(before, shell=True, capture_output=True, check=True).stdout
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(piped), "utf-8"))
    words = shlex.split(own)
    assert words.pop(0) == "steermoe"
    monkeypatch.chdir(tmp_path)
    if " discover " in command:  # umap's threads would slow down what follows
        alone = [sys.executable, "-m", "steermoe", *words]
        assert subprocess.run(alone, capture_output=True, check=True).stdout.strip()
        return
    done = run(*words, *(("--max-new-tokens", "12") if words[0] in ("generate", "compare", "batch") else ()))
    assert done.code == 0, done.err
    assert done.out.strip()


@pytest.mark.default_model
def test_python_blocks_run(capsys, tmp_path, monkeypatch):
    if not pull.is_pulled():
        pytest.skip("the default model is not pulled: `make model`")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert "SteeringReport(" in capsys.readouterr().out
    assert (tmp_path / "steering_vectors" / "my-model" / "athletics.safetensors").is_file()
