"""Requests through transformers' own `generate`: any model, one padded batch after another.

Shapes: B rows, S columns of their padded prompts.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from steermoe.engines.decoding import Row, finish, scores_of
from steermoe.engines.engine import OnToken
from steermoe.engines.hf.cache import has_own_generate
from steermoe.engines.hf.sampling import RowLimits, RowSampler, note_logprobs
from steermoe.engines.request import Completion, Request, TokenScore
from steermoe.errors import SteeringError, TraceError
from steermoe.models.loading import LoadedModel
from steermoe.routing.recording import record_routing
from steermoe.routing.tracker import Tracker, Window
from steermoe.steering.handle import SteeringHandle
from steermoe.steering.plans import SteeringPlan
from steermoe.steering.report import SteeringReport
from steermoe.steering.tags import ModelTags
from steermoe.steering.tracing import RoutingTracer


class StaticDecoder:
    """Runs everything that has been started as one batch, which takes as long as its longest row.

    A model with a `generate` of its own gets a batch for each length of prompt.

    Args:
        loaded: the model and its tokenizer.
        ends: tokens that end a text.
        record: also fill `Completion.frequency`.
        tags: the model's; by default those of its tokenizer.
        steerable: whether `steer` may be called while a batch runs.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        ends: set[int],
        record: bool = False,
        tags: ModelTags | None = None,
        steerable: bool = False,
    ) -> None:
        self._loaded = loaded
        self._model: Any = loaded.model
        self._device = loaded.device
        self._tokenizer = loaded.tokenizer
        self._ends, self._record, self._steerable = ends, record, steerable
        self._tags = tags or ModelTags.of_tokenizer(loaded.tokenizer, ends)
        self._report: SteeringReport | None = None
        self._scores: dict[Row[None], deque[TokenScore]] = {}
        self._running: tuple[SteeringHandle, Sequence[Row[None]]] | None = None
        self.clear()

    def __len__(self) -> int:
        return len(self._rows)

    def clear(self) -> None:
        self._rows: list[Row[None]] = []

    def close(self) -> None:
        self.clear()

    def report(self) -> SteeringReport | None:
        return self._report

    def start(
        self,
        requests: Sequence[Request],
        prompts: Sequence[list[int]],
        on_text: Callable[[str], None] | None = None,
        on_token: OnToken | None = None,
    ) -> None:
        for request, prompt in zip(requests, prompts, strict=True):
            tags, shape = self._tags.of(request.plan), self._loaded.shape if request.trace else None
            row = Row(
                request,
                prompt,
                self._tokenizer,
                self._ends,
                None,
                on_text,
                tags=tags,
                on_token=on_token,
                shape=shape,
            )
            self._rows.append(row)

    def drop(self, request: Request) -> None:
        for row in self._rows:
            if row.request is request:
                row.end("interrupted")

    def steer(self, request: Request, plan: SteeringPlan | None) -> None:
        for row in self._rows:
            if row.request is not request or row.finish_reason:
                continue
            tags = self._tags.of(plan)
            running = self._running is not None and any(one is row for one in self._running[1])
            if tags is not None and running:
                raise SteeringError(
                    f"positions {plan.positions if plan else None} follows tags, which this model's texts can't begin "
                    "to do while they are generated: use positions generated"
                )
            row.steer(plan, tags)
            if running and self._running is not None:
                handle, rows = self._running
                handle.set(rows=[one.plan for one in rows])

    def step(self) -> list[Completion]:
        if not self._rows:
            return []
        dropped = [finish(row) for row in self._rows if row.finish_reason]
        done = [completion for rows in self._batches() for completion in self._run(rows)]
        self._rows = []
        return dropped + done

    def _batches(self) -> list[list[Row[None]]]:
        """All rows together; by length if the model has a `generate` of its own, which may read padding as text."""
        rows = [row for row in self._rows if not row.finish_reason]
        if not has_own_generate(self._model):
            return [rows] if rows else []
        batches: dict[int, list[Row[None]]] = {}
        for row in rows:
            batches.setdefault(len(row.prompt), []).append(row)
        return list(batches.values())

    def _run(self, rows: Sequence[Row[None]]) -> list[Completion]:
        """Generate with steering attached and routing recorded, and leave the model as it was."""
        model, plans = self._model, [row.plan for row in rows]
        handle = None
        with ExitStack() as undo:
            if any(plans) or self._steerable:
                handle = SteeringHandle(model, plans[:1] if len(set(plans)) == 1 else plans, self._tags)
                undo.callback(handle.remove)
                self._running = handle, rows
                undo.callback(setattr, self, "_running", None)
            routing = undo.enter_context(record_routing(model, "generated")) if self._record else None
            if any(row.recorder is not None for row in rows):
                undo.callback(RowTracer(model, rows).close)
            # `generate` takes what a configuration leaves open from the model's own, sampling and penalties included
            undo.callback(setattr, model, "generation_config", model.generation_config)
            model.generation_config = self._config(rows)
            self._generate(rows)
            if handle is not None:
                handle.verify()
        if handle is not None:
            self._report = (self._report or SteeringReport()) + handle.report()
        if routing is None:
            return [finish(row) for row in rows]
        return [finish(row, routing.frequency_of(number)) for number, row in enumerate(rows)]

    def _generate(self, rows: Sequence[Row[None]]) -> None:
        """Let each row take its tokens."""
        lengths = [len(row.prompt) for row in rows]
        width, pad = max(lengths), self._tokenizer.pad_token_id
        start = 1 if self._model.config.is_encoder_decoder else width  # an encoder-decoder returns the text alone
        tokens_BS = [[pad] * (width - len(row.prompt)) + row.prompt for row in rows]
        mask_BS = [[0] * (width - length) + [1] * length for length in lengths]
        samplings = [row.request.sampling for row in rows]
        own = [1] * len(rows) if self._model.config.is_encoder_decoder else lengths
        limits = [sampling.max_new_tokens for sampling in samplings]
        is_streamed = any(row.on_text or row.on_token or row.request.on_trace for row in rows)
        self._scores = {row: deque() for row in rows if row.request.logprobs is not None}
        is_noted = self._scores or any(row.recorder is not None for row in rows)
        sampler = RowSampler(samplings, own, sorted(self._ends), partial(self._note, rows) if is_noted else None)
        with torch.inference_mode():
            output = self._model.generate(
                torch.tensor(tokens_BS, device=self._device),
                attention_mask=torch.tensor(mask_BS, device=self._device),
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=StoppingCriteriaList([RowLimits(limits, start), RowEnds(rows)]),
                streamer=RowStreamer(rows, self._take) if is_streamed else None,
            )
        for row, new in zip(rows, output[:, start:].tolist(), strict=True):
            for token in new:
                if row.finish_reason:
                    break
                self._take(row, token)

    def _note(self, rows: Sequence[Row[None]], scores: Tensor, token_B: Tensor) -> None:
        """Keep how likely each row's next token is, until the row takes it."""
        note_logprobs(rows, scores, token_B)
        if not self._scores:
            return
        most = [row.request.logprobs if row in self._scores and not row.finish_reason else None for row in rows]
        for row, score in zip(rows, scores_of(scores, token_B.tolist(), most), strict=True):
            if score is not None:
                self._scores[row].append(score)

    def _take(self, row: Row[None], token: int) -> None:
        waiting = self._scores.get(row)
        row.take(token, waiting.popleft() if waiting else None)

    def _config(self, rows: Sequence[Row[None]]) -> GenerationConfig:
        """Greedy, since RowSampler has drawn the token by the time `generate` picks it."""
        usual = self._model.generation_config
        begins = (
            "bos_token_id",
            "decoder_start_token_id",
            "forced_bos_token_id",
        )  # how an encoder-decoder's text begins
        kept = {name: getattr(usual, name, None) for name in begins if self._model.config.is_encoder_decoder}
        return GenerationConfig(
            **kept,
            max_new_tokens=max(row.request.sampling.max_new_tokens for row in rows),
            do_sample=False,
            eos_token_id=sorted(self._ends) or None,
            pad_token_id=self._tokenizer.pad_token_id,
        )


