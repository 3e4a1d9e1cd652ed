"""Attaching, swapping, reporting and removing, in transformers' own ways of generating."""

from dataclasses import replace

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, pipeline

from steermoe import record_routing
from steermoe.errors import SteeringError
from steermoe.routing.routers import find_routers
from steermoe.steering.handle import attach, steer
from steermoe.steering.plans import SteeringPlan
from steermoe.vectors.mixing import mix
from tests.support import steering_models as tiny

ALL = [*tiny.CAUSAL, "switch"]


@pytest.fixture(scope="module")
def models():
    return {family: tiny.build(family) for family in ALL}


@pytest.fixture
def model(models):
    yield models["mixtral"]
    assert tiny.traces(models["mixtral"]) == []


# ---- what is steered ----


@pytest.mark.parametrize("family", ALL)
def test_steers_and_leaves_nothing(models, family):
    model, ids = models[family], tiny.prompt(6, rows=2)
    before = tiny.continued(model, ids)
    with steer(model, tiny.vector_for(model, 1, 5), 5.0) as handle:
        steered = tiny.continued(model, ids)
        assert tiny.continued(model, ids) == steered  # another call in the same block
    assert steered != before
    assert handle.report().tokens_steered == 2 * 2 * 5
    assert tiny.continued(model, ids) == before
    assert tiny.traces(model) == []


@pytest.mark.parametrize("family", ALL)
def test_strength_0_is_bit_identical(models, family):
    model, call = models[family], {"input_ids": tiny.prompt(5)}
    if family == "switch":
        call["decoder_input_ids"] = tiny.prompt(3)
    with torch.no_grad():
        before = model(**call).logits
        with steer(model, tiny.vector_for(model, 1), 0.0, positions="all") as handle:
            assert torch.equal(model(**call).logits, before)
    assert handle.report().router_calls == 0


@pytest.mark.parametrize("positions", ["generated", "prompt", "all"])
@pytest.mark.parametrize("family", ALL)
def test_positions(models, family, positions):
    """Which router calls of a real generation chose the expert, call by call: the prompt's first, then the tokens'."""
    model = models[family]
    layer = find_routers(model)[-1].layer  # a decoder's
    plan = SteeringPlan(force=((layer, 3),), positions=positions)
    with tiny.watched(model) as chosen, steer(model, rows=[plan]) as handle:
        tiny.continued(model, tiny.prompt(5), 4)
    forced = [bool((call == 3).any(-1).all()) for call in chosen[-1]]
    assert forced[0] or positions == "generated"
    assert all(forced[1:]) or positions == "prompt"
    seen = {"encoder": 5, "prompt": 1} if family == "switch" else {"encoder": 0, "prompt": 5}
    expected = {"prompt": seen["encoder"] + seen["prompt"], "generated": 3}
    expected["all"] = sum(expected.values())
    assert handle.report().tokens_steered == expected[positions]
    assert handle.report().tokens_seen == expected["all"]


def test_encoder_is_steered_with_the_prompt_and_by_generate_too(models):
    model = models["switch"]
    encoder = find_routers(model)[0]
    assert encoder.stack == "encoder"
    with tiny.watched(model) as chosen, steer(model, force=((encoder.layer, 6),), positions="prompt") as handle:
        tiny.continued(model, tiny.prompt(5), 3)
    assert [call.flatten().tolist() for call in chosen[0]] == [[6] * 5]
    assert handle.report().router_calls == 1
    assert handle.report().vector_share == 5 / 6  # the decoder's first token belongs to the prompt, and chooses freely


@pytest.mark.parametrize(
    ("schedule", "steered"), [("constant", [0, 1, 2, 3, 4]), ("decay:3", [0, 1, 2]), ("window:1-3", [1, 2])]
)
def test_schedule_in_a_real_generation(model, schedule, steered):
    plan = SteeringPlan(force=((0, 3), (0, 4)), schedule=schedule)
    with tiny.watched(model) as chosen, steer(model, rows=[plan]) as handle:
        tiny.continued(model, tiny.prompt(4), 6)
    forced = [number for number, call in enumerate(chosen[0][1:]) if set(call.flatten().tolist()) == {3, 4}]
    assert forced == steered
    assert handle.report().tokens_steered == handle.report().router_calls == len(steered)


