"""A steered decode step is one graph: other strengths, domains and numbers of rows neither break nor remake it."""

import pytest
import torch
import torch._dynamo

from steermoe.engines.hf.compiled import artifacts
from steermoe.engines.hf.compiled.step import DecodeStep
from steermoe.routing.routers import shape_of
from steermoe.steering.banks import banks_for
from steermoe.steering.editing_graph import Edits
from tests.support import steering_models as tiny
from tests.support.rolling import build

FAMILIES = (
    "mixtral",
    "deepseek_v3",
    "qwen3_moe",
    "qwen2_moe",
    "gpt_oss",
    "olmoe",
    "glm4_moe",
    "phimoe",
    "ernie4_5_moe",
    "granitemoeshared",
    "dots1",
)
COLUMNS = 12


@pytest.fixture
def graphs():
    """The graphs that torch.compile makes, and its backend."""
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=False):
        yield made, backend
    torch._dynamo.reset()


def inputs_for(step, plans):
    """Inputs of a step in which each row follows its plan."""
    rows = len(plans)
    tokens, *rest, states, _ = artifacts._inputs(step, artifacts._states(step.model, rows, COLUMNS), rows, COLUMNS - 1)
    banks = banks_for(shape_of(step.model, step.routers, sizes_only=True), plans)
    edits = Edits.of(plans, banks, list(range(rows)), torch.ones(rows))
    inputs = tokens + 7, *rest, states, list(edits.tensors())
    positions, mask, _ = rest
    for tensor in (inputs[0], positions, mask, *states, *edits.tensors()):
        torch._dynamo.mark_dynamic(tensor, 1 if tensor.dim() == 3 else 0)  # the rows
    return inputs


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_for_all_plans_and_rows(family, graphs):
    made, backend = graphs
    model = build(family)
    step = DecodeStep(model)
    plans = [
        tiny.plan_for_experts(model, 1, 5),
        tiny.plan_for_experts(model, 2, strength=-3.0, formula="additive"),
        tiny.plan_for_experts(model, 3, formula="max_scaled"),
        tiny.plan_for_experts(model, 1, ban=((0, 2),), force=((1, 3),)),
    ]
    seen, given = [], [inputs_for(step, here) for here in (plans[:2], plans[2:], plans, plans[1:])]
    with torch.no_grad(), step.traceable():
        compiled = torch.compile(step, backend=backend, fullgraph=True)
        for number, inputs in enumerate(given):
            expected = step(*inputs)
            torch._dynamo.config.error_on_recompile = number > 0
            for found, wanted in zip(compiled(*inputs), expected, strict=True):
                torch.testing.assert_close(found, wanted)
            seen.append(expected[0][:2])
    assert len(made) == 1
    assert not torch.equal(seen[0], seen[1])
