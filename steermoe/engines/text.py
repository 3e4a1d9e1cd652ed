"""A continuation's text: the same whether it is decoded at the end or streamed while it comes."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from transformers.generation.streamers import BaseStreamer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

CONTEXT_TOKENS = 8
"""Prompt tokens that are decoded along, since what a token reads like may depend on those before it."""
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What bytes read like while the rest of their character is missing."""


def continuation(tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[int], new: Sequence[int]) -> str:
    """What `new` tokens add to the text of the prompt's; some tokenizers drop the space before a text's first word."""
    context = list(prompt[-CONTEXT_TOKENS:])
    before, both = (_decode(tokenizer, tokens) for tokens in (context, [*context, *new]))
    return both[len(before) :]


def _decode(tokenizer: "PreTrainedTokenizerBase", tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class TextStreamer(BaseStreamer):
    """Calls back with each piece of one text as its tokens come, a character not before it is complete.

    Args:
        ends: tokens that end a text and are no part of it.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", on_text: Callable[[str], None], ends: set[int]) -> None:
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._ends = ends
        self._prompt: list[int] | None = None
        self._new: list[int] = []
        self._sent = ""

    def put(self, value: "Tensor") -> None:
        """Take the prompt, then token after token, as `generate` hands them over."""
        tokens = value.flatten().tolist()
        if self._prompt is None:
            self._prompt = tokens
            return
        self._new += [token for token in tokens if token not in self._ends]
        self._send(self._text().rstrip(INCOMPLETE))

    def end(self) -> None:
        """Send what was held back."""
        self._send(self._text())

    def _text(self) -> str:
        return continuation(self._tokenizer, self._prompt or [], self._new)

    def _send(self, text: str) -> None:
        if text.startswith(self._sent) and text != self._sent:
            piece, self._sent = text[len(self._sent) :], text
            self._on_text(piece)
