"""Calls that steering can't follow: refused at once, never wrong in silence."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from steermoe.errors import SteeringError
from steermoe.steering.handle import attach, steer
from tests.support import steering_models as tiny


@pytest.fixture
def model():
    return tiny.build("mixtral")


def gradients(model, ids):
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return [None if weight.grad is None else weight.grad.clone() for weight in model.parameters()]


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "switch"])
def test_gradient_checkpointing(family, use_reentrant):
    """Refused before anything can run again, so it does not matter whether backward comes after the block."""
    model, ids = tiny.build(family).train(), tiny.prompt(6)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with steer(model, tiny.vector_for(model, 1), positions="all") as handle:
        with pytest.raises(
            SteeringError, match=r"gradients would be wrong: call model\.gradient_checkpointing_disable"
        ):
            model(input_ids=ids, labels=ids)
        with torch.no_grad():
            model(input_ids=ids, labels=ids)  # computes no gradients
        model.gradient_checkpointing_disable()
        gradients(model, ids)
    assert handle.report().tokens_steered
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    gradients(model, ids)


def test_gradients_without_checkpointing_are_those_of_the_steered_model(model):
    """In the block and after it."""
    ids, vector = tiny.prompt(6), tiny.vector_for(model, 1)
    usual = gradients(model, ids)
    with steer(model, vector, 20.0, positions="all"):
        steered = gradients(model, ids)
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    after = [weight.grad for weight in model.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(steered, after, strict=True) if one is not None)
    assert not all(torch.equal(one, other) for one, other in zip(steered, usual, strict=True) if one is not None)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_by_other_means(model, use_reentrant):
    """Of one layer, as remote code and other libraries arrange it, without a mark on the module."""
    layer, ids = model.model.layers[1], tiny.prompt(6)
    original = layer.forward
    layer.forward = lambda hidden, **options: checkpoint(
        lambda states: original(states, **options), hidden, use_reentrant=use_reentrant
    )
    handle = attach(model, tiny.plan_for_experts(model, 1, positions="all"))
    with pytest.raises(SteeringError, match="gradient checkpointing runs layers again"):
        model(input_ids=ids)
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    del layer.forward
    with steer(model, tiny.vector_for(model, 1), positions="all"):
        gradients(model, ids)


PACKED = {
    "generate_batch": lambda model: model.generate_batch([[3, 4, 5]]),
    "init_continuous_batching": lambda model: model.init_continuous_batching(),
    "continuous_batching_context_manager": lambda model: model.continuous_batching_context_manager().__enter__(),
}


@pytest.mark.parametrize("call", PACKED.values(), ids=PACKED)
def test_packed_batches_are_refused_at_the_call(model, call):
    vector = tiny.vector_for(model, 1)
    handle = attach(model, tiny.plan_for_experts(model, 1))
    for change in ({}, {"positions": "prompt"}, {"positions": "all", "schedule": "decay:9"}):
        handle.set(**change)
        with pytest.raises(SteeringError, match=r"packs the tokens of all texts.*use generate or `steermoe batch`"):
            call(model)
    plan = tiny.plan_for_experts(model, 2, positions="all")
    handle.set(rows=[plan, None])
    with pytest.raises(SteeringError, match="packs the tokens"):
        call(model)
    handle.remove()
    assert not set(PACKED) & set(vars(model))
    assert vector


def test_packed_batches_may_steer_all_tokens_alike(model, monkeypatch):
    calls = []
    monkeypatch.setattr(type(model), "generate_batch", lambda self, inputs: calls.append(inputs), raising=False)
    with steer(model, rows=[None]):
        model.generate_batch([[3]])
    handle = attach(model, tiny.plan_for_experts(model, 1, positions="all"))
    model.generate_batch([[4]])
    handle.set(strength=0.0)
    model.generate_batch([[5]])
    handle.remove()
    assert calls == [[[3]], [[4]], [[5]]]


@pytest.mark.parametrize("value", [[1, 4, 2], 2.0, -1, True, "3"])
def test_prompt_length_is_one_number(model, value):
    handle = attach(model, tiny.plan_for_experts(model, 1))
    before = handle.plans
    with pytest.raises(SteeringError, match=r"prompt_length is .*expected one whole number.*same for all rows"):
        handle.set(prompt_length=value, strength=2.0)
    assert handle.plans == before
    handle.remove()


def test_what_is_no_plan(model):
    vector = tiny.vector_for(model, 1)
    for use in (lambda: attach(model, vector), lambda: attach(model, rows=[None, 5.0])):
        with pytest.raises(SteeringError, match=r"is no plan: make one with plan_for\(vector\)"):
            use()
    assert tiny.traces(model) == []
