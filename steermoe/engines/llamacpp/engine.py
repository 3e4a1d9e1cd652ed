"""Generates with llama.cpp, each text under its own plan, any number of them together."""

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import llama_cpp
import numpy as np
import torch
from numpy.typing import NDArray

from steermoe.engines.llamacpp import layout
from steermoe.engines.llamacpp.context import Context, last_message, messages, on_message
from steermoe.engines.llamacpp.decoder import RollingDecoder
from steermoe.engines.llamacpp.rows import CALL_TOKENS, Row, Run, factors_of, frequency_of
from steermoe.engines.llamacpp.sampler import TokenSampler
from steermoe.engines.llamacpp.state import CallbackState, Reach
from steermoe.engines.llamacpp.tokenizer import GGUFTokenizer
from steermoe.engines.memory import SHARE, Room, free_memory
from steermoe.engines.request import Completion, Request
from steermoe.engines.text import Pieces, continuation
from steermoe.errors import GenerationError, ModelError
from steermoe.models.gguf.header import GGUFModel, read_gguf
from steermoe.steering.plans import SteeringPlan
from steermoe.steering.report import SteeringReport

MOST_ROWS = 128
"""Texts that go on together; more of `generate` are done in groups. Beyond these, rows add little speed."""
CELL_STEP = 256
"""The cache of a text grows by so many tokens."""
NO_LIBRARY_GPU_LAYERS = 0
ALL_LAYERS = -1
LOGITS_BYTES = 16
"""A token of the vocabulary and row: logits in float32, and their weights, once in float32 and once in float64."""
SAMPLED_BYTES, SAMPLES = 4096, 256
"""Pieces of a file that its fingerprint looks at, and how many."""


