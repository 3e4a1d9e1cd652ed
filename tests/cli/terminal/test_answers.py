"""Words of an answer that comes in pieces, at the width of a terminal."""

import pytest

from steermoe.cli.terminal.answers import WordWrap

TEXT = "The quick brown fox, \u4e2d\u6587 and\n\na list:\n- of a-very-long-word-that-fits-nowhere in lines.\nEnd"


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize("width", [12, 20, 200])
def test_words_are_kept_whole(size, width):
    printed: list[str] = []
    wrap = WordWrap(printed.append, width)
    for start in range(0, len(TEXT), size):
        wrap.add(TEXT[start : start + size])
    wrap.rest()
    text = "".join(printed)
    assert text.split() == TEXT.split()
    for line in text.split("\n"):
        assert len(line.rstrip()) <= width or " " not in line.strip()
    if width == 200:
        assert text == TEXT


def test_words_come_as_soon_as_they_are_complete():
    printed: list[str] = []
    wrap = WordWrap(printed.append, 80)
    wrap.add("The qui")
    assert "".join(printed) == "The "
    wrap.add("ck ")
    assert "".join(printed) == "The quick "
