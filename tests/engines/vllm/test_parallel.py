"""Models over several processes: tensor-parallel workers, pipeline-parallel stages, data-parallel replicas."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from steermoe.engines.vllm import launch
from steermoe.engines.vllm.engine import VLLMEngine
from steermoe.engines.vllm.server import serve
from steermoe.errors import ModelError
from tests.support.vllm_engines import (
    OPTIONS,
    all_at_once,
    end,
    one_by_one,
    plans_of_every_kind,
    requests,
    write_checkpoint,
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm") / "granitemoeshared"
    return write_checkpoint("granitemoeshared", folder), str(folder)


def same_tokens(reference, engine):
    asked = requests(list(plans_of_every_kind(engine.shape).values()))
    assert all_at_once(engine, asked) == one_by_one(reference[0], asked)


@pytest.fixture
def unbound(monkeypatch):
    """Threads are bound to CPUs as the engine decides."""
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)


def test_two_workers_share_each_layer(reference, unbound):
    engine = VLLMEngine(reference[1], **OPTIONS, tensor_parallel_size=2)
    try:
        assert engine.ask("steermoe_reason") == ["", ""]
        same_tokens(reference, engine)
        steered = requests(list(plans_of_every_kind(engine.shape).values()))[1:4]
        expected, found = reference[0].generate(steered), engine.generate(steered, record=True)
        assert found[0].report.tokens_steered == expected[0].report.tokens_steered
        assert found[0].report.router_calls >= expected[0].report.router_calls  # a text may begin a step later
        assert found[0].report.vector_share == pytest.approx(expected[0].report.vector_share, abs=0.02)
        assert found[0].frequency.shape == (2, 8)
    finally:
        end(engine)


def test_two_workers_divide_the_layers(reference, unbound):
    engine = VLLMEngine(reference[1], **OPTIONS, pipeline_parallel_size=2, compiled=True)
    try:
        assert engine.ask("steermoe_reason") == ["", ""]
        same_tokens(reference, engine)
    finally:
        end(engine)


def test_replicas_are_driven_as_one_is(reference, unbound, monkeypatch):
    monkeypatch.setattr(launch, "needs_replicas", lambda options: True)
    engine = VLLMEngine(reference[1], **OPTIONS)
    try:
        same_tokens(reference, engine)
        (completion,) = engine.generate(requests([plans_of_every_kind(engine.shape)["all"]]), record=True)
        assert completion.report.tokens_steered == completion.prompt_tokens + 11
        assert completion.frequency.sum(-1).tolist() == pytest.approx([1, 1])
    finally:
        end(engine)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data_parallel_size": 2}, "--data-parallel-size 2: .* only on GPUs"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2: .* need a compiled model"),
    ],
)
def test_what_vllm_can_not_do_on_cpus_is_refused(reference, sizes, message):
    with pytest.raises(ModelError, match=message):
        VLLMEngine(reference[1], **OPTIONS, **sizes)
    with pytest.raises(ModelError, match=message):
        serve(reference[1], eager=True, parallel=sizes)
