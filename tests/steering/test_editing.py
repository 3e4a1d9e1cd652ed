"""Edited logits and the numbers of the report, against counts by hand."""

from dataclasses import replace

import pytest
import torch

from steermoe import formulas
from steermoe.routing.shape import RouterShape
from steermoe.steering.banks import Bank
from steermoe.steering.editing import Editor, RowLayout, Step, Tally
from steermoe.steering.handle import attach, steer
from steermoe.steering.plans import SteeringPlan
from tests.support import steering_models as tiny


@pytest.fixture(scope="module")
def model():
    return tiny.build("mixtral")


def router(width: int = tiny.EXPERTS) -> RouterShape:
    return RouterShape(0, tiny.EXPERTS, width, tiny.TOP_K)


def editor_for(plans: list[SteeringPlan], step: Step, width: int = tiny.EXPERTS) -> Editor:
    editor = Editor("gate", router(width), Tally())
    editor.bank = Bank.of(editor.router, 0, plans)
    editor.step = step
    return editor


LOGITS = torch.randn(6, tiny.EXPERTS, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("formula", formulas.FORMULAS)
@pytest.mark.parametrize("scale", formulas.SCALES)
def test_one_plan_is_the_formula(model, formula, scale):
    plan = tiny.plan_for_experts(model, 2, formula=formula, scale=scale, strength=3.0)
    editor = editor_for([plan], Step(6, None, plan=plan, factor=0.5))
    by_hand = formulas.BY_NAME[formula](LOGITS, plan.vector.experts[0], 1.5, scale)
    assert torch.equal(editor.edit(LOGITS), by_hand)
    assert torch.equal(editor.edit(LOGITS.view(2, 3, -1)), by_hand.view(2, 3, -1))
    assert editor.edit(LOGITS.double()).dtype == torch.float64
    torch.testing.assert_close(editor.edit(LOGITS.double()).float(), by_hand)


@pytest.mark.parametrize("formula", formulas.FORMULAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "fields",
    [{}, {"strength": -3.0}, {"scale": "paper"}, {"force": ((0, 3),)}],
    ids=["plain", "away", "paper", "lists"],
)
def test_in_place_is_the_same_to_the_bit(model, formula, dtype, fields):
    plan = tiny.plan_for_experts(model, 2, 4, **{"strength": 3.7, "formula": formula, **fields})
    changed = 0
    for rows in (1, 3, 17):
        for factor in (1.0, 0.3):
            editor = editor_for([plan], Step(rows, None, plan=plan, factor=factor))
            for seed in range(5):
                generator = torch.Generator().manual_seed(seed)
                logits = (4 * torch.randn(rows, tiny.EXPERTS, generator=generator) - 2 * seed).to(dtype)
                expected = editor.edit(logits)
                assert torch.equal(editor.edit_in_place(logits.clone()), expected)
                changed += not torch.equal(logits, expected)
    assert changed  # steering away leaves alone what is low already


def test_columns_beyond_the_experts_stay(model):
    """Some routers have more columns than a vector, for experts that always run."""
    plan = tiny.plan_for_experts(model, 2)
    wide = torch.cat([LOGITS, LOGITS[:, :2] + 100], -1)
    editor = editor_for([plan], Step(6, None, plan=plan), width=tiny.EXPERTS + 2)
    edited = editor.edit(wide)
    assert torch.equal(edited[:, tiny.EXPERTS :], wide[:, tiny.EXPERTS :])
    by_hand = formulas.zero_max_scaled(LOGITS, plan.vector.experts[0], plan.strength)
    assert torch.equal(edited[:, : tiny.EXPERTS], by_hand)


def test_rows_get_their_own_formula_strength_and_none(model):
    plans = [
        tiny.plan_for_experts(model, 1, strength=2.0),
        tiny.plan_for_experts(model, 2, strength=-3.0, formula="additive"),
        SteeringPlan(force=((0, 4),), ban=((0, 5),)),
    ]
    factors = torch.tensor([[1.0, 0.5], [0.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    numbers = [0, -1, 1, 2]
    logits = torch.randn(8, tiny.EXPERTS, generator=torch.Generator().manual_seed(2))
    editor = editor_for(plans, Step(5, None, layout=RowLayout.of(plans, numbers, factors)))
    edited = editor.edit(logits)
    first, second = (plan.vector.experts[0] for plan in plans[:2])
    expected = logits.clone()
    expected[0] = formulas.zero_max_scaled(logits[:1], first, 2.0)[0]
    expected[1] = formulas.zero_max_scaled(logits[1:2], first, 1.0)[0]
    expected[5] = formulas.additive(logits[5:6], second, -3.0)[0]
    expected[6:, 4] = logits[6:].amax(-1) + formulas.FORCE_MARGIN
    expected[6:, 5] = expected[6:].amax(-1) - formulas.BAN_DEPTH
    assert torch.equal(edited, expected)
    assert torch.equal(edited[2:5], logits[2:5])  # no plan, and a factor of 0: unchanged


def test_bank_marks_what_is_idle(model):
    plan = tiny.plan_for_experts(model, 1)
    assert not Bank.of(router(), 0, [plan]).is_idle
    assert Bank.of(router(), 0, [replace(plan, layers=(1, 1))]).is_idle
    assert Bank.of(router(), 0, [SteeringPlan(ban=((1, 1),))]).is_idle
    assert Bank.of(router(), 0, []).is_idle
    marked = Bank.of(router(tiny.EXPERTS + 1), 0, [replace(plan, force=((0, 6),), ban=((0, 7),))])
    assert marked.wanted.nonzero()[:, 1].tolist() == [1, 6]
    assert marked.wanted.shape == (1, tiny.EXPERTS + 1)


def test_tally_by_hand(model):
    """Two layers at once; one token of three does not count."""
    plan = tiny.plan_for_experts(model, 1, 2)
    tally = Tally()
    step = Step(2, torch.tensor([True, False, True]), plan=plan)
    editor = editor_for([plan], step)
    for chosen in ([[1, 2], [1, 2], [3, 1]], [[0, 2], [1, 1], [5, 6]]):
        tally.add(editor, step, torch.tensor(chosen, dtype=torch.int32))
    tally.count()
    assert (tally.hits, tally.slots) == (2 + 1 + 1 + 0, 8)
    assert editor.calls == 2


def test_choices_of_single_tokens_wait_for_each_other(model):
    """Calls are counted after each forward call, choices later, and none of them twice."""
    plan = tiny.plan_for_experts(model, 1)
    tally, editors = Tally(), [editor_for([plan], Step(1, None, plan=plan)) for _ in range(2)]
    for number in range(5):
        step = Step(1, None, plan=plan, factor=1 / (1 + number))
        for editor in editors:
            tally.add(editor, step, torch.tensor([[1, 2]]))
        tally.settle()
        assert [editor.calls for editor in editors] == [number + 1] * 2
    assert (tally.hits, len(tally._pending), len(tally._waiting)) == (0, 0, 10)
    tally.add(editors[0], step, torch.tensor([[0, 2]]))
    tally.count()
    assert (tally.hits, tally.slots) == (10, 22)
    assert [editor.calls for editor in editors] == [6, 5]


@pytest.mark.parametrize("fields", [{"force": ((0, 3),)}, {}], ids=["lists", "many places"])
def test_lists_and_long_prompts_are_counted_after_their_call(model, fields):
    plan = tiny.plan_for_experts(model, 1, **fields)
    editor = editor_for([plan], Step(200, None, plan=plan))
    editor._tally.add(editor, editor.step, torch.tensor([[1, 3]] * (1 if fields else 200)))
    editor._tally.settle()
    assert not editor._tally._waiting
    assert (editor._tally.hits > 0, editor.calls) == (True, 1)


def test_tally_counts_long_prompts_at_once(model, monkeypatch):
    monkeypatch.setattr("steermoe.steering.editing.PENDING_LIMIT", 7)
    plan = tiny.plan_for_experts(model, 1)
    tally, step = Tally(), Step(4, None, plan=plan)
    tally.add(editor_for([plan], step), step, torch.ones(4, 2, dtype=torch.long))
    assert not tally._pending
    assert (tally.hits, tally.slots) == (8, 8)


# ---- the report of real models ----


def share_by_hand(calls: list[list[torch.Tensor]], experts: list[set[int]], steered: list[list[bool]]) -> float:
    """The share of wanted experts in each layer's calls, over the tokens that were steered."""
    hits = slots = 0
    for layer in calls:
        for call, mask in zip(layer, steered, strict=True):
            for token, wanted, counts in zip(call.tolist(), experts, mask, strict=False):
                hits += counts * len(wanted & set(token))
                slots += counts * len(token)
    return hits / slots


def test_report_with_padding(model):
    """Two rows of 4 and 2 tokens, all positions, weakly steered: 6 prompt tokens and 2 x 2 decoded ones count."""
    batch = tiny.left_padded([tiny.prompt(4), tiny.prompt(2)])
    with tiny.watched(model) as chosen, steer(model, tiny.vector_for(model, 1), 0.7, positions="all") as handle:
        tiny.continued(model, batch["input_ids"], 3, attention_mask=batch["attention_mask"])
    report = handle.report()
    assert (report.router_calls, report.tokens_seen, report.tokens_steered) == (3 * tiny.LAYERS, 10, 10)
    prompt_mask = batch["attention_mask"].flatten().bool().tolist()
    by_hand = share_by_hand(chosen, [{1}] * 8, [prompt_mask, [True] * 2, [True] * 2])
    assert 0 < by_hand < 0.5
    assert report.vector_share == pytest.approx(by_hand)
    assert report.as_dict() == {
        "router_calls": 6,
        "tokens_seen": 10,
        "tokens_steered": 10,
        "vector_share": report.vector_share,
    }


def test_report_of_rows(model):
    """Three rows, the middle one unsteered, the last one toward another expert and only from its second token on."""
    plans = [
        tiny.plan_for_experts(model, 1, strength=1.2),
        None,
        tiny.plan_for_experts(model, 6, strength=1.2, schedule="window:1-9"),
    ]
    with tiny.watched(model) as chosen, steer(model, rows=plans) as handle:
        tiny.continued(model, tiny.prompt(4, rows=3), 5)
    report = handle.report()
    assert (report.router_calls, report.tokens_seen, report.tokens_steered) == (4 * tiny.LAYERS, 12 + 12, 4 + 3)
    masks = [[False] * 12, [True, False, False], *[[True, False, True]] * 3]
    by_hand = share_by_hand(
        [[c[:3] if i else c for i, c in enumerate(layer)] for layer in chosen], [{1}, set(), {6}] + [set()] * 9, masks
    )
    assert report.vector_share == pytest.approx(by_hand)


def test_report_adds_up_over_calls_and_swaps(model):
    handle = attach(model, SteeringPlan(force=((0, 1), (0, 2))))
    tiny.continued(model, tiny.prompt(4), 3)
    assert handle.report().vector_share == 0.5  # one of two layers
    handle.set(SteeringPlan(ban=((1, 3),)))  # bans want no expert: no choice is a hit
    tiny.continued(model, tiny.prompt(4), 3)
    handle.remove()
    report = handle.report()
    assert (report.router_calls, report.tokens_seen, report.tokens_steered) == (4, 12, 4)
    assert report.vector_share == 0.25
    tiny.continued(model, tiny.prompt(4), 3)
    assert handle.report() == report  # nothing after removal


def test_report_of_finished_rows(model):
    """`generate` fills up a row that ends early; the filler does not count as tokens."""
    ids = tiny.prompt(5, rows=2)
    plan = tiny.plan_for_experts(model, 1)
    with steer(model, rows=[plan]):
        end = tiny.continued(model, ids, 6)[0][1]
    with steer(model, rows=[plan]) as handle:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=6,
            eos_token_id=end,
            pad_token_id=0,
        )
    fed = (out[:, 5:-1] != 0) & (out[:, 5:-1] != end)
    assert fed.sum(-1).tolist()[0] == 1
    assert handle.report().tokens_steered == int(fed.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("formula", formulas.FORMULAS)
def test_no_accepted_strength_gives_a_text_of_nan(formula, dtype):
    model = tiny.build("mixtral").to(dtype)
    tokens = torch.arange(1, 9)[None]
    for strength in (1e5, 1e6, -1e6):
        with steer(model, tiny.vector_for(model, 1), strength, formula=formula, positions="all"):
            assert bool(model(tokens).logits.isfinite().all())
