"""What plans take of memory in a large model, and that no more of them is kept than is in use."""

import weakref

import pytest
import torch

from steermoe.routing.shape import RouterShape, RoutingShape
from steermoe.steering.banks import banks_for
from steermoe.steering.editing import RowLayout
from steermoe.steering.handle import attach
from steermoe.steering.plans import SteeringPlan
from steermoe.vectors.vector import SteeringVector
from tests.support import steering_models as tiny

LAYERS, EXPERTS, ROWS = 61, 256, 64
MOST_BYTES = 5_000_000
LARGE = RoutingShape("large", (), tuple(RouterShape(layer, EXPERTS, EXPERTS, 8) for layer in range(LAYERS)))


@pytest.fixture(scope="module")
def vector():
    weights = torch.rand(LAYERS, EXPERTS, generator=torch.Generator().manual_seed(0))
    return SteeringVector("sport", None, tuple(range(LAYERS)), weights=weights)


def bytes_of(*tensors):
    """Memory that tensors share counts once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def tensors_of(banks):
    names = ("push", "raised", "forced", "banned", "wanted", "active")
    return [getattr(bank, name) for bank in banks for name in names]


def test_64_rows_with_plans_of_their_own_in_a_large_model(vector):
    plans = [SteeringPlan(vector, 1 + row / ROWS) for row in range(ROWS)]
    banks = banks_for(LARGE, plans)
    layout = RowLayout.of(plans, list(range(ROWS)), torch.ones(ROWS, 1))
    assert all(bank.push.shape == (ROWS, EXPERTS) for bank in banks)
    assert not any((bank.forced | bank.banned).any() for bank in banks)
    taken = bytes_of(*tensors_of(banks), layout.plan_T, layout.factor_T1, *(here for *_, here in layout.ways))
    assert 4 * ROWS * LAYERS * EXPERTS < taken <= MOST_BYTES
    assert bytes_of(*tensors_of(banks_for(LARGE, plans[:1]))) <= MOST_BYTES / ROWS * 1.1


@pytest.mark.parametrize(("listed", "bytes_of_marks"), [("force", 3), ("ban", 2)])
def test_lists_take_one_byte_for_each_mark_that_they_need(vector, listed, bytes_of_marks):
    lists = [{listed: tuple((layer, (row + layer) % EXPERTS) for layer in range(LAYERS))} for row in range(ROWS)]
    banks = banks_for(LARGE, [SteeringPlan(vector, 1 + row / ROWS, **one) for row, one in enumerate(lists)])
    assert bytes_of(*tensors_of(banks)) <= (4 + bytes_of_marks) * ROWS * LAYERS * EXPERTS * 1.01


def test_plans_together_are_what_each_is_alone(vector):
    shape = RoutingShape("small", (), tuple(RouterShape(layer, 9, 11, 2) for layer in range(4)))
    weights = torch.rand(4, 9, generator=torch.Generator().manual_seed(1)).masked_fill(torch.eye(4, 9) > 0, 0.0)
    own = SteeringVector("own", None, tuple(range(4)), weights=weights)
    plans = [
        SteeringPlan(own, 2.5),
        SteeringPlan(own, -1.0, layers=(1, 2), force=((1, 3), (2, 0), (3, 1))),
        SteeringPlan(ban=((0, 8), (3, 5), (3, 0))),
        SteeringPlan(own, 0.0, active_experts=3, layers=(2, 3)),
        SteeringPlan(own, 1e-6, force=((0, 0), (0, 1)), ban=((0, 2),)),
    ]
    names = ("push", "raised", "forced", "banned", "wanted", "active")
    together = banks_for(shape, plans)
    for place, plan in enumerate(plans):
        for bank, alone in zip(together, banks_for(shape, [plan]), strict=True):
            assert [
                name for name in names if not torch.equal(getattr(bank, name)[place], getattr(alone, name)[0])
            ] == []
    nothing = torch.zeros(9)
    for number, bank in enumerate(together):
        pushes = [2.5 * weights[number], -1.0 * weights[number] if number in (1, 2) else nothing, nothing, nothing]
        assert torch.equal(bank.push, torch.stack([*pushes, weights[number] * 1e-6]))
        assert torch.equal(bank.raised, bank.push != 0)
        assert bank.wanted.shape == (len(plans), 11)
        assert torch.equal(bank.wanted[:, :9], bank.raised | bank.forced)
        assert bank.may_lower == (number in (1, 2))
        assert [bank.push.is_contiguous(), bank.raised.is_contiguous()] == [True, True]
    assert [bank.forced.nonzero().tolist() for bank in together] == [[[4, 0], [4, 1]], [[1, 3]], [[1, 0]], []]
    assert [bank.banned.nonzero().tolist() for bank in together] == [[[2, 8], [4, 2]], [], [], [[2, 0], [2, 5]]]
    assert [bank.active[3].item() for bank in together] == [0, 0, 3, 3]


def test_a_device_gets_no_more_than_the_bank_has(vector):
    device = torch.device("meta")
    for fields in ({}, {"force": ((0, 1),), "ban": ((0, 2),)}):
        bank = banks_for(LARGE, [SteeringPlan(vector, 1.0 + row, **fields) for row in range(2)])[0]
        moved = bank.on(device)
        assert moved is bank.on(device) is moved.on(device)
        for name in ("push", "raised", "forced", "banned", "wanted"):
            assert getattr(moved, name).device == device
            assert getattr(moved, name).shape == getattr(bank, name).shape
            assert getattr(moved, name).stride() == getattr(bank, name).stride()
        assert (moved.wanted is moved.raised) == (not fields)


def test_a_server_keeps_the_plans_of_its_rows_alone():
    model, rows = tiny.build(), 8
    plans = [tiny.plan_for_experts(model, number % 8, strength=1 + number / 1000) for number in range(1000)]
    handle = attach(model, rows=plans[:rows])
    gone = []
    for first in range(0, len(plans), rows):
        handle.set(rows=plans[first : first + rows])
        with torch.no_grad():
            model(tiny.prompt(2, rows))
        banks = [editor.bank for editor in handle.editors]
        assert all(len(bank.push) == rows for bank in banks)
        gone += map(weakref.ref, banks)
    handle.remove()
    del banks
    assert sum(bank() is not None for bank in gone) == len(handle.editors)  # of the last plans
