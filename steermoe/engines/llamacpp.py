"""The llama.cpp engine: quantised models of GGUF files, steered inside llama.cpp's own graph.

The only importer of llama_cpp; `llama_run` says how texts are written.
"""

import ctypes
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import llama_cpp
import numpy as np
import torch
from numpy.typing import NDArray

from steermoe.engines import ggml, ggml_callback
from steermoe.engines.base import Completion, Request
from steermoe.engines.callback_state import CallbackState, Reach
from steermoe.engines.llama_run import CALL_TOKENS, Row, Run, factors_of, frequency_of
from steermoe.engines.text import Pieces, continuation
from steermoe.engines.token_sampler import TokenSampler
from steermoe.errors import GenerationError, ModelError
from steermoe.gguf_models import GGUFModel, read_gguf
from steermoe.plans import SteeringPlan

MAX_TEXTS = 64
"""Texts that go on together; more are done in groups."""
CELL_STEP = 256
"""The cache grows by so many tokens."""
NO_LIBRARY_GPU_LAYERS = 0
ALL_LAYERS = -1

_messages: list[str] = []


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _on_message(level: int, text: bytes, data: Any) -> None:
    """Keep llama.cpp's own messages off the terminal; the last ones explain an error."""
    _messages.append(text.decode("utf-8", errors="replace").strip())
    del _messages[:-20]


class GGUFTokenizer:
    """llama.cpp's tokenizer of one model, with what `engines.text` needs of transformers' ones."""

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
            raise GenerationError(f"llama.cpp can't tokenize the text {text[:40]!r}: it gave {count}")
        return list(tokens[:count])

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        """The text of tokens, special ones left out; bytes of a character that is not complete become U+FFFD."""
        given = (llama_cpp.llama_token * len(tokens))(*tokens)
        room = 16 * len(tokens) + 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            size = llama_cpp.llama_detokenize(self._vocabulary, given, len(tokens), buffer, room, False, False)
            if size >= 0:
                return buffer.raw[:size].decode("utf-8", errors="replace")
            room = -size


