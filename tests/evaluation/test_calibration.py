"""Calibration: the largest strength within the budget, saturation, ranges, and `generate`'s warning beyond them."""

import json
from dataclasses import replace

import pytest
import torch

from steermoe.errors import SteeringError
from steermoe.evaluation.calibration import LARGEST, calibrate, calibrate_vector
from steermoe.evaluation.teacher_forcing import TeacherForcing
from steermoe.steering.plans import beyond_safe_range, guessed_strength, plan_for
from steermoe.vectors.file import read_vector, write_vector
from steermoe.vectors.vector import VectorInfo


def test_the_largest_strength_within_the_budget():
    found = calibrate(lambda strength: 0.1 * strength, 1.0)
    assert 9.7 <= found.strength <= 10
    assert found.safe_range == (0.0, found.strength)
    assert found.damage == pytest.approx(0.1 * found.strength)
    assert not found.saturates
    assert all(damage <= 1 for strength, damage in found.measured if strength <= found.strength)


def test_if_more_changes_nothing_the_smallest_strength_with_the_full_effect():
    found = calibrate(lambda strength: min(strength, 5.0) / 10, 1.0)
    assert found.saturates
    assert found.safe_range == (0.0, LARGEST)
    assert 4.85 <= found.strength <= 5.05


def test_a_jump_over_the_budget_leaves_the_strength_below_it():
    found = calibrate(lambda strength: 0.01 if strength < 3.37 else 2.0, 1.0)
    assert 3.3 <= found.strength < 3.37
    assert found.damage == 0.01


def test_strengths_whose_damage_is_no_number_are_beyond_the_budget():
    found = calibrate(lambda strength: 0.1 if strength < 5 else float("nan"), 1.0)
    assert 4.9 <= found.strength < 5
    assert found.damage == 0.1
    assert not found.saturates


def test_damage_that_rounding_takes_below_zero_is_none():
    found = calibrate(lambda strength: -1e-9, 1.0)
    assert found.saturates
    assert found.damage == 0


def test_no_strength_is_measured_twice():
    tried = []
    calibrate(lambda strength: tried.append(strength) or strength / 7, 1.0)
    assert len(tried) == len(set(tried)) < 20


@pytest.mark.parametrize("budget", [0, -1, float("nan"), float("inf")])
def test_a_budget_must_be_positive(budget):
    with pytest.raises(SteeringError, match="must be a number above 0"):
        calibrate(lambda strength: strength, budget)


def test_a_budget_that_nothing_fits():
    with pytest.raises(SteeringError, match="raise the budget"):
        calibrate(lambda strength: 3.0, 1.0)


# ---- with a model ----

TEXTS = [f"the quick brown fox number {n} jumps over the lazy dog and runs into the wood" for n in range(4)]


@pytest.fixture(scope="module")
def teacher_forcing(tiny_model):
    return TeacherForcing(tiny_model, TEXTS)


def test_a_vector_is_calibrated(teacher_forcing, make_vector):
    most = teacher_forcing.compare(plan_for(make_vector(), 64.0)).kl_p95
    vector, found = calibrate_vector(teacher_forcing, make_vector(), most / 2)
    assert 0 < vector.info.strength == found.strength <= vector.info.safe_range[1]
    assert vector.info.damage == found.damage <= most / 2
    assert teacher_forcing.compare(plan_for(vector)).kl_p95 <= most / 2


def idle_vector(make_vector):
    """One that holds the expert of one layer that no token would choose anyway, whatever its weight."""
    vector = make_vector()
    weights = torch.zeros(vector.num_layers, vector.num_experts)
    weights[0, 0] = 1e-30
    return replace(vector, frequency=None, weights=weights)


def test_a_vector_that_does_nothing_is_refused(teacher_forcing, make_vector):
    with pytest.raises(SteeringError, match=r"'sport' does nothing: strength 64 costs 0 nats .* in 1 of 3 layers"):
        calibrate_vector(teacher_forcing, idle_vector(make_vector))


def test_the_default_strength_of_a_vector_without_one_is_a_guess(make_vector):
    unknown = replace(make_vector(), info=VectorInfo())
    assert "'sport' is not calibrated: strength 8 is a guess" in guessed_strength(plan_for(unknown))
    assert guessed_strength(plan_for(unknown, 4.0)) == ""
    assert guessed_strength(plan_for(make_vector())) == ""
    assert guessed_strength(plan_for(make_vector(), 8.0)) == ""
    assert guessed_strength(plan_for(None, ban=((0, 1),))) == ""


