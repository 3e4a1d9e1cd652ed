"""The messages of a chat, what a chat template made of them, and how an answer is split into thinking and answer.

Knows no tokenizer and no engine: `chat` renders and encodes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from steermoe.errors import GenerationError

ROLES = ("system", "developer", "user", "assistant", "tool")
ASKING = ("user", "tool")
"""The roles that a model answers."""
HARMONY = ("<|start|>", "<|end|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|return|>", "<|call|>")
"""What GPT-OSS puts around each part of an answer: <|channel|>NAME<|message|>TEXT<|end|>."""

Tags = tuple[str, str]
"""What a model writes before and after its thinking."""


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        thinking: what the model thought before it answered; the template decides whether it is shown to it again.

    Raises:
        GenerationError: a role that no template knows.
    """

    role: str
    content: str
    thinking: str = ""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise GenerationError(f"role {self.role[:80]!r} is unknown: expected {', '.join(ROLES)}")

    def as_dict(self) -> dict[str, str]:
        """As records and JSON lines hold it."""
        return {"role": self.role, "content": self.content, **({"thinking": self.thinking} if self.thinking else {})}


def conversation(text: str, system: str | None = None) -> tuple[Message, ...]:
    """The messages of a chat of one turn; `system` None for what the template says of itself, if anything."""
    user = Message("user", text)
    return (user,) if system is None else (Message("system", system), user)


@dataclass(frozen=True)
class Chat:
    """Messages as the model reads them.

    Attributes:
        text: what the chat template made of the messages, for people to look at.
        tokens: its tokens, which `text` alone can't tell: see `chat`.
        tags: None if the model is not known to think.
        is_thinking: whether the template has opened the thinking already.
        special: special tokens to remove from an answer that is decoded with them; empty if it is decoded without.
    """

    messages: tuple[Message, ...]
    text: str
    tokens: tuple[int, ...]
    tags: Tags | None = None
    is_thinking: bool = False
    special: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """The message that is answered, as it was typed."""
        return self.messages[-1].content

    @property
    def system(self) -> str | None:
        """The first message of the system; None if there is none."""
        return next((one.content for one in self.messages if one.role == "system"), None)

    def as_dict(self, thinking: str | None) -> dict[str, object]:
        """What a record says about a chat, beside the prompt and the answer.

        Args:
            thinking: of the answer; None if the model is not known to think.
        """
        has_turns = sum(one.role != "system" for one in self.messages) > 1
        return {
            "chat": True,
            "system": self.system,
            **({"messages": [one.as_dict() for one in self.messages]} if has_turns else {}),
            **({} if thinking is None else {"thinking": thinking}),
        }


@dataclass(frozen=True)
class Part:
    """A piece of what the model wrote: of its thinking, or of its answer."""

    text: str
    is_thinking: bool = False


class Splitter:
    """Separates the thinking from the answer while the text comes in, whatever pieces it comes in.

    The tags themselves, and white space around the thinking, belong to neither.

    Args:
        chat: what is answered.
    """

    def __init__(self, chat: Chat) -> None:
        self._marks = _marks_of(chat)
        self._is_harmony = self._marks[:1] == HARMONY[:1]
        self._pattern = re.compile("|".join(map(re.escape, sorted(self._marks, key=len, reverse=True))) or "(?!)")
        self._first = {mark[0] for mark in self._marks}
        self._tags = chat.tags or ("", "")
        self._is_thinking = chat.is_thinking
        self._header: str | None = None
        self._at_start = chat.is_thinking
        self._held = ""

    def add(self, text: str) -> list[Part]:
        """The parts that this piece completes."""
        text = self._held + text
        end = len(text) - self._incomplete(text)
        text, self._held = text[:end], text[end:]
        return self._split(text)

    def rest(self) -> list[Part]:
        """What is still held back, once no more text comes."""
        text, self._held = self._held, ""
        return self._split(text)

    def _incomplete(self, text: str) -> int:
        """How many characters at the end may be the beginning of a mark."""
        longest = max(map(len, self._marks), default=1) - 1
        for start in range(max(0, len(text) - longest), len(text)):
            if text[start] in self._first and any(mark.startswith(text[start:]) for mark in self._marks):
                return len(text) - start
        return 0

    def _split(self, text: str) -> list[Part]:
        found: list[Part] = []
        at = 0
        for match in self._pattern.finditer(text):
            self._emit(text[at : match.start()], found)
            self._pass(match[0])
            at = match.end()
        self._emit(text[at:], found)
        return found

    def _emit(self, text: str, found: list[Part]) -> None:
        if self._header is not None:
            self._header += text
            return
        if self._at_start:
            text = text.lstrip()
        if text:
            self._at_start = False
            found.append(Part(text, self._is_thinking))

    def _pass(self, mark: str) -> None:
        """Go past a mark, which changes what the text after it is."""
        if self._is_harmony and mark == "<|message|>":
            if self._header is not None:  # the name of a channel decides what its text is
                self._is_thinking = re.match("final|assistant$", self._header.strip()) is None
            self._header, self._at_start = None, True
        elif self._is_harmony and mark in HARMONY:
            self._header = "" if mark != "<|constrain|>" else self._header
        elif mark in self._tags:
            self._is_thinking = mark == self._tags[0]
            self._at_start = True


def _marks_of(chat: Chat) -> tuple[str, ...]:
    """What is cut out of a text, whole."""
    if chat.tags is None:
        return chat.special
    if chat.tags[0].startswith("<|channel|>"):
        return tuple(dict.fromkeys((*HARMONY, *chat.special)))
    return tuple(dict.fromkeys((*chat.tags, *chat.special)))


def split_answer(chat: Chat, text: str) -> tuple[str, str | None]:
    """The answer in a text that the model wrote, and its thinking; None for that if the model is not known to think."""
    splitter = Splitter(chat)
    parts = [*splitter.add(text), *splitter.rest()]
    answer = "".join(part.text for part in parts if not part.is_thinking)
    thinking = "".join(part.text for part in parts if part.is_thinking)
    return answer, None if chat.tags is None else thinking.rstrip()


def check_messages(messages: Sequence[Message]) -> None:
    """Raise GenerationError for messages that can't be answered, whatever the model."""
    if not messages:
        raise GenerationError("there are no messages: give at least one of the user")
    if messages[-1].role not in ASKING:
        raise GenerationError(
            f"the last message is of role '{messages[-1].role}', expected {' or '.join(ASKING)}: the model answers it"
        )
    for number, message in enumerate(messages, 1):
        if message.role in ASKING and not message.content.strip():
            raise GenerationError(f"message {number} of role '{message.role}' is empty: write something to answer")
