"""Plans: their checks and schedules."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from steermoe.errors import SteeringError
from steermoe.routing.positions import NOWHERE
from steermoe.steering.plans import Schedule, SteeringPlan, plan_for
from steermoe.vectors.vector import SteeringVector, VectorInfo

FREQUENCY = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]])
VECTOR = SteeringVector("sport", FREQUENCY, (0, 1), threshold=1.5)
HEAVY = SteeringVector("heavy", None, (0, 1), weights=3e5 * FREQUENCY / 0.7)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"formula": "sideways"}, ["'sideways'", "additive, max_scaled, zero_max_scaled"]),
        ({"scale": "huge"}, ["'huge'", "magnitude, paper"]),
        ({"positions": "beside"}, ["'beside'", "generated, prompt, all", "thinking, answer"]),
        ({"schedule": "decay:0"}, ["'decay:0'", "N over 0"]),
        ({"schedule": "window:5-5"}, ["'window:5-5'", "A below B"]),
        ({"schedule": "sometimes"}, ["'sometimes'", "constant, decay:N"]),
        ({"schedule": "first:0"}, ["'first:0'", "first:N (N over 0)"]),
        ({"schedule": "after:-1"}, ["'after:-1'", "after:N"]),
        ({"schedule": "after:" + "9" * 30}, ["999999", "too large"]),
        ({"think_tags": "<think>"}, ["think tags", "two different texts"]),
        ({"think_tags": ("<think>", " ")}, ["think tags", "two different texts"]),
        ({"think_tags": ("a", "a")}, ["two different texts"]),
        ({"think_tags": ("a", "b" * 101)}, ["at most 100 characters"]),
        ({"strength": float("nan")}, ["nan", "finite"]),
        ({"strength": float("-inf")}, ["-inf", "finite"]),
        ({"strength": "4"}, ["'4'", "finite number"]),
        ({"strength": 1e39}, ["1e+39", "'sport'", "from -1e+06 to 1e+06"]),
        ({"strength": -1.1e6}, ["-1100000.0", "from -1e+06"]),
        ({"strength": 10**400}, ["1000000", "finite number"]),
        ({"strength": 10**5000}, ["strength a int", "finite number"]),
        ({"vector": HEAVY, "strength": 4.0}, ["strength 4", "'heavy', 300000", "at most 1e+06", "lower one"]),
        ({"schedule": "decay:" + "9" * 30}, ["999999", "too large", "0 to 2147483647"]),
        ({"schedule": "window:0-" + "9" * 5000}, ["999999", "too large"]),
        ({"schedule": "window:2147483648-2147483649"}, ["2147483648 is too large"]),
        ({"schedule": "decay:\u0663"}, ["is unknown", "N over 0"]),
        ({"layers": (0, 2**31)}, ["(0, 2147483648)", "out of range"]),
        ({"force": ((0, 10**5000),)}, ["force: a tuple", "0 to 2147483647"]),
        ({"ban": ((0, 1),) * 16385}, ["16385 experts", "at most 16384"]),
        ({"layers": (3, 1)}, ["3-1", "first and last"]),
        ({"layers": (-1, 1)}, ["-1-1", "counted from 0"]),
        ({"layers": 3}, ["3", "(first, last)"]),
        ({"vector": None}, ["needs a vector"]),
        ({"force": ((0, 1),), "ban": ((0, 1),)}, ["[(0, 1)]", "both forced and banned", "one of the lists"]),
        ({"force": (3,)}, ["force: 3", "(layer, expert)"]),
        ({"ban": ((0, "1"),)}, ["ban: (0, '1')", "whole numbers"]),
    ],
)
def test_errors_name_the_value_and_the_fix(fields, parts):
    with pytest.raises(SteeringError) as caught:
        SteeringPlan(**{"vector": VECTOR, **fields})
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "decay", "stop": 0},
        {"kind": "decay", "stop": 10**30},
        {"kind": "window", "start": 3, "stop": 3},
        {"kind": "window", "start": -1, "stop": 3},
        {"kind": "window", "start": 0, "stop": 2.5},
        {"kind": "sometimes"},
        {"kind": "first", "stop": 0},
        {"kind": "after", "start": -1},
    ],
)
def test_schedules_are_checked_however_they_are_made(fields):
    with pytest.raises(SteeringError, match="is unknown: use constant"):
        Schedule(**fields)


def test_the_largest_numbers_are_taken():
    for schedule in ("decay:2147483647", "window:2147483646-2147483647", "decay:" + "0" * 40 + "7"):
        factor_T = SteeringPlan(VECTOR, -1e6, schedule=schedule).factor(torch.tensor([0, 2**31 - 2, 2**40]))
        assert bool(((factor_T >= 0) & (factor_T <= 1)).all())
    assert SteeringPlan(HEAVY, 3.0).strength == 3.0


@pytest.mark.parametrize(
    ("fields", "prompt", "generated", "expected"),
    [
        ({}, 5, 0, False),
        ({}, 5, 1, True),
        ({"schedule": "decay:1"}, 5, 1, True),
        ({"schedule": "window:50-60"}, 5, 50, False),
        ({"schedule": "window:50-60"}, 5, 51, True),
        ({"schedule": "window:50-60", "positions": "all"}, 5, 0, True),
        ({"schedule": "window:50-60", "positions": "all"}, 0, 0, False),
        ({"schedule": "after:50"}, 5, 50, False),
        ({"schedule": "after:50"}, 5, 51, True),
        ({"schedule": "first:1"}, 5, 1, True),
        ({"positions": "last-prompt"}, 5, 0, True),
        ({"positions": "last-prompt"}, 0, 0, False),
        ({"positions": "last-prompt", "schedule": "after:50"}, 5, 49, False),
        ({"positions": "last-prompt", "schedule": "after:50"}, 5, 50, True),
        ({"positions": "answer"}, 5, 0, False),
        ({"positions": "answer", "schedule": "window:3-5"}, 5, 4, True),
        ({"positions": "prompt"}, 1, 0, True),
        ({"positions": "prompt"}, 0, 9, False),
        ({"strength": 0.0}, 5, 9, False),
        ({"strength": 0.0, "ban": ((0, 1),)}, 5, 9, True),
    ],
)
def test_whether_any_token_of_a_text_is_steered(fields, prompt, generated, expected):
    plan = SteeringPlan(VECTOR, **fields)
    assert plan.steers(prompt, generated) == expected
    assert bool(plan.factor(torch.arange(-prompt, generated)).any()) == expected


def test_lists_become_tuples_so_that_plans_compare_and_hash():
    plan = SteeringPlan(VECTOR, force=[[0, 1]], layers=[0, 1], schedule="decay:4")
    assert plan == SteeringPlan(VECTOR, force=((0, 1),), layers=(0, 1), schedule=Schedule("decay", 0, 4))
    assert hash(plan) == hash(replace(plan))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("constant", [1, 1, 1, 1, 1, 1, 1]),
        ("decay:4", [1, 1, 1, 0.75, 0.5, 0.25, 0]),
        ("decay:1", [1, 1, 1, 0, 0, 0, 0]),
        ("window:1-3", [1, 1, 0, 1, 1, 0, 0]),
        ("window:0-1", [1, 1, 1, 0, 0, 0, 0]),
        ("first:2", [1, 1, 1, 1, 0, 0, 0]),
        ("after:2", [1, 1, 0, 0, 1, 1, 1]),
        ("after:0", [1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_factor_by_hand(text, expected):
    index = torch.arange(-2, 5)  # two prompt tokens, then the generated ones
    schedule = Schedule.parse(text)
    assert schedule.factor(index).tolist() == expected
    assert str(schedule) == text


@pytest.mark.parametrize("schedule", ["constant", "decay:7", "decay:1000", "window:1-3", "first:2", "after:2"])
@pytest.mark.parametrize("positions", ["generated", "prompt", "all", "last-prompt"])
def test_arrays_get_the_bits_that_tensors_get(positions, schedule):
    plan, numbers = SteeringPlan(VECTOR, positions=positions, schedule=schedule), [NOWHERE, *range(-20, 1020)]
    of_array = plan.factor(np.array(numbers, dtype=np.float32))
    assert of_array.dtype == np.float32
    assert of_array.tobytes() == plan.factor(torch.tensor(numbers)).numpy().tobytes()


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("generated", [0, 0, 1, 0.5]),
        ("prompt", [1, 1, 0, 0]),
        ("all", [1, 1, 1, 0.5]),
        ("last-prompt", [0, 1, 0.5, 0]),
        ("thinking", [0, 0, 1, 0.5]),
        ("answer", [0, 0, 1, 0.5]),
        ("tool-calls", [0, 0, 1, 0.5]),
    ],
)
def test_positions_by_hand(positions, expected):
    plan = SteeringPlan(VECTOR, positions=positions, schedule="decay:2")
    assert plan.factor(torch.arange(-2, 2)).tolist() == expected
    assert plan.factor(torch.tensor([NOWHERE])).tolist() == [0]


def test_strength_0_does_nothing_but_lists_do():
    assert not SteeringPlan(VECTOR, 0.0).does_something
    assert not SteeringPlan(VECTOR, 0.0).factor(torch.arange(3)).any()
    assert SteeringPlan(VECTOR, 0.0, ban=((0, 1),)).does_something
    assert SteeringPlan(VECTOR, -1.0).does_something


def test_plan_for_takes_what_the_vector_was_calibrated_with():
    info = VectorInfo(strength=2.5, formula="zero_max_scaled", scale="paper")
    calibrated = replace(VECTOR, info=info)
    assert plan_for(calibrated) == SteeringPlan(calibrated, 2.5, "zero_max_scaled", "paper")
    assert plan_for(calibrated, 0.0, formula="additive") == SteeringPlan(calibrated, 0.0, "additive", "paper")
    assert plan_for(VECTOR) == SteeringPlan(VECTOR, 8.0, "max_scaled", "magnitude")
