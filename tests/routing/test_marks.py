"""Marks in the place of a gate's weight: they catch what the mode catches, in the same order, and leave nothing."""

import pytest
import torch
from torch import nn

from steermoe.routing.intercept import intercept
from steermoe.routing.marks import MarkedGate
from steermoe.routing.recording import record_routing
from steermoe.routing.routers import find_routers
from steermoe.steering.handle import attach
from tests.support import steering_models as tiny

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")


@pytest.fixture
def marked(monkeypatch):
    """Counts the runs of routers with a mark; `marked.off` keeps them under the mode."""
    runs = []
    run, can_run = MarkedGate.run, MarkedGate.can_run

    def counted(self, *given):
        runs.append(1)
        return run(self, *given)

    monkeypatch.setattr(MarkedGate, "run", counted)
    monkeypatch.setattr(MarkedGate, "can_run", lambda self: not runs_off and can_run(self))
    runs_off: list[int] = []
    return runs, runs_off


def steered(model, formula):
    """The logits of a short batch, step by step, and the report."""
    plan = tiny.plan_for_experts(model, 1, 5, formula=formula, positions="all")
    cache, ids, found = None, tiny.prompt(5, rows=2), []
    handle = attach(model, plan)
    with torch.no_grad():
        for _ in range(4):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
            found.append(output.logits)
    handle.verify()
    handle.remove()
    return found, handle.report()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("formula", ["additive", "max_scaled", "zero_max_scaled"])
def test_marks_change_nothing(family, formula, marked):
    runs, off = marked
    model = tiny.build(family).to(torch.bfloat16)
    off.append(1)
    expected, report = steered(model, formula)
    assert not runs
    off.clear()
    found, same = steered(model, formula)
    assert all(map(torch.equal, found, expected))
    assert same == report
    assert report.tokens_steered == 2 * (5 + 3)
    if family in ("mixtral", "qwen3_moe", "gpt_oss"):  # `F.linear(x, self.weight)`
        assert len(runs) == 3 * tiny.LAYERS
    assert not any("weight" in vars(module) for module in model.modules())


class Seen:
    """An editor that adds a number, and keeps the logits as they came, without a copy."""

    def __init__(self, number):
        self.number, self.logits, self.observed = number, [], 0

    def active(self):
        return True

    def edit(self, logits):
        self.logits.append(logits)
        return logits + self.number

    def edit_in_place(self, logits):
        self.logits.append(logits.clone())
        return logits.add_(self.number)

    def runs(self):
        return 1

    def observe(self, output):
        self.observed += 1


def test_nested_interceptions_keep_their_order():
    """The one that came last is outside and edits first; it sees logits that the inner one must not change."""
    model = tiny.build("mixtral")
    inner, outer = Seen(1.0), Seen(10.0)
    router = find_routers(model)[0]
    undo = [intercept(model, router, inner)]
    with torch.no_grad():
        model(input_ids=tiny.prompt(4))  # the inner one is known
        undo.append(intercept(model, router, outer))
        for _ in range(3):
            model(input_ids=tiny.prompt(4))
    for one in undo:
        one()
    assert len(inner.logits) == 4
    assert (len(outer.logits), outer.observed) == (3, 3)
    plain = inner.logits[0]
    assert all(torch.equal(logits, plain) for logits in outer.logits)
    assert all(torch.equal(logits, plain + 10) for logits in inner.logits[1:])
    assert "weight" not in vars(router.module)


def test_a_record_around_steering_sees_the_same(marked):
    runs, off = marked
    model = tiny.build("mixtral")
    found = []
    for is_off in (True, False):
        off[:] = [1] * is_off
        handle = attach(model, tiny.plan_for_experts(model, 2, positions="all"))
        with record_routing(model, probabilities=True) as record, torch.no_grad():
            for length in (3, 4, 5):
                model(input_ids=tiny.prompt(length))
            found.append((record.counts.clone(), record.mean_probability()))
        handle.remove()
    assert runs
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


class Turncoat(nn.Module):
    """A router that computes its logits in another way from its second call on."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))
        self.calls = 0

    def forward(self, hidden):
        self.calls += 1
        weight = self.weight if self.calls == 1 else self.weight.float().clone()
        return nn.functional.linear(hidden, weight)


def test_a_router_that_changes_its_ways_is_followed():
    router, edited = Turncoat(), []
    gate = MarkedGate(router, edited.append, edited.append)
    gate.learn([router.weight])
    with torch.no_grad():
        assert gate.can_run()
        _, times = gate.run(router.forward, (torch.ones(1, 4),), {})
        assert times == 1
        output, times = gate.run(router.forward, (torch.ones(1, 4),), {})
        assert (times, len(edited)) == (0, 1)  # then it runs again, under the mode
        assert torch.equal(output, torch.ones(1, 4))
        gate.learn([None])
        assert not gate.can_run()
    gate.learn([router.weight])
    assert not gate.can_run()  # gradients are wanted


def test_a_failing_router_leaves_no_mark():
    router = Turncoat()
    gate = MarkedGate(router, lambda logits: 1 / 0, lambda logits: 1 / 0)
    gate.learn([router.weight])
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        gate.run(router.forward, (torch.ones(1, 4),), {})
    assert isinstance(router.weight, nn.Parameter)
