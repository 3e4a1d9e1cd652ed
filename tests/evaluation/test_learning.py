"""Learned vectors, on a model in which it is known what is right to learn; and what can't be learned from."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from steermoe.errors import GenerationError, VectorError
from steermoe.evaluation.learning import LearningSettings, check_learnable, learn, starting_vectors
from steermoe.evaluation.teacher_forcing import TeacherForcing
from steermoe.models.quantization import quantize_model
from steermoe.steering.plans import plan_for
from steermoe.vectors import file
from tests.support.planted_experts import BAD, DOMAIN, GOOD, NEUTRAL, plant, vector_of

SETTINGS = LearningSettings(budget=0.3, steps=12)


@pytest.fixture(scope="module")
def planted(tiny_model):
    return plant(tiny_model)


@pytest.fixture(scope="module")
def learned(planted):
    return learn(planted, vector_of(planted.shape), DOMAIN, NEUTRAL, SETTINGS)


def test_the_expert_that_helps_is_raised_and_the_one_that_harms_lowered(learned):
    experts = learned.vector.experts
    assert experts[GOOD] > 0.4 > experts[BAD]
    assert learned.helped
    assert learned.gain > learned.gain_at_start + 0.01


def test_the_strength_spends_the_budget(planted, learned):
    info = learned.vector.info
    assert (info.formula, info.scale) == ("max_scaled", "magnitude")
    neutral = TeacherForcing(planted, NEUTRAL, max_tokens=SETTINGS.max_tokens)
    damage = neutral.compare(plan_for(learned.vector)).kl_p95
    assert damage == pytest.approx(info.damage)
    assert 0.5 * SETTINGS.budget < damage <= SETTINGS.budget


def test_a_layer_without_effect_is_left_as_it_is(learned):
    expected = torch.zeros(8)
    expected[0] = 0.4
    assert torch.allclose(learned.vector.experts[0], expected)


def test_the_vector_says_how_it_was_made(learned):
    assert learned.vector.info.created_by.endswith("--rule learned")
    assert learned.vector.info.title == "zebras, learned from 6 texts within 0.3 nats"


def test_the_same_texts_give_the_same_vector_and_the_model_stays(planted, learned):
    before = {name: weight.clone() for name, weight in planted.model.named_parameters()}
    again = learn(planted, vector_of(planted.shape), DOMAIN, NEUTRAL, SETTINGS)
    assert again.vector.experts.equal(learned.vector.experts)
    for name, weight in planted.model.named_parameters():
        assert weight.equal(before[name])
        assert weight.requires_grad
        assert weight.grad is None


def test_the_start_is_kept_if_learning_does_not_help(planted):
    """What is learned from texts full of q makes those that were held back unlikelier."""
    start = vector_of(planted.shape)
    texts = [DOMAIN[number // 4] if number % 4 == 0 else "qq qqq qq " * 4 for number in range(8)]
    found = learn(planted, start, texts, NEUTRAL, replace(SETTINGS, steps=6, rate=0.2))
    assert not found.helped
    assert found.vector.experts.equal(start.experts)
    assert "learned" not in found.vector.info.created_by


def test_a_start_by_frequencies_has_the_experts_that_set_texts_apart(planted):
    (vector,) = starting_vectors(planted, {"zebras": DOMAIN}, NEUTRAL)
    assert vector.frequency is not None
    apart = vector.experts > 0
    assert apart.any()
    assert (vector.frequency[apart] > vector.baseline[apart]).all()
    assert vector.info.texts == len(DOMAIN)


def test_a_quantised_model_is_refused(tiny_model):
    model = copy.deepcopy(tiny_model.model)
    quantize_model(model)
    with pytest.raises(VectorError, match="is quantised, which leaves no gradients to learn from, as --rule learned"):
        learn(replace(tiny_model, model=model), vector_of(tiny_model.shape), DOMAIN, NEUTRAL, SETTINGS)
    assert check_learnable(tiny_model) is tiny_model


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        (DOMAIN[:1], VectorError, "'zebras' has 1 text to learn from: give 2 or more"),
        (["zz", "zzz"], GenerationError, "has more than 17 tokens: give longer texts"),
    ],
)
def test_too_little_to_learn_from(planted, texts, error, message):
    with pytest.raises(error, match=message):
        learn(planted, vector_of(planted.shape), texts, NEUTRAL, SETTINGS)


# ---- the command ----


@pytest.fixture
def texts(bare_search_path):
    for name, lines in {"zebras": DOMAIN, "others": NEUTRAL}.items():
        (bare_search_path / name).mkdir()
        for number, line in enumerate(lines):
            (bare_search_path / name / f"{number}.txt").write_text(line)
    return bare_search_path


def test_build_by_learning(run, tiny_checkpoint, texts):
    arguments = ["vectors", "build", "--texts", "zebras=zebras", "--against", "others", "--model", tiny_checkpoint]
    result = run(*arguments, "--rule", "learned", "--steps", "3", "--budget", "0.01", "--json")
    assert result.code == 0, result.err
    (record,) = json.loads(result.out)
    assert record["learned"] == (record["gain"] > record["gain_at_start"])
    assert f"texts that were held back gain {record['gain']:+.3f} nats per token" in result.err
    vector = file.read_vector(record["path"])
    assert vector.info.damage <= 0.01
    assert vector.info.strength == record["strength"]
    result = run("generate", "Hi", "-d", "zebras", "--model", tiny_checkpoint, "--max-new-tokens", "3")
    assert result.code == 0, result.err
    assert "a guess" not in result.err
