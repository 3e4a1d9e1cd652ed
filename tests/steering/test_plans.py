"""Plans: their checks, schedules, and what users write."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steermoe.errors import CompatibilityError, SteeringError, VectorError, VectorNotFound
from steermoe.steering.plans import Schedule, SteeringPlan, plan_for
from steermoe.steering.spec import make_plan, parse_domain, parse_expert, parse_layers
from steermoe.vectors.file import write_vector
from steermoe.vectors.vector import SteeringVector, VectorInfo
from tests.support import steering_models as tiny

FREQUENCY = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]])
VECTOR = SteeringVector("sport", FREQUENCY, (0, 1), threshold=1.5)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"formula": "sideways"}, ["'sideways'", "additive, max_scaled, zero_max_scaled"]),
        ({"scale": "huge"}, ["'huge'", "magnitude, paper"]),
        ({"positions": "answer"}, ["'answer'", "generated, prompt, all"]),
        ({"schedule": "decay:0"}, ["'decay:0'", "N over 0"]),
        ({"schedule": "window:5-5"}, ["'window:5-5'", "A below B"]),
        ({"schedule": "sometimes"}, ["'sometimes'", "constant, decay:N"]),
        ({"strength": float("nan")}, ["nan", "finite"]),
        ({"strength": float("-inf")}, ["-inf", "finite"]),
        ({"strength": "4"}, ["'4'", "finite number"]),
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
    ],
)
def test_factor_by_hand(text, expected):
    index = torch.arange(-2, 5)  # two prompt tokens, then the generated ones
    schedule = Schedule.parse(text)
    assert schedule.factor(index).tolist() == expected
    assert str(schedule) == text


@pytest.mark.parametrize(
    ("positions", "expected"),
    [("generated", [0, 0, 1, 0.5]), ("prompt", [1, 1, 0, 0]), ("all", [1, 1, 1, 0.5])],
)
def test_positions_by_hand(positions, expected):
    plan = SteeringPlan(VECTOR, positions=positions, schedule="decay:2")
    assert plan.factor(torch.arange(-2, 2)).tolist() == expected


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


@pytest.mark.parametrize(
    ("parse", "text", "expected"),
    [
        (parse_domain, "sport", ("sport", 1.0)),
        (parse_domain, "sport=0.7", ("sport", 0.7)),
        (parse_domain, "./a=b.safetensors=-2", ("./a=b.safetensors", -2.0)),
        (parse_layers, "12", (12, 12)),
        (parse_layers, "3-20", (3, 20)),
        (parse_expert, "12:5", (12, 5)),
    ],
)
def test_parse(parse, text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_domain, "sport=much"),
        (parse_domain, "sport="),
        (parse_domain, "=1"),
        (parse_domain, "sport=nan"),
        (parse_layers, "1-"),
        (parse_layers, "-3"),
        (parse_layers, "all"),
        (parse_expert, "12"),
        (parse_expert, "12:-1"),
    ],
)
def test_parse_errors_name_the_text_and_an_example(parse, text):
    with pytest.raises(SteeringError, match="such as") as caught:
        parse(text)
    assert f"'{text}'" in str(caught.value)


@pytest.fixture
def model():
    return tiny.build("mixtral")


@pytest.fixture
def vectors(model, tmp_path: Path) -> Path:
    for domain, expert in (("sport", 1), ("food", 2)):
        write_vector(tiny.vector_for(model, expert, domain=domain), tmp_path / f"{domain}.safetensors")
    return tmp_path


def test_make_plan_mixes_domains(model, vectors):
    plan = make_plan(
        model,
        ["sport=0.7", "food=0.3"],
        strength=2.0,
        layers="0-1",
        ban=["1:7"],
        vectors=vectors,
        positions="all",
        scale=None,
    )
    assert plan.vector.domain == "sport+food"
    frequency = 0.9 + 0.1 / tiny.EXPERTS
    for expert, weight in ((1, 0.7), (2, 0.3)):
        torch.testing.assert_close(plan.vector.experts[:, expert], torch.full((tiny.LAYERS,), weight * frequency))
    assert (plan.strength, plan.layers, plan.ban, plan.positions, plan.scale) == (
        2.0,
        (0, 1),
        ((1, 7),),
        "all",
        "magnitude",
    )


def test_make_plan_without_anything_is_no_plan(model, vectors):
    assert make_plan(model, [], strength=3.0, layers="0-1", vectors=vectors) is None
    assert make_plan(model, [], force=["0:1"]).force == ((0, 1),)


def test_make_plan_errors(model, vectors):
    with pytest.raises(VectorNotFound, match="'knitting'"):
        make_plan(model, ["knitting"], vectors=vectors)
    with pytest.raises(VectorError, match="sport=0"):
        make_plan(model, ["sport=0"], vectors=vectors)
    write_vector(SteeringVector("tall", FREQUENCY.repeat(2, 1), (0, 1, 2, 3)), vectors / "tall.safetensors")
    with pytest.raises(CompatibilityError, match="tall"):
        make_plan(model, ["tall"], vectors=vectors)
