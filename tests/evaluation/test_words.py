import pytest

from steermoe.evaluation.words import distinct_words, word_pattern

PATTERN = word_pattern(["goal", "team", "race", "goalkeeper"])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Two GOALS by one team", {"goal", "team"}),
        ("they raced, racing again", {"race"}),  # "racing" drops the e: not a known ending
        ("a goalkeeper keeps goal", {"goalkeeper", "goal"}),
        ("steamed goalless traces", set()),
        ("", set()),
    ],
)
def test_words_are_found_with_common_endings_and_nothing_else(text, found):
    assert distinct_words(text, PATTERN) == found
