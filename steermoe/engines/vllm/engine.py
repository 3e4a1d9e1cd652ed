"""The vLLM engine: many texts at once on one machine or several GPUs, each text with its own plan.

Sampling is vLLM's own: a seed always gives the same text, but not the text that it gives in transformers. Greedy texts
are the same.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from steermoe.engines.chat import read_chat
from steermoe.engines.decoding import complete
from steermoe.engines.request import Completion, Request
from steermoe.engines.text import HFEncoder, encode_prompt, end_tokens
from steermoe.engines.vllm.decoder import VLLMDecoder, report_of
from steermoe.engines.vllm.launch import check_sizes, parallel_sizes, prepare_environment, start
from steermoe.engines.vllm.spec import NO_COUNTS
from steermoe.errors import GenerationError, UnsupportedModel
from steermoe.models.checkpoint import find_source
from steermoe.models.description import shape_of_config
from steermoe.steering.report import SteeringReport
from steermoe.steering.tags import ModelTags

if TYPE_CHECKING:
    from steermoe.engines.messages import Chat, Message

MAX_TEXTS = 64
"""The most texts that run together; vLLM starts further ones as others finish."""


class VLLMEngine:
    """Generates with vLLM.

    Args:
        model: as in `loading.load`, but not a GGUF file.
        dtype: as in `loading.load`.
        trust_remote_code: as in `loading.load`.
        compiled: let vLLM compile the model, which takes a minute or more at the start and gives more tokens per second
            afterwards. The share of the vector's experts is then not counted, and routing can't be recorded.
        max_texts: at most this many texts run together.
        options: further arguments of vLLM's `EngineArgs`, among them the sizes of `parallel_sizes`.

    Raises:
        ModelError: the model can't be found or loaded. UnsupportedModel: it can't be steered in vLLM.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        compiled: bool = False,
        max_texts: int = MAX_TEXTS,
        **options: Any,
    ) -> None:
        self._source = find_source(model, dtype)
        self.compiled, self.max_texts = compiled, max_texts
        sizes = parallel_sizes(options)
        check_sizes(sizes, compiled)
        prepare_environment(math.prod(sizes.values()))
        self._vllm = start(
            self._source,
            trust_remote_code=trust_remote_code,
            enforce_eager=not compiled,
            max_num_seqs=max_texts,
            **{**options, **sizes},
        )
        if reason := next(filter(None, self.ask("steermoe_reason")), ""):
            self.close()
            raise UnsupportedModel(f"{self._source.name} can't be steered in vLLM: {reason}")
        self._no_lists = next(filter(None, self.ask("steermoe_no_lists")), "")
        shape = shape_of_config(self._vllm.model_config).without_counts(NO_COUNTS)
        self.shape = replace(shape, name=self.name)
        self.tokenizer = self._source.tokenizer(trust_remote_code)
        self._encoder = HFEncoder(self.tokenizer)
        self.ends = end_tokens(self._source.eos_token_id(), self.tokenizer)
        self.tags = ModelTags.of_tokenizer(self.tokenizer, self.ends)

    @property
    def name(self) -> str:
        return self._source.name

    @property
    def dtype(self) -> str:
        return str(self._vllm.model_config.dtype).removeprefix("torch.")

    def ask(self, method: str, *args: Any) -> list[Any]:
        """Each worker's answer to a method of `plugin.WorkerReport`."""
        return self._vllm.collective_rpc(method, args=args)

    def fingerprint(self) -> str:
        """A hash of the model, its dtype and this engine, since sampled texts differ between engines."""
        return hashlib.sha256(f"vllm {self.dtype} {self._source.fingerprint()}".encode()).hexdigest()

    def close(self) -> None:
        """Stop vLLM's processes and free its memory."""
        if self._vllm is not None:
            self._vllm.engine_core.shutdown()
            self._vllm = None

    # ---- Engine ----

    @property
    def context_length(self) -> int:
        return int(self._vllm.model_config.max_model_len)

    def chat(self, messages: "Sequence[Message]", thinking: bool | None = None) -> "Chat":
        """As `Engine.chat`."""
        return read_chat(self._encoder, messages, self.name, thinking)

    def encode(self, request: Request, known: list[int] | None = None) -> list[int]:
        """As `Engine.encode`."""
        self.tags.of(request.plan)
        return encode_prompt(self._encoder, request, self.name, self.context_length, known)

    def generate(
        self, requests: Sequence[Request], *, on_text: Callable[[str], None] | None = None, record: bool = False
    ) -> list[Completion]:
        """As `Engine.generate`; all requests run together if there is room."""
        if record and self.compiled:
            raise GenerationError("routing can't be recorded in a compiled model: start the engine without compiling")
        prompts = [self.encode(request) for request in requests]
        return complete(self.decoder(record=record), requests, prompts, on_text)

    @property
    def most_rows(self) -> int:
        return self.max_texts

    def room(self) -> None:
        """None: vLLM manages its own memory."""

    def decoder(self, rows: int = MAX_TEXTS, tokens: int | None = None, *, record: bool = False) -> VLLMDecoder:
        """As `Engine.decoder`; vLLM itself decides how many requests run together."""
        return VLLMDecoder(self._vllm, self.shape, self.tokenizer, self.ends, record, self._no_lists, self.tags)

    def report(self) -> SteeringReport:
        """What was steered since the last report, by all workers together."""
        return report_of(self._vllm)
