"""The packaged texts and openings in both languages, and how a prompt chooses between them."""

import re

import pytest

from steermoe.discovery.packaged import (
    NEUTRAL_TEXTS,
    TEXTS,
    is_latin,
    is_packaged,
    language_of,
    openings,
    packaged_texts,
)
from steermoe.evaluation.texts import packaged_texts as judged_texts
from steermoe.models.default import spec
from steermoe.models.default.stories import domain_words

BOTH = pytest.mark.parametrize("language", ["en", "ru"])


@BOTH
def test_each_domain_has_as_many_texts_in_both_languages(language):
    texts = packaged_texts(language)
    assert tuple(texts) == spec.TOPICS
    assert {domain: len(own) for domain, own in texts.items()} == {
        **dict.fromkeys(spec.DOMAINS, TEXTS),
        "neutral": NEUTRAL_TEXTS,
    }
    every = [text for own in texts.values() for text in own]
    assert len(set(every)) == len(every)
    assert all(text == " ".join(text.split()) for text in every)


def test_russian_texts_are_russian_and_of_the_length_asked_for():
    for domain, texts in packaged_texts("ru").items():
        for text in texts:
            assert 60 <= len(text.split()) <= 120, (domain, text)
            assert len(re.findall("[а-яёА-ЯЁ]", text)) > 0.95 * sum(map(str.isalpha, text)), (domain, text)
            assert language_of(text) == "ru"
        starts = {" ".join(text.split()[:3]).lower() for text in texts}
        assert len(starts) == len(texts), domain


def test_both_languages_together():
    both = packaged_texts("both")
    assert both["law"] == packaged_texts("en")["law"] + packaged_texts("ru")["law"]
    assert list(both) == list(packaged_texts("en"))


def test_the_judge_has_seen_none_of_them():
    """Neither what it learns from nor what is measured on."""
    judged = judged_texts()
    judged_too = {text for text, _ in (*judged.learn, *judged.measure)}
    assert judged_too
    assert not judged_too & {text for texts in packaged_texts("both").values() for text in texts}


@BOTH
def test_openings_begin_with_barney_and_name_no_domain(language):
    found = openings(language)
    assert len(found) == len(set(found)) == 11
    assert ("Barney" if language == "en" else "Барни") in found[0]
    assert all(language_of(opening) == language for opening in found)
    words = {word for domain in spec.DOMAINS for word in domain_words(domain)}
    assert not words & {word for opening in found for word in re.findall("[a-z]+", opening.lower())}


@pytest.mark.parametrize(
    ("text", "language", "latin"),
    [
        ("A dog", "en", True),
        ("Пёс по имени Барни", "ru", False),
        ("Пёс Barney жил у реки", "ru", False),
        ("The word пёс is a dog", "en", True),
        ("犬が川のそばに", "en", False),
        ("Ο σκύλος", "en", False),
        ("Ähnliche Hünde, naïve façade", "en", True),
        ("123 !? ", "en", True),
        ("", "en", True),
    ],
)
def test_script_decides(text, language, latin):
    assert (language_of(text), is_latin(text)) == (language, latin)


def test_what_is_packaged():
    assert is_packaged("sport")
    assert not is_packaged("neutral")
    assert not is_packaged("chess")
