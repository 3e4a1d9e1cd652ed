"""Damage measured in llama.cpp agrees with that in transformers, and a GGUF file gets its vectors on demand."""

from dataclasses import replace

import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make llamacpp")
pytest.importorskip("numba", reason="numba is not installed: make llamacpp")

from steermoe.discovery import packaged, packaged_vectors
from steermoe.engines.llamacpp.engine import LlamaCppEngine
from steermoe.engines.request import Request, Sampling
from steermoe.errors import GenerationError
from steermoe.evaluation import provision
from steermoe.evaluation.forcing_llamacpp import GGUFForcing
from steermoe.evaluation.provision import Wish, provide
from steermoe.evaluation.teacher_forcing import TeacherForcing
from steermoe.vectors.file import read_vector
from tests.support import steering_models, tiny_ggufs

TEXTS = ["The cat is on the mat today, and it stays there until the rain ends.", "A dog ran home when the bell rang."]


@pytest.fixture(scope="module")
def loaded():
    return tiny_ggufs.build("qwen3_moe")


@pytest.fixture(scope="module")
def engine(loaded, tmp_path_factory):
    return LlamaCppEngine(str(tiny_ggufs.write(loaded, tmp_path_factory.mktemp("gguf"))), cache="f32")


@pytest.mark.parametrize("strength", [0.5, 4.0])
def test_damage_agrees_with_transformers(loaded, engine, strength):
    plan = steering_models.plan_for_experts(loaded.model, 1, 5, strength=strength)
    expected = TeacherForcing(loaded, TEXTS, prompt_tokens=4).compare(plan)
    found = GGUFForcing(engine, TEXTS, prompt_tokens=4).compare(plan)
    assert found.kl_p95 == pytest.approx(expected.kl_p95, rel=0.05)
    assert found.jaccard == pytest.approx(expected.jaccard, abs=0.02)
    assert expected.kl_p95 > 1e-4


def test_without_strength_nothing_changes(loaded, engine):
    forcing = GGUFForcing(engine, TEXTS, prompt_tokens=4)
    plan = steering_models.plan_for_experts(loaded.model, 1, strength=1.0)
    before = forcing.compare(plan)
    found = forcing.compare(replace(plan, strength=0.0))
    assert (found.kl_p95, found.jaccard) == (0.0, 1.0)
    assert forcing.compare(plan) == before


def test_short_texts_are_refused(engine):
    with pytest.raises(GenerationError, match="1 text has more than 17 tokens"):
        GGUFForcing(engine, ["x"])


def test_a_gguf_file_gets_its_vectors(engine, bare_search_path, monkeypatch, tmp_path):
    monkeypatch.setattr(packaged, "TEXTS", 2)
    monkeypatch.setattr(packaged, "NEUTRAL_TEXTS", 2)
    monkeypatch.setattr(packaged_vectors, "MAX_TOKENS", 60)
    monkeypatch.setattr(provision, "CALIBRATION_TEXTS", 2)
    monkeypatch.setenv("STEERMOE_CACHE", str(tmp_path / "cache"))
    given = provide(engine, Wish(("sport",)))
    vector = read_vector(given["sport"])
    assert vector.info.strength > 0
    vector.check_fits(engine.shape)
    (done,) = engine.generate([Request("A dog", None, Sampling(max_new_tokens=4, do_sample=False))], record=True)
    assert done.frequency is not None
