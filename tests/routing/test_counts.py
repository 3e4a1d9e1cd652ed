"""Another number of active experts: every family against a model whose configuration has that number."""

import functools

import pytest
import torch

from steermoe import SteeringPlan, SteeringVector, attach, find_routers, list_families, record_routing
from steermoe.errors import SteeringError
from steermoe.routing.recording import watch_choices
from steermoe.routing.routers import NOTE, shape_of
from steermoe.routing.shape import RouterShape, RoutingShape
from steermoe.steering.tables import check_plan
from steermoe.steering.tracing import NONE, RoutingTracer
from tests.support.tiny_models import EXPERTS, TOP_K, build, run, tiny_config, tokens

STEERABLE = [family.family for family in list_families() if family.steerable]
REFUSED = {
    "dbrx": "DbrxRouter keeps no number that could be changed",
    "jetmoe": "sorts the tokens by expert",
    "nllb_moe": "always chooses two",
    "openai_privacy_filter": "its block multiplies by the number too",
    "phimoe": "always chooses two",
    "switch_transformers": "always chooses one",
    "zaya": "always chooses one, or skips the layer",
}
"""Families whose routers have no number of their own, with a part of the reason."""
QUICK = {
    *("deepseek_v3", "ernie4_5_moe", "gemma4", "gpt_oss", "granitemoeshared", "hunyuan_v1_moe"),
    *("inkling", "llama4", "longcat_flash", "minimax", "mixtral", "qwen3_moe"),
}
"""Families whose routers differ in kind: scores, biases, groups, where the number is, what they return."""
NAMES = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
MORE, FEWER = 3, {"longcat_flash": 2}
"""Numbers other than the model's own, 2; `FEWER` is 1 where it can be."""
TOLERANCE = 1e-4


def with_number(family: str, number: int):
    """The family's model with the same weights and this number in its configuration."""
    if family == "deepseek_v4":  # its configuration changes the tables of the hash layers too
        model = build(family)
        for router in find_routers(model):
            router.module.top_k = number
        return model
    config = tiny_config(family)
    return build(family, **{name: number for name in NAMES if isinstance(getattr(config, name, None), int)})


def all_tokens(**fields) -> SteeringPlan:
    return SteeringPlan(positions="all", **fields)


@pytest.mark.parametrize(
    "family",
    [
        family if family in QUICK else pytest.param(family, marks=pytest.mark.slow)
        for family in STEERABLE
        if family not in REFUSED
    ],
)
def test_a_family_with_another_number_computes_what_its_configuration_would(family):
    """All rows alike, then rows with different numbers and without one, then steered too."""
    least = FEWER.get(family, 1)
    model, fewer, more = build(family), with_number(family, least), with_number(family, MORE)
    rows = tokens(model, rows=3, length=5)
    plain = run(model, rows)
    few, many = run(fewer, rows), run(more, rows)
    assert not torch.allclose(many, plain, atol=TOLERANCE)
    handle = attach(model, all_tokens(active_experts=MORE))
    assert torch.allclose(run(model, rows), many, atol=TOLERANCE)
    assert handle.report().slots == handle.report().tokens_steered * MORE * len(find_routers(model))

    handle.set(rows=[all_tokens(active_experts=MORE), None, all_tokens(active_experts=least)])
    mixed = run(model, rows)
    handle.verify()
    for row, expected in enumerate((many, plain, few)):
        assert torch.allclose(mixed[row], expected[row], atol=TOLERANCE), row

    vector = torch.zeros(len(find_routers(model)), EXPERTS)
    vector[:, 5] = 0.5
    steering = {"vector": SteeringVector("x", None, shape_of(model).layers, weights=vector), "strength": 4.0}
    handle.set(all_tokens(active_experts=MORE, **steering))
    found = run(model, rows)
    handle.remove()
    reference = attach(more, all_tokens(**steering))
    assert torch.allclose(found, run(more, rows), atol=TOLERANCE)
    reference.remove()
    assert torch.equal(run(model, rows), plain)
    assert all(vars(router.module).get(NOTE) is None for router in find_routers(model))


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_without_a_number_is_refused_by_name(family):
    model = build(family)
    with pytest.raises(SteeringError, match=f"can't have 3 active experts: .*{REFUSED[family]}") as caught:
        attach(model, all_tokens(active_experts=MORE))
    assert "\n" not in str(caught.value)
    attach(model, all_tokens(active_experts=find_routers(model)[0].top_k)).remove()


def test_groups_limit_the_number():
    """Two groups of four experts, of which a token may use one."""
    shape = shape_of(build("deepseek_v3"))
    check_plan(shape, all_tokens(active_experts=4))
    with pytest.raises(SteeringError, match=r"5 active experts are too many .* chooses from 4, as it leaves"):
        check_plan(shape, all_tokens(active_experts=5))


