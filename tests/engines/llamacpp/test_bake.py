"""llama.cpp runs a baked file, without steermoe, as steermoe steers the original."""

import numpy as np
import pytest
import torch

from tests.support import tiny_ggufs

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make llamacpp")
pytest.importorskip("numba", reason="numba is not installed: make llamacpp")

from steermoe.engines.llamacpp.engine import LlamaCppEngine
from steermoe.models.baking.record import Steering
from steermoe.models.gguf.bake import GGUFFile, undo
from steermoe.steering.baking import pushes_of
from steermoe.steering.plans import SteeringPlan
from steermoe.vectors.vector import SteeringVector

TOKENS = [5, 17, 40, 200, 9, 88, 131, 3, 60, 77]
PREFILLED = 6


def logits_of(path, plan=None) -> np.ndarray:
    """[T, V]: of a prompt that is read at once, then of single tokens, as in generation."""
    engine = LlamaCppEngine(str(path), threads=1, cache="f32", callback=plan is not None)
    context, rows = engine.context(1, 64), []
    if plan is not None:
        engine.state.install([plan])
    for places in (range(PREFILLED), *([place] for place in range(PREFILLED, len(TOKENS)))):
        tokens = [TOKENS[place] for place in places]
        if plan is not None:
            engine.state.steer([0] * len(tokens), [1.0] * len(tokens), range(len(tokens)))
        context.forward(tokens, places, [0] * len(tokens), None)
        rows += [context.logits(place).copy() for place in range(len(tokens))]
    engine.close()
    return np.stack(rows)


@pytest.fixture(scope="module")
def oss(tmp_path_factory):
    return tiny_ggufs.write(tiny_ggufs.build("gpt_oss"), tmp_path_factory.mktemp("gguf"))


@pytest.mark.parametrize("strength", [3.0, -2.0])
def test_baked_is_steered(oss, tmp_path, strength):
    source = GGUFFile(oss)
    weights = torch.randn(
        len(source.shape.routers), source.shape.num_experts, generator=torch.Generator().manual_seed(1)
    )
    vector = SteeringVector("sport", None, source.shape.layers, weights=weights)
    plan = SteeringPlan(vector, strength, formula="additive", positions="all")
    source.bake(Steering("logits", "sport", strength, "0" * 64), pushes_of(source.shape, plan), tmp_path / "out.gguf")
    undo(tmp_path / "out.gguf", tmp_path / "back.gguf")
    plain, steered, baked = logits_of(oss), logits_of(oss, plan), logits_of(tmp_path / "out.gguf")
    np.testing.assert_allclose(baked, steered, atol=1e-4)
    assert np.abs(steered - plain).max() > 1e-2
    assert np.array_equal(logits_of(tmp_path / "back.gguf"), plain)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_choice_only_decides_the_choice(tmp_path, family):
    """Where the file has a bias on scores, and where it gets one."""
    path = tiny_ggufs.write(tiny_ggufs.build(family, n_group=1, topk_group=1), tmp_path)
    source = GGUFFile(path)
    push = torch.zeros(source.shape.num_experts)
    push[5] = 50.0
    steering = Steering("choice", "sport", 50.0, "0" * 64)
    source.bake(steering, [push] * len(source.shape.routers), tmp_path / "out.gguf")
    engine = LlamaCppEngine(str(tmp_path / "out.gguf"), threads=1, cache="f32")
    chosen = engine.chosen(TOKENS, None)
    engine.close()
    assert (chosen[:, :, 5] == 1).all()
    assert np.abs(logits_of(tmp_path / "out.gguf") - logits_of(path)).max() > 1e-3
