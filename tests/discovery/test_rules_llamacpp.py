"""In llama.cpp the rules that count choices work too; those that need gradients say so."""

import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make llamacpp")
pytest.importorskip("numba", reason="numba is not installed: make llamacpp")

from steermoe.discovery.rules import vectors_by_rule
from steermoe.discovery.stable import stable_vectors
from steermoe.engines.llamacpp.engine import LlamaCppEngine
from steermoe.errors import VectorError
from steermoe.evaluation.learning import check_learnable
from tests.support import tiny_ggufs

DOMAINS = {"sport": ["A goal!", "The team ran."], "food": ["Salt and a pan.", "bread"]}


def test_rules_of_a_gguf_file(tmp_path):
    engine = LlamaCppEngine(str(tiny_ggufs.write(tiny_ggufs.build("qwen3_moe"), tmp_path)), cache="f32")
    for vector in vectors_by_rule(engine, "steermoe", DOMAINS):
        vector.check_fits(engine.shape)
        assert (vector.experts > 0).any()
        assert (vector.experts < 0).any()
    with pytest.raises(VectorError, match="has no gradients to weigh tokens by, as --rule dsmoe does: use --engine hf"):
        vectors_by_rule(engine, "dsmoe", DOMAINS)
    with pytest.raises(VectorError, match="has no gradients to learn from, as --rule learned does: use --engine hf"):
        check_learnable(engine)
    assert all((vector.experts > 0).any() for vector in stable_vectors(engine, DOMAINS, threshold=1.1))
