"""What a worker does to logits, without vLLM: replayed graphs do the same as code that runs."""

import sys

import pytest
import torch

from steermoe import formulas
from steermoe.engines.vllm.steps import WAYS, Row, Steps
from steermoe.engines.vllm.wire import pack
from steermoe.errors import SteeringError
from steermoe.routing.routers import find_routers
from steermoe.steering.plans import SteeringPlan
from tests.support.steering_models import plan_for_experts
from tests.support.vllm_engines import plans_of_every_kind

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    from tests.support.tiny_models import build

    return build("mixtral")


@pytest.fixture
def routers(model):
    return find_routers(model)


def steps_for(routers, graphs=False, capacity=64, plans=16, uses_kernels=True):
    steps = Steps(routers, range(len(routers)), capacity, plans, CPU, graphs)
    steps.uses_kernels = steps.uses_kernels and uses_kernels  # without them, as for logits on a GPU
    return steps


def logits_for(routers, tokens, seed=0):
    return torch.randn(tokens, routers[0].num_experts, generator=torch.Generator().manual_seed(seed))


def rows_of(plans, count=3, prompt=2):
    """One row per plan, each with some tokens of its prompt and some generated ones."""
    return [
        Row(str(i), None if plan is None else pack(plan), first=i % 3, tokens=count, prompt=prompt)
        for i, plan in enumerate(plans)
    ]


def test_replayed_graphs_and_compiled_kernels_do_what_torch_does(model, routers):
    plans = list(plans_of_every_kind(model).values())
    live, graph, machine = ways = (
        steps_for(routers, uses_kernels=False),
        steps_for(routers, graphs=True),
        steps_for(routers),
    )
    assert {(plan.formula, plan.scale) for plan in plans if plan} == set(WAYS)
    for seed in range(4):
        rows = rows_of(plans[seed:] + plans[:seed])
        tokens = sum(row.tokens for row in rows)
        for steps in ways:
            steps.begin(rows)
        for number in range(len(routers)):
            logits = logits_for(routers, tokens, seed)
            edited = live.edit(number, logits)
            assert not torch.equal(edited, logits)
            assert torch.equal(edited, graph.edit(number, logits))
            torch.testing.assert_close(machine.edit(number, logits), edited, rtol=1e-6, atol=1e-6)
        for steps in ways:
            steps.end()


def test_rows_without_a_plan_are_left_bit_for_bit(model, routers):
    plans = list(plans_of_every_kind(model).values())
    for graphs, uses_kernels in ((False, False), (True, False), (False, True)):
        steps = steps_for(routers, graphs, uses_kernels=uses_kernels)
        steps.begin(rows_of([None, plans[1], None]))
        logits = logits_for(routers, 9).bfloat16()
        edited = steps.edit(0, logits)
        assert torch.equal(edited[:3], logits[:3])
        assert torch.equal(edited[6:], logits[6:])
        assert not torch.equal(edited[3:6], logits[3:6])


def test_each_token_follows_the_formula(model, routers):
    plan = plans_of_every_kind(model)["zero_max_scaled-paper"]
    steps = steps_for(routers)
    steps.begin([Row("a", pack(plan), first=1, tokens=3, prompt=2)])
    logits = logits_for(routers, 3)
    expected = formulas.zero_max_scaled(logits, plan.vector.experts[0], plan.strength, "paper")
    edited = steps.edit(0, logits)
    assert torch.equal(edited[:1], logits[:1])  # the last token of the prompt
    assert torch.allclose(edited[1:], expected[1:])


@pytest.mark.parametrize("uses_kernels", [True, False])
def test_padding_is_left_alone_and_tokens_that_are_missing_are_noticed(model, routers, uses_kernels):
    plan = plans_of_every_kind(model)["all"]
    steps = steps_for(routers, uses_kernels=uses_kernels)
    steps.begin([Row("a", pack(plan), 0, 4, 2)])
    logits = logits_for(routers, 7)
    assert torch.equal(steps.edit(0, logits)[4:], logits[4:])
    with pytest.raises(SteeringError, match="saw 3 tokens where the batch has 4"):
        steps.edit(0, logits[:3])


