"""detach: the model is as it was, whatever was attached, and other libraries' hooks stay."""

import copy

import pytest
import torch

import steermoe
from steermoe.routing.recording import record_routing
from steermoe.steering.handle import attach
from tests.routing.test_routers import TrainedCopy
from tests.support import steering_models as tiny


@pytest.fixture
def model():
    return tiny.build("mixtral")


def logits(model):
    with torch.no_grad():
        return model(tiny.prompt(8)).logits


def test_a_lost_handle(model):
    before = logits(model)
    attach(model, tiny.plan_for_experts(model, 1, positions="all"))  # nothing keeps the handle
    assert not torch.equal(logits(model), before)
    assert steermoe.detach(model)
    assert torch.equal(logits(model), before)
    assert tiny.traces(model) == []
    assert not steermoe.detach(model)
    attach(model, tiny.plan_for_experts(model, 2)).remove()  # it can be steered again


def test_a_handle_that_is_not_lost(model):
    with steermoe.steer(model, tiny.vector_for(model, 1), positions="all") as handle:
        logits(model)
        assert steermoe.detach(model)
        handle.remove()
    assert tiny.traces(model) == []


def test_recording(model):
    watching = record_routing(model, probabilities=True)
    watching.__enter__()
    assert tiny.traces(model)
    assert steermoe.detach(model)
    assert tiny.traces(model) == []
    watching.__exit__(None, None, None)
    assert tiny.traces(model) == []


def test_hooks_of_others_stay(model):
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    attach(model, tiny.plan_for_experts(model, 1))
    assert steermoe.detach(model)
    logits(model)
    assert calls == [1]
    hook.remove()
    assert tiny.traces(model) == []


def test_a_copy_has_nothing_to_take_off(model):
    attach(model, tiny.plan_for_experts(model, 1))
    twin = copy.deepcopy(model)
    assert not steermoe.detach(twin)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in twin.modules())
    assert steermoe.detach(model)


def test_a_model_whose_routers_were_copied_since(model):
    """As PEFT does where it trains a router: the copy is used, beside the original with what was attached to it."""
    before = logits(model)
    attach(model, tiny.plan_for_experts(model, 1, positions="all"))
    for layer in model.model.layers:
        layer.mlp.gate = TrainedCopy(layer.mlp.gate, "default")
    assert steermoe.detach(model)
    assert torch.equal(logits(model), before)
    assert not steermoe.detach(model)
    hooks = [(module._forward_hooks, module._forward_pre_hooks) for module in model.modules()]
    assert not any(before or after for before, after in hooks)


def test_through_a_wrapper(model):
    attach(model, tiny.plan_for_experts(model, 1))
    assert steermoe.detach(torch.nn.Sequential(model))
    assert tiny.traces(model) == []
