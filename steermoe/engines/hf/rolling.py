"""Many requests at once: a row that is finished makes room for the next request, while the others continue.

For models whose cache is keys and values; `static` takes any model. Transformers' own continuous batching has no seeds
per request and packs all tokens into one row, where steering can't distinguish prompts from texts; `docs/batch.md`
gives the other reasons against it.

Shapes: B rows in flight, M prompts that are computed together, S columns of them, W columns of the cache, V tokens of
the vocabulary.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steermoe.engines.decoding import Row, by_prompt, finish, scores_of, steers_prompt
from steermoe.engines.engine import OnToken
from steermoe.engines.hf.cache import RowCache, empty_cache
from steermoe.engines.hf.sampling import generators_of, next_tokens, note_logprobs
from steermoe.engines.request import Completion, Request
from steermoe.errors import TraceError
from steermoe.models.loading import LoadedModel
from steermoe.routing.tracker import Window
from steermoe.steering.handle import SteeringHandle
from steermoe.steering.plans import SteeringPlan
from steermoe.steering.report import SteeringReport
from steermoe.steering.tags import ModelTags
from steermoe.steering.tracing import Choices, RoutingTracer

if TYPE_CHECKING:
    from steermoe.engines.hf.compiled.steps import CompiledSteps

logger = logging.getLogger(__name__)

PROMPT_TOKENS = 4096
"""Tokens of new prompts per forward pass, padding included; a longer prompt gets a pass of its own."""

HFRow = Row[torch.Generator]


class RollingDecoder:
    """Continuous batching with one cache for all rows, on any device.

    Requests that start together with the same prompt share its computation, unless they steer it differently.

    Args:
        loaded: the model, whose rows can change (see `cache.rows_can_change`), and its tokenizer.
        ends: tokens that end a text.
        compiled: the model's compiled steps, used when they serve the number of rows in flight.
        tags: the model's; by default those of its tokenizer.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        ends: set[int],
        compiled: "CompiledSteps | None" = None,
        tags: ModelTags | None = None,
    ) -> None:
        self._loaded = loaded
        self._model: Any = loaded.model
        self._tracer: RoutingTracer | None = None
        self._device = loaded.device
        self._tokenizer = loaded.tokenizer
        self._ends = ends
        self._tags = tags or ModelTags.of_tokenizer(loaded.tokenizer, ends)
        self._end_tokens = torch.tensor(sorted(ends), dtype=torch.long)
        accepted = inspect.signature(self._model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._handle: SteeringHandle | None = None
        self._compiled = compiled
        if compiled is not None:
            compiled.reset()
        self.clear()

    def __len__(self) -> int:
        return len(self._rows) + len(self._finished)

    def clear(self) -> None:
        self._rows: list[HFRow] = []
        self._finished: list[Completion] = []
        self._cache: RowCache | None = None
        self._rows_changed = True

    def report(self) -> SteeringReport | None:
        reports = [] if self._handle is None else [self._handle.report()]
        if self._compiled is not None and self._compiled.report().tokens_steered:
            reports.append(self._compiled.report())
        return sum(reports, SteeringReport()) if reports else None

    def close(self) -> None:
        self.clear()
        self._close_tracer()
        if self._handle is not None:
            self._handle.remove()

    def start(
        self,
        requests: Sequence[Request],
        prompts: Sequence[list[int]],
        on_text: Callable[[str], None] | None = None,
        on_token: OnToken | None = None,
    ) -> None:
        generators = generators_of([request.sampling for request in requests])
        rows = [
            HFRow(
                request,
                prompt,
                self._tokenizer,
                self._ends,
                generator,
                on_text,
                tags=self._tags.of(request.plan),
                on_token=on_token,
                shape=self._loaded.shape if request.trace else None,
            )
            for request, prompt, generator in zip(requests, prompts, generators, strict=True)
        ]
        for chunk in _chunks(by_prompt(rows), PROMPT_TOKENS):
            self._compute_prompts(chunk)

    def drop(self, request: Request) -> None:
        for row in self._rows:
            if row.request is request:
                row.end("interrupted")

    def steer(self, request: Request, plan: SteeringPlan | None) -> None:
        for row in self._rows:
            if row.request is request:
                row.steer(plan, self._tags.of(plan))
                self._rows_changed = True

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        self._drop_ended()
        if self._rows:
            assert self._cache is not None
            self._take_tokens(self._rows, self._next_logits(self._cache))
            self._drop_ended()
        finished, self._finished = self._finished, []
        return finished

    def _next_logits(self, cache: RowCache) -> Tensor:
        """[B, V] after each row's last token, float32."""
        plans = [row.plan for row in self._rows]
        tokens_B1 = torch.tensor([row.new[-1:] for row in self._rows])
        cached_B = torch.tensor([row.cached for row in self._rows])
        index_B1 = torch.tensor([[row.place] for row in self._rows])
        is_traced = any(row.recorder is not None for row in self._rows)
        if (steps := self._steps_for(plans, is_traced)) is not None:
            logits_BV = steps.forward(cache, tokens_B1, cached_B, plans, index_B1[:, 0])
            if is_traced:
                self._note_choices(*steps.choices())
            return logits_BV
        width = int(cached_B.max())
        mask_BW = torch.arange(width + 1) >= (width - cached_B)[:, None]
        if self._rows_changed:
            self._steer(plans)
        self._rows_changed = False
        window = Window(len(self._rows), 1, 0, 0, index=index_B1)
        if not is_traced:
            return self._forward(tokens_B1, mask_BW, cached_B[:, None], cache, window)
        with self._tracing() as tracer:
            logits_BV = self._forward(tokens_B1, mask_BW, cached_B[:, None], cache, window)
        self._note_choices(*tracer.take())
        return logits_BV

    # ---- traces ----

    @contextmanager
    def _tracing(self) -> Iterator[RoutingTracer]:
        """Have the forward call inside looked at; the tracer stays attached for the next ones."""
        if self._tracer is None:
            self._tracer = RoutingTracer(self._model)
        self._tracer.is_on = True
        try:
            yield self._tracer
        finally:
            self._tracer.is_on = False

    def _close_tracer(self) -> None:
        if self._tracer is not None:
            self._tracer.close()
        self._tracer = None

    def _steps_for(self, plans: Sequence[SteeringPlan | None], is_traced: bool) -> "CompiledSteps | None":
        """The compiled steps, if there are any for all that the rows ask for."""
        steps, rows = self._compiled, len(self._rows)
        if steps is None or not steps.serves(rows):
            return None
        if any(plan is not None and plan.active_experts is not None for plan in plans):
            _tell_uncompiled("another number of active experts", "they have the model's own number in them")
            return None
        if is_traced and not steps.show_choices(rows):
            _tell_uncompiled("a trace", "this model's show no router's own choice")
            return None
        return steps

    def _note_choices(self, chosen: Choices, unsteered: Choices) -> None:
        """Pass on what was chosen for each row's last token."""
        if len(chosen) != len(self._rows):
            raise TraceError(
                f"routers saw {len(chosen)} tokens where the batch has {len(self._rows)}: this model does not keep "
                "rows apart; trace texts one by one"
            )
        for number, row in enumerate(self._rows):
            if row.recorder is not None:
                row.recorder.read(len(row.new) - 1, chosen[number], unsteered[number], row.plan, row.place)

    # ---- prompts ----

    @torch.inference_mode()
    def _compute_prompts(self, groups: list[list[HFRow]]) -> None:
        """Compute the prompt of each group once, and pick the first tokens of all its rows."""
        logits_MV, computed = self._read_prompts([group[0] for group in groups])
        rows = [row for group in groups for row in group]
        source = [number for number, group in enumerate(groups) for _ in group]
        self._take_tokens(rows, logits_MV[torch.tensor(source).to(logits_MV.device, non_blocking=True)])
        self._finished += [finish(row) for row in rows if row.finish_reason]
        self._admit(
            [(row, number) for row, number in zip(rows, source, strict=True) if not row.finish_reason], computed
        )

    def _read_prompts(self, rows: list[HFRow]) -> tuple[Tensor, Any]:
        """Logits [M, V] after the prompt of each row, float32, and the cache that holds the prompts."""
        prompts = [row.prompt for row in rows]
        lengths = torch.tensor([len(ids) for ids in prompts])
        width, pad = int(lengths.max()), self._tokenizer.pad_token_id
        tokens_MS = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts])
        mask_MS = torch.arange(width) >= (width - lengths)[:, None]
        positions_MS = (mask_MS.long().cumsum(-1) - 1).clamp(min=0)
        self._steer([row.plan if steers_prompt(row.plan) else None for row in rows])
        self._rows_changed = True
        computed = empty_cache(self._model, forgets=self._compiled is None)
        window = Window(len(rows), width, 0, width, mask_MS)
        logits_MV = self._forward(tokens_MS, mask_MS, positions_MS, computed, window)
        if self._compiled is not None and self._handle is None:
            self._compiled.saw(int(mask_MS.sum()))
        return logits_MV, computed

    def _admit(self, staying: list[tuple[HFRow, int]], computed: Any) -> None:
        """Add rows to the batch, each with its place in the cache that holds their prompts."""
        if not staying:
            return
        if self._cache is None:
            self._cache = RowCache(computed)
        rows = [row for row, _ in staying]
        widest = max(row.cached for row in [*self._rows, *rows])
        self._cache.place(len(self._rows), [number for _, number in staying], computed, widest)
        self._rows += rows

    # ---- all rows ----

    def _forward(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Any, window: Window) -> Tensor:
        """Logits of the last column, float32."""
        device = self._device
        if self._handle is not None:
            self._handle.expect(window)
        output = self._model(
            input_ids=tokens.to(device, non_blocking=True),
            attention_mask=mask.long().to(device, non_blocking=True),
            position_ids=positions.to(device, non_blocking=True),
            past_key_values=cache,
            use_cache=True,
            **self._last_only,
        )
        if self._handle is not None:
            self._handle.verify()
        return output.logits[:, -1].float()

    def _take_tokens(self, rows: Sequence[HFRow], logits_BV: Tensor) -> None:
        samplings = [row.request.sampling for row in rows]
        new = [len(row.new) for row in rows]
        generators = [row.sampler for row in rows]

        def history(number: int) -> Tensor:
            return torch.tensor(rows[number].prompt + rows[number].new)

        token_B = next_tokens(logits_BV, samplings, new, self._end_tokens, history, generators)
        note_logprobs(rows, logits_BV, token_B)
        tokens = token_B.tolist()
        scores = scores_of(logits_BV, tokens, [row.request.logprobs for row in rows])
        for row, token, score in zip(rows, tokens, scores, strict=True):
            row.take(token, score)

    def _drop(self, number: int) -> None:
        assert self._cache is not None
        self._finished.append(finish(self._rows[number]))
        self._cache.drop(number)
        last = self._rows.pop()
        if number < len(self._rows):
            self._rows[number] = last
        self._rows_changed = True

    def _drop_ended(self) -> None:
        """Take the rows that have ended out of the cache, and give up the columns that only they had."""
        ended = [number for number, row in enumerate(self._rows) if row.finish_reason]
        for number in reversed(ended):
            self._drop(number)
        if self._cache is not None:
            self._cache.set_width(max((row.cached for row in self._rows), default=0))

    def _steer(self, plans: list[SteeringPlan | None]) -> None:
        if self._handle is not None:
            self._handle.set(rows=plans)
        elif any(plans):
            self._close_tracer()  # it must be outside of the steering
            self._handle = SteeringHandle(self._model, plans, self._tags)


@functools.cache
def _tell_uncompiled(texts: str, why: str) -> None:
    """Say once what costs the compiled steps."""
    logger.warning("texts with %s are generated without compiled steps: %s", texts, why)


def _chunks(groups: list[list[HFRow]], most: int) -> Iterator[list[list[HFRow]]]:
    """Groups in their order, as many at a time as a forward pass takes."""
    chunk: list[list[HFRow]] = []
    width = 0
    for group in groups:
        wider = max(width, len(group[0].prompt))
        if chunk and wider * (len(chunk) + 1) > most:
            yield chunk
            chunk, wider = [], len(group[0].prompt)
        chunk.append(group)
        width = wider
    if chunk:
        yield chunk
