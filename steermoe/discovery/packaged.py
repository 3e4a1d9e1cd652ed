"""The texts and openings that come with steermoe, in English and Russian, from which a vector is built for any model.

All were written for this project. The English texts are what the default model's training stories say after their
openings; the judge of an evaluation learns from others. The Russian texts and all openings are in `data/`.
"""

import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeAlias

from steermoe.models.default.spec import DOMAINS, TOPICS
from steermoe.models.default.stories import load_stories

DATA = Path(__file__).parent / "data"
"""A folder for each language: `openings.txt`, and the Russian texts as `DOMAIN.jsonl`."""
NEUTRAL = "neutral"
CREATED_BY = "steermoe, from its packaged texts"
"""What a vector says that was built from them."""
TEXTS, NEUTRAL_TEXTS = 40, 60
"""Texts of a domain, and neutral ones: the same in both languages."""

TextLanguage: TypeAlias = Literal["en", "ru"]
Language: TypeAlias = Literal["en", "ru", "both"]
"""Which texts a vector is built from."""
NAMES: dict[str, str] = {"en": "English", "ru": "Russian", "both": "English and Russian"}


def packaged_texts(language: Language = "en") -> dict[str, list[str]]:
    """Domain -> its texts, `neutral` last; with "both", first the English ones."""
    if language == "both":
        english, russian = packaged_texts("en"), packaged_texts("ru")
        return {domain: english[domain] + russian[domain] for domain in TOPICS}
    read = _english if language == "en" else _russian
    return {domain: read(domain)[: NEUTRAL_TEXTS if domain == NEUTRAL else TEXTS] for domain in TOPICS}


def _english(domain: str) -> list[str]:
    return [story.rest for story in load_stories("train", domain)]


def _russian(domain: str) -> list[str]:
    lines = (DATA / "ru" / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def is_packaged(domain: str) -> bool:
    """Whether there are texts of a domain; a name of any kind may be asked for."""
    return domain in DOMAINS


def openings(language: TextLanguage) -> list[str]:
    """The opening about the dog Barney, then ten others; none hints at a domain."""
    return (DATA / language / "openings.txt").read_text(encoding="utf-8").splitlines()


def language_of(text: str) -> TextLanguage:
    """The language of the packaged texts that suits a text: Russian if most of its letters are Cyrillic."""
    scripts = list(_scripts(text))
    return "ru" if 2 * scripts.count("CYRILLIC") > len(scripts) else "en"


def is_latin(text: str) -> bool:
    """Whether at least half of a text's letters are Latin; true of a text without letters."""
    scripts = list(_scripts(text))
    return 2 * scripts.count("LATIN") >= len(scripts)


def _scripts(text: str) -> Iterator[str]:
    """The first word of each letter's Unicode name, which is its script."""
    return (unicodedata.name(char, "").split(" ")[0] for char in text if char.isalpha())
