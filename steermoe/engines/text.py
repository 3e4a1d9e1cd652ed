"""A continuation's text from its tokens: the same whether it is decoded at the end or streamed."""

import functools
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from steermoe.engines.request import Request
from steermoe.errors import GenerationError

logger = logging.getLogger(__name__)

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What bytes decode to while the rest of their character is missing."""
CONTROLS = r"\x00-\x08\x0b-\x1f\x7f-\x9f"
"""Characters that command a terminal, without the tab and the line feed."""
REVERSING = r"\u202a-\u202e\u2066-\u2069"
"""Characters that change the direction of the text after them."""
NOT_TEXT = r"\ud800-\udfff\ufffe\uffff"
"""Halves of surrogate pairs, which stand for bytes that are not UTF-8, and what no encoding allows."""

_DROPPED = re.compile(f"[{CONTROLS}{REVERSING}{NOT_TEXT}]")


def printable(text: str) -> str:
    """Running text, such as a story, without the characters that could command a terminal or reverse what follows."""
    return _DROPPED.sub("", text)


class Tokenizer(Protocol):
    """What is needed of a tokenizer, whether it is from transformers or llama.cpp."""

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        """The text of tokens; `options` are transformers' own."""


class Encoder(Protocol):
    """How an engine turns text into tokens."""

    def encode(self, text: str, special: bool = False, begin: bool | None = None) -> list[int]:
        """The tokens of a text.

        Args:
            text: what to encode.
            special: whether special tokens in it are encoded as such; otherwise what looks like one stays text.
            begin: whether what belongs before every text is put there; by default only if not `special`, since a text
                that begins with a special token begins with what belongs there.
        """

    def leading_special(self, text: str) -> str:
        """The special token that a text begins with; "" if with none."""

    def chat_template(self) -> str | None:
        """The source of the model's chat template; "" if it is code instead, None if there is none."""

    def render(self, messages: Sequence[Mapping[str, str]], options: Mapping[str, bool]) -> str:
        """What the chat template makes of messages, up to where the answer begins.

        Args:
            messages: as the template reads them.
            options: further variables of the template.

        Raises:
            Exception: whatever a template or its interpreter raises.
        """

    def special_tokens(self) -> Mapping[str, int]:
        """The numbers of all special tokens, by their texts."""

    def template_tokens(self) -> Mapping[str, int]:
        """As `template_tokens` of this module, of the model's own template."""


def template_tokens(template: str | None, added: Mapping[str, int]) -> dict[str, int]:
    """The tokens that a chat template writes, special or not, by their texts.

    Args:
        template: its source.
        added: the tokens that a text is searched for before it is split into words. White space among them, as in
            Gemma's vocabulary, is ordinary text.
    """
    return {name: number for name, number in added.items() if template and name.strip() and name in template}


def encode_prompt(
    encoder: Encoder,
    request: Request,
    model: str,
    limit: int | None,
    known: list[int] | None = None,
) -> list[int]:
    """A prompt's tokens, checked. Says on stderr, once, how special tokens in a prompt are read.

    Args:
        encoder: gives the tokens of a text.
        request: what to check and encode; a chat has its tokens already.
        model: the model's name, for the message.
        limit: the size of its context, in tokens; None if unknown.
        known: the tokens, if another request had the same prompt.

    Raises:
        GenerationError: a prompt that is empty or no text, or leaves no room in the model's context.
    """
    if request.chat is not None:
        ids = list(request.chat.tokens)
    else:
        check_text(request.prompt, "the prompt")
        check_not_empty(request.prompt)
        ids = _encode_text(encoder, request, known)
    if not ids:
        raise GenerationError(f"the prompt {request.prompt!r} has no tokens in this model's vocabulary: write another")
    if limit is not None and len(ids) + request.sampling.max_new_tokens > limit:
        raise GenerationError(
            f"the prompt has {len(ids)} tokens and {request.sampling.max_new_tokens} more were asked for, but the "
            f"context of {model} is {limit}: shorten the prompt or lower --max-new-tokens"
        )
    return ids


def _encode_text(encoder: Encoder, request: Request, known: list[int] | None) -> list[int]:
    """The tokens of a prompt that is no chat; special tokens of a chat template are not read as text in silence."""
    leading = encoder.leading_special(request.prompt)
    held = leading or _held_special(encoder, request.prompt)
    special = bool(request.special_tokens and held)
    if held and request.special_tokens is not False and _hints.get():
        _tell_reading(held, bool(leading), special)
    if known is not None:
        return known
    return encoder.encode(request.prompt, special, begin=not leading if special else True)


def _held_special(encoder: Encoder, text: str) -> str:
    """The first special token of the chat template that a text holds; "" if it holds none."""
    special = encoder.special_tokens()
    found = [(text.find(name), name) for name in encoder.template_tokens() if name in special and name in text]
    return min(found, default=(0, ""))[1]


