"""What llama.cpp computes in: the cache of several texts, and the batch of tokens that is passed to it."""

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from steermoe.engines.llamacpp import callback
from steermoe.engines.llamacpp.rows import CALL_TOKENS
from steermoe.engines.llamacpp.state import CallbackState
from steermoe.errors import GenerationError

messages: list[str] = []
"""The latest messages of llama.cpp."""


class NoRoom(GenerationError, MemoryError):
    """There is not enough memory for the cache."""


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def on_message(level: int, text: bytes, data: Any) -> None:
    """Keep llama.cpp's own messages off the terminal; the last ones explain an error."""
    messages.append(text.decode("utf-8", errors="replace").strip())
    del messages[:-20]


def last_message() -> str:
    """llama.cpp's message about its last error."""
    said = [text for text in messages if text]
    errors = [text for text in said if "error" in text.lower() or "fail" in text.lower()]
    # the first error is the cause, later ones only pass it on
    return " ".join((errors[:1] or said[-1:] or ["it gave no reason"])[0].split())[:300]


class Context:
    """One llama.cpp context with room for several texts, and the batch that is passed to it."""

    def __init__(
        self, model: Any, texts: int, cells: int, threads: int, state: CallbackState | None, cache: str
    ) -> None:
        self.texts, self.cells = texts, cells
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = texts * cells, texts, False
        params.n_batch = params.n_ubatch = CALL_TOKENS
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = getattr(llama_cpp, f"GGML_TYPE_{cache.upper()}")
        params.no_perf = True
        self._state = state
        if state is not None:
            params.cb_eval = llama_cpp.ggml_backend_sched_eval_callback(callback.on_node.address)
            params.cb_eval_user_data = state.header.ctypes.data
        messages.clear()
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise NoRoom(f"llama.cpp can't make room for {texts} times {cells} tokens: {last_message()}; ask for fewer")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(CALL_TOKENS, 0, 1)
        as_array = np.ctypeslib.as_array
        self._token = as_array(self._batch.token, (CALL_TOKENS,))
        self._position = as_array(self._batch.pos, (CALL_TOKENS,))
        self._wanted = as_array(self._batch.logits, (CALL_TOKENS,))
        as_array(self._batch.n_seq_id, (CALL_TOKENS,))[:] = 1
        self._text = self._batch.seq_id
        self._laid_out: tuple[list[int], list[int] | None] | None = None
        self._logits: dict[int, NDArray[np.float32]] = {}
        self._logits_at = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32)(
            ("llama_get_logits_ith", llama_cpp.llama_cpp._lib)
        )
        self._vocabulary = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)))

    def close(self) -> None:
        if self._context:
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_free(self._context)
            self._context = None

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, False)

    def copy(self, text: int, to: int) -> None:
        """Let another text continue as this one does, without computing it again."""
        llama_cpp.llama_memory_seq_cp(self._memory, text, to, -1, -1)

    def forget(self, text: int) -> None:
        """Free the cache of one text."""
        llama_cpp.llama_memory_seq_rm(self._memory, text, -1, -1)

    def forward(
        self, tokens: Sequence[int], positions: Sequence[int], texts: Sequence[int], wanted: Sequence[int] | None
    ) -> None:
        """Compute some tokens, at most CALL_TOKENS.

        Args:
            tokens: [T].
            positions: [T], each token's place in its text.
            texts: [T], the text of each token; tokens of one text together, texts in ascending order.
            wanted: which tokens' logits are wanted; None for all.

        Raises:
            GenerationError: llama.cpp can't compute them.
        """
        count = len(tokens)
        self._token[:count] = tokens
        self._position[:count] = positions
        layout = (list(texts), None if wanted is None else list(wanted))
        if layout != self._laid_out:  # as a rule it is that of the call before
            self._lay_out(*layout)
            self._laid_out = layout
        if code := llama_cpp.llama_decode(self._context, self._batch):
            raise GenerationError(f"llama.cpp can't compute {count} tokens (code {code}): {last_message()}")

    def _lay_out(self, texts: list[int], wanted: list[int] | None) -> None:
        """Say to which text each token of the batch belongs, and which tokens' logits are wanted."""
        self._batch.n_tokens = len(texts)
        for i, text in enumerate(texts):
            self._text[i][0] = text
        self._wanted[: len(texts)] = wanted is None
        if wanted is not None:
            self._wanted[wanted] = 1

    def logits(self, token: int) -> NDArray[np.float32]:
        """[V], the logits of a token of the last call: a view that the next call overwrites."""
        place = self._logits_at(self._context, token)
        found = self._logits.get(place)
        if found is None:  # making a view takes longer than drawing a token needs; llama.cpp has few places
            if len(self._logits) >= CALL_TOKENS:
                self._logits.clear()
            pointer = ctypes.cast(place, ctypes.POINTER(ctypes.c_float))
            found = self._logits[place] = np.ctypeslib.as_array(pointer, (self._vocabulary,))
        return found
