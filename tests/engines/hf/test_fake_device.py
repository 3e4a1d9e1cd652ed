"""Decoding on a GPU that is not there: nothing mixes devices, and the host waits for the device only where it is said.

Models are tiny and have no numbers there, see `tests/support/fake_device.py`: shapes, devices and waits are real.
"""

from collections import Counter

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.hf.rolling import RollingDecoder
from steermoe.engines.request import PenalisedSampling, Request, Sampling
from steermoe.routing.recording import record_routing
from steermoe.steering.handle import attach
from steermoe.steering.plans import SteeringPlan
from tests.support import steering_models as tiny
from tests.support import tiny_models
from tests.support.fake_device import FakeDevice, Wait

FAMILIES = (
    "mixtral",
    "olmoe",
    "qwen3_moe",
    "deepseek_v3",
    "gpt_oss",
    "glm4_moe",
    "granitemoe",
    "ernie4_5_moe",
    "hunyuan_v1_moe",
    "minimax_m2",
)
STEPS, TOKENS = 2, 8
GREEDY = Sampling(TOKENS, min_new_tokens=TOKENS, do_sample=False)
SAMPLED = Sampling(TOKENS, min_new_tokens=TOKENS, temperature=0.8, top_p=0.9, seed=3)
PENALISED = PenalisedSampling(
    TOKENS, min_new_tokens=TOKENS, repetition_penalty=1.3, presence_penalty=0.1, frequency_penalty=0.2
)
DRAWN = Wait("numbers", "steermoe", "rolling.py:RollingDecoder._take_tokens")
"""The tokens themselves, once for all rows: texts are made on the host, and so is the next step's steering."""
MASKED = Wait("number", "transformers", "masking_utils.py:_ignore_causal_mask_sdpa")
"""Whether attention needs a mask. Asked before the layers, when the device has nothing to do."""


@pytest.fixture(scope="module")
def gpu():
    with FakeDevice() as device:
        yield device


def build(family, device="cuda"):
    """As a GPU runs it: in bfloat16, with grouped products."""
    config = tiny_models.tiny_config(family, vocab_size=tiny.VOCABULARY)
    kind = tiny_models.model_class(family)
    if kind._can_set_experts_implementation():
        config._experts_implementation = "grouped_mm"
    with torch.device(device):
        model = kind._from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = tiny.PAD, tiny.END
    return model


@pytest.fixture(scope="module")
def model(gpu):
    return build("mixtral")


def plans_for(model):
    return [
        tiny.plan_for_experts(model, 1, 5),
        None,
        tiny.plan_for_experts(model, 2, formula="additive", schedule="decay:9"),
    ]


def requests_for(plans, sampling=GREEDY, **fields):
    return [Request(f"Once upon {row}", plan, sampling, **fields) for row, plan in enumerate(plans)]


def waits_of_steps(gpu, model, requests, late=()):
    """The waits of some decode steps, each as a counter; in the last one `late` requests join."""
    engine = HFEngine(tiny.loaded(model))
    decoder = RollingDecoder(engine.loaded, engine.end_tokens())
    decoder.start(requests, [engine.encode(request) for request in requests])
    found = []
    for number in range(STEPS):
        with gpu.waiting() as waits:
            if late and number == STEPS - 1:
                decoder.drop(requests[0])
                decoder.start(late, [engine.encode(request) for request in late])
            decoder.step()
        found.append(waits)
    with gpu.waiting() as waits:
        report = decoder.report()
    assert (report is None) == (not any(request.plan for request in requests))
    decoder.close()
    return found


def assert_waits(found, *expected):
    """What we wait for in each step; transformers waits for its masks at most."""
    for waits in found:
        assert ours(waits) == Counter(expected)
        assert waits.keys() - ours(waits).keys() <= {MASKED}
        assert waits[MASKED] <= 1


def ours(waits):
    return Counter({wait: times for wait, times in waits.items() if wait.package == "steermoe"})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_waits_for_its_tokens_alone(gpu, family):
    model = build(family)
    assert model.device.type == "cuda"
    assert_waits(waits_of_steps(gpu, model, requests_for(plans_for(model))), DRAWN)


def test_an_unsteered_step_waits_as_often(gpu, model):
    assert_waits(waits_of_steps(gpu, model, requests_for([None, None])), DRAWN)