def test_after_the_call_nothing_is_edited(model, routers):
    plan = plans_of_every_kind(model)["all"]
    steps = steps_for(routers)
    logits = logits_for(routers, 4)
    steps.begin([Row("a", pack(plan), 0, 4, 2)])
    assert steps.edit(0, logits) is not logits
    steps.end()
    assert steps.edit(0, logits) is logits
    steps.begin([Row("b", None, 0, 4, 2)])
    assert steps.edit(0, logits) is logits


def test_replayed_graphs_forget_the_call_before(model, routers):
    plan = plans_of_every_kind(model)["all"]
    steps = steps_for(routers, graphs=True)
    steps.begin([Row("a", pack(plan), 0, 6, 2)])
    steps.end()
    logits = logits_for(routers, 6)
    steps.begin([Row("b", pack(plan), 0, 2, 2), Row("c", None, 0, 1, 2)])
    assert torch.equal(steps.edit(0, logits)[2:], logits[2:])
    steps.begin([Row("c", None, 0, 6, 2)])
    assert torch.equal(steps.edit(0, logits), logits)


def test_without_numba_torch_edits(model, routers, monkeypatch):
    plan = plans_of_every_kind(model)["all"]
    logits = logits_for(routers, 4)
    edited = []
    for _ in range(2):
        steps = steps_for(routers)
        steps.begin([Row("a", pack(plan), 0, 4, 2)])
        edited.append(steps.edit(0, logits))
        assert steps.uses_kernels == (len(edited) == 1)
        monkeypatch.delattr(
            "steermoe.steering.editing_numba", raising=False
        )  # otherwise the package has it without an import
        monkeypatch.setitem(sys.modules, "steermoe.steering.editing_numba", None)
    torch.testing.assert_close(*edited, rtol=1e-6, atol=1e-6)


def test_room_of_plans_is_used_again(model, routers):
    steps = steps_for(routers, plans=2)
    sport = plans_of_every_kind(model)["all"].vector
    logits = logits_for(routers, 2)
    for strength in range(1, 8):
        plan = SteeringPlan(sport, float(strength), "additive", positions="all")
        steps.begin([Row("a", pack(plan), 0, 2, 2)])
        assert torch.allclose(steps.edit(0, logits), logits + strength * sport.experts[0])
        steps.end()


def test_a_thousand_plans_have_the_room_of_a_few(model, routers):
    """Whoever was followed longest ago makes room, and is installed again when it comes back."""
    room = 4
    steps = steps_for(routers, plans=room, uses_kernels=False)
    plans = [plan_for_experts(model, number % 8, strength=1 + number / 1000) for number in range(1000)]
    banks = [editor.bank for editor in steps.editors]
    for plan in [*plans, plans[0]]:
        steps.begin(rows_of([plan]))
        steps.end()
    assert [len(editor.bank.push) for editor in steps.editors] == [room] * len(routers)
    assert [editor.bank.push.data_ptr() for editor in steps.editors] == [bank.push.data_ptr() for bank in banks]
    assert len(steps._installed) == room
    logits = logits_for(routers, 3)
    found = []
    for other in (steps, steps_for(routers, uses_kernels=False)):
        other.begin(rows_of([plans[0]]))
        found.append(other.edit(0, logits))
    assert torch.equal(*found)
    assert not torch.equal(found[0], logits)


@pytest.mark.parametrize("schedule", ["constant", "decay:4", "window:1-3"])
@pytest.mark.parametrize("positions", ["generated", "prompt", "all"])
def test_what_is_kept_from_token_to_token_is_what_is_wanted(model, routers, schedule, positions):
    """The same rows call after call, against steps that see only one call; then a row is added, and a row ends."""
    sport = plans_of_every_kind(model)["all"].vector
    plan = pack(SteeringPlan(sport, 2.0, "additive", positions=positions, schedule=schedule))
    other = pack(SteeringPlan(sport, 5.0, "max_scaled"))
    steps = steps_for(routers)
    logits = logits_for(routers, 3)
    kept = []
    for first in range(9):
        rows = [Row("a", plan, first, 1, 3), Row("b", None, first, 1, 1), Row("c", other, first, 1, 5)]
        rows = rows[: 2 if first == 6 else 3]
        steps.begin(rows)
        alone = steps_for(routers)
        alone.begin(rows)
        assert torch.equal(steps.edit(1, logits), alone.edit(1, logits))
        kept.append(steps._last[1])
        steps.end()
    assert (kept[7] is kept[8]) == (schedule == "constant")
    assert steps.report().tokens_steered == sum(step.tokens for step in kept)