def test_decay_falls_linearly(model):
    """Decode step i under decay:4 equals that step under a constant strength of (1 - i/4) times as much."""
    ids, plan = tiny.prompt(4), tiny.plan_for_experts(model, 1, 5, strength=8.0)
    handle = attach(model, replace(plan, schedule="decay:4"))
    decayed = tiny.step_by_step(model, handle, ids, 6)
    handle.set(plan)
    by_hand = tiny.step_by_step(
        model, handle, ids, 6, lambda step: handle.set(strength=max(0.0, 8.0 * (1 - max(0, step - 1) / 4)))
    )
    handle.remove()
    assert torch.equal(torch.stack(decayed), torch.stack(by_hand))


def test_layer_range(model):
    vector = tiny.vector_for(model, 1, 5)
    with tiny.watched(model) as chosen, steer(model, vector, 9.0, layers=(1, 1), positions="all") as handle:
        tiny.continued(model, tiny.prompt(8), 1)
    with tiny.watched(model) as unsteered:
        tiny.continued(model, tiny.prompt(8), 1)
    assert torch.equal(chosen[0][0], unsteered[0][0])
    assert chosen[1][0].sort(-1).values.tolist() == [[1, 5]] * 8
    assert handle.report().router_calls == 1


def test_negative_strength_steers_away(model):
    share = {}
    for strength in (-3.0, 0.0, 3.0):
        with record_routing(model, "generated") as record, steer(model, tiny.vector_for(model, 1), strength):
            tiny.continued(model, tiny.prompt(8, rows=8), 8)
        share[strength] = float(record.frequency()[:, :, 1].mean())
    assert share[-3.0] == 0.0 < share[0.0] < share[3.0] == 0.5


@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_force_and_ban(models, family):
    model = models[family]
    with tiny.watched(model) as usual:
        tiny.continued(model, tiny.prompt(6, rows=4), 1)
    common, rare = (
        int(f(usual[0][0].flatten().bincount(minlength=tiny.EXPERTS))) for f in (torch.argmax, torch.argmin)
    )
    plan = SteeringPlan(tiny.vector_for(model, common), force=((0, rare), (1, 2)), ban=((0, common),), positions="all")
    with tiny.watched(model) as chosen, steer(model, rows=[plan]):
        tiny.continued(model, tiny.prompt(6, rows=4), 4)
    for call in chosen[0]:
        assert (call == rare).any(-1).all()
        assert not (call == common).any()
    assert all((call == 2).any(-1).all() for call in chosen[1])


def test_mixture_raises_all_its_experts(model):
    mixture = mix([(tiny.vector_for(model, 1), 0.5), (tiny.vector_for(model, 5, domain="food"), 0.5)])
    with tiny.watched(model) as chosen, steer(model, mixture, 12.0) as handle:
        tiny.continued(model, tiny.prompt(6, rows=3), 4)
    assert all(sorted(token) == [1, 5] for calls in chosen for call in calls[1:] for token in call.tolist())
    assert handle.report().vector_share == 1.0


# ---- one plan per row ----


def row_plans(model) -> list[SteeringPlan | None]:
    return [
        tiny.plan_for_experts(model, 1),
        None,
        tiny.plan_for_experts(model, 2, 6, formula="additive", strength=20.0),
        tiny.plan_for_experts(model, 4, formula="max_scaled", scale="paper", strength=-2.0, positions="all"),
        SteeringPlan(force=((1, 7),), ban=((0, 0),), schedule="window:1-4"),
        tiny.plan_for_experts(model, 3, schedule="decay:5", layers=(1, 1)),
    ]


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("family", ALL)
def test_each_row_as_alone(models, family, options):
    model = models[family]
    if family == "switch":
        if options:
            pytest.skip("an encoder-decoder's cache is another")
        plans = [tiny.plan_for_experts(model, 1), None, tiny.plan_for_experts(model, 2, formula="additive")]
    else:
        plans = row_plans(model)
    prompts = [tiny.prompt(3 + number % 3, seed=number) for number in range(len(plans))]
    outcome = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    outcome |= {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    batch = tiny.left_padded(prompts)
    if family == "switch":  # an encoder is padded on the right
        batch = {
            name: torch.cat(
                [row.roll(int(m.sum()), 0)[None] for row, m in zip(tensor, batch["attention_mask"], strict=True)]
            )
            for name, tensor in batch.items()
        }
    with steer(model, rows=plans) as handle:
        together = model.generate(**batch, **outcome, **options)
    seen = steered = 0
    for row, (plan, ids) in enumerate(zip(plans, prompts, strict=True)):
        with steer(model, rows=[plan]) as alone_handle:
            alone = model.generate(ids, attention_mask=torch.ones_like(ids), **outcome, **options)
        for step, logits in enumerate(alone.logits):
            torch.testing.assert_close(together.logits[step][row], logits[0], atol=2e-4, rtol=1e-4)
        seen += alone_handle.report().tokens_seen
        steered += alone_handle.report().tokens_steered
    assert (handle.report().tokens_seen, handle.report().tokens_steered) == (seen, steered)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}])
