"""llama.cpp's tokenizer of one model, with the chat template that its file holds."""

import ctypes
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import llama_cpp

from steermoe.engines.text import template_tokens
from steermoe.errors import GenerationError

LONGEST_SPECIAL = 64
"""Characters of a special token's name, at most."""
SPECIAL = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
"""Templates' names for special tokens, and how GGUF spells them."""
LONGEST_NUMBER = 32
"""Bytes of a number in a file's header, as text."""


class GGUFTokenizer:
    """The part of transformers' tokenizer interface that `engines.text` needs, its `Encoder`, and a `Vocabulary`.

    Args:
        model: llama.cpp's pointer to the model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._vocabulary = llama_cpp.llama_model_get_vocab(model)
        self.size = int(llama_cpp.llama_vocab_n_tokens(self._vocabulary))
        self.ends = {token for token in range(self.size) if llama_cpp.llama_vocab_is_eog(self._vocabulary, token)}

    def encode(self, text: str, special: bool = False, begin: bool | None = None) -> list[int]:
        """As `Encoder.encode`."""
        raw = text.encode("utf-8")
        room = len(raw) + 8
        tokens = (llama_cpp.llama_token * room)()
        begins = not special if begin is None else begin
        count = llama_cpp.llama_tokenize(self._vocabulary, raw, len(raw), tokens, room, begins, special)
        if count < 0:
            raise GenerationError(f"llama.cpp can't tokenize the text {text[:40]!r}: it returned {count}")
        return list(tokens[:count])

    def tokens(self, text: str) -> list[int]:
        """As `Vocabulary.tokens`."""
        return self.encode(text, special=True)

    def pieces(self) -> list[str]:
        """As `Vocabulary.pieces`."""
        return [self._text(token) for token in range(self.size)]

    @functools.cached_property
    def special(self) -> dict[str, int]:
        """As `Vocabulary.special`."""
        return self._with(llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED)

    @property
    def template(self) -> str | None:
        """As `Vocabulary.template`."""
        return self.chat_template()

    def leading_special(self, text: str) -> str:
        """As `Encoder.leading_special`."""
        first = self.encode(text[:LONGEST_SPECIAL], special=True)[:1]
        if not first or not llama_cpp.llama_vocab_is_control(self._vocabulary, first[0]):
            return ""
        name = self._text(first[0])
        return name if name and text.startswith(name) else ""

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        """The text of tokens, without special ones unless `skip_special_tokens` is False.

        Bytes of an incomplete character become U+FFFD.
        """
        shown = not options.get("skip_special_tokens", True)
        given = (llama_cpp.llama_token * len(tokens))(*tokens)
        room = 16 * len(tokens) + 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            size = llama_cpp.llama_detokenize(self._vocabulary, given, len(tokens), buffer, room, False, shown)
            if size >= 0:
                return buffer.raw[:size].decode("utf-8", errors="replace")
            room = -size

    # ---- chats ----

    def chat_template(self) -> str | None:
        """As `Encoder.chat_template`; it is that in the file."""
        found = llama_cpp.llama_model_chat_template(self._model, None)
        return None if found is None else found.decode("utf-8", errors="replace")

    def render(self, messages: Sequence[Mapping[str, str]], options: Mapping[str, bool]) -> str:
        """As `Encoder.render`, by the interpreter of transformers, which keeps templates from running code."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, _ = render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            chat_template=self.chat_template(),
            add_generation_prompt=True,
            **self._named,
            **options,
        )
        return str(rendered[0])

    def special_tokens(self) -> Mapping[str, int]:
        """As `Encoder.special_tokens`."""
        return self._special

    def template_tokens(self) -> Mapping[str, int]:
        """As `Encoder.template_tokens`."""
        return self._written

    @functools.cached_property
    def _special(self) -> dict[str, int]:
        return self._with(SPECIAL)

    @functools.cached_property
    def _written(self) -> dict[str, int]:
        return template_tokens(self.chat_template(), self._with(SPECIAL | llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED))

    @functools.cached_property
    def _named(self) -> dict[str, str]:
        """Special tokens by the names that templates use, as far as the file names them."""
        found = {}
        for name, key in NAMED.items():
            number = self._setting(f"tokenizer.ggml.{key}_token_id")
            if number.isdecimal() and int(number) < self.size:
                found[f"{name}_token"] = self._text(int(number))
        return found

    def _with(self, attributes: int) -> dict[str, int]:
        """The tokens that have one of these attributes, by their texts."""
        vocabulary = self._vocabulary
        numbers = [n for n in range(self.size) if llama_cpp.llama_vocab_get_attr(vocabulary, n) & attributes]
        return {text: number for number in numbers if (text := self._text(number))}

    def _text(self, token: int) -> str:
        return str(llama_cpp.llama_vocab_get_text(self._vocabulary, token).decode("utf-8", errors="replace"))

    def _setting(self, key: str) -> str:
        """A value of the file's header, as text; "" if it is not there."""
        buffer = ctypes.create_string_buffer(LONGEST_NUMBER)
        size = llama_cpp.llama_model_meta_val_str(self._model, key.encode(), buffer, LONGEST_NUMBER)
        return buffer.value.decode("utf-8", errors="replace") if size > 0 else ""