def test_rows_that_are_given_again_do_the_same_again(model, routers):
    """Against steps that get new rows for each token; then another call comes in between."""
    plans = plans_of_every_kind(model)
    sport = plans["all"].vector
    plan = pack(SteeringPlan(sport, 2.0, "additive", layers=(0, 0)))
    kept, fresh = steps_for(routers), steps_for(routers)
    logits, chosen = logits_for(routers, 2), torch.tensor([[0, 1], [2, 3]])
    first = [Row("a", plan, 3, 1, 2), Row("b", None, 9, 1, 2, True)]
    for step in range(4):
        if step == 2:  # another text in between
            for steps in (kept, fresh):
                steps.begin([Row("c", pack(plans["all"]), 0, 3, 2)])
                steps.end()
        kept.begin(first)
        fresh.begin([row._replace(first=row.first + step) for row in first])
        assert kept.goes_on(first)
        for number in range(len(routers)):
            assert torch.equal(kept.edit(number, logits), fresh.edit(number, logits))
            for steps in (kept, fresh):
                steps.chose(number, chosen)
                steps.choose(number, logits, torch.ones(2, 2), chosen)
        kept.end()
        fresh.end()
        assert kept.edit(0, logits) is logits
    assert kept.recorded() == fresh.recorded() != {}
    report = kept.report()
    assert report == fresh.report()
    assert report.tokens_steered == 4 + 3


@pytest.mark.parametrize(
    ("row", "schedule", "expected"),
    [
        ({}, "constant", True),
        ({"first": 2}, "constant", False),  # the first generated token: the one before was the prompt's
        ({"tokens": 2}, "constant", False),
        ({"numbers": (4,)}, "constant", False),
        ({}, "decay:9", False),
        ({"plan": None}, "constant", True),
        ({"plan": None, "tokens": 3}, "constant", False),
    ],
)
def test_rows_that_can_be_given_again(model, routers, row, schedule, expected):
    plan = pack(SteeringPlan(plans_of_every_kind(model)["all"].vector, 2.0, schedule=schedule))
    rows = [Row("a", None, 5, 1, 2), Row("b", plan, 3, 1, 2)._replace(**row)]
    steps = steps_for(routers)
    steps.begin(rows)
    assert steps.goes_on(rows) == expected
    replayed = steps_for(routers, graphs=True)
    replayed.begin(rows)
    assert not replayed.goes_on(rows)


def test_a_stage_of_a_pipeline_follows_its_own_rows(model, routers):
    plan = plans_of_every_kind(model)["all"]
    whole, stage = steps_for(routers), Steps(routers[1:], [1], 64, 4, CPU, graphs=False)
    logits = logits_for(routers, 3)
    for steps in (whole, stage):
        steps.begin([Row("a", pack(plan), 0, 3, 2)])
    assert torch.equal(stage.edit(0, logits), whole.edit(1, logits))
    assert not torch.equal(stage.edit(0, logits), whole.edit(0, logits))


def test_choices_are_counted_by_request(model, routers):
    steps = steps_for(routers)
    steps.begin([Row("a", None, 1, 3, 2, True), Row("b", None, 4, 1, 2, False), Row("c", None, 4, 1, 2, True)])
    chosen = torch.tensor([[0, 1], [2, 3], [2, 4], [5, 6], [7, 0]])
    for number in range(len(routers)):
        steps.chose(number, chosen)
    found = {name: dict(rows) for name, rows in steps.recorded().items()}
    assert found["a"][0] == [0, 0, 2, 1, 1, 0, 0, 0]  # the token of the prompt is not counted
    assert found["c"][1] == [1, 0, 0, 0, 0, 0, 0, 1]
    assert found.keys() == {"a", "c"}
    assert steps.recorded() == {}


def test_too_many_tokens(model, routers):
    steps = steps_for(routers, graphs=True, capacity=8)
    with pytest.raises(SteeringError, match="a call of 9 tokens is larger than the 8"):
        steps.begin([Row("a", pack(plans_of_every_kind(model)["all"]), 0, 9, 2)])
