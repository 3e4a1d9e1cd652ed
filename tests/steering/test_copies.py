"""Copies of a steered or recorded model: they run their own weights, unsteered, and can be steered themselves."""

import copy
import io
import multiprocessing
import pickle

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from steermoe.errors import SteeringError
from steermoe.routing.recording import record_routing
from steermoe.routing.routers import find_routers
from steermoe.steering.handle import attach, steer
from tests.support import steering_models as tiny


@pytest.fixture
def model():
    return tiny.build("mixtral")


def saved(model):
    """As `torch.save` writes it and `torch.load` reads it."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "average": lambda model: AveragedModel(model).module, "torch.save": saved}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "switch"])
def test_a_copy_of_a_steered_model_is_unsteered_and_its_own(make, family):
    model, ids = tiny.build(family), tiny.prompt(4)
    usual, other = tiny.continued(model, ids), tiny.build(family, seed=1)
    with steer(model, tiny.vector_for(model, 1), 20.0) as handle, record_routing(model, probabilities=True) as record:
        steered = tiny.continued(model, ids)
        seen, tokens = handle.report(), record.tokens.clone()
        twin = make(model)
        assert tiny.continued(twin, ids) == usual
        twin.load_state_dict(other.state_dict())  # it does not run the weights of the original
        assert tiny.continued(twin, ids) == tiny.continued(other, ids)
        with steer(twin, tiny.vector_for(twin, 3), 20.0) as own:
            tiny.continued(twin, ids)
        assert own.report().tokens_steered
        assert handle.report() == seen  # the original's report counts nothing of the copy's
        assert torch.equal(record.tokens, tokens)
        assert tiny.continued(model, ids, 6) == steered
    assert tiny.continued(model, ids) == usual
    assert tiny.traces(model) == []


def test_a_copy_keeps_no_part_of_the_original(model):
    with steer(model, tiny.vector_for(model, 1), positions="all") as handle:
        tiny.continued(model, tiny.prompt(4))
        twin = copy.deepcopy(model)
    assert handle.report().tokens_steered
    own = {id(module) for module in twin.modules()}
    for router in find_routers(twin):
        assert id(router.module.forward.__self__) in own
    assert twin.generate.__self__ is twin


@pytest.mark.parametrize("use", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_handle_is_not_copied(model, use):
    handle = attach(model, tiny.plan_for_experts(model, 1))
    with pytest.raises(SteeringError, match="a handle belongs to its model and can't be copied or saved"):
        use(handle)
    handle.remove()
    assert tiny.traces(model) == []


def _continue(model, ids, answer):
    answer.put(tiny.continued(model, ids))


def test_a_spawned_process_gets_an_unsteered_model(model):
    ids = tiny.prompt(4)
    usual, context = tiny.continued(model, ids), multiprocessing.get_context("spawn")
    answer = context.Queue()
    with steer(model, tiny.vector_for(model, 1), 20.0):
        tiny.continued(model, ids)
        process = context.Process(target=_continue, args=(model, ids, answer))
        process.start()
    assert answer.get(timeout=60) == usual
    process.join()


@pytest.mark.parametrize("family", ["mixtral", "switch"])
def test_replicas_of_data_parallel_are_refused(family):
    """They share the original's routers, and with them its weights."""
    model, ids = tiny.build(family), tiny.prompt(4)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if family == "switch" else {})
    handle = attach(model, tiny.plan_for_experts(model, 1))
    replica = model._replicate_for_data_parallel()
    with pytest.raises(SteeringError, match=r"nn\.DataParallel.*DistributedDataParallel"):
        replica(**inputs)
    handle.remove()
    model(**inputs)


def test_a_layer_that_is_copied_alone(model):
    """As some trainers copy a part for reference."""
    layer = model.model.layers[0].mlp
    hidden = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    usual = layer(hidden)
    with steer(model, tiny.vector_for(model, 1), positions="all") as handle:
        tiny.continued(model, tiny.prompt(4))
        assert torch.equal(copy.deepcopy(layer)(hidden), usual)
    assert handle.report().tokens_steered
