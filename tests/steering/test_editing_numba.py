"""Logits edited by compiled kernels, against the formulas and against the editor of the hf engine."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("numba", reason="numba comes with steermoe[llamacpp] and steermoe[vllm]")

import numpy as np

from steermoe import formulas
from steermoe.routing.shape import RouterShape
from steermoe.steering import editing_numba, kernels, tables
from steermoe.steering.banks import Bank
from steermoe.steering.editing import Editor, RowLayout, Step, Tally
from steermoe.steering.plans import SteeringPlan
from steermoe.vectors.vector import SteeringVector

EXPERTS, TOKENS = 8, 24


@pytest.mark.parametrize("shift", [0.0, -9.0], ids=["mixed", "all negative"])
@pytest.mark.parametrize("strength", [2.5, -1.5, 0.0])
@pytest.mark.parametrize("scale", formulas.SCALES)
@pytest.mark.parametrize("formula", formulas.FORMULAS)
@pytest.mark.parametrize("lists", [((), ()), ((5,), ()), ((), (0, 3)), ((5, 6), (1,))], ids=str)
def test_a_row_is_edited_as_by_the_formulas(formula, scale, strength, shift, lists):
    forced, banned = (torch.tensor([n in listed for n in range(EXPERTS)]) for listed in lists)
    experts = torch.tensor([0.0, 0.4, 0.0, 0.25, 0.0, 0.0, 0.1, 0.0])
    for seed, factor in enumerate((1.0, 0.5)):
        logits = (np.random.default_rng(seed).normal(size=EXPERTS) * 2 + shift).astype(np.float32)
        push = experts * strength
        wanted = formulas.apply(
            formula, torch.from_numpy(logits.copy())[None], push * factor, experts > 0, scale, bool((push < 0).any())
        )
        wanted = formulas.ban(formulas.force(wanted, forced), banned)[0]
        marks = ((experts > 0) * tables.RAISED + forced * tables.FORCED + banned * tables.BANNED).numpy()
        kernels.edit_row(
            logits,
            push.numpy(),
            marks.astype(np.uint8),
            formulas.FORMULAS.index(formula),
            scale == "paper",
            np.float32(factor),
        )
        torch.testing.assert_close(torch.from_numpy(logits), wanted, rtol=1e-6, atol=1e-6)


def plan(seed: int, formula: str, scale: str, **fields) -> SteeringPlan:
    frequency = torch.rand(1, EXPERTS, generator=torch.Generator().manual_seed(seed)).round(decimals=3)
    vector = SteeringVector("sport", None, (0,), weights=frequency.where(frequency > 0.5, 0.0))
    return SteeringPlan(vector, formula=formula, scale=scale, **fields)


@pytest.mark.parametrize("columns", [EXPERTS, EXPERTS + 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tokens_of_many_plans_are_edited_as_by_the_editor(dtype, columns):
    ways = [(formula, scale) for formula in formulas.FORMULAS for scale in formulas.SCALES]
    plans = [plan(seed, *way, strength=3.5 - seed) for seed, way in enumerate(ways)]
    plans.append(SteeringPlan(force=((0, 3),), ban=((0, 5), (0, 6))))
    router = RouterShape(0, EXPERTS, columns, 2)
    editor = Editor("gate", router, Tally())
    editor.bank = Bank.of(router, 0, plans)
    numbers = [token % (len(plans) + 1) - 1 for token in range(TOKENS)]
    factors = torch.tensor(
        [[0.0 if number < 0 else (1.0, 0.5, 0.0)[token % 3]] for token, number in enumerate(numbers)]
    )
    layout = RowLayout.of(plans, numbers, factors)
    editor.step = Step(0, None, layout=layout)
    logits = (3 * torch.randn(TOKENS + 3, columns, generator=torch.Generator().manual_seed(9))).to(dtype)
    before = logits.clone()
    formula_P = np.array([formulas.FORMULAS.index(plan.formula) for plan in plans])
    paper_P = np.array([plan.scale == "paper" for plan in plans])
    layer = editing_numba.LayerEditor(editor.bank, formula_P, paper_P)
    found = layer.edit(logits, editing_numba.TokenPlans(layout.plan_T.numpy(), factors[:, 0].numpy()))
    wanted = editor.edit(logits[:TOKENS])
    assert (found.dtype, found.shape) == (dtype, logits.shape)
    assert torch.equal(logits, before)
    assert torch.equal(found[TOKENS:], logits[TOKENS:])
    steered = factors[:, 0] != 0
    assert torch.equal(found[:TOKENS][~steered], logits[:TOKENS][~steered])
    assert all(not torch.equal(a, b) for a, b in zip(found[:TOKENS][steered], logits[:TOKENS][steered], strict=True))
    torch.testing.assert_close(found[:TOKENS], wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_bfloat16_is_rounded_as_by_torch():
    """A router's plain logits come back by way of float32 with pushes of every size."""
    values = torch.randn(4096, EXPERTS, generator=torch.Generator().manual_seed(3)).bfloat16()
    values[0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    values[1, :2] = torch.tensor([0.0, -0.0])
    router = RouterShape(0, EXPERTS, EXPERTS, 2)
    push = torch.linspace(-1, 1, EXPERTS)[None]
    bank = replace(Bank.of(router, 0, []), push=push)
    layer = editing_numba.LayerEditor(bank, np.array([kernels.ADDITIVE]), np.array([False]))
    found = layer.edit(values, editing_numba.TokenPlans(np.zeros(4096, np.int64), np.ones(4096, np.float32)))
    wanted = (values.float() + push).bfloat16()
    assert torch.equal(found.nan_to_num(7.0), wanted.nan_to_num(7.0))


def test_memory_is_never_read_beyond_its_end():
    router = RouterShape(0, EXPERTS, EXPERTS, 2)
    layer = editing_numba.LayerEditor(Bank.of(router, 0, []), np.zeros(1, np.int64), np.zeros(1, np.bool_))
    tokens = editing_numba.TokenPlans(np.zeros(3, np.int64), np.ones(3, np.float32))
    for shape in ((2, EXPERTS), (3, EXPERTS - 1)):
        with pytest.raises(ValueError, match=f"{shape[0]} x {shape[1]} for 3 tokens, 8 experts"):
            layer.edit(torch.zeros(shape), tokens)
    for numbers, factors in ((np.zeros(3, np.int32), np.ones(3, np.float32)), (np.zeros(3, np.int64), np.ones(3))):
        with pytest.raises(TypeError, match="expected a contiguous one"):
            editing_numba.TokenPlans(numbers, factors)


@pytest.mark.parametrize("strength", [1e6, -1e6])
@pytest.mark.parametrize("formula", formulas.FORMULAS)
def test_the_largest_strength_stays_finite_in_every_type(formula, strength):
    weights = torch.tensor([[0.5, 0.0, 1.0, 0.25, 0.0, 0.0, 0.0, 0.9]])
    steering = SteeringPlan(SteeringVector("sport", None, (0,), weights=weights), strength, formula)
    bank = Bank.of(RouterShape(0, EXPERTS, EXPERTS, 2), 0, [steering])
    numbers = np.array([formulas.FORMULAS.index(formula)]), np.array([False])
    layer = editing_numba.LayerEditor(bank, *numbers)
    tokens = editing_numba.TokenPlans(np.zeros(TOKENS, np.int64), np.ones(TOKENS, np.float32))
    logits = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(3)) * 1e4
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        edited = layer.edit(logits.to(dtype), tokens)
        assert edited.dtype == dtype
        assert bool(edited.isfinite().all())


