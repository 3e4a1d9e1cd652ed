"""Strengths by layer, on a model in which it is known which layer helps, which one harms and which one does nothing."""

import json
from dataclasses import replace

import pytest

from steermoe.errors import SteeringError
from steermoe.evaluation.by_layer import COARSE, LEVELS, calibrate_layers, scaled, strengths_by_layer
from steermoe.evaluation.calibration import calibrate_vector
from steermoe.evaluation.teacher_forcing import TeacherForcing
from steermoe.steering.plans import plan_for
from steermoe.vectors.file import read_vector, write_vector
from tests.support.planted_experts import BAD, DOMAIN, GOOD, NEUTRAL, plant, vector_of

BUDGET = 0.3


@pytest.fixture(scope="module")
def planted(tiny_model):
    return plant(tiny_model)


@pytest.fixture(scope="module")
def read(planted):
    """The domain's texts, others of it, and neutral ones."""
    return [TeacherForcing(planted, texts) for texts in (DOMAIN[::2], DOMAIN[1::2], NEUTRAL)]


@pytest.fixture(scope="module")
def spent(planted, read):
    """The plan with one strength for all layers, the vector with strengths by layer, and what was found."""
    plan = plan_for(vector_of(planted.shape), 1.0)
    return plan, *strengths_by_layer(*read, plan, BUDGET)


def test_the_layer_that_helps_gets_the_budget(spent):
    plan, vector, found = spent
    assert found.factors[GOOD[0]] > 0
    assert found.factors[BAD[0]] == 0
    assert found.idle == (0,)
    assert found.helped
    assert found.gain > found.gain_alike + 0.01
    assert vector.experts.equal(scaled(plan.vector, found.factors).experts)
    assert all(factor in LEVELS for factor in found.factors)


def test_the_gains_are_those_at_the_budget(read, spent):
    _, held_back, neutral = read
    plan, vector, found = spent
    for used, gain in ((vector, found.gain), (plan.vector, found.gain_alike)):
        at_budget = plan_for(calibrate_vector(neutral, used, BUDGET, tolerance=COARSE)[0])
        figures = held_back.compare(at_budget)
        assert figures.nats_unsteered - figures.nats == pytest.approx(gain)
        assert neutral.compare(at_budget).kl_p95 <= BUDGET


def test_one_strength_is_kept_if_layers_of_their_own_do_not_help(planted, read):
    """With only one layer that does anything there is nothing to spread."""
    vector = vector_of(planted.shape, weights=(0.4, 0.0))
    kept, found = strengths_by_layer(*read, plan_for(vector, 1.0), BUDGET)
    assert found.idle == (0, BAD[0])
    assert found.factors[BAD[0]] == 0
    assert kept.experts[GOOD].item() > 0
    assert abs(found.gain - found.gain_alike) < 0.2 * found.gain_alike


def test_a_vector_that_only_harms_is_refused(planted, read):
    vector = vector_of(planted.shape, weights=(0.0, 0.4))
    with pytest.raises(SteeringError, match=r"'zebras' makes its domain's texts no likelier in any layer within 0\.3"):
        strengths_by_layer(*read, plan_for(vector, 1.0), BUDGET)


def test_a_vector_says_that_it_was_done(planted):
    vector = vector_of(planted.shape)
    vector = replace(vector, info=replace(vector.info, created_by="steermoe vectors build"))
    made, found = calibrate_layers(planted, plan_for(vector, 1.0), DOMAIN, NEUTRAL, BUDGET)
    assert found.helped
    assert made.info.created_by == "steermoe vectors build, steermoe calibrate --by-layer"


# ---- the command ----


@pytest.fixture
def folders(bare_search_path, planted, tmp_path):
    """A checkpoint of the planted model, texts in folders by label, and a vector file."""
    checkpoint = tmp_path / "planted"
    planted.model.save_pretrained(checkpoint)
    planted.tokenizer.save_pretrained(checkpoint)
    for label, texts in {"zebras": DOMAIN, "neutral": NEUTRAL}.items():
        (tmp_path / "texts" / label).mkdir(parents=True)
        for number, text in enumerate(texts):
            (tmp_path / "texts" / label / f"{number}.txt").write_text(text)
    vector = vector_of(planted.shape)
    path = bare_search_path / "zebras.safetensors"
    write_vector(replace(vector, info=replace(vector.info, model="planted", fingerprint="")), path)
    return checkpoint, tmp_path / "texts", path


def test_calibrate_by_layer_writes_the_scaled_rows(run, folders):
    checkpoint, texts, path = folders
    shared = ("--by-layer", "--budget", BUDGET, "--model", checkpoint, "--dtype", "float32")
    command = ("calibrate", "-d", path, "--heldout", texts, *shared)
    result = run(*command, "-o", "out", "--json")
    assert result.code == 0, result.err
    (record,) = json.loads(result.out)
    assert record["by_layer"]["helped"]
    assert record["by_layer"]["factors"][BAD[0]] == 0
    made = read_vector(record["path"])
    assert made.experts[BAD].item() == 0
    assert made.experts[GOOD].item() == pytest.approx(0.4 * record["by_layer"]["factors"][GOOD[0]])
    assert made.info.strength == record["strength"]
    assert f"zebras: strengths by layer: {GOOD[0]} x " in result.err
    assert read_vector(path).experts[BAD].item() == pytest.approx(0.4)
    plain = run("calibrate", "-d", path, "--heldout", texts, "--dry-run", "--json", *shared[1:])
    assert "by_layer" not in json.loads(plain.out)[0]


def test_calibrate_by_layer_needs_texts_of_the_domain(run, folders):
    checkpoint, texts, path = folders
    shared = ("--by-layer", "--model", checkpoint)
    result = run("calibrate", "-d", path, "--dry-run", *shared)
    assert (result.code, result.out) == (1, "")
    assert result.err == (
        "steermoe: the package has 0 texts labelled 'zebras', --by-layer needs 4: give texts in a folder of that name "
        "with --heldout, or name their field with --label-field\n"
    )
    result = run("calibrate", "-d", path, "--heldout", texts / "neutral", "--dry-run", *shared)
    assert result.code == 1
    assert "has 0 texts labelled 'zebras'" in result.err
