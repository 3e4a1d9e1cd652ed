"""Positions that follow tags in llama.cpp: the texts and reports of the transformers engine, alone and side by side."""

import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make llamacpp")
pytest.importorskip("numba", reason="numba is not installed: make llamacpp")

from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.llamacpp.engine import LlamaCppEngine
from steermoe.errors import SteeringError
from steermoe.steering.plans import SteeringPlan
from tests.support import chat_models, tiny_ggufs


@pytest.fixture(scope="module")
def hf():
    return HFEngine(chat_models.build())


@pytest.fixture(scope="module")
def engine(hf, tmp_path_factory):
    engine = LlamaCppEngine(str(tiny_ggufs.write(hf.loaded, tmp_path_factory.mktemp("gguf"))), cache="f32")
    yield engine
    engine.close()


def test_texts_and_reports_of_the_transformers_engine(engine, hf):
    requests = chat_models.requests(list(chat_models.plans_of_every_position(hf.shape).values()))
    theirs, ours = hf.generate(requests), engine.generate(requests)
    assert [engine.encode(request) for request in requests] == [hf.encode(request) for request in requests]
    for own, other in zip(ours, theirs, strict=True):
        assert own.token_ids == other.token_ids
        assert own.missed == other.missed
    assert ours[0].report.tokens_steered == theirs[0].report.tokens_steered
    for request in requests[5::7]:
        (alone,), (other,) = engine.generate([request]), hf.generate([request])
        assert alone.token_ids == other.token_ids
        assert alone.report.tokens_steered == other.report.tokens_steered


def test_both_find_the_same_tags(engine, hf):
    for fields in ({"positions": "answer"}, {"positions": "answer", "think_tags": ("<b>", "the")}, {}):
        plan = SteeringPlan(ban=((0, 0),), **fields)
        assert engine.tags.of(plan) == hf.tags.of(plan) is not None


def test_a_model_without_tags(tmp_path):
    engine = LlamaCppEngine(str(tiny_ggufs.write(tiny_ggufs.build("mixtral"), tmp_path)))
    request = chat_models.requests([SteeringPlan(ban=((0, 0),), positions="answer")])[0]
    with pytest.raises(SteeringError, match="this model has none: name them with --think-tags"):
        engine.generate([request])
    engine.close()
