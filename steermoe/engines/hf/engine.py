"""The default engine: any model and device that transformers reaches, one padded batch a call."""

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from steermoe.engines.engine import Decoder
from steermoe.engines.hf.cache import bytes_of_a_token
from steermoe.engines.hf.sampling import RowLimits, RowSampler
from steermoe.engines.hf.streamer import TextStreamer
from steermoe.engines.memory import SHARE, Room, free_memory
from steermoe.engines.request import Completion, Request
from steermoe.engines.text import continuation, encode_prompt
from steermoe.errors import GenerationError
from steermoe.models.loading import LoadedModel
from steermoe.routing.recording import record_routing
from steermoe.routing.shape import RoutingShape
from steermoe.steering.handle import attach

if TYPE_CHECKING:
    from steermoe.engines.hf.compiled.steps import CompiledSteps

MOST_ROWS, MOST_ROWS_ON_CPU = 256, 64
"""Beyond these, rows add little speed and much memory."""
LOGITS_BYTES = 40
"""A token of the vocabulary and row: logits as the model gives them, in float32, warped, and twice in float64."""
SAMPLED_WEIGHTS = 8
"""Numbers of each tensor of a model that its fingerprint looks at."""


class HFEngine:
    """Generates with transformers' own `generate`, with steering attached around it, or with compiled steps.

    Args:
        loaded: the model.
        compiled: take the steps that `steermoe models compile` made, where there are any for this model.
    """

    def __init__(self, loaded: LoadedModel, compiled: bool = True) -> None:
        self.loaded = loaded
        self.compiled = compiled
        self._steps: CompiledSteps | None = None

    @property
    def name(self) -> str:
        return self.loaded.name

    @property
    def shape(self) -> RoutingShape:
        return self.loaded.shape

    @property
    def dtype(self) -> str:
        return str(self.loaded.model.dtype).removeprefix("torch.")

    @property
    def most_rows(self) -> int:
        return MOST_ROWS_ON_CPU if self.loaded.model.device.type == "cpu" else MOST_ROWS

    def room(self) -> Room:
        model: Any = self.loaded.model
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        return Room(int(free_memory(model.device) * SHARE), LOGITS_BYTES * vocabulary, bytes_of_a_token(model))

    def decoder(self, rows: int) -> Decoder:
        from steermoe.engines.hf.rolling import decoder_for

        return decoder_for(self)

    def fingerprint(self) -> str:
        """Class and dtype, and a few numbers of every tensor."""
        model: Any = self.loaded.model
        digest = hashlib.sha256(f"{type(model).__name__} {model.dtype}".encode())
        for name, parameter in model.named_parameters():
            some = parameter.detach().flatten()[:SAMPLED_WEIGHTS]
            digest.update(f"{name} {tuple(parameter.shape)} {some.float().cpu().tolist()}".encode())
        return digest.hexdigest()

    def generate(
        self, requests: Sequence[Request], *, on_text: Callable[[str], None] | None = None, record: bool = False
    ) -> list[Completion]:
        """As `Engine.generate`; all requests run as one batch, which takes as long as its longest."""
        if not requests:
            return []
        if on_text is not None and len(requests) != 1:
            raise GenerationError(f"text can be streamed for one request at a time, not for {len(requests)}")
        steps = None if record else self.compiled_steps()
        if steps is not None and steps.serves(len(requests)):
            return self._generate_rolling(requests, on_text)
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        prompts = [self.encode(request) for request in requests]
        lengths = [len(ids) for ids in prompts]
        width, pad = max(lengths), tokenizer.pad_token_id
        padded = [[pad] * (width - len(ids)) + ids for ids in prompts]
        real = [[0] * (width - length) + [1] * length for length in lengths]
        samplings = [request.sampling for request in requests]
        limits = [sampling.max_new_tokens for sampling in samplings]
        plans = [request.plan for request in requests]
        ends = self.end_tokens()
        handle = None
        with ExitStack() as undo:
            if any(plans):
                handle = attach(model, plans[0]) if len(set(plans)) == 1 else attach(model, rows=plans)
                undo.callback(handle.remove)
            routing = undo.enter_context(record_routing(model, "generated")) if record else None
            # `generate` fills what a configuration leaves open from the checkpoint's own, sampling and penalties too
            undo.callback(setattr, model, "generation_config", model.generation_config)
            model.generation_config = self._config(max(limits), ends)
            started = time.perf_counter()
            with torch.inference_mode():
                output = model.generate(
                    torch.tensor(padded, device=model.device),
                    attention_mask=torch.tensor(real, device=model.device),
                    logits_processor=LogitsProcessorList([RowSampler(samplings, lengths, sorted(ends))]),
                    stopping_criteria=StoppingCriteriaList([RowLimits(limits, width)]),
                    streamer=None if on_text is None else TextStreamer(tokenizer, on_text, ends),
                )
            seconds = time.perf_counter() - started
            if handle is not None:
                handle.verify()
        report = handle.report() if handle is not None else None
        completions = []
        for row, request in enumerate(requests):
            new = output[row, width:].tolist()[: limits[row]]
            stop = next((position for position, token in enumerate(new) if token in ends), None)
            kept = new if stop is None else new[:stop]
            completions.append(
                Completion(
                    request=request,
                    text=continuation(tokenizer, prompts[row], kept),
                    token_ids=tuple(kept),
                    prompt_tokens=lengths[row],
                    finish_reason="length" if stop is None else "stop",
                    seconds=seconds,
                    report=report,
                    frequency=None if routing is None else routing.frequency_of(row),
                )
            )
        return completions

    def compiled_steps(self) -> "CompiledSteps | None":
        """The model's compiled steps; None where they are not wanted, or would pass by what else is attached to it."""
        if not self.compiled or self.loaded.model.device.type != "cpu" or not _is_plain(self.loaded.model):
            return None
        from steermoe.engines.hf.compiled.steps import CompiledSteps

        if self._steps is None:
            self._steps = CompiledSteps(self.loaded.model)
        return self._steps

    def _generate_rolling(self, requests: Sequence[Request], on_text: Callable[[str], None] | None) -> list[Completion]:
        from steermoe.engines.hf.rolling import RollingDecoder

        prompts = [self.encode(request) for request in requests]
        streamer = None if on_text is None else TextStreamer(self.loaded.tokenizer, on_text, self.end_tokens())
        if streamer is not None:
            streamer.put(torch.tensor(prompts[0]))
        started = time.perf_counter()
        decoder = RollingDecoder(self, None if streamer is None else lambda token: streamer.put(torch.tensor([token])))
        try:
            decoder.start(requests, prompts)
            done: dict[int, list[Completion]] = {}
            while len(decoder):
                for completion in decoder.step():
                    done.setdefault(id(completion.request), []).append(completion)
            report = decoder.report()
        finally:
            decoder.close()
        if streamer is not None:
            streamer.end()
        seconds = time.perf_counter() - started
        return [replace(done[id(request)].pop(), seconds=seconds, report=report) for request in requests]

    def encode(self, request: Request, known: list[int] | None = None) -> list[int]:
        """As `Engine.encode`."""
        return encode_prompt(self.loaded.tokenizer, request, self.name, self.loaded.context_length, known)

    def end_tokens(self) -> set[int]:
        """Tokens that end a text."""
        end = self.loaded.model.generation_config.eos_token_id
        end = self.loaded.tokenizer.eos_token_id if end is None else end
        return set(end) if isinstance(end, list | tuple) else {end} - {None}

    def _config(self, max_new_tokens: int, ends: set[int]) -> GenerationConfig:
        """Greedy for `generate`, since RowSampler has drawn the token by then."""
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(ends) or None,
            pad_token_id=self.loaded.tokenizer.pad_token_id,
        )


def _is_plain(model: torch.nn.Module) -> bool:
    """Whether nothing hangs on to a module that a compiled step would not call."""
    return not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in model.modules()
    )
