"""Another number of experts per token in llama.cpp, which reads it when it loads a model: as in transformers."""

import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make llamacpp")
pytest.importorskip("numba", reason="numba is not installed: make llamacpp")

from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.llamacpp.engine import LlamaCppEngine
from steermoe.engines.request import Request, Sampling
from steermoe.errors import SteeringError
from steermoe.steering.plans import SteeringPlan
from steermoe.steering.tables import check_plan
from tests.support import tiny_ggufs

NUMBER = 5
SAMPLING = Sampling(max_new_tokens=8, do_sample=False)


@pytest.fixture(scope="module")
def hf():
    return HFEngine(tiny_ggufs.build("qwen3_moe"))


@pytest.fixture(scope="module")
def path(hf, tmp_path_factory):
    return str(tiny_ggufs.write(hf.loaded, tmp_path_factory.mktemp("gguf")))


@pytest.fixture(scope="module")
def engine(path):
    engine = LlamaCppEngine(path, cache="f32", active_experts=NUMBER)
    yield engine
    engine.close()


@pytest.mark.parametrize("fields", [{}, {"force": ((1, 3),)}, {"ban": ((0, 2), (1, 1))}], ids=["alone", "force", "ban"])
def test_texts_of_the_transformers_engine(engine, hf, fields):
    plan = SteeringPlan(active_experts=NUMBER, positions="all", **fields)
    requests = [Request(prompt, plan, SAMPLING) for prompt in ("a dog", "The cat is", "it")]
    ours, theirs = (one.generate(requests) for one in (engine, hf))
    assert [one.token_ids for one in ours] == [one.token_ids for one in theirs]
    plain = hf.generate([Request(request.prompt, None, SAMPLING) for request in requests])
    assert [one.token_ids for one in plain] != [one.token_ids for one in theirs]
    if not fields:  # with lists, llama.cpp counts no prompts in its last layer, where it leaves them out
        assert [one.report.slots for one in ours] == [one.report.slots for one in theirs]
    else:
        shares = [(one.report.forced_share, one.report.banned_share) for one in ours]
        assert shares == [(1.0, 0.0)] * 3


def test_a_text_can_not_have_its_own_number(engine, path):
    with pytest.raises(SteeringError, match=r"asks for no number of active experts, but llama.cpp was loaded with 5"):
        engine.generate([Request("a dog", None, SAMPLING)])
    with pytest.raises(SteeringError, match=r"asks for 3 active experts, but llama.cpp was loaded with 5 for all"):
        engine.generate([Request("a dog", SteeringPlan(active_experts=3), SAMPLING)])
    usual = LlamaCppEngine(path, cache="f32")
    with pytest.raises(SteeringError, match=r"can't have 3 active experts: llama.cpp reads the number once"):
        check_plan(usual.shape, SteeringPlan(active_experts=3))
    with pytest.raises(SteeringError, match=r"can't have 3 active experts: llama.cpp reads the number once"):
        usual.generate([Request("a dog", SteeringPlan(active_experts=3), SAMPLING)])
    usual.close()
    with pytest.raises(SteeringError, match=r"9 active experts are too many for .*, which has 8: ask for fewer"):
        LlamaCppEngine(path, active_experts=9)
