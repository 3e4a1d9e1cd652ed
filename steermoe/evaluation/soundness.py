"""Detect texts that are not sound: gibberish, a loop, or a bare list of the domain's words. Knows no model.

All three can fool a classifier and a word list, so success only counts if the text is sound. What is usual comes from
unsteered texts of the same model, openings and length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, pstdev

GIBBERISH_DEVIATIONS = 5.0
LOOP_DEVIATIONS = 4.0
"""How far a text's nats per token may be above and below the unsteered texts' mean, in standard deviations."""
REPEATED_LIMIT = 0.3
"""Above this share of repeated 4-grams a text counts as a loop, whatever the unsteered ones do."""
LOOP_TOKENS = 16
"""From this length on a stretch that repeats a piece counts as a loop."""
LIST_PER_THOUSAND = 400.0
"""Above this many of the domain's words per 1,000 a text is a list of them; the densest stories stay below half."""
LEAST_DEVIATION = 0.2
"""In nats per token: if unsteered texts hardly vary, small deviations must not count as damage."""


@dataclass(frozen=True)
class Usual:
    """What unsteered texts are like: mean and deviation of their nats per token, under the unsteered model."""

    nats: float
    deviation: float

    @classmethod
    def of(cls, nats: Sequence[float]) -> "Usual":
        """From one figure per text; at least two."""
        return cls(mean(nats), max(pstdev(nats), LEAST_DEVIATION))


def defect_of(usual: Usual, nats: float | None, repeated: float, loop: int, per_thousand: float) -> str:
    """What is wrong with a text: "gibberish", "loop", "list", or "" for a sound one.

    Args:
        usual: of the unsteered texts.
        nats: mean negative log-likelihood per token under the unsteered model; None for a text without tokens.
        repeated: share of repeated 4-grams.
        loop: tokens of the longest loop.
        per_thousand: the domain's words per 1,000 words, from all lists together.
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
