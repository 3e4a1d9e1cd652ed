"""Figures of one text, from its tokens or words alone: loops, repetition, variety, a domain's words. Knows no model.

Lengths and positions are in tokens of the model, word rates are per 1,000 words of the text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

LONGEST_PERIOD = 40
"""The longest repeated piece of a loop that is looked for, in tokens."""
VARIETY_LENGTH = 40
"""Tokens of a text in which distinct n-grams are counted: the share falls with length, so all need the same length."""


def distinct_ngrams(tokens: Sequence[int], size: int, length: int = VARIETY_LENGTH) -> float | None:
    """Share of different n-grams among the first `length` tokens, 0 to 1; None if the text is shorter."""
    if len(tokens) < length:
        return None
    grams = _ngrams(tokens[:length], size)
    return len(set(grams)) / len(grams)


def repeated_ngrams(tokens: Sequence[int], size: int = 4) -> float:
    """Share of n-grams that occurred earlier in the text, 0 to 1."""
    grams = _ngrams(tokens, size)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def longest_loop(tokens: Sequence[int]) -> int:
    """Tokens of the longest stretch in which one piece occurs at least twice in a row; 0 if there is none."""
    longest = 0
    for period in range(1, min(LONGEST_PERIOD, len(tokens) // 2) + 1):
        run = 0
        for here, before in zip(tokens[period:], tokens, strict=False):
            run = run + 1 if here == before else 0
            if run >= period:
                longest = max(longest, run + period)
    return longest


@dataclass(frozen=True)
class WordFigures:
    """A domain's words in a text.

    Attributes:
        per_thousand: the domain's words per 1,000 words.
        distinct: the number of different ones.
        sentences: share of sentences with at least one, 0 to 1.
    """

    per_thousand: float
    distinct: int
    sentences: float


def word_figures(text: str, pattern: re.Pattern[str]) -> WordFigures:
    """Count the words that `words.word_pattern` finds."""
    found = [match[1].lower() for match in pattern.finditer(text)]
    words = len(re.findall(r"\w+", text))
    sentences = [part for part in re.split(r"[.!?]+", text) if re.search(r"\w", part)]
    hit = sum(bool(pattern.search(sentence)) for sentence in sentences)
    return WordFigures(
        1000 * len(found) / words if words else 0.0, len(set(found)), hit / len(sentences) if sentences else 0.0
    )


def _ngrams(tokens: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
