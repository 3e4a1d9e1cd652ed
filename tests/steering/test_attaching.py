"""What attaching refuses, what raises at the end, and that nothing is ever left behind."""

import gc

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from transformers import LlamaConfig, LlamaForCausalLM

from steermoe.errors import CompatibilityError, SteeringError, UnsupportedModel
from steermoe.routing.recording import record_routing
from steermoe.routing.routers import find_routers
from steermoe.routing.shape import RouterShape, RoutingShape
from steermoe.steering.handle import attach, steer
from steermoe.steering.plans import SteeringPlan
from steermoe.steering.tables import check_plan
from steermoe.vectors.vector import SteeringVector
from tests.support import steering_models as tiny


@pytest.fixture(scope="module")
def shared():
    return tiny.build("mixtral")


@pytest.fixture
def model(shared):
    yield shared
    assert tiny.traces(shared) == []


def vector_of_shape(layers: int, experts: int) -> SteeringVector:
    frequency = torch.full((layers, experts), 0.5 / (experts - 1))
    frequency[:, 0] = 0.5
    return SteeringVector("odd", frequency, tuple(range(layers)))


def flat_vector(model) -> SteeringVector:
    layers = len(find_routers(model))
    return SteeringVector("flat", torch.full((layers, tiny.EXPERTS), 1 / tiny.EXPERTS), tuple(range(layers)))


@pytest.mark.parametrize(
    ("fields", "error", "parts"),
    [
        (lambda m: {"vector": vector_of_shape(3, 8)}, CompatibilityError, ["3x8", "2x8", "build one"]),
        (lambda m: {"vector": vector_of_shape(2, 16)}, CompatibilityError, ["2x16", "2x8"]),
        (lambda m: {"vector": flat_vector(m)}, SteeringError, ["'flat'", "threshold 3", "lower the threshold"]),
        (lambda m: {"vector": tiny.vector_for(m), "layers": (2, 5)}, SteeringError, ["2-5 hold no router", "0-1"]),
        (lambda m: {"force": ((0, 8),)}, SteeringError, ["(0, 8) does not exist", "experts 0 to 7"]),
        (lambda m: {"ban": ((2, 0),)}, SteeringError, ["(2, 0) does not exist", "layers 0-1"]),
        (lambda m: {"force": ((0, 1),), "layers": (1, 1)}, SteeringError, ["nothing would be steered"]),
        (lambda m: {"force": ((0, 1), (0, 2), (0, 3))}, SteeringError, ["3 experts are forced", "force at most 2"]),
        (lambda m: {"ban": tuple((0, e) for e in range(7))}, SteeringError, ["7 of 8", "ban at most 6"]),
    ],
)
def test_plans_that_do_not_fit(model, fields, error, parts):
    for rows in (1, 2):
        with pytest.raises(error) as caught:
            attach(model, rows=[SteeringPlan(**fields(model)), None][:rows])
        for part in parts:
            assert part in str(caught.value)
        assert tiny.traces(model) == []


def test_wrong_arguments(model):
    plan = tiny.plan_for_experts(model, 1)
    with pytest.raises(SteeringError, match="not both and not neither"):
        attach(model)
    with pytest.raises(SteeringError, match="not both and not neither"):
        attach(model, plan, rows=[plan])
    with pytest.raises(SteeringError, match="no plans given"):
        attach(model, rows=[])
    with pytest.raises(SteeringError, match="not both"), steer(model, plan.vector, rows=[plan]):
        pass


def test_dense_model():
    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(UnsupportedModel, match="dense"):
        attach(dense, SteeringPlan(ban=((0, 0),)))
    assert tiny.traces(dense) == []


