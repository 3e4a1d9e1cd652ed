"""Steering in the options of other programs: text for every field, or values of Python."""

import json

import pytest

from steermoe.errors import SteeringError
from steermoe.steering.asked import spec_of_options
from steermoe.steering.spec import FIELDS, SteeringSpec, read_spec


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_a_field_may_be_text_or_a_value(field):
    example = field.metadata["example"]
    others = {} if field.name == "domain" else {"domain": "sport"}
    expected = read_spec({**others, field.name: example})
    text = example if isinstance(example, str) else json.dumps(example)
    if isinstance(example, list) and str in field.metadata["kinds"]:
        text = "-".join(map(str, example))  # layers have a notation of their own
    assert spec_of_options({**others, field.name: text}) == expected
    assert spec_of_options({**others, field.name: example}) == expected
    assert getattr(expected, field.name) != field.default


@pytest.mark.parametrize(
    ("options", "spec"),
    [
        ({"domain": "sport"}, SteeringSpec(("sport",))),
        ({"domain": "sport=0.7, food=0.3"}, SteeringSpec(("sport=0.7", "food=0.3"))),
        ({"domain": "sport=0.7+food"}, SteeringSpec(("sport=0.7+food",))),
        ({"domain": '{"sport": 2}'}, SteeringSpec(("sport=2",))),
        ({"domain": ["sport", "food=3"]}, SteeringSpec(("sport", "food=3"))),
        ({"force": "0:1, 2:3", "ban": "1:1"}, SteeringSpec(force=("0:1", "2:3"), ban=("1:1",))),
        ({"domain": "sport", "think_tags": "<a>,</a>"}, SteeringSpec(("sport",), think_tags=("<a>", "</a>"))),
        ({"domain": "none"}, SteeringSpec(("none",))),
        ({"domain": "sport", "strength": None}, SteeringSpec(("sport",))),
    ],
)
def test_notations(options, spec):
    assert spec_of_options(options) == spec


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domain": "sport,"}, "names no domain"),
        ({"domain": "{sport"}, "field 'domain' is '{sport', expected a name, or an object"),
        ({"domain": "sport", "strength": "5 6"}, "field 'strength' is '5 6', expected a number"),
        ({"domain": "sport", "strength": "NaN"}, "field 'strength' is 'NaN', expected a number"),
        ({"active_experts": "[" * 100_000}, "field 'active_experts' is .*, expected a whole number"),
        ({"force": "[1"}, r"field 'force' is '\[1', expected a list"),
        ({}, "it names no domain"),
    ],
)
def test_what_cannot_be_read_is_named(options, message):
    with pytest.raises(SteeringError, match=message) as error:
        spec_of_options(options)
    assert len(str(error.value)) < 300
