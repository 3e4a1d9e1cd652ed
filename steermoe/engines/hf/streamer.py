"""Stream the text of one request as transformers' `generate` hands its tokens over."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from transformers.generation.streamers import BaseStreamer

from steermoe.engines.text import Pieces

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


class TextStreamer(BaseStreamer):
    """Calls back with each piece of one text as its tokens come.

    Args:
        ends: tokens that end a text and are no part of it.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", on_text: Callable[[str], None], ends: set[int]) -> None:
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._ends = ends
        self._pieces: Pieces | None = None

    def put(self, value: "Tensor") -> None:
        """Take the prompt, then token after token, as `generate` hands them over."""
        tokens = value.flatten().tolist()
        if self._pieces is None:
            self._pieces = Pieces(self._tokenizer, tokens)
            return
        for token in tokens:
            if token not in self._ends:
                self._send(self._pieces.add(token))

    def end(self) -> None:
        """Send what was held back."""
        if self._pieces is not None:
            self._send(self._pieces.rest())

    def _send(self, text: str) -> None:
        if text:
            self._on_text(text)