@pytest.mark.parametrize("formula", formulas.FORMULAS)
def test_logits_that_sink_together_are_lifted_as_by_the_formulas(formula):
    experts = torch.linspace(0.1, 1.0, EXPERTS)
    push, marks = -1e4 * experts, np.full(EXPERTS, tables.RAISED, np.uint8)
    for shift in (0.0, -200.0):
        logits = (np.random.default_rng(0).normal(size=EXPERTS) + shift).astype(np.float32)
        wanted = formulas.apply(formula, torch.from_numpy(logits.copy())[None], push, experts > 0, "magnitude")
        kernels.edit_row(logits, push.numpy(), marks, formulas.FORMULAS.index(formula), False, np.float32(1))
        torch.testing.assert_close(torch.from_numpy(logits)[None], wanted)
        assert logits.max() == formulas.LOWEST


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1.0, 300.0, 1e4])
def test_lists_survive_rounding(dtype, size):
    router = RouterShape(0, EXPERTS, EXPERTS, 2)
    bank = Bank.of(router, 0, [SteeringPlan(force=((0, 3),), ban=((0, 5),))])
    layer = editing_numba.LayerEditor(bank, np.zeros(1, np.int64), np.zeros(1, np.bool_))
    logits = (torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0)) * size).to(dtype)
    tokens = editing_numba.TokenPlans(np.zeros(TOKENS, np.int64), np.ones(TOKENS, np.float32))
    steered = layer.edit(logits, tokens)
    others = steered[:, [0, 1, 2, 4, 6, 7]]
    assert (steered[:, 3:4] > others).all()
    assert (steered[:, 5:6] < others).all()