KINDS = {
    "lists": ({"ban": ((0, 2),), "force": ((1, 3),)}, GREEDY, {}, {"editing.py:each_listed": 1}),
    "another number of experts": ({"active_experts": 3}, GREEDY, {}, {}),
    "sampled": ({}, SAMPLED, {}, {}),
    "penalties": ({}, PENALISED, {}, {}),
    "likeliest tokens": ({}, GREEDY, {"logprobs": 3}, {"decoding.py:scores_of": 1}),
    "a trace": ({}, GREEDY, {"trace": True}, {"tracing.py:RoutingTracer._stacked": 2, "sampling.py:note_logprobs": 1}),
}
"""Fields of a plan, a sampling, fields of requests, and what more the host then waits for in a step:

- lists: whether they were kept to is checked in every step, for all layers at once.
- likeliest tokens, a trace: they are what was asked for; a trace's choices come with steering and without.
"""


@pytest.mark.parametrize("kind", KINDS)
def test_what_else_a_step_waits_for(gpu, model, kind):
    fields, sampling, asked, more = KINDS[kind]
    plans = [tiny.plan_for_experts(model, 1, **fields), tiny.plan_for_experts(model, 2), None]
    expected = [Wait("numbers", "steermoe", name) for name, times in more.items() for _ in range(times)]
    assert_waits(waits_of_steps(gpu, model, requests_for(plans, sampling, **asked)), DRAWN, *expected)


def test_rows_that_come_and_go(gpu, model):
    late = requests_for([tiny.plan_for_experts(model, 4, positions="all"), None])
    *_, last = waits_of_steps(gpu, model, requests_for(plans_for(model)), late)
    assert ours(last) == Counter([DRAWN] * 2)  # the first tokens of those that join, then those of all


STOPPED = "utils.py:StopCheck.__call__"
"""Where transformers' own `generate` waits in every step: to see whether all texts have ended, and for a streamer."""
AROUND = {
    "static.py:StaticDecoder._generate",
    "handle.py:SteeringHandle.report",
    "editing.py:Tally.hits.<locals>.<genexpr>",
    "editing.py:Tally.slots",
}
"""Where we wait before and after all steps: for the prompts, the texts and the report."""
RECORDED = "recording.py:RoutingRecord._before_forward"
"""Where a record of several texts waits in every step, to see which of them have ended."""


@pytest.mark.parametrize("is_recorded", [False, True])
def test_generate_waits_where_transformers_does(gpu, model, is_recorded):
    engine = HFEngine(tiny.loaded(model))
    plans = plans_for(model) if is_recorded else plans_for(model)[:1]
    gpu.truths[:] = [False] * 12 + [True] * 12  # some are read before the first step, some for masks
    with gpu.waiting() as waits:
        done = engine.generate(requests_for(plans), on_text=None if is_recorded else str, record=is_recorded)
    gpu.truths.clear()
    steps = waits[Wait("number", "transformers", STOPPED)]
    assert 2 < steps < TOKENS
    assert waits[Wait("numbers", "transformers", STOPPED)] == (0 if is_recorded else steps)
    assert done[0].report.router_calls > 0
    own = {wait.function: times for wait, times in ours(waits).items()}
    assert own.pop(RECORDED, 0) == (steps if is_recorded else 0)
    assert own.keys() <= AROUND


def test_a_record_waits_once_for_all_layers(gpu, model):
    ids = torch.zeros(2, 5, dtype=torch.long, device="cuda")
    for probabilities in (False, True):
        with record_routing(model, probabilities=probabilities) as record, torch.no_grad(), gpu.waiting() as waits:
            model(input_ids=ids, use_cache=False)
        taken = Wait("numbers", "steermoe", "recording.py:RoutingRecord._take")
        assert ours(waits) == Counter({taken: 1 + probabilities})
        assert record.counts.sum() == 2 * 5 * tiny.LAYERS * tiny.TOP_K
        assert record.counts.device.type == "cpu"


