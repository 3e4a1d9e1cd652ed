"""Threads that share a steered model take turns, and a change of the steering waits for the next forward call."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.request import Request, Sampling
from steermoe.routing.recording import record_routing
from steermoe.routing.routers import find_routers
from steermoe.routing.tracker import turn_of
from steermoe.steering.handle import attach, steer
from tests.support import steering_models as tiny

SECONDS = 60


@pytest.fixture
def model():
    yield (built := tiny.build("mixtral"))
    assert tiny.traces(built) == []


def in_threads(calls):
    """What the calls return, each run in a thread of its own."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(SECONDS) for future in [pool.submit(call) for call in calls]]


def test_four_threads_generate(model):
    """Prompts of different lengths, so that a position taken from another thread's text would show."""
    prompts = [tiny.prompt(length, seed=length) for length in (2, 5, 9, 14)] * 4
    handle = attach(model, tiny.plan_for_experts(model, 1, strength=20.0, schedule="window:2-5"))
    alone = [tiny.continued(model, ids, 8) for ids in prompts]
    assert in_threads([lambda ids=ids: tiny.continued(model, ids, 8) for ids in prompts]) == alone
    handle.remove()


def test_threads_that_call_the_model_directly(model):
    handle = attach(model, tiny.plan_for_experts(model, 1, strength=20.0))
    alone = [tiny.step_by_step(model, handle, tiny.prompt(3, seed=seed), 1)[0] for seed in range(8)]
    handle.set(positions="all")

    def call(seed):
        with torch.no_grad():
            return model(input_ids=tiny.prompt(3 + seed, seed=seed)).logits

    alone = [call(seed) for seed in range(8)]
    for got, expected in zip(in_threads([lambda s=s: call(s) for s in range(8)]), alone, strict=True):
        assert torch.equal(got, expected)
    handle.remove()


def test_steering_and_recording_wait_for_one_turn(model):
    """One thread begins with the steering's hooks, the other with the recording's `generate`: two locks would block."""
    with steer(model, tiny.vector_for(model, 1)), record_routing(model):

        def call():
            for _ in range(10):
                model(input_ids=tiny.prompt(4))

        in_threads([call, lambda: [tiny.continued(model, tiny.prompt(4), 2) for _ in range(10)]])


def test_a_failed_call_ends_its_turn(model):
    handle = attach(model, tiny.plan_for_experts(model, 1, positions="all"))
    for use in (
        lambda: model(input_ids=torch.tensor([[tiny.VOCABULARY]])),
        lambda: model(unknown=1),
        lambda: tiny.continued(model, torch.tensor([[tiny.VOCABULARY]])),
    ):
        with pytest.raises((IndexError, TypeError, ValueError)):
            use()
        (free,) = in_threads([lambda: turn_of(model).acquire(timeout=SECONDS) and not turn_of(model).release()])
        assert free
    handle.remove()


def test_removing_waits_and_frees_the_turn(model):
    """Also inside a forward call, whose end is then not told."""
    handle = attach(model, tiny.plan_for_experts(model, 1, positions="all"))
    hook = find_routers(model)[0].module.register_forward_pre_hook(lambda module, args: handle.remove())
    model(input_ids=tiny.prompt(4))
    hook.remove()
    (free,) = in_threads([lambda: turn_of(model).acquire(timeout=SECONDS) and not turn_of(model).release()])
    assert free


def test_a_change_from_another_thread_waits_for_the_next_call(model):
    """From three rows of plans to one plan, in the middle of a forward call."""
    ids = torch.cat([tiny.prompt(4, seed=seed) for seed in range(3)])
    one, other = (tiny.plan_for_experts(model, expert, strength=20.0, positions="all") for expert in (1, 5))
    handle = attach(model, rows=[one, None, other])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        handle.set(one)
        after = model(input_ids=ids).logits
        handle.set(rows=[one, None, other])

        def change(module, args):
            in_threads([lambda: handle.set(one)])

        hook = find_routers(model)[0].module.register_forward_pre_hook(change)
        during = model(input_ids=ids).logits
        hook.remove()
        assert torch.equal(during, expected)
        assert torch.equal(model(input_ids=ids).logits, after)
    assert handle.plans == (one,)
    handle.remove()


def test_changes_while_threads_generate(model):
    """Every change is a complete one: at strength 0 or at 20, never between, and no thread fails."""
    handle, stop = attach(model, tiny.plan_for_experts(model, 1, positions="all")), threading.Event()
    plans = [handle.plans[0], tiny.plan_for_experts(model, 5, positions="all", strength=20.0)]

    def change():
        while not stop.is_set():
            handle.set(rows=[plans[0], None])
            handle.set(plans[1])
            handle.set(strength=3.0)
            handle.report()

    changer = threading.Thread(target=change)
    changer.start()
    try:
        texts = in_threads([lambda: tiny.continued(model, tiny.prompt(4, rows=2), 12)] * 2)
    finally:
        stop.set()
        changer.join(SECONDS)
    assert [len(row) for rows in texts for row in rows] == [12] * 4
    handle.remove()


def test_an_engine_in_several_threads(model):
    engine = HFEngine(tiny.loaded(model))
    requests = [
        Request(f"{number} dogs", tiny.plan_for_experts(model, number, strength=20.0), Sampling(6, seed=number))
        for number in (1, 2, 3, 4)
    ]
    alone = [engine.generate([request])[0].token_ids for request in requests]
    together = in_threads([lambda one=one: engine.generate([one])[0].token_ids for one in requests])
    assert together == alone
