"""What a visitor chose: from widgets, from links, and as steering."""

from urllib.parse import parse_qs

import pytest
from hypothesis import given
from hypothesis import strategies as some

from steermoe.errors import SteerMoEError
from steermoe.formulas import FORMULAS, SCALES
from steermoe.routing.positions import POSITIONS
from steermoe.serving.page.presets import FIRST_PROMPT, PRESETS, first, fitting
from steermoe.serving.page.settings import MOST_AMOUNT, OWN, Settings, from_values
from steermoe.steering.spec import SteeringSpec

STRENGTHS = {"sport": 8.0, "food": 4.0}
FULL = Settings(
    "Milo & the <river>?",
    is_chat=True,
    amounts={"sport": 0.5, "a=b": -1.0},
    strength=-0.25,
    formula="additive",
    scale="paper",
    positions="all",
    schedule="decay:40",
    layers="3-5",
    tokens=7,
    temperature=0.0,
    min_p=0.05,
    seed=2**40,
)
amounts = some.integers(-200, 200).map(lambda number: number / 100)


def test_a_link_holds_all_settings():
    assert Settings("other").updated(FULL.query()) == FULL
    plain = Settings("Milo")
    assert plain.query() == "prompt=Milo"
    assert Settings("other", amounts={"sport": 1.0}).updated("prompt=Milo") == Settings("Milo", amounts={"sport": 1.0})


@pytest.mark.fuzz
@given(
    some.builds(
        Settings,
        some.text(min_size=1, max_size=50).filter(str.strip).filter(lambda text: text.isprintable()),
        is_chat=some.booleans(),
        amounts=some.dictionaries(some.text("ab=& ", min_size=1), amounts.filter(bool), min_size=1, max_size=3),
        strength=amounts,
        formula=some.sampled_from([None, *FORMULAS]),
        scale=some.sampled_from([None, *SCALES]),
        positions=some.sampled_from(POSITIONS),
        schedule=some.text(),
        layers=some.text(),
        tokens=some.integers(1, 1000),
        temperature=some.integers(0, 200).map(lambda number: number / 100),
        min_p=some.integers(0, 100).map(lambda number: number / 100),
        seed=some.integers(0, 2**62),
    )
)
def test_any_settings_survive_a_link(settings):
    assert Settings("other").updated(settings.query()) == settings


def test_a_link_holds_every_digit_of_a_seed():
    assert Settings("Milo").updated(Settings("Milo", seed=2**53 + 1).query()).seed == 2**53 + 1


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("strength=3", "strength is 3, expected -2 to 2"),
        ("strength=nan", "strength is nan"),
        ("topic=sport=9", "sport is 9"),
        ("topic=sport=x", "topic sport is 'x'"),
        ("prompt=", "the prompt has 0 characters"),
        ("tokens=1e9", "tokens is 1000000000, expected 1 to 1000"),
        ("tokens=many", "tokens is 'many'"),
        ("tokens=inf", "tokens is 'inf'"),
        ("chat=yes", "chat is 'yes'"),
        ("positions=here", "positions is 'here', expected one of generated"),
        ("formula=magic", "formula is 'magic'"),
        ("temperature=1e99", "temperature 1e"),
        ("min_p=2", "min_p 2.0 is out of range"),
        ("seed=-1", "seed -1 is out of range"),
        ("utm=x&" * 101, "more than 100 settings"),
    ],
)
def test_a_wrong_link_says_what_is_wrong(query, message):
    with pytest.raises(SteerMoEError, match=message):
        Settings("Milo").updated(query)


def test_what_a_link_does_not_know_is_left_alone():
    assert Settings("Milo").updated("__theme=dark&utm=x") == Settings("Milo")


def test_the_strength_is_relative_to_what_the_vectors_were_calibrated_with():
    one = Settings("x", amounts={"sport": 1.0}, strength=0.5).spec(STRENGTHS.__getitem__)
    assert (one.domain, one.strength) == (("sport=1",), 4.0)
    both = Settings("x", amounts={"sport": 0.5, "food": 0.5}).spec(STRENGTHS.__getitem__)
    assert (both.domain, both.strength) == (("sport=0.5", "food=0.5"), 6.0)


@pytest.mark.parametrize("settings", [Settings("x"), Settings("x", amounts={"sport": 0.0}), Settings("x", strength=0)])
def test_no_topic_or_no_strength_is_no_steering(settings):
    assert settings.spec(STRENGTHS.__getitem__) == SteeringSpec()


def test_widgets_give_settings():
    values = ["Milo", False, 1, OWN, "paper", "all", " first:3 ", "", 12.0, 0.7, 0.25, 5.0]
    read = from_values(values, ["sport", "food"], [0.5, 0, 0.9])
    assert read == Settings(
        "Milo",
        amounts={"sport": 0.5, "food": 0.0},
        scale="paper",
        positions="all",
        schedule=" first:3 ",
        tokens=12,
        min_p=0.25,
        seed=5,
    )
    spec = read.spec(STRENGTHS.__getitem__)
    assert (spec.schedule, spec.layers, spec.formula) == ("first:3", None, None)
    with pytest.raises(SteerMoEError, match="seed is"):
        from_values([*values[:-1], None], [], [])


def test_presets_fit_and_the_first_screen_has_a_topic_that_is_there():
    for name, preset in PRESETS.items():
        assert parse_qs(preset.query())["prompt"] == [preset.prompt], name
        assert preset.spec(lambda topic: 8.0).strength
        assert all(abs(amount) <= MOST_AMOUNT for amount in preset.amounts.values())
    assert first(["food", "sport"]).amounts == {"sport": 1.0}
    assert first(["chess"]).amounts == {"chess": 1.0}
    assert first([]) == Settings(FIRST_PROMPT)
    assert set(fitting(["sport"])) == {"A sporty dog", "Anything but sport"}
