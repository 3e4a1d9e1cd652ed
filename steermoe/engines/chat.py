"""Turns messages into the tokens of a prompt, by the model's own chat template, in any engine.

Only the template writes special tokens. What looks like one in a message is marked before the template renders, with
two characters that are in no message, and encoded apart from the rest, as text: so a message that holds "<|im_end|>"
can't end its turn or begin another one. Where no message holds such a thing, which is the rule, the whole is encoded at
once, exactly as `apply_chat_template` of transformers does.
"""

import functools
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from steermoe.engines.messages import Chat, Message, Tags, check_messages
from steermoe.engines.text import Encoder, check_text
from steermoe.errors import GenerationError, reason
from steermoe.models.template import think_tags

logger = logging.getLogger(__name__)

NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
"""Unicode keeps them free for marks inside a program; no text should hold any."""
SWITCHES = ("enable_thinking", "thinking")
"""The variables of templates that turn thinking on or off."""
SHORTEST = 2
"""Characters of a text that can still be taken apart."""


def read_chat(encoder: Encoder, messages: Sequence[Message], model: str, thinking: bool | None = None) -> Chat:
    """Render and encode messages.

    Args:
        encoder: of the model.
        messages: the last one is answered.
        model: the model's name, for messages.
        thinking: let the model think before it answers, or not; None as its template does by default.

    Raises:
        GenerationError: the model has no chat template, or one that refuses these messages or knows no such switch.
    """
    source = encoder.chat_template()
    if source is None:
        raise GenerationError(
            f"{model} has no chat template, so it can't chat: give the beginning of a text to `steermoe generate` "
            "without --chat, or take an instruct version of the model"
        )
    check_messages(messages)
    for message in messages:
        check_text(message.content, f"a message of role '{message.role}'")
    special = encoder.special_tokens()
    control = {**special, **encoder.template_tokens()}
    marked, marks = _marked(encoder, messages, control)
    options = {} if thinking is None else dict.fromkeys(SWITCHES, thinking)
    text = _render(encoder, marked, options, model)
    if thinking is not None and text == _render(encoder, marked, dict.fromkeys(SWITCHES, not thinking), model):
        raise GenerationError(
            f"the chat template of {model} has no switch for thinking: leave out --{'' if thinking else 'no-'}thinking"
        )
    plain = text if marks is None else re.sub(f"[{marks}]", "", text)
    tokens = encoder.encode(text, special=True) if marks is None else _encode_marked(encoder, text, marks, control)
    tags = think_tags(source, control)
    return Chat(
        tuple(messages),
        plain,
        tuple(tokens),
        tags,
        is_thinking=tags is not None and plain.rstrip().endswith(tags[0]),
        special=tuple(special) if tags is not None and any(name in "".join(tags) for name in special) else (),
    )


def _render(encoder: Encoder, messages: Sequence[Mapping[str, str]], options: Mapping[str, bool], model: str) -> str:
    try:
        return encoder.render(messages, options)
    except Exception as error:  # a template is a program that came with the model
        raise GenerationError(
            f"the chat template of {model} can't render these messages: {reason(error)}; check their roles and order, "
            "or leave out the system's message"
        ) from error


# ---- messages that hold what looks like a special token ----


def _marked(
    encoder: Encoder, messages: Sequence[Message], control: Mapping[str, int]
) -> tuple[list[dict[str, str]], str | None]:
    """The messages as the template reads them, and the two marks around what must stay text; None if nothing must."""
    texts = [text for message in messages for text in (message.content, message.thinking)]
    if not any(_forges(encoder, text, control) for text in dict.fromkeys(texts)):
        return [_for_template(message) for message in messages], None
    _tell_of_forged(encoder, messages, control)
    free = [char for char in NONCHARACTERS if not any(char in text for text in texts)]
    if len(free) < 2:
        raise GenerationError("a message holds nearly all noncharacters from U+FDD0 to U+FDEF: remove them")
    start, end = free[:2]
    pattern = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))))

    def marked(text: str) -> str:
        if not _forges(encoder, text, control):
            return text
        found, count = pattern.subn(lambda match: f"{start}{match[0]}{end}", text)
        rest = pattern.split(text)
        is_all = count and not any(_forges(encoder, part, control) for part in rest)
        return found if is_all else f"{start}{text}{end}"

    return [
        _for_template(Message(message.role, marked(message.content), marked(message.thinking))) for message in messages
    ], start + end


def _tell_of_forged(encoder: Encoder, messages: Sequence[Message], control: Mapping[str, int]) -> None:
    """Say what a message of the user or the system holds that stays text."""
    for message in messages:
        if message.role != "assistant":
            found = [(message.content.find(name), name) for name in control if name in message.content]
            if found and _forges(encoder, message.content, control):
                _tell_once(min(found)[1])


@functools.cache
def _tell_once(held: str) -> None:
    logger.warning(
        "a message holds %a, a special token of the model, which stays text there: give a prompt that is in the form "
        "of the chat template already without --chat",
        held,
    )


def _for_template(message: Message) -> dict[str, str]:
    """A message by the names that templates read; there are two for thinking."""
    found = {"role": message.role, "content": message.content}
    if message.thinking:
        found |= {"reasoning_content": message.thinking, "thinking": message.thinking}
    return found


def _forges(encoder: Encoder, text: str, control: Mapping[str, int]) -> bool:
    """Whether a text, encoded as the template's own is, would hold a token that only the template may write."""
    if not text:
        return False
    return not set(control.values()).isdisjoint(encoder.encode(text, special=True, begin=False))


def _encode_marked(encoder: Encoder, text: str, marks: str, control: Mapping[str, int]) -> list[int]:
    """The tokens of a rendered chat: what is between two marks is text, the rest is the template's.

    A template that takes a message apart can leave a mark alone; it only separates then.
    """
    start, end = marks[0], marks[1]
    pieces = re.split(f"({start}[^{start}{end}]*{end}|[{start}{end}])", text)
    tokens: list[int] = []
    for number, piece in enumerate(pieces):
        content = piece.strip(marks) if number % 2 else piece
        if content and number % 2:
            tokens += _encode_text(encoder, content, set(control.values()))
        elif content:
            tokens += _encode_inside(encoder, content, special=True) if tokens else encoder.encode(content, True)
    return tokens


def _encode_text(encoder: Encoder, text: str, forbidden: Collection[int]) -> list[int]:
    """The tokens of a text without any forbidden one; it is taken apart where the tokenizer finds one all the same."""
    tokens = _encode_inside(encoder, text, special=False)
    if set(forbidden).isdisjoint(tokens) or len(text) < SHORTEST:
        return tokens
    half = len(text) // 2
    return _encode_text(encoder, text[:half], forbidden) + _encode_text(encoder, text[half:], forbidden)


def _encode_inside(encoder: Encoder, text: str, *, special: bool) -> list[int]:
    """The tokens of a text that does not begin the prompt.

    Tokenizers of the sentencepiece kind put a space before a text; after a line feed they don't, so one goes before it
    and is taken off again.
    """
    feed = encoder.encode("\n", special, begin=False)
    tokens = encoder.encode(f"\n{text}", special, begin=False)
    return tokens[len(feed) :] if tokens[: len(feed)] == feed else encoder.encode(text, special, begin=False)


def tags_of(encoder: Encoder) -> Tags | None:
    """The tags that the model puts around its thinking; None if it is not known to think."""
    source: Any = encoder.chat_template()
    return think_tags(source, {**encoder.special_tokens(), **encoder.template_tokens()})