class LlamaCppEngine:
    """A GGUF file in llama.cpp.

    Args:
        model: the GGUF file, or what `read_gguf` says of it.
        threads: by default as many as torch has.
        gpu_layers: layers on an accelerator; by default all if this llama.cpp has one. There the logits go through
            ggml's get and set, which is not tested.
        reach: how logits are reached (see `callback`); by default inside the graph on the CPU.
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
        self._context: Context | None = None
        self.file = model if isinstance(model, GGUFModel) else read_gguf(model)
        self.shape = self.file.shape
        self.threads = threads or torch.get_num_threads()
        self._cache = cache
        self._callback = callback
        llama_cpp.llama_log_set(on_message, None)
        llama_cpp.llama_backend_init()
        if gpu_layers is None:
            gpu_layers = ALL_LAYERS if llama_cpp.llama_supports_gpu_offload() else NO_LIBRARY_GPU_LAYERS
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        messages.clear()
        self._model = llama_cpp.llama_model_load_from_file(str(self.file.path).encode(), params)
        if not self._model:
            raise ModelError(f"llama.cpp can't load '{self.file.path}': {last_message()}; get or export it again")
        self.tokenizer = GGUFTokenizer(llama_cpp.llama_model_get_vocab(self._model))
        library = llama_cpp.llama_cpp._lib
        functions = tuple(
            layout.address(library, name)
            for name in ("ggml_backend_tensor_get", "ggml_backend_tensor_set", "ggml_backend_buffer_is_host")
        )
        self.state = CallbackState(
            self.file,
            layout.find_layout(library),
            (functions[0], functions[1], functions[2]),
            CALL_TOKENS,
            reach or ("graph" if gpu_layers == 0 else "pieces"),
        )

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def dtype(self) -> str:
        """How most of the file's matrices are stored, such as "q8_0"."""
        from gguf import LlamaFileType

        with suppress(ValueError):
            return re.sub("^(all|mostly)_", "", LlamaFileType(self.file.file_type).name.lower())
        return "gguf"

    @property
    def most_rows(self) -> int:
        return MOST_ROWS

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
        """As `Engine.generate`; up to MOST_ROWS requests go on together."""
        if on_text is not None and len(requests) != 1:
            raise GenerationError(f"text can be streamed for one request at a time, not for {len(requests)}")
        completions: list[Completion] = []
        prompts = [self.encode(request) for request in requests]
        for start in range(0, len(requests), MOST_ROWS):
            group = slice(start, start + MOST_ROWS)
            completions += self._generate(requests[group], prompts[group], on_text, record)
        return completions

    def encode(self, request: Request, known: list[int] | None = None) -> list[int]:
        """As `Engine.encode`."""
        if not request.prompt.strip():
            raise GenerationError("the prompt is empty: give the beginning of a text (without PROMPT a story is told)")
        ids = self.tokenizer.encode(request.prompt) if known is None else known
        if not ids:
            raise GenerationError(
                f"the prompt {request.prompt!r} has no tokens in this model's vocabulary: write another"
            )
        limit = self.file.context_length
        if limit and len(ids) + request.sampling.max_new_tokens > limit:
            raise GenerationError(
                f"the prompt has {len(ids)} tokens and {request.sampling.max_new_tokens} more were asked for, but the "
                f"context of {self.name} is {limit}: shorten the prompt or lower --max-new-tokens"
            )
        return ids

    def decoder(self, rows: int) -> RollingDecoder:
        return RollingDecoder(self, min(rows, CALL_TOKENS))

    def room(self) -> Room:
        vocabulary, number_bytes = self.tokenizer.size, {"f16": 2, "f32": 4}[self._cache]
        return Room(
            int(free_memory(torch.device("cpu")) * SHARE),
            LOGITS_BYTES * vocabulary,
            number_bytes * self.file.cache_numbers,
        )

    def fingerprint(self) -> str:
        """The file's size, and pieces of it from beginning to end."""
        size = self.file.path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with self.file.path.open("rb") as file:
            for start in np.linspace(0, max(0, size - SAMPLED_BYTES), SAMPLES).astype(int):
                file.seek(int(start))
                digest.update(file.read(SAMPLED_BYTES))
        return digest.hexdigest()

    def _generate(
        self,
        requests: Sequence[Request],
        prompts: Sequence[list[int]],
        on_text: Callable[[str], None] | None,
        record: bool,
    ) -> list[Completion]:
        rows = [self.row(*given, text=text) for text, given in enumerate(zip(requests, prompts, strict=True))]
        if on_text is not None:
            rows[0].pieces = Pieces(self.tokenizer, rows[0].prompt)  # type: ignore[arg-type]
        self.state.record(len(rows) if record else 0)
        run = Run(self.context(len(rows), max(row.most for row in rows)), self.state, self.tokenizer.ends, on_text)
        started = time.perf_counter()
        run.begin(rows)
        while run.rows:
            run.step()
        seconds = time.perf_counter() - started
        report = run.report() if any(request.plan is not None for request in requests) else None
        return [self.completion(row, seconds, report, recorded=record) for row in rows]

    def row(self, request: Request, prompt: list[int], *, text: int = -1) -> Row:
        """A text to be written; `text` is its place among those that are counted."""
        sampler = TokenSampler(request.sampling, sorted(self.tokenizer.ends))
        factor = factors_of(request.plan, len(prompt), request.sampling.max_new_tokens)
        return Row(request, prompt, sampler, factor, text=text)

    def completion(
        self, row: Row, seconds: float, report: SteeringReport | None = None, *, recorded: bool = False
    ) -> Completion:
        """Of a row that is finished."""
        return Completion(
            request=row.request,
            text=continuation(self.tokenizer, row.prompt, row.new),  # type: ignore[arg-type]
            token_ids=tuple(row.new),
            prompt_tokens=len(row.prompt),
            finish_reason=row.finish_reason,
            seconds=seconds,
            report=report,
            frequency=frequency_of(self.state.counts[row.text]) if recorded else None,
        )

    def context(self, texts: int, cells: int) -> Context:
        """An empty context with room for so many texts of so many tokens each; the last one if that has it."""
        if self._context is None or self._context.texts < texts or self._context.cells < cells:
            if self._context is not None:
                self._context.close()
                self._context = None
            cells = -(-cells // CELL_STEP) * CELL_STEP
            state = self.state if self._callback else None
            self._context = Context(self._model, texts, cells, self.threads, state, self._cache)
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
