"""Prompts that are no text, and those that begin with a special token, as chat templates write them."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe.cli.options import has_special_tokens
from steermoe.engines import text
from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.request import Request
from steermoe.engines.text import check_text, encode_prompt
from steermoe.errors import GenerationError
from tests.support import steering_models as tiny

CHAT = "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}<|start|>assistant\n"
MESSAGES = [{"role": "user", "content": "Tell me of a </s> dog."}]


@pytest.fixture(scope="module")
def engine():
    tokenizer = tiny.byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    tokenizer.chat_template = CHAT
    return HFEngine(tiny.loaded(tiny.build("mixtral"), tokenizer))


@pytest.fixture(autouse=True)
def afresh():
    text._tell_reading.cache_clear()


def test_a_chat_is_encoded_as_its_template_does(engine, caplog):
    tokenizer = engine.loaded.tokenizer
    chat = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    with caplog.at_level(logging.WARNING):
        tokens = engine.encode(Request(chat, special_tokens=True))
        engine.encode(Request(chat, special_tokens=True))
    assert tokens == tokenizer.apply_chat_template(MESSAGES)["input_ids"]
    assert [record.getMessage() for record in caplog.records] == [
        "the prompt begins with '<|start|>', a special token: its special tokens are encoded as such"
    ]


def test_a_chat_from_elsewhere_stays_text_and_that_is_said(engine, caplog):
    chat = engine.loaded.tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    with caplog.at_level(logging.WARNING):
        tokens = engine.encode(Request(chat))
        engine.encode(Request(chat))
    assert len(tokens) == len(chat)  # a token for each byte
    (record,) = caplog.records
    assert "begins with '<|start|>', a special token of the model, but is read as plain text" in record.getMessage()
    assert "--special-tokens" in record.getMessage()


def test_text_on_request_is_text_in_silence(engine, caplog):
    chat = engine.loaded.tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    with caplog.at_level(logging.WARNING):
        assert len(engine.encode(Request(chat, special_tokens=False))) == len(chat)
    assert caplog.records == []


@pytest.mark.parametrize("prompt", ["A </s> dog", "a <|start >user", "<|star", "< |start|>"])
@pytest.mark.parametrize("special", [True, False])
def test_any_other_prompt_is_text_in_silence(engine, caplog, prompt, special):
    with caplog.at_level(logging.WARNING):
        assert len(engine.encode(Request(prompt, special_tokens=special))) == len(prompt)
    assert caplog.records == []


def test_the_longest_special_token_is_told(engine):
    encoder = text.HFEncoder(engine.loaded.tokenizer)
    assert encoder.leading_special("<s>x") == "<s>"
    assert encoder.leading_special("<|start|>x") == "<|start|>"
    assert encoder.leading_special("") == ""


@pytest.mark.parametrize(
    ("prompt", "wanted", "expected"),
    [
        ("typed", None, True),
        ("-", None, None),
        (None, None, None),
        ("-", True, True),
        ("typed", False, False),
    ],
)
def test_typed_prompts_may_have_special_tokens(prompt, wanted, expected):
    assert has_special_tokens(prompt, wanted) is expected


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("Go \udcff", r"the prompt is not UTF-8 \(invalid start byte at byte 3\): convert it, .*iconv"),
        ("\udce9t\udce9", r"the prompt is not UTF-8 \(invalid continuation byte at byte 0\)"),
        ("\ud83d", "the prompt holds half a surrogate pair, which is not text"),
        ("\udced\udca0\udc80", r"the prompt is not UTF-8 \(invalid continuation byte at byte 0\)"),
    ],
)
def test_a_prompt_that_is_no_text(prompt, message):
    with pytest.raises(GenerationError, match=message):
        encode_prompt(text.HFEncoder(tiny.byte_tokenizer()), Request(prompt), "tiny", None)


def test_a_prompt_of_any_script_is_text():
    prompt = "é ё 中文 \U0001f415 \x1b\u202e"
    assert check_text(prompt, "the prompt") is prompt


@pytest.mark.fuzz
@given(st.text(st.characters()) | st.binary().map(lambda raw: raw.decode(errors="surrogateescape")))
def test_what_passes_can_be_written_in_utf_8(prompt):
    try:
        written = prompt.encode()
    except UnicodeEncodeError:
        with pytest.raises(GenerationError, match=r"^stdin (is not UTF-8 \(|holds half a surrogate pair).*[^\n]$"):
            check_text(prompt, "stdin")
    else:
        assert check_text(prompt, "stdin").encode() == written