def check_text(text: str, name: str) -> str:
    """The text, if a tokenizer can read it.

    Args:
        text: may hold bytes that are not UTF-8, as Python reads arguments and, in the locale C, files.
        name: what it is, for the message.

    Raises:
        GenerationError: it can't be written in UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            text.encode(errors="surrogateescape").decode()
        except UnicodeDecodeError as error:
            raise GenerationError(f"{name} {not_utf8(error)}") from error
        except UnicodeEncodeError:
            pass
        raise GenerationError(f"{name} holds half a surrogate pair, which is not text: remove it") from None
    return text


def check_not_empty(prompt: str) -> str:
    """The prompt, if there is anything to continue.

    Raises:
        GenerationError: it is empty.
    """
    if not prompt.strip():
        raise GenerationError(
            "the prompt is empty: give the beginning of a text (without PROMPT, a story is generated)"
        )
    return prompt


def not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 ({error.reason} at byte {error.start}): convert it, for example with `iconv -t UTF-8`"


_hints: ContextVar[bool] = ContextVar("hints", default=True)


@contextmanager
def without_hints() -> Iterator[None]:
    """For prompts that steermoe makes by a chat template: within it, nothing is said about their special tokens."""
    before = _hints.set(False)
    try:
        yield
    finally:
        _hints.reset(before)


@functools.cache
def _tell_reading(held: str, leads: bool, special: bool) -> None:
    """Say once how prompts that hold special tokens are read.

    Args:
        held: the first of them.
        leads: whether the prompt begins with it.
        special: whether it is encoded as such.
    """
    how = "begins with" if leads else "holds"
    if special:
        but = "" if leads else " (as text: --no-special-tokens)"
        logger.warning("the prompt %s %a, a special token: its special tokens are encoded as such%s", how, held, but)
    else:
        logger.warning(
            "a prompt %s %a, a special token of the model, but is read as plain text: pass --special-tokens, or "
            "--no-special-tokens if that is right; in Python, pass Request(..., special_tokens=True), or False",
            how,
            held,
        )


class HFEncoder:
    """An encoder with a transformers tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, special: bool = False, begin: bool | None = None) -> list[int]:
        """As `Encoder.encode`."""
        options = {} if special else {"split_special_tokens": True}
        begins = not special if begin is None else begin
        return list(self._tokenizer(text, add_special_tokens=begins, **options)["input_ids"])

    def leading_special(self, text: str) -> str:
        """As `Encoder.leading_special`."""
        found = [name for name in self._special if text.startswith(name)]
        return max(found, key=len, default="")

    def chat_template(self) -> str | None:
        """As `Encoder.chat_template`."""
        found = getattr(self._tokenizer, "chat_template", None)
        if isinstance(found, dict):  # several by name
            found = found.get("default")
        if found is None and _has_own_templates(self._tokenizer):
            return ""
        return found

    def render(self, messages: Sequence[Mapping[str, str]], options: Mapping[str, bool]) -> str:
        """As `Encoder.render`."""
        return str(
            self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True, **options
            )
        )

    def special_tokens(self) -> Mapping[str, int]:
        """As `Encoder.special_tokens`."""
        return self._special

    def template_tokens(self) -> Mapping[str, int]:
        """As `Encoder.template_tokens`."""
        return self._written

    @functools.cached_property
    def _special(self) -> dict[str, int]:
        added = getattr(self._tokenizer, "added_tokens_decoder", {}).values()
        named = getattr(self._tokenizer, "all_special_tokens", ())
        names = {*named, *(token.content for token in added if token.special)} - {""}
        return {name: self._tokenizer.convert_tokens_to_ids(name) for name in sorted(names)}

    @functools.cached_property
    def _written(self) -> dict[str, int]:
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        names = {token.content: number for number, token in added.items()}
        return template_tokens(self.chat_template(), {**names, **self._special})


def _has_own_templates(tokenizer: Any) -> bool:
    """Whether a tokenizer renders chats by code of its own, as mistral-common's do."""
    from transformers import PreTrainedTokenizerBase

    own = getattr(type(tokenizer), "apply_chat_template", None)
    return own is not None and own is not PreTrainedTokenizerBase.apply_chat_template


def end_tokens(configured: int | list[int] | None, tokenizer: Any) -> set[int]:
    """Tokens that end a text by the rules of transformers.

    Args:
        configured: `eos_token_id` of the generation configuration.
        tokenizer: its own end token counts where the configuration has none.
    """
    end: Any = tokenizer.eos_token_id if configured is None else configured
    return set(end) if isinstance(end, list | tuple) else {end} - {None}


class Pieces:
    """Turns tokens into text piece by piece, and emits a character only when it is complete.

    What a token decodes to may depend on the one before: many tokenizers drop the space before a text's first word, and
    decode a run of bytes as a whole. So each piece is decoded together with the one before, whose text is then cut off.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._without_special = not special
        self._before = list(prompt)
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """The text that this token completes, or ""."""
        self._pending.append(token)
        text = self.rest()
        if not text or text.endswith(INCOMPLETE):
            return ""
        self._before, self._pending = self._pending, []
        return text

    @property
    def is_pending(self) -> bool:
        """Whether tokens are held back."""
        return bool(self._pending)

    def rest(self) -> str:
        """The text that is still held back."""
        before, both = self._decode(self._before), self._decode(self._before + self._pending)
        return both[len(before) :] if both.startswith(before) else self._decode(self._pending)

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(
            tokens, skip_special_tokens=self._without_special, clean_up_tokenization_spaces=False
        )


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], new: Iterable[int], special: bool = False) -> str:
    """The text that the `new` tokens add to that of the prompt, with special tokens if `special` is set."""
    pieces = Pieces(tokenizer, prompt, special)
    return "".join(map(pieces.add, new)) + pieces.rest()
