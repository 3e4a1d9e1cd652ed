"""What users write about steering, and the messages if it can't be read."""

import json
import subprocess
import sys

import pytest

from steermoe.errors import SteeringError
from steermoe.steering.plans import Schedule
from steermoe.steering.spec import (
    FIELDS,
    NAMES,
    SteeringSpec,
    parse_domain,
    parse_expert,
    parse_layers,
    read_field,
    read_spec,
)


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
        (parse_domain, "sport=1e300"),
        (parse_domain, "sport=-1000001"),
        (parse_domain, "sport=1e-320"),
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


@pytest.mark.parametrize(
    ("parse", "text", "part"),
    [
        (parse_layers, "9" * 5000, "layer 99"),
        (parse_layers, f"0-{2**31}", f"layer {2**31} is too large: expected 0 to {2**31 - 1}"),
        (parse_expert, f"0:{'9' * 400}", "expert 99"),
        (parse_domain, "a" * 5000 + "=x", "aaaa...'"),
        (parse_layers, "\x1b[31m\n", "'\\x1b[31m\\n' is not a range"),
    ],
)
def test_long_and_odd_texts_are_quoted_in_part_and_on_one_line(parse, text, part):
    with pytest.raises(SteeringError) as caught:
        parse(text)
    assert part in str(caught.value)
    assert len(str(caught.value)) < 250
    assert str(caught.value).isprintable()


def test_digits_of_other_scripts_and_leading_zeros():
    assert parse_layers("0" * 5000 + "7") == (7, 7)
    with pytest.raises(SteeringError, match="is not a range"):
        parse_layers("\u0663")


def test_lists_and_single_texts_of_options_become_tuples():
    spec = SteeringSpec("sport", force=["0:1"], ban=None)
    assert spec == SteeringSpec(("sport",), force=("0:1",))
    assert hash(spec) == hash(SteeringSpec(("sport",), force=("0:1",)))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (SteeringSpec(), True),
        (SteeringSpec(strength=3.0, layers="0-1"), True),
        (SteeringSpec("none"), True),
        (SteeringSpec("none", ban=("0:1",)), True),
        (SteeringSpec("sport"), False),
        (SteeringSpec(ban=("0:1",)), False),
    ],
)
def test_what_asks_for_no_steering(spec, expected):
    assert spec.is_unsteered == expected


def test_the_fields_of_the_plan():
    spec = SteeringSpec("sport", 3.0, "additive", "paper", "all", "decay:4", "2", ("0:1",), ("1:2", "1:3"))
    expected = {
        "strength": 3.0,
        "formula": "additive",
        "scale": "paper",
        "positions": "all",
        "schedule": Schedule("decay", 0, 4),
        "layers": (2, 2),
        "force": ((0, 1),),
        "ban": ((1, 2), (1, 3)),
    }
    assert expected.items() <= spec.plan_fields().items()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("domain", "sport=0.7+food=0.3", ("sport=0.7+food=0.3",)),
        ("domain", {"sport": 0.7, "food": -1}, ("sport=0.7", "food=-1")),
        ("domain", ["sport=0.7", "food"], ("sport=0.7", "food")),
        ("domain", "", ()),
        ("strength", 3, 3),
        ("layers", 3, "3"),
        ("layers", "3-5", "3-5"),
        ("layers", [3, 5], "3-5"),
        ("force", ["12:5", [3, 4]], ("12:5", "3:4")),
    ],
)
def test_values_of_json(name, value, expected):
    assert read_field(name, value) == expected


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("domain", 7, ["field 'domain' is 7", "a name, or an object of names and weights"]),
        ("domain", {"sport": "much"}, ["field 'domain'", "names and weights"]),
        ("domain", {"sport": True}, ["names and weights"]),
        ("domain", [["sport"]], ["names and weights"]),
        ("domain", ["sport+food"] * 17, ["34 domains", "at most 32"]),
        ("strength", "4", ["field 'strength' is '4', expected a number"]),
        ("strength", True, ["field 'strength' is True"]),
        ("strength", 10**400, ["field 'strength' is too large a number"]),
        ("formula", 3, ["field 'formula' is 3, expected text"]),
        ("layers", [1, "2"], ["field 'layers' is [1, '2'], expected text such as 15-29"]),
        ("layers", [1, 2, 3], ["expected text such as 15-29"]),
        ("force", "0:1", ["field 'force' is '0:1', expected a list such as"]),
        ("ban", [5], ["field 'ban' is [5]"]),
        ("ban", [["x" * 200]], ["field 'ban' is [['xxx", "expected a list"]),
        ("ban", [[[1], 2]], ["field 'ban' is [[[1], 2]]", "expected a list"]),
        ("force", ["1:1"] * 16385, ["16385 experts", "at most 16384"]),
        ("domain", {"sport": 10**5000}, ["field 'domain' is a dict", "names and weights"]),
    ],
)
def test_wrong_values_of_json_are_named_with_what_was_expected(name, value, parts):
    with pytest.raises(SteeringError) as caught:
        read_field(name, value)
    for part in parts:
        assert part in str(caught.value)
    assert len(str(caught.value)) < 160


def test_specs_out_of_json():
    asked = {"domain": "sport", "strength": None, "layers": 3}
    assert read_spec(asked) == read_spec(json.dumps(asked)) == SteeringSpec("sport", layers="3")
    with pytest.raises(SteeringError, match="steering has no field volume: its fields are domain, strength, formula"):
        read_spec({"domain": "sport", "volume": 11})
    with pytest.raises(SteeringError, match="names no domain, no experts to force or ban and no active experts"):
        read_spec({"domain": "", "strength": 3})
    assert read_spec({"domain": "", "ban": ["0:1"]}) == SteeringSpec(ban=("0:1",))


def test_fields_say_all_that_is_known_of_them():
    for field in FIELDS:
        known = field.metadata
        assert known["help"].endswith(".")
        assert known["unset"] or field.default not in (None, ())
        assert read_field(field.name, known["example"]) != field.default


def test_specs_are_read_without_torch():
    code = (
        "import sys, steermoe.steering.spec as s; s.read_spec('{\"domain\": \"sport\"}'); print('torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


def test_none_leaves_the_default():
    assert SteeringSpec(**dict.fromkeys(NAMES)) == SteeringSpec()