class RowTracer:
    """Passes to the rows what is chosen for their generated tokens, while `generate` runs.

    Args:
        model: the model, steered already if it is to be.
        rows: those of the batch; some ask for a trace.
    """

    def __init__(self, model: Any, rows: Sequence[Row[None]]) -> None:
        self._rows = rows
        with ExitStack() as undo:
            self._tracer = RoutingTracer(model)
            undo.callback(self._tracer.close)
            undo.callback(Tracker(model, self._before, self._after).close)
            self._undo = undo.pop_all()

    def close(self) -> None:
        self._undo.close()

    def _before(self, window: Window) -> None:
        self._tracer.is_on = window.stack == "decoder" and bool((window.generated_index() >= 0).any())

    def _after(self, window: Window) -> None:
        if not self._tracer.is_on:
            return
        self._tracer.is_on = False
        chosen, unsteered = self._tracer.take()
        if len(chosen) != window.rows * window.columns:
            raise TraceError(
                f"routers saw {len(chosen)} tokens where the batch has {window.rows * window.columns}: this model does "
                "not keep rows apart; trace texts one by one"
            )
        for number, row in enumerate(self._rows):
            for column, place in enumerate(window.generated_index().tolist()):
                if row.recorder is not None and place >= 0:
                    at = number * window.columns + column
                    own = row.place if len(row.new) - 1 == place else None  # without streaming, rows get tokens later
                    row.recorder.read(place, chosen[at], unsteered[at], row.plan, own)


class RowEnds(StoppingCriteria):
    """Ends each row that has ended already, as `Stop` can end one."""

    def __init__(self, rows: Sequence[Row[None]]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        ended = torch.tensor([bool(row.finish_reason) for row in self._rows])
        return ended.to(input_ids.device, non_blocking=True)


class RowStreamer(BaseStreamer):
    """Passes tokens to the rows of a batch while `generate` runs.

    Args:
        rows: in their order in the batch.
        take: called with a row that goes on, and its token.
    """

    def __init__(self, rows: Sequence[Row[None]], take: Callable[[Row[None], int], None]) -> None:
        self._rows, self._take = rows, take
        self._saw_prompt = False

    def put(self, value: Tensor) -> None:
        """Skip the prompts, which come first, then pass on the token of each row that goes on."""
        if self._saw_prompt:
            for row, token in zip(self._rows, value.flatten().tolist(), strict=True):
                if not row.finish_reason:
                    self._take(row, token)
        self._saw_prompt = True

    def end(self) -> None:
        """Nothing to do: the row knows when it ends."""