def test_rows_under_beams(model, options):
    plans, ids = [tiny.plan_for_experts(model, 1), None], tiny.prompt(5, rows=2)
    with steer(model, rows=plans):
        together = tiny.continued(model, ids, **options)
    each = len(together) // 2
    with steer(model, rows=plans[:1]):
        assert together[:each] == tiny.continued(model, ids[:1], **options)
    assert together[each:] == tiny.continued(model, ids[1:], **options)


def test_equal_plans_are_one(model):
    """Equal plans, though separate objects, take the fast path of one plan for all."""
    vector = tiny.vector_for(model, 1)
    with steer(model, rows=[SteeringPlan(vector, 3.0), SteeringPlan(vector, 3.0)]) as by_row:
        rows = tiny.continued(model, tiny.prompt(4, rows=2))
    with steer(model, vector, 3.0) as handle:
        assert tiny.continued(model, tiny.prompt(4, rows=2)) == rows
    assert by_row.report() == handle.report()


def test_rows_that_do_not_fit_the_batch(model):
    with (
        pytest.raises(SteeringError, match="2 row plans can't be laid over 3 rows"),
        steer(model, rows=row_plans(model)[:2]),
    ):
        tiny.continued(model, tiny.prompt(4, rows=3))


# ---- ways of generating ----


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 2},
        {"cache_implementation": "static", "prefill_chunk_size": 2},
    ],
    ids=lambda options: "+".join(options),
)
@pytest.mark.parametrize("positions", ["generated", "prompt", "all"])
@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_same_tokens_however_they_are_computed(models, family, positions, options):
    model, ids = models[family], tiny.prompt(3).repeat(1, 3)  # repeated, so that the lookup finds drafts
    plan = tiny.plan_for_experts(model, 1, 5, positions=positions, schedule="decay:9")
    with steer(model, rows=[plan]) as usual:
        expected = tiny.continued(model, ids)
    with steer(model, rows=[plan]) as handle:
        assert tiny.continued(model, ids, **options) == expected
    if "prompt_lookup_num_tokens" not in options:  # drafts count too
        ours, theirs = handle.report(), usual.report()
        assert (ours.tokens_seen, ours.tokens_steered) == (theirs.tokens_seen, theirs.tokens_steered)
        assert ours.vector_share == pytest.approx(theirs.vector_share)


def test_inputs_embeds(model):
    ids, plan = tiny.prompt(5), tiny.plan_for_experts(model, 1, 5)
    with steer(model, rows=[plan]):
        expected = tiny.continued(model, ids)
        assert tiny.continued(model, inputs_embeds=model.get_input_embeddings()(ids)) == expected


def test_pipeline(model):
    tokenizer = tiny.byte_tokenizer()
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "return_full_text": False}
    texts = ["Once upon", "A dog"]
    before = generate(texts, batch_size=2, **options)
    with steer(model, tiny.vector_for(model, 1, 5), 5.0) as handle:
        steered = generate(texts, batch_size=2, **options)
    assert steered != before
    assert handle.report().tokens_steered == 14
    assert handle.report().tokens_seen == len("Once upon") + len("A dog") + 14
    assert generate(texts, batch_size=2, **options) == before


