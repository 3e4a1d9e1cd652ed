"""Prompts that are text, and those that no tokenizer can read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe.engines.request import Request
from steermoe.engines.text import check_text, encode_prompt
from steermoe.errors import GenerationError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Go \udcff", r"the prompt is not UTF-8 \(invalid start byte at byte 3\): convert it, .*iconv"),
        ("\udce9t\udce9", r"the prompt is not UTF-8 \(invalid continuation byte at byte 0\)"),
        ("\ud83d", "the prompt holds half a surrogate pair, which is not text"),
        ("\udced\udca0\udc80", r"the prompt is not UTF-8 \(invalid continuation byte at byte 0\)"),
    ],
)
def test_a_prompt_that_is_no_text(text, message):
    with pytest.raises(GenerationError, match=message):
        encode_prompt(lambda text: list(text.encode()), Request(text), "tiny", None)


def test_a_prompt_of_any_script_is_text():
    text = "é ё 中文 \U0001f415 \x1b\u202e"
    assert check_text(text, "the prompt") is text


@pytest.mark.fuzz
@given(st.text(st.characters()) | st.binary().map(lambda raw: raw.decode(errors="surrogateescape")))
def test_what_passes_can_be_written_in_utf_8(text):
    try:
        written = text.encode()
    except UnicodeEncodeError:
        with pytest.raises(GenerationError, match=r"^stdin (is not UTF-8 \(|holds half a surrogate pair).*[^\n]$"):
            check_text(text, "stdin")
    else:
        assert check_text(text, "stdin").encode() == written
