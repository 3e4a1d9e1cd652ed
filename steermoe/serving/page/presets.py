"""Settings to begin with: what the page shows first, and what its buttons set."""

from collections.abc import Sequence

from steermoe.serving.page.settings import Settings

FIRST_PROMPT = "Once upon a time there was a brown dog named Milo who lived by the river."
FIRST_TOPIC = "sport"

PRESETS: dict[str, Settings] = {
    "A sporty dog": Settings(FIRST_PROMPT, amounts={"sport": 1.0}),
    "Dinner on a space ship": Settings(
        "The captain looked out of the window and sighed.", amounts={"space": 1.0, "food": 0.6}, seed=2
    ),
    "A musical lawyer": Settings(
        "Anna opened the old wooden door and walked in.", amounts={"law": 0.7, "music": 0.7}, seed=1
    ),
    "Medicine at first, then let go": Settings(
        "On Monday morning Tom woke up early.", amounts={"medicine": 1.0}, schedule="first:40", seed=3
    ),
    "Anything but sport": Settings("After school the children ran to the field.", amounts={"sport": 1.0}, strength=-1),
}


def first(topics: Sequence[str]) -> Settings:
    """What the page begins with, for a model that has vectors of these topics."""
    topic = FIRST_TOPIC if FIRST_TOPIC in topics else next(iter(topics), None)
    return Settings(FIRST_PROMPT, amounts={} if topic is None else {topic: 1.0})


def fitting(topics: Sequence[str]) -> dict[str, Settings]:
    """The presets whose topics are there."""
    return {name: one for name, one in PRESETS.items() if set(one.amounts) <= set(topics)}
