"""llama.cpp's tokenizer of one model."""

import ctypes
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import llama_cpp

from steermoe.errors import GenerationError

LONGEST_SPECIAL = 64
"""Characters of a special token's name, at most."""


class GGUFTokenizer:
    """The part of transformers' tokenizer interface that `engines.text` needs, and a `Vocabulary` for `steering.tags`.

    Args:
        vocabulary: llama.cpp's.
        template: the chat template in the file.
    """

    def __init__(self, vocabulary: Any, template: str | None = None) -> None:
        self._vocabulary = vocabulary
        self.template = template
        self.size = int(llama_cpp.llama_vocab_n_tokens(vocabulary))
        self.ends = {token for token in range(self.size) if llama_cpp.llama_vocab_is_eog(vocabulary, token)}

    def encode(self, text: str, special: bool = False) -> list[int]:
        """As `Encoder.encode`."""
        raw = text.encode("utf-8")
        room = len(raw) + 8
        tokens = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self._vocabulary, raw, len(raw), tokens, room, not special, special)
        if count < 0:
            raise GenerationError(f"llama.cpp can't tokenize the text {text[:40]!r}: it returned {count}")
        return list(tokens[:count])

    def tokens(self, text: str) -> list[int]:
        """As `Vocabulary.tokens`."""
        return self.encode(text, special=True)

    def pieces(self) -> list[str]:
        """As `Vocabulary.pieces`."""
        return [self._text_of(token) for token in range(self.size)]

    @cached_property
    def special(self) -> dict[str, int]:
        """As `Vocabulary.special`."""
        added = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
        marked = (n for n in range(self.size) if llama_cpp.llama_vocab_get_attr(self._vocabulary, n) & added)
        return {self._text_of(token): token for token in marked}

    def _text_of(self, token: int) -> str:
        return llama_cpp.llama_vocab_get_text(self._vocabulary, token).decode("utf-8", errors="replace")

    def leading_special(self, text: str) -> str:
        """As `Encoder.leading_special`."""
        first = self.encode(text[:LONGEST_SPECIAL], special=True)[:1]
        if not first or not llama_cpp.llama_vocab_is_control(self._vocabulary, first[0]):
            return ""
        name = self._text_of(first[0])
        return name if name and text.startswith(name) else ""

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        """The text of tokens, without special ones; bytes of an incomplete character become U+FFFD."""
        given = (llama_cpp.llama_token * len(tokens))(*tokens)
        room = 16 * len(tokens) + 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            size = llama_cpp.llama_detokenize(self._vocabulary, given, len(tokens), buffer, room, False, False)
            if size >= 0:
                return buffer.raw[:size].decode("utf-8", errors="replace")
            room = -size