def test_failed_attach_leaves_nothing(model, monkeypatch):
    """The second router can't be intercepted; all is as it was, and attaching works again."""
    import steermoe.steering

    plan, intercept, calls = tiny.plan_for_experts(model, 1), steermoe.steering.handle.intercept, []

    def fails_later(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("no")
        return intercept(*args)

    with monkeypatch.context() as patch:
        patch.setattr(steermoe.steering.handle, "intercept", fails_later)
        with pytest.raises(RuntimeError, match=r"^no$"):
            attach(model, plan)
    assert tiny.traces(model) == []
    attach(model, plan).remove()


def test_remove_is_idempotent(model):
    handle = attach(model, tiny.plan_for_experts(model, 1))
    handle.remove()
    handle.remove()
    other = attach(model, tiny.plan_for_experts(model, 2))
    handle.remove()  # of the first: the second stays
    with tiny.watched(model) as chosen:
        tiny.continued(model, tiny.prompt(4), 3)
    assert other.report().tokens_steered == 2
    other.remove()
    assert chosen


def test_a_second_handle_is_refused(model):
    vector = tiny.vector_for(model, 1)
    with steer(model, vector) as handle:
        for wrapped in (model, torch.nn.Sequential(model)):
            with pytest.raises(SteeringError, match=r"steered already.*handle.set.*mix.*remove"):
                attach(wrapped, SteeringPlan(vector))
        tiny.continued(model, tiny.prompt(4), 3)  # continues undisturbed
    assert handle.report().tokens_steered == 2
    with steer(model, vector):  # and is possible again
        tiny.continued(model, tiny.prompt(4), 3)


def test_models_are_not_kept_alive():
    import weakref

    model = tiny.build("mixtral")
    handle = attach(model, tiny.plan_for_experts(model, 1))
    alive = weakref.ref(model)
    handle.remove()
    del model, handle
    gc.collect()
    assert alive() is None


def test_exceptions_keep_their_own_error(model):
    vector = tiny.vector_for(model, 1)
    for error in (KeyError("mine"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, steer(model, vector):
            raise error
        assert caught.value is error
        assert caught.value.__context__ is None
        assert tiny.traces(model) == []
    with pytest.raises(IndexError), steer(model, vector, positions="all"):  # inside a forward call
        tiny.continued(model, torch.tensor([[tiny.VOCABULARY]]))


# ---- steering that was asked for and did not happen ----


def test_nothing_generated(model):
    vector = tiny.vector_for(model, 1)
    with (
        pytest.raises(SteeringError, match=r"none of the 4 tokens .* \(positions generated\).*positions='all'"),
        steer(model, vector),
        torch.no_grad(),
    ):
        model(input_ids=tiny.prompt(4))
    with pytest.raises(SteeringError, match="was not called"), steer(model, vector):
        pass
    with pytest.raises(SteeringError, match="was not called"), steer(model, vector), torch.no_grad():
        model.model(input_ids=tiny.prompt(4))  # past the model's own forward
    with steer(model, vector, 0.0), torch.no_grad():  # asked for nothing
        model(input_ids=tiny.prompt(4))
    with steer(model, rows=[None]):
        pass


def test_a_bypassed_router(model):
    """Something sets a router's forward anew while steering is on."""
    router = find_routers(model)[1]
    original = router.module.forward

    def generate() -> None:
        with steer(model, tiny.vector_for(model, 1)):
            tiny.continued(model, tiny.prompt(4), 3)  # these are steered
            ours, router.module.forward = router.module.forward, original
            tiny.continued(model, tiny.prompt(4), 3)
            router.module.forward = ours

    with pytest.raises(SteeringError, match=r"1 of 2 routers .* bypassed .*layers\.1.*in 2 forward calls"):
        generate()
    assert tiny.traces(model) == []


def test_a_router_that_steering_does_not_want_may_be_bypassed(model):
    router = find_routers(model)[1]
    original = router.module.forward
    with steer(model, tiny.vector_for(model, 1), layers=(0, 0)):
        ours, router.module.forward = router.module.forward, original
        tiny.continued(model, tiny.prompt(4), 3)
        router.module.forward = ours


@pytest.mark.parametrize("order", ["inside", "theirs first", "theirs stays", "theirs goes"])
def test_accelerate_in_every_order(model, order):
    """Accelerate swaps routers' forward too. In every order, steering works and nothing is left behind."""
    router, ids, vector = find_routers(model)[0].module, tiny.prompt(4), tiny.vector_for(model, 1, 5)
    usual = tiny.continued(model, ids)
    with steer(model, vector, 5.0):
        steered = tiny.continued(model, ids)
    if order in ("theirs first", "theirs goes"):
        add_hook_to_module(router, ModelHook())
    handle = attach(model, tiny.plan_for_experts(model, 1, 5, strength=5.0))
    if order in ("inside", "theirs stays"):
        add_hook_to_module(router, ModelHook())
    assert tiny.continued(model, ids) == steered
    if order in ("inside", "theirs goes"):
        remove_hook_from_module(router)
        assert tiny.continued(model, ids) == steered
    handle.verify()
    handle.remove()
    assert tiny.continued(model, ids) == usual
    remove_hook_from_module(router)
    router.__dict__.pop("forward", None)  # accelerate leaves the original there
    assert tiny.continued(model, ids) == usual


def test_recording_and_steering_come_and_go_in_any_order(model):
    ids, plan = tiny.prompt(4), tiny.plan_for_experts(model, 1, 5)
    recording = record_routing(model, "generated")
    handle = attach(model, plan)
    record = recording.__enter__()
    tiny.continued(model, ids, 3)
    handle.remove()
    tiny.continued(model, ids, 3)
    recording.__exit__(None, None, None)
    assert handle.report().tokens_steered == 2
    assert record.tokens.tolist() == [4]


def test_layers_without_a_router_are_left_out_of_messages():
    shape = RoutingShape("sparse", (), tuple(RouterShape(layer, 8, 8, 2) for layer in (1, 3)))
    with pytest.raises(SteeringError, match="sparse has routers in layers 1, 3, experts 0 to 7"):
        check_plan(shape, SteeringPlan(ban=((2, 0),)))
    with pytest.raises(SteeringError, match="layers 2-2 hold no router: the model has them in 1, 3"):
        check_plan(shape, SteeringPlan(ban=((1, 0),), layers=(2, 2)))
