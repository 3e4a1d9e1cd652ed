"""Plans numbered and factors laid out, against each row and each token on its own."""

from dataclasses import replace

import pytest
import torch

from steermoe.steering.mapping import UNSTEERED, PlanMapping, factor_table
from steermoe.steering.plans import SteeringPlan

CONSTANT = SteeringPlan(force=((0, 1),))
DECAY = SteeringPlan(force=((0, 2),), schedule="decay:4", positions="all")
WINDOW = SteeringPlan(force=((0, 3),), schedule="window:1-3")
PROMPT = SteeringPlan(ban=((0, 4),), positions="prompt")

ROWS = [DECAY, None, CONSTANT, DECAY, WINDOW, PROMPT]


def one_by_one(rows, index_BS):
    """Each token's factor, from its row's plan alone."""
    return torch.tensor(
        [
            [0.0 if plan is None else float(plan.factor(torch.tensor([index]))) for index in indices]
            for plan, indices in zip(rows, index_BS.tolist(), strict=True)
        ]
    )


def test_plans_are_numbered_in_the_order_of_rows():
    mapping = PlanMapping(ROWS)
    assert mapping.plans == (DECAY, CONSTANT, WINDOW, PROMPT)
    assert mapping.numbers(ROWS) == [0, UNSTEERED, 1, 0, 2, 3]
    assert mapping.numbers([PROMPT, None]) == [3, UNSTEERED]


def test_equal_plans_share_a_number():
    mapping = PlanMapping([CONSTANT, replace(CONSTANT), replace(CONSTANT, force=((0, 2),))])
    assert len(mapping.plans) == 2
    assert mapping.numbers([replace(CONSTANT)]) == [0]


def test_rows_that_come_and_go_between_known_plans_are_known():
    mapping = PlanMapping(ROWS)
    assert all(mapping.knows(rows) for rows in (ROWS, ROWS[::-1], [CONSTANT], [replace(WINDOW), None], [None], []))
    other = replace(CONSTANT, ban=((1, 1),))
    assert not mapping.knows([CONSTANT, other])
    with pytest.raises(KeyError):
        mapping.numbers([other])


def test_without_rows_or_plans():
    for mapping in (PlanMapping(), PlanMapping([None, None])):
        assert mapping.plans == ()
        assert mapping.knows([None])
        assert not mapping.knows([CONSTANT])
        assert torch.equal(mapping.factors([UNSTEERED] * 2, torch.arange(-1, 2)), torch.zeros(2, 3))


def test_factors_of_rows_that_began_together():
    mapping = PlanMapping(ROWS)
    index = torch.arange(-3, 6)
    found = mapping.factors(mapping.numbers(ROWS), index)
    assert found.dtype == torch.float32
    assert torch.equal(found, one_by_one(ROWS, index.expand(len(ROWS), -1)))
    assert found[1].eq(0).all()


def test_factors_of_rows_that_began_at_different_times():
    mapping = PlanMapping(ROWS)
    index = torch.arange(-5, 5)[None] + torch.arange(len(ROWS))[:, None]
    assert torch.equal(mapping.factors(mapping.numbers(ROWS), index), one_by_one(ROWS, index))


@pytest.mark.parametrize("plan", [CONSTANT, DECAY, WINDOW, PROMPT])
@pytest.mark.parametrize("index", [torch.arange(-3, 6), torch.tensor([[-1, 0], [3, 4], [2, 3]])])
def test_factors_of_rows_that_follow_one_plan(plan, index):
    """The mapping may know other plans as well."""
    mapping = PlanMapping([CONSTANT, DECAY, WINDOW, PROMPT])
    found = mapping.factors(mapping.numbers([plan] * 3), index)
    assert torch.equal(found, one_by_one([plan] * 3, index.expand(3, -1) if index.dim() == 1 else index))


def test_a_table_holds_every_plan_s_factors_and_ends_with_zeros():
    table = factor_table([DECAY, PROMPT], torch.tensor([-1, 0, 2]))
    assert [factors.tolist() for factors in table] == [[1.0, 1.0, 0.5], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert table[UNSTEERED] is table[2]


def test_other_rows_and_tokens_get_factors_of_their_own():
    """Nothing that is kept between calls survives a change of rows."""
    mapping = PlanMapping(ROWS)
    for rows in (ROWS, ROWS, ROWS[::-1], [DECAY, None], [DECAY, DECAY], [None], ROWS):
        for index in (torch.arange(2, 5), torch.arange(3, 6)):
            found = mapping.factors(mapping.numbers(rows), index)
            assert torch.equal(found, one_by_one(rows, index.expand(len(rows), -1)))
