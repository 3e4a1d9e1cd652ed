import pytest
import torch

from steermoe.engines.request import Completion, Request
from steermoe.evaluation.comparison import compare_completions, vector_share
from steermoe.steering.plans import SteeringPlan
from steermoe.vectors.vector import SteeringVector, VectorInfo


def vector(domain, expert, keywords=()):
    frequency = torch.full((2, 4), 0.02)
    frequency[:, expert] = 0.94
    return SteeringVector(domain, frequency, (0, 1), info=VectorInfo(keywords=keywords))


def completion(text, plan, frequency):
    return Completion(Request("Once.", plan), text, tuple(range(5)), 2, "length", 0.1, frequency=frequency)


def test_share_of_the_vectors_experts_is_a_mean_over_layers():
    frequency = torch.tensor([[0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    assert vector_share(frequency, vector("sport", 1)) == pytest.approx((0.5 + 0.25) / 2)


def test_every_text_is_measured_against_every_vector():
    sport, food = vector("sport", 1, ("goal", "team")), vector("food", 2, ("soup",))
    plain = torch.full((2, 4), 0.25)
    turned = torch.tensor([[0.0, 1.0, 0, 0], [0.0, 0.5, 0.5, 0]])
    columns = compare_completions(
        [
            completion(" A soup.", None, plain),
            completion(" The teams scored goals, goals.", SteeringPlan(sport, 2.0), turned),
            completion(" Soup!", SteeringPlan(food, 3.0, formula="additive"), plain),
        ]
    )
    assert [column.label for column in columns] == ["unsteered", "sport", "food"]
    assert [column.detail for column in columns] == ["", "max_scaled, strength 2", "additive, strength 3"]
    assert columns[1].shares == pytest.approx({"sport": 0.75, "food": 0.25})
    assert columns[0].shares == pytest.approx({"sport": 0.25, "food": 0.25})
    assert [column.word_count for column in columns] == [
        {"sport": 0, "food": 1},
        {"sport": 2, "food": 0},
        {"sport": 0, "food": 1},
    ]
    text = columns[1].completion.text
    assert [text[start:end] for start, end in columns[1].words] == ["teams", "goals", "goals"]


def test_json_includes_the_figures():
    sport = vector("sport", 1, ("goal",))
    (column,) = compare_completions([completion("Goal!", SteeringPlan(sport), torch.full((2, 4), 0.25))])
    record = column.as_dict("tiny")
    assert record["vector_shares"] == {"sport": 0.25}
    assert record["distinct_keywords"] == {"sport": 1}
    assert record["text"] == "Goal!"
