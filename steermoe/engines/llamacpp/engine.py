"""Generates with llama.cpp, many texts together, each with its own plan."""

import hashlib
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from steermoe.engines.chat import read_chat
from steermoe.engines.decoding import complete
from steermoe.engines.llamacpp import layout
from steermoe.engines.llamacpp.context import Context, last_message, messages, on_message
from steermoe.engines.llamacpp.decoder import RollingDecoder
from steermoe.engines.llamacpp.rows import CALL_TOKENS, factors_of
from steermoe.engines.llamacpp.state import CallbackState, Reach
from steermoe.engines.llamacpp.threads import default_threads
from steermoe.engines.llamacpp.tokenizer import GGUFTokenizer
from steermoe.engines.memory import SHARE, Room, free_memory
from steermoe.engines.request import Completion, Request
from steermoe.engines.text import encode_prompt
from steermoe.errors import ModelError, SteeringError
from steermoe.models.gguf.header import GGUFModel, read_gguf
from steermoe.steering.limits import check_count
from steermoe.steering.plans import SteeringPlan
from steermoe.steering.tags import ModelTags

if TYPE_CHECKING:
    from steermoe.engines.messages import Chat, Message

MOST_ROWS = 128
"""Texts that run together; `generate` starts further ones as others finish. More rows would add little speed."""
CELL_STEP = 256
"""The cache of a text grows in steps of this many tokens."""
NO_LIBRARY_GPU_LAYERS = 0
ALL_LAYERS = -1
LOGITS_BYTES = 16
"""Per row and token of the vocabulary: logits in float32, and their weights in float32 and in float64."""
SAMPLED_BYTES, SAMPLES = 4096, 256
"""The size in bytes of the pieces of a file that go into its fingerprint, and their number."""


NO_COUNTS = (
    "llama.cpp reads the number once, when it loads the model: `steermoe generate --active-experts N` loads it with N"
)
"""Why a text can't have its own number of active experts."""


def with_active_experts(file: GGUFModel, number: int) -> GGUFModel:
    """The file as llama.cpp reads it if each token is to get another number of experts.

    Raises:
        SteeringError: the model has fewer experts.
    """
    check_count(number)
    most = min(router.num_experts for router in file.routers)
    if number > most:
        raise SteeringError(f"{number} active experts are too many for {file.name}, which has {most}: ask for fewer")
    return replace(file, routers=tuple(replace(router, top_k=number) for router in file.routers))


def _overrides(key: str, number: int) -> Any:
    """What llama.cpp reads instead of a number in the file; a list that ends with an empty entry."""
    overrides = (llama_cpp.llama_model_kv_override * 2)()
    overrides[0].tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
    overrides[0].key = key.encode()
    overrides[0].value.val_i64 = number
    return overrides


