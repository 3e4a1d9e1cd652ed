"""The examples of docs/bake.md, run as written on tiny random models: what they write, not how it reads."""

import shlex
from functools import partial

import pytest
import torch

from steermoe.cli import bake
from steermoe.routing.routers import shape_of
from steermoe.vectors.file import write_vector
from steermoe.vectors.vector import SteeringVector, VectorInfo
from tests.support import tiny_ggufs
from tests.support.pages import code_blocks, read_page

PAGE = read_page("docs/bake.md")

blocks = partial(code_blocks, PAGE)
COMMANDS = [line for block in blocks("console") for line in block.splitlines()]


@pytest.fixture
def models(bare_search_path, monkeypatch):
    """`my-oss`, `my-oss.gguf` and `my-glm` with vectors, in the working folder."""
    monkeypatch.setattr(bake, "TEXTS", 2)
    for name, family in (("my-oss", "gpt_oss"), ("my-glm", "glm4_moe")):
        loaded = tiny_ggufs.build(family)
        loaded.model.save_pretrained(bare_search_path / name)
        loaded.tokenizer.save_pretrained(bare_search_path / name)
        shape = shape_of(loaded.model)
        for number, domain in enumerate(("sport", "food")):
            weights = torch.zeros(len(shape.routers), shape.num_experts)
            weights[:, number] = 0.8
            info = VectorInfo(model=name, architecture=family, fingerprint=shape.fingerprint, strength=4.0)
            vector = SteeringVector(domain, None, shape.layers, weights=weights, info=info)
            write_vector(vector, bare_search_path / "steering_vectors" / name / f"{domain}.safetensors")
        if family == "gpt_oss":
            tiny_ggufs.write(loaded, bare_search_path).rename(bare_search_path / "my-oss.gguf")
    return bare_search_path


def test_commands_run(models, run):
    assert len(COMMANDS) == 7
    for command in COMMANDS:
        done = run(*shlex.split(command)[1:])
        assert done.code == 0, (command, done.err)
        assert done.out.strip()
    assert (models / "my-oss-again.gguf").read_bytes() == (models / "my-oss.gguf").read_bytes()
    for file in (models / "my-oss").iterdir():
        assert (models / "my-oss-again" / file.name).read_bytes() == file.read_bytes()
