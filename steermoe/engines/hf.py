"""The default engine: any model and device that transformers reaches, one padded batch a call."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from transformers import GenerationConfig, LogitsProcessorList, TextStreamer
from transformers.generation.streamers import BaseStreamer

from steermoe.engines.base import Completion, Request
from steermoe.engines.sampling import RowSampler
from steermoe.errors import GenerationError
from steermoe.models import LoadedModel
from steermoe.recording import record_routing
from steermoe.steering import attach


class HFEngine:
    """Generates with transformers' own `generate`, with steering attached around it."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded

    @property
    def name(self) -> str:
        return self.loaded.name

    def generate(
        self, requests: Sequence[Request], *, on_text: Callable[[str], None] | None = None, record: bool = False
    ) -> list[Completion]:
        """As `Engine.generate`; all requests run as one batch, whose longest max_new_tokens bounds them all."""
        if not requests:
            return []
        if on_text is not None and len(requests) != 1:
            raise GenerationError(f"text can be streamed for one request at a time, not for {len(requests)}")
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        prompts = [self.encode(request) for request in requests]
        width = max(map(len, prompts))
        pad = tokenizer.pad_token_id
        padded = [[pad] * (width - len(ids)) + ids for ids in prompts]
        real = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        plans = [request.plan for request in requests]
        handle = None
        with ExitStack() as stack:
            if any(plans):
                handle = attach(model, plans[0]) if len(set(map(id, plans))) == 1 else attach(model, rows=plans)
                stack.callback(handle.remove)
            routing = stack.enter_context(record_routing(model, "generated")) if record else None
            started = time.perf_counter()
            with torch.inference_mode():
                output = model.generate(
                    torch.tensor(padded, device=model.device),
                    attention_mask=torch.tensor(real, device=model.device),
                    generation_config=self._config(requests),
                    logits_processor=LogitsProcessorList([RowSampler([request.sampling for request in requests])]),
                    streamer=_streamer(tokenizer, on_text),
                )
            seconds = time.perf_counter() - started
            if handle is not None:
                handle.verify()
        report = handle.report() if handle is not None else None
        frequency = routing.frequency() if routing and routing.tokens is not None and (routing.tokens > 0).all() else None
        ends = self._end_tokens()
        completions = []
        for row, request in enumerate(requests):
            new = output[row, width:].tolist()[: request.sampling.max_new_tokens]
            stop = next((position for position, token in enumerate(new) if token in ends), None)
            kept = new if stop is None else new[:stop]
            completions.append(
                Completion(
                    request=request,
                    text=tokenizer.decode(kept, skip_special_tokens=True),
                    token_ids=tuple(kept),
                    prompt_tokens=len(prompts[row]),
                    finish_reason="length" if stop is None else "stop",
                    seconds=seconds,
                    report=report,
                    frequency=None if frequency is None else frequency[row],
                )
            )
        return completions

    def encode(self, request: Request) -> list[int]:
        """The prompt's tokens; text that looks like a special token stays text.

        Raises:
            GenerationError: an empty prompt, or one that leaves no room in the model's context.
        """
        tokenizer = self.loaded.tokenizer
        if not request.prompt.strip():
            raise GenerationError("the prompt is empty: give the beginning of a text (without PROMPT a story is told)")
        ids: list[int] = tokenizer(request.prompt, split_special_tokens=True)["input_ids"]
        limit = self.loaded.context_length
        if limit is not None and len(ids) + request.sampling.max_new_tokens > limit:
            raise GenerationError(
                f"the prompt has {len(ids)} tokens and {request.sampling.max_new_tokens} more were asked for, but the "
                f"context of {self.name} is {limit}: shorten the prompt or lower --max-new-tokens"
            )
        return ids

    def _end_tokens(self) -> set[int]:
        end = self.loaded.model.generation_config.eos_token_id
        end = self.loaded.tokenizer.eos_token_id if end is None else end
        return set(end) if isinstance(end, list | tuple) else {end} - {None}

    def _config(self, requests: Sequence[Request]) -> GenerationConfig:
        """Greedy for `generate`, since RowSampler has drawn the token by then; nothing of the checkpoint's own sampling."""
        minimum = min(request.sampling.min_new_tokens for request in requests)
        return GenerationConfig(
            max_new_tokens=max(request.sampling.max_new_tokens for request in requests),
            min_new_tokens=minimum or None,
            do_sample=False,
            eos_token_id=sorted(self._end_tokens()) or None,
            pad_token_id=self.loaded.tokenizer.pad_token_id,
        )


class _CallbackStreamer(TextStreamer):
    def __init__(self, tokenizer: object, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.on_text(text)


def _streamer(tokenizer: object, on_text: Callable[[str], None] | None) -> BaseStreamer | None:
    return None if on_text is None else _CallbackStreamer(tokenizer, on_text)
