"""A continuation's text from its tokens: the same whether it is decoded at the end or streamed."""

import functools
import logging
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from steermoe.engines.request import Request
from steermoe.errors import GenerationError

logger = logging.getLogger(__name__)

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What bytes decode to while the rest of their character is missing."""


class Tokenizer(Protocol):
    """What is needed of a tokenizer, whether it is from transformers or llama.cpp."""

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        """The text of tokens; `options` are transformers' own."""


class Encoder(Protocol):
    """How an engine turns text into tokens."""

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The tokens of a text; what looks like a special token stays text unless `special` is set.

        With `special`, nothing is put before the text, which begins with what belongs there.
        """

    def leading_special(self, text: str) -> str:
        """The special token that a text begins with; "" if with none."""


def encode_prompt(
    encoder: Encoder,
    request: Request,
    model: str,
    limit: int | None,
    known: list[int] | None = None,
) -> list[int]:
    """A prompt's tokens, checked. Says on stderr, once, how a special token at the beginning of a prompt is read.

    Args:
        encoder: gives the tokens of a text.
        request: what to check and encode.
        model: the model's name, for the message.
        limit: the size of its context, in tokens; None if unknown.
        known: the tokens, if another request had the same prompt.

    Raises:
        GenerationError: a prompt that is empty or no text, or leaves no room in the model's context.
    """
    check_text(request.prompt, "the prompt")
    check_not_empty(request.prompt)
    leading = encoder.leading_special(request.prompt)
    special = bool(request.special_tokens and leading)
    ids = encoder.encode(request.prompt, special) if known is None else known
    if leading and request.special_tokens is not False:
        _tell_reading(leading, special)
    if not ids:
        raise GenerationError(f"the prompt {request.prompt!r} has no tokens in this model's vocabulary: write another")
    if limit is not None and len(ids) + request.sampling.max_new_tokens > limit:
        raise GenerationError(
            f"the prompt has {len(ids)} tokens and {request.sampling.max_new_tokens} more were asked for, but the "
            f"context of {model} is {limit}: shorten the prompt or lower --max-new-tokens"
        )
    return ids


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


def literal_tokens(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens, by a transformers tokenizer; what looks like a special token stays text."""
    return list(tokenizer(text, split_special_tokens=True)["input_ids"])


@functools.cache
def _tell_reading(leading: str, special: bool) -> None:
    """Say once how prompts that begin with a special token are read."""
    if special:
        logger.warning("the prompt begins with %a, a special token: its special tokens are encoded as such", leading)
    else:
        logger.warning(
            "a prompt begins with %a, a special token of the model, but is read as plain text: pass --special-tokens, "
            "or --no-special-tokens if that is right; in Python, pass Request(..., special_tokens=True), or False",
            leading,
        )


class HFEncoder:
    """An encoder with a transformers tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, special: bool = False) -> list[int]:
        """As `Encoder.encode`."""
        if special:
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        return literal_tokens(self._tokenizer, text)

    def leading_special(self, text: str) -> str:
        """As `Encoder.leading_special`."""
        found = [name for name in self._special if text.startswith(name)]
        return max(found, key=len, default="")

    @functools.cached_property
    def _special(self) -> tuple[str, ...]:
        added = getattr(self._tokenizer, "added_tokens_decoder", {}).values()
        named = getattr(self._tokenizer, "all_special_tokens", ())
        return tuple({*named, *(token.content for token in added if token.special)} - {""})


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

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
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

    def rest(self) -> str:
        """The text that is still held back."""
        before, both = self._decode(self._before), self._decode(self._before + self._pending)
        return both[len(before) :] if both.startswith(before) else self._decode(self._pending)

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], new: Iterable[int]) -> str:
    """The text that the `new` tokens add to that of the prompt."""
    pieces = Pieces(tokenizer, prompt)
    return "".join(map(pieces.add, new)) + pieces.rest()
