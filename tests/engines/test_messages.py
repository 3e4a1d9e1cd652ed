"""Messages, and how what a model writes is split into thinking and answer, whatever pieces it comes in."""

import pytest

from steermoe.engines.messages import Chat, Message, Splitter, check_messages, conversation, split_answer
from steermoe.errors import GenerationError

THINK = ("<think>", "</think>")
CHANNELS = ("<|channel|>analysis<|message|>", "<|end|>")
HARMONY = (
    "<|channel|>analysis<|message|>They greet.\nI greet.<|end|><|start|>assistant<|channel|>final<|message|>Hello! 1<2"
)


def chat(tags=None, is_thinking=False, special=()):
    return Chat(conversation("Hi"), "", (1,), tags, is_thinking, special)


@pytest.mark.parametrize(
    ("asked", "text", "answer", "thinking"),
    [
        (chat(), "Hello <think> there.\n", "Hello <think> there.\n", None),
        (chat(THINK), "Hello\n\nthere.", "Hello\n\nthere.", ""),
        (chat(THINK), "<think>\nHm, 1 < 2.\n</think>\n\nHello.", "Hello.", "Hm, 1 < 2."),
        (chat(THINK), "<think></think> Hello.", "Hello.", ""),
        (chat(THINK, True), "Hm.\n</think>\nHello <there>.", "Hello <there>.", "Hm."),
        (chat(THINK, True), "Hm, and then the tokens ended </thin", "", "Hm, and then the tokens ended </thin"),
        (chat(THINK), "One.<think>Hm.</think>Two.", "One.Two.", "Hm."),
        (chat(THINK, special=("<s>",)), "<s><think>Hm.<s></think>Two<s>.", "Two.", "Hm."),
        (chat(CHANNELS, special=("<|end|>", "<|zero|>")), HARMONY + "<|zero|>", "Hello! 1<2", "They greet.\nI greet."),
        (chat(CHANNELS), "<|channel|>final<|message|>Hi<|return|>", "Hi", ""),
        (chat(CHANNELS), "<|channel|>commentary to=f <|constrain|>json<|message|>{}<|call|>", "", "{}"),
        (chat(CHANNELS), "Hello without a channel.", "Hello without a channel.", ""),
    ],
)
def test_thinking_and_answer(asked, text, answer, thinking):
    assert split_answer(asked, text) == (answer, thinking)
    for size in (1, 2, 3, 7):
        splitter = Splitter(asked)
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        parts = [part for piece in pieces for part in splitter.add(piece)] + splitter.rest()
        assert "".join(part.text for part in parts if not part.is_thinking) == answer
        assert "".join(part.text for part in parts if part.is_thinking).rstrip() == (thinking or "")


def test_text_comes_at_once_unless_it_may_be_a_tag():
    splitter = Splitter(chat(THINK))
    assert [part.text for part in splitter.add("Hello <")] == ["Hello "]
    assert [part.text for part in splitter.add("b> x")] == ["<b> x"]


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "there are no messages"),
        (
            [Message("user", "Hi"), Message("assistant", "Hello")],
            "the last message is of role 'assistant', expected user",
        ),
        ([Message("user", "Hi"), Message("user", "\n ")], "message 2 of role 'user' is empty"),
    ],
)
def test_messages_that_can_not_be_answered(messages, error):
    with pytest.raises(GenerationError, match=error):
        check_messages(messages)


def test_a_role_is_checked():
    with pytest.raises(GenerationError, match="role 'robot' is unknown: expected system, "):
        Message("robot", "Hi")


def test_a_record_has_earlier_turns_only_if_there_are_any():
    assert chat().as_dict(None) == {"chat": True, "system": None}
    assert chat(THINK).as_dict("Hm.") == {"chat": True, "system": None, "thinking": "Hm."}
    turns = (Message("system", "Be brief."), Message("user", "a"), Message("assistant", "b", "c"), Message("user", "d"))
    record = Chat(turns, "", (1,)).as_dict(None)
    assert record["system"] == "Be brief."
    assert record["messages"][2] == {"role": "assistant", "content": "b", "thinking": "c"}
