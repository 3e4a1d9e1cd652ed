"""A continuation's text from its tokens: the same whether it is decoded at the end or streamed while it comes."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from steermoe.engines.request import Request
from steermoe.errors import GenerationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What bytes read like while the rest of their character is missing."""


def encode_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    request: Request,
    model: str,
    limit: int | None,
    known: list[int] | None = None,
) -> list[int]:
    """A prompt's tokens; text that looks like a special token stays text.

    Args:
        tokenizer: the model's.
        request: what to check and encode.
        model: the model's name, for the message.
        limit: tokens of its context.
        known: the tokens, if another request had the same prompt.

    Raises:
        GenerationError: an empty prompt, or one that leaves no room in the model's context.
    """
    if not request.prompt.strip():
        raise GenerationError("the prompt is empty: give the beginning of a text (without PROMPT a story is told)")
    ids = tokenizer(request.prompt, split_special_tokens=True)["input_ids"] if known is None else known
    if not ids:
        raise GenerationError(f"the prompt {request.prompt!r} has no tokens in this model's vocabulary: write another")
    if limit is not None and len(ids) + request.sampling.max_new_tokens > limit:
        raise GenerationError(
            f"the prompt has {len(ids)} tokens and {request.sampling.max_new_tokens} more were asked for, but the "
            f"context of {model} is {limit}: shorten the prompt or lower --max-new-tokens"
        )
    return ids


class Pieces:
    """Turns tokens into text piece by piece, a character not before it is complete.

    What a token reads like may depend on the one before: many tokenizers drop the space before a text's first word, and
    read a row of bytes as a whole. So each piece is decoded together with the one before, whose text is then cut off.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._before = list(prompt)
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """The text that is complete with this token, or ""."""
        self._pending.append(token)
        text = self.rest()
        if not text or text.endswith(INCOMPLETE):
            return ""
        self._before, self._pending = self._pending, []
        return text

    def rest(self) -> str:
        """What is held back so far."""
        before, both = self._decode(self._before), self._decode(self._before + self._pending)
        return both[len(before) :] if both.startswith(before) else self._decode(self._pending)

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def continuation(tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[int], new: Iterable[int]) -> str:
    """What `new` tokens add to the text of the prompt's."""
    pieces = Pieces(tokenizer, prompt)
    return "".join(map(pieces.add, new)) + pieces.rest()