def test_beyond_the_safe_range_there_is_a_warning(make_vector):
    vector = make_vector()
    plain = plan_for(vector, 9.0)
    assert beyond_safe_range(plain) == ""
    info = replace(vector.info, safe_range=(0.0, 5.0), damage=0.93, formula="zero_max_scaled", scale="magnitude")
    calibrated = replace(vector, info=info)
    assert beyond_safe_range(plan_for(calibrated, 5.0)) == ""
    assert "strength 9 is outside 0 to 5" in beyond_safe_range(plan_for(calibrated, 9.0))
    assert "-1 is outside" in beyond_safe_range(plan_for(calibrated, -1.0))
    assert beyond_safe_range(plan_for(calibrated, 9.0, formula="additive")) == ""


# ---- the commands ----


@pytest.fixture
def vector_file(bare_search_path, make_vector):
    path = bare_search_path / "steering_vectors" / "tiny-mixtral" / "sport.safetensors"
    write_vector(make_vector(), path)
    return path


@pytest.fixture
def neutral(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    return folder


def test_calibrate_writes_the_file_and_generate_warns(
    run, vector_file, neutral, tiny_checkpoint, teacher_forcing, make_vector
):
    budget = teacher_forcing.compare(plan_for(make_vector(), 64.0)).kl_p95 / 2
    shared = ("--model", tiny_checkpoint, "--dtype", "float32")
    code, out, err = run("calibrate", "-d", "sport", "--budget", budget, "--heldout", neutral, *shared)
    assert code == 0, err
    assert str(vector_file)[-20:] in out
    info = read_vector(vector_file).info
    assert info.damage <= budget
    assert info.safe_range == (0.0, info.strength)
    beyond = str(info.strength + 1)
    code, _, err = run("generate", "hello", "-d", "sport", "--strength", beyond, "--max-new-tokens", "3", *shared)
    assert code == 0
    assert f"strength {info.strength + 1:g} is outside 0 to {info.strength:g}" in err
    code, _, err = run("generate", "hello", "-d", "sport", "--max-new-tokens", "3", *shared)
    assert "outside" not in err


def test_calibrate_refuses_a_vector_that_does_nothing(
    run, vector_file, neutral, tiny_checkpoint, teacher_forcing, make_vector
):
    write_vector(idle_vector(make_vector), vector_file)
    before = vector_file.read_bytes()
    code, out, err = run("calibrate", "-d", "sport", "--heldout", neutral, "--model", tiny_checkpoint)
    assert (code, out) == (1, "")
    assert err.startswith("steermoe: vector 'sport' does nothing: strength 64")
    assert err.count("\n") == 1
    assert vector_file.read_bytes() == before


def test_generate_says_that_a_strength_is_a_guess(run, vector_file, tiny_checkpoint, make_vector):
    write_vector(replace(make_vector(), info=VectorInfo()), vector_file)
    command = ("generate", "hello", "-d", "sport", "--max-new-tokens", "3", "--model", tiny_checkpoint)
    assert run(*command).err.startswith("steermoe: 'sport' is not calibrated: strength 8 is a guess")
    assert "guess" not in run(*command, "--strength", "4").err


def test_the_share_of_slots_is_one_of_all_layers(run, vector_file, tiny_checkpoint, make_vector):
    shared = (
        "generate",
        "hello",
        "--max-new-tokens",
        "3",
        "--model",
        tiny_checkpoint,
        "-d",
        "sport",
        "--strength",
        "90",
    )
    one = run(*shared, "--layers", "1-1")
    assert "steered 2 of 7 tokens in 1 of 3 MoE layers; 17% of their slots" in one.err  # one of two slots of a layer
    every = run(*shared)
    assert "steered 2 of 7 tokens; 50% of their slots" in every.err
    found = [json.loads(run(*shared, "--json", *layers).out) for layers in (("--layers", "1-1"), ())]
    assert [one["steering"]["vector_share"] for one in found] == pytest.approx([1 / 6, 1 / 2])


def test_calibrate_dry_run_writes_nothing(run, vector_file, neutral, tiny_checkpoint):
    before = vector_file.read_bytes()
    code, out, err = run(
        "calibrate", "-d", "sport", "--heldout", neutral, "--model", tiny_checkpoint, "--dry-run", "--json"
    )
    assert code == 0, err
    assert '"saturates": true' in out
    assert vector_file.read_bytes() == before


def test_calibrate_reports_wrong_budgets_before_it_loads(run, vector_file):
    code, _, err = run("calibrate", "-d", "sport", "--budget", "0", "--model", "/nowhere/at/all")
    assert (code, err) == (1, "steermoe: budget 0.0 must be a number above 0, in nats, such as 1\n")