def test_lists_hold_in_each_run_of_a_router_that_leaves_out_groups():
    """Its weights are those of the scores after groups were left out: a forced expert of such a group would have 0."""
    model = build("deepseek_v2", topk_method="group_limited_greedy", n_group=2, topk_group=1)
    layers = shape_of(model).layers
    forced = tuple((layer, expert) for layer in layers for expert in (0, EXPERTS - 1))
    rows = tokens(model, rows=2, length=5)
    plans = [all_tokens(active_experts=number, force=forced) for number in (2, MORE)]
    alone = []
    for plan in plans:
        handle = attach(model, plan)
        alone.append(run(model, rows))
        handle.remove()
    handle = attach(model, rows=plans)
    mixed = run(model, rows)
    handle.remove()
    for row in range(2):
        assert torch.allclose(mixed[row], alone[row][row], atol=TOLERANCE), row


@functools.cache
def mixtral():
    return build("mixtral")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            {"active_experts": 9},
            "9 active experts are too many for layer 0 of .*, which chooses from 8: ask for at most 8",
        ),
        (
            {"active_experts": 1, "force": ((0, 1), (0, 2))},
            "2 experts are forced in layer 0, but it chooses 1 per token",
        ),
        ({"active_experts": 8, "ban": ((1, 1),)}, "1 of 8 experts are banned in layer 1, but it chooses 8 per token"),
    ],
)
def test_what_does_not_fit(plan, message):
    with pytest.raises(SteeringError, match=message):
        check_plan(shape_of(mixtral()), all_tokens(**plan))


def test_too_few():
    """With one, LongCat's own code fails: it squeezes a dimension away."""
    with pytest.raises(SteeringError, match=r"1 active experts are too few for layer 0 of .*: ask for 2 or more"):
        check_plan(shape_of(build("longcat_flash")), all_tokens(active_experts=1))


@pytest.mark.parametrize("number", [0, -1, 2.0, True, 2**31])
def test_what_is_no_number(number):
    with pytest.raises(SteeringError, match=r"active experts .*: expected a whole number from 1 on, such as 4"):
        all_tokens(active_experts=number)


def test_lists_and_layers():
    """A forced expert is among fewer, a banned one not among more, and only the plan's layers get another number."""
    model = mixtral()
    rows = tokens(model, rows=2)
    plans = [all_tokens(active_experts=1, force=((1, 6),)), all_tokens(active_experts=7, ban=((0, 2),))]
    handle = attach(model, rows=plans)
    with watch_choices(model) as chosen:
        run(model, rows)
    report = handle.report()
    handle.remove()
    assert (report.forced_share, report.banned_share) == (1.0, 0.0)
    layers = [one.view(2, -1, 7) for one in chosen]
    beyond = EXPERTS
    assert all((layer[0, :, 1:] == beyond).all() and (layer[1] < beyond).all() for layer in layers)
    assert (layers[1][0, :, 0] == 6).all()
    assert not (layers[0][1] == 2).any()
    assert report.slots == rows["input_ids"].shape[1] * (1 + 7) * len(layers)

    handle = attach(model, all_tokens(active_experts=5, layers=(1, 1)))
    with watch_choices(model) as chosen:
        run(model, rows)
    handle.remove()
    assert [one.shape[1] for one in chosen] == [TOP_K, 5]


def test_recording_counts_the_experts_that_tokens_got():
    model = mixtral()
    rows = tokens(model, rows=2)
    handle = attach(model, rows=[all_tokens(active_experts=3), None])
    with record_routing(model) as record:
        run(model, rows)
    handle.remove()
    length = rows["input_ids"].shape[1]
    assert record.counts.sum(-1).tolist() == [[3 * length] * 2, [TOP_K * length] * 2]


def test_a_trace_shows_both_numbers():
    model = mixtral()
    rows = tokens(model, rows=2, length=4)
    handle = attach(model, rows=[all_tokens(active_experts=3), None])
    tracer = RoutingTracer(model)
    tracer.is_on = True
    run(model, rows)
    chosen, unsteered = tracer.take()
    tracer.close()
    handle.remove()
    assert chosen.shape == unsteered.shape == (8, 2, 3)
    assert (chosen[:4] != NONE).all()
    assert (unsteered[:, :, 2] == NONE).all()
    assert (chosen[4:, :, :2] == unsteered[4:, :, :2]).all()
    assert set(chosen[4:, :, 2].ravel().tolist()) == {EXPERTS}  # beyond the experts: none


def test_an_engine_may_have_one_number_for_all():
    shape = RoutingShape("m", (), (RouterShape(0, 8, 8, 2),)).without_counts("the engine reads it once")
    check_plan(shape, all_tokens(active_experts=2))
    with pytest.raises(SteeringError, match="layer 0 of m can't have 3 active experts: the engine reads it once"):
        check_plan(shape, all_tokens(active_experts=3))
