"""Tell a sound text from a damaged one: gibberish, a loop, or a bare list of the domain's words. Knows no model.

A classifier and a list of words can be fooled by all three, so success only counts where the text is sound. What is
usual is read off the unsteered texts of the same model, openings and length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, pstdev

GIBBERISH_DEVIATIONS = 5.0
LOOP_DEVIATIONS = 4.0
"""How far a text's nats a token may lie from the unsteered texts' mean, above and below, in their deviations."""
REPEATED_LIMIT = 0.3
"""Share of repeated 4-grams from which a text counts as a loop whatever the unsteered ones do."""
LOOP_TOKENS = 16
"""Length of a stretch said twice or more in a row from which it counts as a loop."""
LIST_PER_THOUSAND = 400.0
"""Words of the domain per 1,000 from which a text is a list of them; the densest stories stay under half of it."""
LEAST_DEVIATION = 0.2
"""In nats a token: texts of a very even model must not all be called damaged."""


@dataclass(frozen=True)
class Usual:
    """What the unsteered texts are like: mean and deviation of their nats a token, under the unsteered model."""

    nats: float
    deviation: float

    @classmethod
    def of(cls, nats: Sequence[float]) -> "Usual":
        """From one figure a text; at least two."""
        return cls(mean(nats), max(pstdev(nats), LEAST_DEVIATION))


def damage_of(usual: Usual, nats: float | None, repeated: float, loop: int, per_thousand: float) -> str:
    """What is wrong with a text: "gibberish", "loop", "list", or "" for a sound one.

    Args:
        usual: of the unsteered texts.
        nats: mean negative log-likelihood a token under the unsteered model; None for a text without tokens.
        repeated: share of repeated 4-grams.
        loop: tokens of the longest loop.
        per_thousand: words of the domain per 1,000 words, all lists together.
    """
    if repeated > REPEATED_LIMIT or loop >= LOOP_TOKENS:
        return "loop"
    if nats is not None and nats < usual.nats - LOOP_DEVIATIONS * usual.deviation:
        return "loop"
    if per_thousand > LIST_PER_THOUSAND:
        return "list"
    if nats is not None and nats > usual.nats + GIBBERISH_DEVIATIONS * usual.deviation:
        return "gibberish"
    return ""
