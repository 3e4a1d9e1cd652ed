"""The language of a text by its stop words, its list of stop words, and its stems. No model, no download.

Lists and stemmers come with the extra `discover`; without them every text is read as English, or as no known language.
Languages are ISO 639-1 codes, "" for none that is known.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache

READ_WORDS = 200
"""Words of a text that decide on its language."""
LEAST_HITS, LEAST_SHARE = 2, 0.1
"""A language needs that number of stop words in a text, and this share of its words."""
STEMMERS = {
    **{"ar": "arabic", "ca": "catalan", "cs": "czech", "da": "danish", "de": "german", "el": "greek", "es": "spanish"},
    **{"et": "estonian", "eu": "basque", "fa": "persian", "fi": "finnish", "fr": "french", "ga": "irish"},
    **{"hi": "hindi", "hu": "hungarian", "hy": "armenian", "id": "indonesian", "it": "italian", "lt": "lithuanian"},
    **{"nl": "dutch", "no": "norwegian", "pl": "polish", "pt": "portuguese", "ro": "romanian", "ru": "russian"},
    **{"sv": "swedish", "tr": "turkish"},
}
"""Snowball's names of languages. English is left out: of its inflections only plurals matter to keywords."""
_SCRIPTS = {
    "ja": re.compile(r"[\u3040-\u30ff]"),
    "zh": re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]"),
    "th": re.compile(r"[\u0e00-\u0e7f]"),
}
"""Languages without spaces between words, which stop words can't tell: by a letter, the first that is there."""


def language_of(text: str, words: Sequence[str]) -> str:
    """The language whose stop words a text has most of; a word of several languages counts less for each.

    Args:
        text: as it is.
        words: its words in lower case.
    """
    languages = _languages()
    hits: dict[str, float] = {}
    read = words[:READ_WORDS]
    for word in read:
        for code in languages.get(word, ()):
            hits[code] = hits.get(code, 0.0) + 1 / len(languages[word])
    if hits:
        best = max(sorted(hits), key=hits.__getitem__)
        count = sum(best in languages.get(word, ()) for word in read)
        if count >= max(LEAST_HITS, LEAST_SHARE * len(read)):
            return best
    return next((code for code, letter in _SCRIPTS.items() if letter.search(text)), "")


@cache
def stop_words(language: str) -> frozenset[str]:
    """Words of a language that say nothing about a text's topic; none if the language or the list is not there."""
    if language == "en":
        from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

        return frozenset(ENGLISH_STOP_WORDS)
    try:
        from stopwordsiso import stopwords
    except ImportError:
        return frozenset()
    return frozenset(stopwords(language))


@cache
def _languages() -> dict[str, tuple[str, ...]]:
    """The languages of each stop word."""
    try:
        from stopwordsiso import langs
    except ImportError:
        return dict.fromkeys(stop_words("en"), ("en",))
    found: dict[str, list[str]] = {}
    for code in sorted(langs()):
        for word in stop_words(code):
            found.setdefault(word, []).append(code)
    return {word: tuple(codes) for word, codes in found.items()}


@cache
def stemmer(language: str) -> Callable[[str], str] | None:
    """What cuts the endings off a language's words; None if there is nothing for it."""
    if language not in STEMMERS:
        return None
    try:
        import snowballstemmer
    except ImportError:
        return None
    return snowballstemmer.stemmer(STEMMERS[language]).stemWord


def most_frequent_forms(words: Iterable[str], counts: Iterable[float], language: str) -> dict[str, str]:
    """For each word the form of its stem that occurs most; the word itself if there is no stemmer."""
    stem = stemmer(language)
    if stem is None:
        return {word: word for word in words}
    ranked = sorted(zip(words, counts, strict=True), key=lambda pair: (-pair[1], pair[0]))
    forms: dict[str, str] = {}
    return {word: forms.setdefault(stem(word), word) for word, _ in ranked}
