"""The vLLM engine: many texts at once on one machine or several accelerators, each text under its own plan.

Sampling is vLLM's own: a seed gives the same text again, but another one than the same seed in transformers. Greedy
texts are the same.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from steermoe.engines.request import Completion, Request, Sampling
from steermoe.engines.text import Pieces, continuation, encode_prompt, end_tokens, literal_tokens
from steermoe.engines.vllm.launch import _start, check_sizes, prepare_environment
from steermoe.engines.vllm.steps import RECORD
from steermoe.engines.vllm.wire import KEY, pack
from steermoe.errors import GenerationError, UnsupportedModel
from steermoe.models.checkpoint import find_source
from steermoe.models.description import shape_of_config
from steermoe.steering.banks import check_plan
from steermoe.steering.plans import SteeringPlan
from steermoe.steering.report import SteeringReport

MAX_TEXTS = 64
"""Texts that go on together, at most; vLLM takes more as they are finished."""


class VLLMEngine:
    """Generates with vLLM.

    Args:
        model: as in `models.load`, but no GGUF file.
        dtype: likewise.
        trust_remote_code: likewise.
        compiled: let vLLM compile the model: a minute or more at the start, more tokens a second after it. Then the
            share of the vector's experts is not counted, nor can routing be recorded.
        tensor_parallel_size: as in vLLM, how many workers share each layer.
        pipeline_parallel_size: how many of those divide the layers.
        data_parallel_size: copies of all that, among which texts are divided.
        max_texts: texts that go on together at most.
        options: further arguments of vLLM's `EngineArgs`.

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
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        data_parallel_size: int = 1,
        max_texts: int = MAX_TEXTS,
        **options: Any,
    ) -> None:
        self._source = find_source(model, dtype)
        self.compiled, self.max_texts = compiled, max_texts
        check_sizes(pipeline_parallel_size, data_parallel_size, compiled)
        workers = tensor_parallel_size * pipeline_parallel_size * data_parallel_size
        prepare_environment(workers)
        self._vllm = _start(
            self._source,
            trust_remote_code=trust_remote_code,
            enforce_eager=not compiled,
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            data_parallel_size=data_parallel_size,
            max_num_seqs=max_texts,
            **options,
        )
        if reason := next(filter(None, self.ask("steermoe_reason")), ""):
            self.close()
            raise UnsupportedModel(f"{self._source.name} can't be steered in vLLM: {reason}")
        self.shape = replace(shape_of_config(self._vllm.model_config), name=self.name)
        self.tokenizer = self._source.tokenizer(trust_remote_code)
        self.ends = end_tokens(self._source.eos_token_id(), self.tokenizer)
        self._numbers = count()

    @property
    def name(self) -> str:
        return self._source.name

    @property
    def dtype(self) -> str:
        return str(self._vllm.model_config.dtype).removeprefix("torch.")

    def ask(self, method: str, *args: Any) -> list[Any]:
        """What each worker answers (see `plugin.WorkerReport`)."""
        return self._vllm.collective_rpc(method, args=args)

    def fingerprint(self) -> str:
        """Tells the model, its type and this engine from others; texts that are sampled differ between engines."""
        return hashlib.sha256(f"vllm {self.dtype} {self._source.fingerprint()}".encode()).hexdigest()

    def close(self) -> None:
        """End vLLM's processes and free its memory."""
        if self._vllm is not None:
            self._vllm.engine_core.shutdown()
            self._vllm = None

    # ---- Engine ----

    def encode(self, request: Request, known: list[int] | None = None) -> list[int]:
        """As `HFEngine.encode`."""
        limit = self._vllm.model_config.max_model_len
        return encode_prompt(partial(literal_tokens, self.tokenizer), request, self.name, limit, known)

    def generate(
        self, requests: Sequence[Request], *, on_text: Callable[[str], None] | None = None, record: bool = False
    ) -> list[Completion]:
        """As `Engine.generate`; all requests go on together, as far as there is room."""
        if on_text is not None and len(requests) != 1:
            raise GenerationError(f"text can be streamed for one request at a time, not for {len(requests)}")
        if record and self.compiled:
            raise GenerationError("routing can't be recorded in a compiled model: start the engine without compiling")
        decoder = self.decoder(on_text=on_text, record=record)
        started = time.perf_counter()
        decoder.start(requests, [self.encode(request) for request in requests])
        done: dict[int, Completion] = {}
        try:
            while len(decoder):
                done.update((id(completion.request), completion) for completion in decoder.step())
        finally:
            decoder.clear()
        seconds = time.perf_counter() - started
        report = decoder.report() if any(request.plan for request in requests) else None
        return [_finished(done[id(request)], seconds, report) for request in requests]

    @property
    def most_rows(self) -> int:
        return self.max_texts

    def room(self) -> None:
        """Memory is vLLM's own affair."""

    def decoder(
        self, rows: int = 0, *, on_text: Callable[[str], None] | None = None, record: bool = False
    ) -> "VLLMDecoder":
        """As `Engine.decoder`; what there is no room for waits in vLLM's own queue."""
        return VLLMDecoder(self, on_text, record)

    # ---- for the decoder ----

    def add(self, request: Request, prompt: Sequence[int], record: bool) -> str:
        """Hand a request to vLLM; its number there."""
        from vllm import TokensPrompt

        number = f"steermoe-{next(self._numbers)}"
        params = sampling_params(request.sampling, sorted(self.ends))
        extra: dict[str, Any] = {RECORD: b"1"} if record else {}  # bytes, which no client of a server can send
        if (data := self._packed(request.plan)) is not None:
            extra[KEY] = data
        params.extra_args = extra or None
        self._vllm.add_request(number, TokensPrompt(prompt_token_ids=list(prompt)), params)
        return number

    def step(self) -> list[Any]:
        return self._vllm.step() if self._vllm.has_unfinished_requests() else []

    def abort(self, numbers: Sequence[str]) -> None:
        self._vllm.abort_request(list(numbers))

    def report(self) -> SteeringReport:
        """What was steered since the last report, by all workers together."""
        return _sum_of_stages(self.ask("steermoe_report"))

    def recorded(self) -> dict[str, Tensor]:
        """Counts [L, N] of what requests chose that were to be recorded, since it was asked last."""
        found: dict[str, Tensor] = {}
        for worker in self.ask("steermoe_recorded"):
            for number, rows in worker.items():
                counts = found.setdefault(number, torch.zeros(len(self.shape.routers), self.shape.num_experts))
                for row, values in rows:
                    counts[row, : len(values)] = torch.tensor(values, dtype=torch.float32)
        return found

    def _packed(self, plan: SteeringPlan | None) -> bytes | None:
        if plan is None or not plan.does_something:
            return None
        check_plan(self.shape, plan)
        return pack(plan)


