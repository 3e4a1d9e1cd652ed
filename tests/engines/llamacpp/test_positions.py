"""Positions that follow tags in llama.cpp: the texts and reports of the transformers engine, alone and side by side."""

import pytest
import torch

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make llamacpp")
pytest.importorskip("numba", reason="numba is not installed: make llamacpp")

from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.llamacpp.engine import LlamaCppEngine
from steermoe.errors import SteeringError
from steermoe.steering.handle import SteeringHandle
from steermoe.steering.plans import SteeringPlan
from tests.support import tagged_models, tiny_ggufs


@pytest.fixture(scope="module")
def hf():
    return HFEngine(tagged_models.build())


@pytest.fixture(scope="module")
def engine(hf, tmp_path_factory):
    engine = LlamaCppEngine(str(tiny_ggufs.write(hf.loaded, tmp_path_factory.mktemp("gguf"))), cache="f32")
    yield engine
    engine.close()


def test_texts_and_reports_of_the_transformers_engine(engine, hf):
    requests = tagged_models.requests(list(tagged_models.plans_of_every_position(hf.shape).values()))
    theirs, ours = hf.generate(requests), engine.generate(requests)
    assert [engine.encode(request) for request in requests] == [hf.encode(request) for request in requests]
    differ = [pair for pair in zip(ours, theirs, strict=True) if pair[0].token_ids != pair[1].token_ids]
    assert len(differ) < len(requests) / 10
    for own, other in differ:
        assert gap(hf, own, other) < 0.02  # llama.cpp's own logits, steered or not, are off by up to half of it


def gap(hf, own, other):
    """How far the transformers model's logits of two texts are apart where they begin to differ."""
    texts = zip(own.token_ids, other.token_ids, strict=True)
    at = next(number for number, (one, two) in enumerate(texts) if one != two)
    prompt = hf.encode(own.request)
    handle = SteeringHandle(hf.loaded.model, [own.request.plan], hf.tags)
    handle.set(prompt_length=len(prompt))
    with torch.no_grad():
        logits = hf.loaded.model(torch.tensor([[*prompt, *own.token_ids[:at]]])).logits[0, -1]
    handle.remove()
    return float((logits[own.token_ids[at]] - logits[other.token_ids[at]]).abs())


def test_a_text_alone_is_steered_where_it_says(engine, hf):
    requests = tagged_models.requests(list(tagged_models.plans_of_every_position(hf.shape).values()))
    together = engine.generate(requests)
    for request, beside in zip(requests[::2], together[::2], strict=True):
        (alone,) = engine.generate([request])
        assert alone.token_ids == beside.token_ids
        if request.plan is not None and request.plan.think_tags is None:
            places = tagged_models.places(alone, engine.encode(request), hf.loaded.tokenizer)
            assert alone.report.tokens_steered == tagged_models.steered(request.plan, places)
            assert bool(alone.missed) == (alone.report.tokens_steered == 0)


def test_both_find_the_same_tags(engine, hf):
    for fields in ({"positions": "answer"}, {"positions": "answer", "think_tags": ("<b>", "the")}, {}):
        plan = SteeringPlan(ban=((0, 0),), **fields)
        assert engine.tags.of(plan) == hf.tags.of(plan) is not None


def test_a_model_without_tags(tmp_path):
    engine = LlamaCppEngine(str(tiny_ggufs.write(tiny_ggufs.build("mixtral"), tmp_path)))
    request = tagged_models.requests([SteeringPlan(ban=((0, 0),), positions="answer")])[0]
    with pytest.raises(SteeringError, match="this model has none: name them with --think-tags"):
        engine.generate([request])
    engine.close()
