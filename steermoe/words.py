"""Find a domain's words in a text, whatever their common endings. Knows no domain and no model."""

import re
from collections.abc import Iterable


def word_pattern(words: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the words in any case, also with -s, -es, -d, -ed or -ing; group 1 is the word as listed."""
    alternatives = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return re.compile(rf"\b({alternatives})(?:s|es|d|ed|ing)?\b", re.IGNORECASE)


def distinct_words(text: str, pattern: re.Pattern[str]) -> set[str]:
    """The words as listed, in small letters, that a text holds."""
    return {match[1].lower() for match in pattern.finditer(text)}