@dataclass(eq=False)
class _Text:
    """A request in flight."""

    request: Request
    prompt: list[int]
    started: float
    pieces: Pieces | None
    sent: int = 0


@dataclass(eq=False)
class VLLMDecoder:
    """Takes requests whenever there is room, and gives completions as they are finished (`rolling.Decoder`)."""

    engine: VLLMEngine
    on_text: Callable[[str], None] | None = None
    record: bool = False
    _texts: dict[str, _Text] = field(default_factory=dict)
    _steered: bool = False

    def __len__(self) -> int:
        return len(self._texts)

    def start(self, requests: Sequence[Request], prompts: Sequence[list[int]]) -> None:
        for request, prompt in zip(requests, prompts, strict=True):
            number = self.engine.add(request, prompt, self.record)
            pieces = None if self.on_text is None else Pieces(self.engine.tokenizer, prompt)
            self._texts[number] = _Text(request, prompt, time.perf_counter(), pieces)
            self._steered = self._steered or request.plan is not None

    def step(self) -> list[Completion]:
        finished = []
        for output in self.engine.step():
            number, text = output.request_id, self._texts[output.request_id]
            made = output.outputs[0]
            tokens = list(made.token_ids)
            is_stop = output.finished and made.finish_reason == "stop"
            kept = tokens[:-1] if is_stop and tokens and tokens[-1] in self.engine.ends else tokens
            self._stream(text, kept, output.finished)
            if output.finished:
                del self._texts[number]
                finished.append((number, self._completion(text, kept, "stop" if is_stop else "length")))
        if not self.record or not finished:
            return [completion for _, completion in finished]
        counts = self.engine.recorded()
        return [_with_frequency(completion, counts.get(number)) for number, completion in finished]

    def clear(self) -> None:
        if self._texts:
            self.engine.abort(list(self._texts))
        self._texts = {}

    def report(self) -> SteeringReport | None:
        return self.engine.report() if self._steered else None

    def close(self) -> None:
        self.clear()

    def _completion(self, text: _Text, kept: list[int], reason: str) -> Completion:
        return Completion(
            request=text.request,
            text=continuation(self.engine.tokenizer, text.prompt, kept),
            token_ids=tuple(kept),
            prompt_tokens=len(text.prompt),
            finish_reason=reason,
            seconds=time.perf_counter() - text.started,
        )

    def _stream(self, text: _Text, tokens: list[int], is_last: bool) -> None:
        if text.pieces is None or self.on_text is None:
            return
        for token in tokens[text.sent :]:
            if piece := text.pieces.add(token):
                self.on_text(piece)
        text.sent = len(tokens)
        if is_last and (rest := text.pieces.rest()):
            self.on_text(rest)


def sampling_params(sampling: Sampling, ends: list[int]) -> Any:
    """The same in vLLM's words: a text ends at `ends` and nowhere else."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=sampling.temperature if sampling.do_sample else 0.0,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
        max_tokens=sampling.max_new_tokens,
        min_tokens=sampling.min_new_tokens,
        stop_token_ids=ends,
        ignore_eos=True,
        detokenize=False,
    )


def _finished(completion: Completion, seconds: float, report: SteeringReport | None) -> Completion:
    return replace(completion, seconds=seconds, report=report)


def _with_frequency(completion: Completion, counts: Tensor | None) -> Completion:
    if counts is None or not bool((counts.sum(-1) > 0).all()):
        return completion
    return replace(completion, frequency=counts / counts.sum(-1, keepdim=True))


def _sum_of_stages(workers: Sequence[dict[str, Any]]) -> SteeringReport:
    """One report of all replicas and pipeline stages.

    The workers that share a stage's layers count the same tokens and choices: one of them answers for all. All stages
    of a replica see the same tokens: its first stage counts them, while each counts the calls and slots of its own
    layers.

    Args:
        workers: what each answers to `steermoe_report`.
    """
    parts: dict[tuple[int, tuple[int, ...]], SteeringReport] = {}
    for worker in workers:
        counts = {name: count for name, count in worker.items() if name not in ("copy", "rows")}
        parts[worker["copy"], tuple(worker["rows"])] = SteeringReport(**counts)
    first = min(rows for _, rows in parts)
    whole = (
        report if rows == first else replace(report, tokens_seen=0, tokens_steered=0)
        for (_, rows), report in parts.items()
    )
    return sum(whole, SteeringReport())