def test_the_report_waits_only_when_it_is_asked_for(gpu, model):
    ids, mask = (torch.ones(2, 5, dtype=torch.long, device="cuda") for _ in range(2))
    handle = attach(model, rows=[tiny.plan_for_experts(model, 1, positions="all"), None])
    with torch.no_grad(), gpu.waiting() as waits:
        for _ in range(3):
            model(input_ids=ids, attention_mask=mask, use_cache=False)
            handle.verify()
    assert not ours(waits)
    with gpu.waiting() as waits:
        report = handle.report()
    assert report.router_calls == 3 * tiny.LAYERS
    assert waits
    handle.remove()


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_weights_on_two_devices(gpu, family):
    model = build(family)
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    for name in ("model.layers.1", "model.norm", "lm_head"):
        for module in model.get_submodule(name).modules():
            for kept in (module._parameters, module._buffers):
                kept.update({name: _moved(one, second) for name, one in kept.items() if one is not None})
    skipped = model._skip_keys_device_placement
    for name in ("model.layers.0", "model.layers.1", "model.norm", "lm_head"):  # as `device_map` does
        place = first if name == "model.layers.0" else second
        add_hook_to_module(model.get_submodule(name), AlignDevicesHook(place, skip_keys=skipped))
    add_hook_to_module(model, AlignDevicesHook(first, io_same_device=True, skip_keys=skipped))
    assert {weight.device.index for weight in model.parameters()} == {0, 1}
    plans = [*plans_for(model), tiny.plan_for_experts(model, 1, ban=((0, 2),)), SteeringPlan(active_experts=1)]
    for waits in waits_of_steps(gpu, model, requests_for(plans)):
        assert ours(waits) == Counter([DRAWN, Wait("numbers", "steermoe", "editing.py:each_listed")])


def _moved(one, device):
    moved = torch.empty_like(one.detach(), device=device)
    return torch.nn.Parameter(moved, requires_grad=False) if isinstance(one, torch.nn.Parameter) else moved


@pytest.mark.parametrize("family", FAMILIES[:5])
def test_on_meta(gpu, family):
    """A model without any numbers is steered and recorded too."""
    model = build(family, "meta")
    ids = torch.zeros(3, 4, dtype=torch.long, device="meta")
    handle = attach(model, rows=plans_for(model))
    with torch.no_grad(), record_routing(model) as record, gpu.waiting() as waits:
        output = model(input_ids=ids, use_cache=True)
        model(input_ids=ids[:, :1], past_key_values=output.past_key_values, use_cache=True)
    assert output.logits.is_meta
    assert record.counts.shape == (3, tiny.LAYERS, tiny.EXPERTS)
    assert handle.report().router_calls == tiny.LAYERS
    handle.remove()
    assert {wait.function for wait in ours(waits)} == {"recording.py:RoutingRecord._take"}


# ---- the device itself ----

WAITING = {
    "number": (lambda one: one.sum().item(), lambda one: bool(one[0, 0] > 0), lambda one: int(one[0, 0])),
    "numbers": (lambda one: one.tolist(), lambda one: one.cpu(), lambda one: torch.zeros(2, 3).copy_(one)),
    "mask": (lambda one: one.__setitem__(one > 0, 0),),
    "sent": (
        lambda one: torch.tensor([1, 2], device="cuda"),
        lambda one: one[torch.tensor([0, 1])],
        lambda one: torch.zeros(3).to(one.device),
    ),
}


@pytest.mark.parametrize("what", WAITING)
def test_a_wait_is_noticed(gpu, what):
    one = torch.ones(2, 3, device="cuda")
    for operation in WAITING[what]:
        with gpu.waiting() as waits:
            operation(one)
        assert [(wait.what, times) for wait, times in waits.items()] == [(what, 1)]


def test_what_does_not_wait(gpu):
    one = torch.ones(2, 3, device="cuda")
    with gpu.waiting() as waits:
        sent = torch.tensor([0, 1]).to(one.device, non_blocking=True)
        one[sent, :2] = one[:, None, -1] * 2
        two = one.to("cuda:1").masked_fill(torch.ones(2, 3, dtype=torch.bool, device="cuda:1"), 0.0)
    assert not waits
    assert (one.device.index, two.device.index, two.shape) == (0, 1, (2, 3))


@pytest.mark.parametrize("other", ["cpu", "cuda:1"])
def test_devices_that_mix_are_an_error(gpu, other):
    one, two = torch.ones(2, 3, device="cuda"), torch.ones(2, 3, device=other)
    for operation in (torch.add, torch.mul, lambda a, b: torch.where(a > 0, a, b), lambda a, b: torch.cat([a, b])):
        with pytest.raises(RuntimeError, match="device"):
            operation(one, two)


def test_a_shape_that_depends_on_numbers_is_an_error(gpu):
    one = torch.ones(2, 3, device="cuda")
    for operation in (lambda a: a.nonzero(), torch.unique, lambda a: a[a > 0]):
        with pytest.raises(DynamicOutputShapeException):
            operation(one)
