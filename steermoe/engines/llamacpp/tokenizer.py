"""llama.cpp's tokenizer of one model."""

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp

from steermoe.errors import GenerationError


class GGUFTokenizer:
    """The part of transformers' tokenizer interface that `engines.text` needs."""

    def __init__(self, vocabulary: Any) -> None:
        self._vocabulary = vocabulary
        self.size = int(llama_cpp.llama_vocab_n_tokens(vocabulary))
        self.ends = {token for token in range(self.size) if llama_cpp.llama_vocab_is_eog(vocabulary, token)}

    def encode(self, text: str) -> list[int]:
        """A text's tokens; what looks like a special token stays text."""
        raw = text.encode("utf-8")
        room = len(raw) + 8
        tokens = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self._vocabulary, raw, len(raw), tokens, room, True, False)
        if count < 0:
            raise GenerationError(f"llama.cpp can't tokenize the text {text[:40]!r}: it returned {count}")
        return list(tokens[:count])

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