class LlamaCppEngine:
    """A GGUF file in llama.cpp.

    Args:
        model: the GGUF file, or what `read_gguf` returned for it.
        threads: by default as many as torch would take (see `threads`).
        gpu_layers: layers on a GPU; by default all if this llama.cpp supports one. There the logits go through ggml's
            get and set, which is not tested.
        reach: how logits are reached (see `callback`); by default inside the graph on the CPU.
        cache: ggml's type of the attention cache, "f16" or "f32".
        callback: False leaves it out, to measure its cost; then nothing can be steered or recorded.
        active_experts: how many experts each token of all texts gets, prompts included; by default as many as the file
            says.

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
        active_experts: int | None = None,
    ) -> None:
        self._model: Any = None
        self._context: Context | None = None
        self.file = model if isinstance(model, GGUFModel) else read_gguf(model)
        self._active = active_experts
        if active_experts is not None:
            self.file = with_active_experts(self.file, active_experts)
        self.file = replace(self.file, routers=self.file.shape.without_counts(NO_COUNTS).routers)
        self.shape = self.file.shape
        self.threads = threads or default_threads()
        self._cache = cache
        self._callback = callback
        llama_cpp.llama_log_set(on_message, None)
        llama_cpp.llama_backend_init()
        if gpu_layers is None:
            gpu_layers = ALL_LAYERS if llama_cpp.llama_supports_gpu_offload() else NO_LIBRARY_GPU_LAYERS
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        if active_experts is not None:
            overrides = _overrides(f"{self.file.architecture}.expert_used_count", active_experts)
            params.kv_overrides = overrides
        messages.clear()
        self._model = llama_cpp.llama_model_load_from_file(str(self.file.path).encode(), params)
        if not self._model:
            raise ModelError(f"llama.cpp can't load '{self.file.path}': {last_message()}; download or export it again")
        self.tokenizer = GGUFTokenizer(self._model)
        self.tags = ModelTags(self.tokenizer, lambda: self.tokenizer.ends)
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
        with suppress(Exception):  # the library may be gone when Python exits
            self.close()

    # ---- Engine ----

    def generate(
        self, requests: Sequence[Request], *, on_text: Callable[[str], None] | None = None, record: bool = False
    ) -> list[Completion]:
        """As `Engine.generate`; at most MOST_ROWS requests run together."""
        prompts = [self.encode(request) for request in requests]
        grown = [len(ids) + one.sampling.max_new_tokens for one, ids in zip(requests, prompts, strict=True)]
        if grown:  # now, so that the time of the first texts does not hold that of making the cache
            self.context(min(len(requests), MOST_ROWS), max(grown))
        recorded = len(requests) if record else 0
        decoder = RollingDecoder(self.context, self.state, self.tokenizer, MOST_ROWS, recorded, self.tags)
        return complete(decoder, requests, prompts, on_text)

    @property
    def context_length(self) -> int | None:
        return self.file.context_length or None

    def chat(self, messages: "Sequence[Message]", thinking: bool | None = None) -> "Chat":
        """As `Engine.chat`."""
        return read_chat(self.tokenizer, messages, self.name, thinking)

    def encode(self, request: Request, known: list[int] | None = None) -> list[int]:
        """As `Engine.encode`."""
        self.tags.of(request.plan)
        asked = None if request.plan is None else request.plan.active_experts
        if asked is not None and request.plan is not None and request.plan.layers is not None:
            raise SteeringError(
                f"llama.cpp gives all layers {asked} active experts, and the plan names layers: leave out `layers`, or "
                "generate in transformers"
            )
        if self._active not in (None, asked):
            raise SteeringError(
                f"this text asks for {asked or 'no number of'} active experts, but llama.cpp was loaded with "
                f"{self._active} for all texts: load it once for each number"
            )
        return encode_prompt(self.tokenizer, request, self.name, self.context_length, known)

    def decoder(self, rows: int, tokens: int | None = None) -> RollingDecoder:
        rows = min(rows, CALL_TOKENS)
        if tokens is not None:
            self.context(rows, tokens)
        least = (1, 0) if tokens is None else (rows, tokens)
        return RollingDecoder(self.context, self.state, self.tokenizer, rows, tags=self.tags, least=least)

    def room(self) -> Room:
        vocabulary, number_bytes = self.tokenizer.size, {"f16": 2, "f32": 4}[self._cache]
        return Room(
            int(free_memory(None) * SHARE),
            LOGITS_BYTES * vocabulary,
            number_bytes * self.file.cache_numbers,
        )

    def fingerprint(self) -> str:
        """A hash of the file's size and of pieces from its beginning to its end."""
        size = self.file.path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with self.file.path.open("rb") as file:
            for start in np.linspace(0, max(0, size - SAMPLED_BYTES), SAMPLES).astype(int):
                file.seek(int(start))
                digest.update(file.read(SAMPLED_BYTES))
        return digest.hexdigest()

    def context(self, texts: int, cells: int) -> Context:
        """An empty context with room for `texts` texts of `cells` tokens each; the last one if it is large enough."""
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
            plan: steers them; all of them count as prompt.
        """
        context = self.context(1, len(token_ids))
        self.state.install([] if plan is None else [plan])
        self.state.record(len(token_ids), stop=True)
        factor = factors_of(plan, len(token_ids), 0)
        for start in range(0, len(token_ids), CALL_TOKENS):
            part = token_ids[start : start + CALL_TOKENS]
            places = np.arange(start, start + len(part), dtype=np.int32)
            numbers = np.full(len(part), -1 if plan is None else 0, dtype=np.int32)
            self.state.steer(numbers, factor[places], np.arange(len(part), dtype=np.int32), places)
            context.forward(part, places.tolist(), [0] * len(part), None)
            self.state.verify()
        return self.state.counts
