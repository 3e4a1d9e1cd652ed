"""The vLLM engine against the hf engine: the same greedy tokens, for every kind of plan, on several families."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from vllm_engines import (
    FAMILIES,
    OPTIONS,
    all_at_once,
    end,
    one_by_one,
    plans_of_every_kind,
    requests,
    write_checkpoint,
)

from steermoe.engines.vllm.engine import VLLMEngine


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """The hf and the vLLM engine on one checkpoint."""
    folder = tmp_path_factory.mktemp("vllm") / request.param
    reference = write_checkpoint(request.param, folder)
    engine = VLLMEngine(str(folder), **OPTIONS)
    yield reference, engine
    end(engine)


def test_every_plan_gives_the_tokens_of_the_hf_engine(pair):
    reference, engine = pair
    plans = plans_of_every_kind(engine.target)
    asked = requests(list(plans.values()))
    expected = one_by_one(reference, asked)
    assert len(set(expected)) > len(plans) // 2, "steering must change these texts, or the test shows nothing"
    found = all_at_once(engine, asked)
    assert dict(zip(plans, found, strict=True)) == dict(zip(plans, expected, strict=True))