def test_bfloat16_is_steered_in_float32():
    """The logits given to top-k are bfloat16 again, but rounded once, from a float32 sum."""
    model = tiny.build("qwen3_moe").to(torch.bfloat16)
    router = find_routers(model)[0]
    hidden = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits = torch.nn.functional.linear(hidden, router.module.weight)
    seen = []
    handle = attach(model, tiny.plan_for_experts(model, 1, strength=0.37, positions="all"))
    edit, push = handle._editors[0].edit, handle._editors[0].bank.push[0]
    handle._editors[0].edit = lambda given: seen.append((given, edit(given))) or seen[-1][1]
    with torch.no_grad():
        model(input_ids=tiny.prompt(50))
    handle.remove()
    given, edited = seen[0]
    assert given.dtype == edited.dtype == logits.dtype == torch.bfloat16
    z = given.float()
    by_hand = torch.where(push > 0, 0.0, z) + z.amax(-1, keepdim=True).abs() * push
    assert torch.equal(edited, by_hand.bfloat16())


def test_direct_calls_with_prompt_length(model):
    ids = tiny.prompt(6)
    with tiny.watched(model) as chosen, steer(model, force=((0, 3), (0, 4))) as handle, torch.no_grad():
        handle.set(prompt_length=4)
        model(input_ids=ids)
    assert [set(token) == {3, 4} for token in chosen[0][0].tolist()] == [False] * 4 + [True] * 2
    assert handle.report().tokens_steered == 2


@pytest.mark.parametrize("is_steered_first", [True, False])
def test_torch_compile(model, is_steered_first):
    """Compiled once for all strengths, in one piece, whether steering or compiling comes first."""
    import torch._dynamo

    torch._dynamo.reset()
    ids, plan = tiny.prompt(5), tiny.plan_for_experts(model, 1, 5, positions="all")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=False):
        usual = model(input_ids=ids, use_cache=False).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        if not is_steered_first:
            assert torch.equal(compiled(input_ids=ids, use_cache=False).logits, usual)
        with steer(model, rows=[plan]) as handle:
            eager = model(input_ids=ids, use_cache=False).logits
        with steer(compiled, rows=[plan]) as handle:
            torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, eager)
            handle.set(strength=1.0)
            compiled(input_ids=ids, use_cache=False)
            with torch._dynamo.config.patch(error_on_recompile=True):
                for strength in (2.0, 5.0):
                    handle.set(strength=strength)
                    again = compiled(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(again, eager)
            assert handle.report().router_calls == 4 * tiny.LAYERS
        assert torch.equal(compiled(input_ids=ids, use_cache=False).logits, usual)
    torch._dynamo.reset()


# ---- swapping while it runs ----


class Between(LogitsProcessor):
    """Calls back after each token of a generation."""

    def __init__(self, call) -> None:
        self.call, self.tokens = call, 0

    def __call__(self, input_ids, scores):
        self.tokens += 1
        self.call(self.tokens)
        return scores


def test_swap_between_tokens_changes_later_tokens_only(model):
    first, second = (SteeringPlan(force=((0, a), (0, b))) for a, b in ((1, 2), (6, 7)))
    changes = {3: {"plan": second}, 5: {"rows": [None]}}
    with tiny.watched(model) as chosen, steer(model, rows=[first]) as handle:
        attached = tiny.traces(model)
        swap = Between(lambda tokens: handle.set(**changes.get(tokens, {})))
        tiny.continued(model, tiny.prompt(4), 7, logits_processor=LogitsProcessorList([swap]))
        assert tiny.traces(model) == attached  # not attached anew
    experts = [set(call.flatten().tolist()) for call in chosen[0][1:]]
    assert experts[:4] == [{1, 2}, {1, 2}, {6, 7}, {6, 7}]
    assert handle.report().tokens_steered == 4
    assert handle.plans == (None,)


def test_a_wrong_swap_changes_nothing(model):
    plan = tiny.plan_for_experts(model, 1)
    handle = attach(model, plan)
    for wrong, match in (
        ({"strength": float("nan")}, "nan"),
        ({"plan": SteeringPlan(force=((9, 1),))}, r"\(9, 1\) does not exist"),
        ({"plan": replace(plan, strength=1.0), "layers": (7, 9)}, "7-9 hold no router"),
        ({"plan": plan, "rows": [plan]}, "not both"),
        ({"rows": []}, "no plans given"),
        ({"power": 3}, "no power: it has vector, strength"),
    ):
        with pytest.raises(SteeringError, match=match):
            handle.set(**wrong)
        assert handle.plans == (plan,)
    handle.set(schedule="decay:5", strength=2)
    assert handle.plans == (replace(plan, schedule="decay:5", strength=2),)
    handle.remove()