class _Context:
    """One llama.cpp context with room for some texts, and the batch that is handed to it."""

    def __init__(
        self, model: Any, texts: int, cells: int, threads: int, state: CallbackState | None, cache: str
    ) -> None:
        self.texts, self.cells = texts, cells
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = cells, texts, True
        params.n_batch = params.n_ubatch = CALL_TOKENS
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = getattr(llama_cpp, f"GGML_TYPE_{cache.upper()}")
        params.no_perf = True
        self._state = state
        if state is not None:
            params.cb_eval = llama_cpp.ggml_backend_sched_eval_callback(ggml_callback.on_node.address)
            params.cb_eval_user_data = state.header.ctypes.data
        _messages.clear()
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise GenerationError(f"llama.cpp can't make room for {cells} tokens: {_last_message()}; ask for fewer")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(CALL_TOKENS, 0, 1)
        as_array = np.ctypeslib.as_array
        self._token = as_array(self._batch.token, (CALL_TOKENS,))
        self._position = as_array(self._batch.pos, (CALL_TOKENS,))
        self._wanted = as_array(self._batch.logits, (CALL_TOKENS,))
        as_array(self._batch.n_seq_id, (CALL_TOKENS,))[:] = 1
        self._text = self._batch.seq_id
        self._vocabulary = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)))

    def close(self) -> None:
        if self._context:
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_free(self._context)
            self._context = None

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, False)

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
            texts: [T], which text each is of.
            wanted: which tokens' logits are wanted; None for all.

        Raises:
            GenerationError: llama.cpp can't.
        """
        count = len(tokens)
        self._token[:count] = tokens
        self._position[:count] = positions
        self._wanted[:count] = wanted is None
        for i, text in enumerate(texts):
            self._text[i][0] = text
        if wanted is not None:
            self._wanted[list(wanted)] = 1
        self._batch.n_tokens = count
        if code := llama_cpp.llama_decode(self._context, self._batch):
            raise GenerationError(f"llama.cpp can't compute {count} tokens (code {code}): {_last_message()}")

    def logits(self, token: int) -> NDArray[np.float32]:
        """[V], of a token of the last call, a view that the next call overwrites."""
        pointer = llama_cpp.llama_get_logits_ith(self._context, token)
        return np.ctypeslib.as_array(pointer, (self._vocabulary,))


class LlamaCppEngine:
    """Generates with llama.cpp, each text under its own plan.

    Args:
        model: the GGUF file, or what `read_gguf` says of it.
        threads: by default as many as torch has.
        gpu_layers: layers on an accelerator; by default all if this llama.cpp has one. There the logits go through
            ggml's get and set, which is not tested.
        reach: how logits are reached (see `ggml_callback`); by default inside the graph on the CPU.
        cache: ggml's type of the attention cache, "f16" or "f32".
        callback: False leaves it away, to measure what it costs; nothing can be steered or recorded then.

    Raises:
        ModelError: the file can't be loaded. UnsupportedModel: it has no routers.
    """

    def __init__(
        self,
        model: GGUFModel | str,
        *,
        threads: int | None = None,
        gpu_layers: int | None = None,
        reach: Reach | None = None,
        cache: str = "f16",
        callback: bool = True,
    ) -> None:
        self._model: Any = None
        self._context: _Context | None = None
        self.target = model if isinstance(model, GGUFModel) else read_gguf(model)
        self.threads = threads or torch.get_num_threads()
        self._cache = cache
        self._callback = callback
        llama_cpp.llama_log_set(_on_message, None)
        llama_cpp.llama_backend_init()
        if gpu_layers is None:
            gpu_layers = ALL_LAYERS if llama_cpp.llama_supports_gpu_offload() else NO_LIBRARY_GPU_LAYERS
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        _messages.clear()
        self._model = llama_cpp.llama_model_load_from_file(str(self.target.path).encode(), params)
        if not self._model:
            raise ModelError(f"llama.cpp can't load '{self.target.path}': {_last_message()}; get or export it again")
        self.tokenizer = GGUFTokenizer(llama_cpp.llama_model_get_vocab(self._model))
        library = llama_cpp.llama_cpp._lib
        functions = tuple(
            ggml.address(library, name)
            for name in ("ggml_backend_tensor_get", "ggml_backend_tensor_set", "ggml_backend_buffer_is_host")
        )
        self.state = CallbackState(
            self.target,
            ggml.find_layout(library),
            (functions[0], functions[1], functions[2]),
            CALL_TOKENS,
            reach or ("graph" if gpu_layers == 0 else "pieces"),
        )

    @property
    def name(self) -> str:
        return self.target.name

    def close(self) -> None:
        """Free the model's memory."""
        if self._context is not None:
            self._context.close()
            self._context = None
        if self._model:
            llama_cpp.llama_model_free(self._model)
            self._model = None

    def __del__(self) -> None:
        with suppress(Exception):  # at the end of Python the library may be gone
            self.close()

    # ---- Engine ----

    def generate(
        self, requests: Sequence[Request], *, on_text: Callable[[str], None] | None = None, record: bool = False
    ) -> list[Completion]:
        """As `Engine.generate`; up to MAX_TEXTS requests go on together."""
        if on_text is not None and len(requests) != 1:
            raise GenerationError(f"text can be streamed for one request at a time, not for {len(requests)}")
        completions: list[Completion] = []
        prompts = [self.encode(request) for request in requests]
        for start in range(0, len(requests), MAX_TEXTS):
            group = slice(start, start + MAX_TEXTS)
            completions += self._generate(requests[group], prompts[group], on_text, record)
        return completions

    def encode(self, request: Request) -> list[int]:
        """As `HFEngine.encode`."""
        if not request.prompt.strip():
            raise GenerationError("the prompt is empty: give the beginning of a text (without PROMPT a story is told)")
        ids = self.tokenizer.encode(request.prompt)
        limit = self.target.context_length
        if limit and len(ids) + request.sampling.max_new_tokens > limit:
            raise GenerationError(
                f"the prompt has {len(ids)} tokens and {request.sampling.max_new_tokens} more were asked for, but the "
                f"context of {self.name} is {limit}: shorten the prompt or lower --max-new-tokens"
            )
        return ids

    def _generate(
        self,
        requests: Sequence[Request],
        prompts: Sequence[list[int]],
        on_text: Callable[[str], None] | None,
        record: bool,
    ) -> list[Completion]:
        plans = list(dict.fromkeys(request.plan for request in requests if request.plan is not None))
        self.state.install(plans)
        self.state.record(len(requests) if record else 0)
        self.state.take_share()
        rows = [
            Row(
                number=number,
                request=request,
                prompt=prompt,
                sampler=TokenSampler(request.sampling, sorted(self.tokenizer.ends)),
                slot=-1 if request.plan is None else plans.index(request.plan),
                factor=factors_of(request.plan, len(prompt), request.sampling.max_new_tokens),
                pieces=None if on_text is None else Pieces(self.tokenizer, prompt),  # type: ignore[arg-type]
            )
            for number, (request, prompt) in enumerate(zip(requests, prompts, strict=True))
        ]
        run = Run(self._room(rows), self.state, on_text, record)
        started = time.perf_counter()
        run.write(rows, self.tokenizer.ends)
        seconds = time.perf_counter() - started
        report = run.report() if plans else None
        return [
            Completion(
                request=row.request,
                text=continuation(self.tokenizer, row.prompt, row.new),  # type: ignore[arg-type]
                token_ids=tuple(row.new),
                prompt_tokens=len(row.prompt),
                finish_reason=row.finish_reason,
                seconds=seconds,
                report=report,
                frequency=frequency_of(self.state.counts[row.number]) if record else None,
            )
            for row in rows
        ]

    def _room(self, rows: Sequence[Row]) -> _Context:
        cells = sum(len(row.prompt) + row.request.sampling.max_new_tokens for row in rows)
        return self.context(len(rows), cells)

    def context(self, texts: int, cells: int) -> _Context:
        """An empty context with room for so many texts and, of all together, tokens; the last one if that has it."""
        if self._context is None or self._context.texts < texts or self._context.cells < cells:
            if self._context is not None:
                self._context.close()
            cells = -(-cells // CELL_STEP) * CELL_STEP
            state = self.state if self._callback else None
            self._context = _Context(self._model, texts, cells, self.threads, state, self._cache)
        self._context.clear()
        return self._context

    # ---- recording texts ----

    def chosen(self, token_ids: Sequence[int], plan: SteeringPlan | None = None) -> NDArray[np.int64]:
        """Which experts each token of a text is sent to, 1 or 0, [T, L, N].

        Nothing after the last router is computed.

        Args:
            token_ids: the text's tokens.
            plan: steers them; they are all taken for the prompt.
        """
        context = self.context(1, len(token_ids))
        self.state.install([] if plan is None else [plan])
        self.state.record(len(token_ids), stop=True)
        factor = factors_of(plan, len(token_ids), 0)
        for start in range(0, len(token_ids), CALL_TOKENS):
            part = token_ids[start : start + CALL_TOKENS]
            places = np.arange(start, start + len(part), dtype=np.int32)
            slots = np.full(len(part), -1 if plan is None else 0, dtype=np.int32)
            self.state.steer(slots, factor[places], np.arange(len(part), dtype=np.int32), places)
            context.forward(part, places.tolist(), [0] * len(part), None)
            self.state.verify()
        return self.state.counts


def _last_message() -> str:
    """What llama.cpp said last of an error."""
    said = [text for text in _messages if text]
    errors = [text for text in said if "error" in text.lower() or "fail" in text.lower()]
    # the first error is the cause, later ones only pass it on
    return " ".join((errors[:1] or said[-1:] or ["it gave no reason"])[0].split())[:300]
