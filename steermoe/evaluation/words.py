"""Find a domain's words in a text, with common endings. Knows no domain and no model."""

import re
from collections.abc import Iterable


def word_pattern(words: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the words in any case, also with -s, -es, -d, -ed or -ing; group 1 is the listed word."""
    alternatives = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return re.compile(rf"\b({alternatives})(?:s|es|d|ed|ing)?\b", re.IGNORECASE)


def distinct_words(text: str, pattern: re.Pattern[str]) -> set[str]:
    """The listed words, in lower case, that a text contains."""
    return {match[1].lower() for match in pattern.finditer(text)}


def without_forms_of(words: Iterable[str], others: Iterable[str]) -> list[str]:
    """The words that are not one of `others` in any form that `word_pattern` knows."""
    listed = list(others)
    if not listed:
        return list(words)
    pattern = word_pattern(listed)
    return [word for word in words if not pattern.fullmatch(word)]
