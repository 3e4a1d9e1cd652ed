"""Many requests at once: a row that is finished makes room for the next request, while the others go on.

`RollingDecoder` does so for models whose cache is keys and values; `StaticDecoder` takes any model, a batch after the
other, each as long as its longest. Transformers' own continuous batching gives no seeds a request and packs all tokens
into one row, where steering can't tell prompts from texts; `docs/batch.md` says what else stood against it.

Shapes: B rows in flight, M prompts that are computed together, S columns of them, W columns of the cache, V tokens of
the vocabulary.
"""

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steermoe.engines.hf.cache import RowCache, empty_cache, rows_can_change
from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.hf.sampling import generators_of, next_tokens
from steermoe.engines.request import Completion, Request
from steermoe.engines.text import continuation
from steermoe.routing.tracker import Window
from steermoe.steering.handle import SteeringHandle, attach
from steermoe.steering.plans import SteeringPlan
from steermoe.steering.report import SteeringReport

PROMPT_TOKENS = 4096
"""Tokens of new prompts that one forward pass takes, padding included; a longer prompt goes alone."""


def decoder_for(engine: HFEngine) -> "RollingDecoder | StaticDecoder":
    """The best that the engine's model allows."""
    return RollingDecoder(engine) if rows_can_change(engine.loaded.model) else StaticDecoder(engine)


@dataclass(eq=False)
class _Row:
    """A request in flight.

    Attributes:
        new: its tokens so far; all but the last one are in the cache, behind the prompt's.
    """

    request: Request
    prompt: list[int]
    generator: torch.Generator
    started: float
    new: list[int] = field(default_factory=list)

    @property
    def cached(self) -> int:
        return len(self.prompt) + len(self.new) - 1

    def history(self) -> Tensor:
        return torch.tensor(self.prompt + self.new)


class RollingDecoder:
    """Continuous batching with one cache for all rows, on any device.

    Requests that begin together and share a prompt share its computation, unless steering changes the prompt.

    Args:
        engine: with the model; where it has compiled steps that serve the rows in flight, they are taken.
        on_token: called with every token as it is picked, for a single request.
    """

    def __init__(self, engine: HFEngine, on_token: Callable[[int], None] | None = None) -> None:
        self._engine = engine
        self._model: Any = engine.loaded.model
        self._ends = engine.end_tokens()
        self._end_tokens = torch.tensor(sorted(self._ends), dtype=torch.long)
        accepted = inspect.signature(self._model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._handle: SteeringHandle | None = None
        self._compiled = engine.compiled_steps()
        if self._compiled is not None:
            self._compiled.reset()
        self._on_token = on_token
        self.clear()

    def __len__(self) -> int:
        return len(self._rows) + len(self._finished)

    def clear(self) -> None:
        self._rows: list[_Row] = []
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
        if self._handle is not None:
            self._handle.remove()

    def start(self, requests: Sequence[Request], prompts: Sequence[list[int]]) -> None:
        now = time.perf_counter()
        generators = generators_of([request.sampling for request in requests])
        rows = [
            _Row(request, ids, generator, now)
            for request, ids, generator in zip(requests, prompts, generators, strict=True)
        ]
        groups: dict[Any, list[_Row]] = {}
        for row in rows:
            plan = row.request.plan
            groups.setdefault((tuple(row.prompt), plan if _steers_prompt(plan) else None), []).append(row)
        for chunk in _chunks(list(groups.values()), PROMPT_TOKENS):
            self._compute_prompts(chunk)

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        if self._rows:
            assert self._cache is not None
            self._take_tokens(self._rows, self._next_logits(self._cache))
            for number in reversed(range(len(self._rows))):
                if self._ended(self._rows[number]):
                    self._drop(number)
            self._cache.set_width(max((row.cached for row in self._rows), default=0))
        finished, self._finished = self._finished, []
        return finished

    def _next_logits(self, cache: RowCache) -> Tensor:
        """[B, V] after each row's last token, float32."""
        plans = [row.request.plan for row in self._rows]
        tokens_B1 = torch.tensor([row.new[-1:] for row in self._rows])
        cached_B = torch.tensor([row.cached for row in self._rows])
        index_B1 = torch.tensor([[len(row.new) - 1] for row in self._rows])
        if self._compiled is not None and self._compiled.serves(len(self._rows)):
            return self._compiled.forward(cache, tokens_B1, cached_B, plans, index_B1[:, 0])
        width = int(cached_B.max())
        mask_BW = torch.arange(width + 1) >= (width - cached_B)[:, None]
        if self._rows_changed:
            self._steer(plans)
        self._rows_changed = False
        window = Window(len(self._rows), 1, 0, 0, index=index_B1)
        return self._forward(tokens_B1, mask_BW, cached_B[:, None], cache, window)

    # ---- prompts ----

    @torch.inference_mode()
    def _compute_prompts(self, groups: list[list[_Row]]) -> None:
        """Compute the prompt of each group once, and pick all its rows' first tokens."""
        prompts = [group[0].prompt for group in groups]
        lengths = torch.tensor([len(ids) for ids in prompts])
        width, pad = int(lengths.max()), self._engine.loaded.tokenizer.pad_token_id
        tokens_MS = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts])
        mask_MS = torch.arange(width) >= (width - lengths)[:, None]
        positions_MS = (mask_MS.long().cumsum(-1) - 1).clamp(min=0)
        plans = [group[0].request.plan for group in groups]
        self._steer([plan if _steers_prompt(plan) else None for plan in plans])
        self._rows_changed = True
        computed = empty_cache(self._model, forgets=self._compiled is None)
        window = Window(len(groups), width, 0, width, mask_MS)
        logits_MV = self._forward(tokens_MS, mask_MS, positions_MS, computed, window)
        if self._compiled is not None and self._handle is None:
            self._compiled.saw(int(mask_MS.sum()))
        rows = [row for group in groups for row in group]
        source = [number for number, group in enumerate(groups) for _ in group]
        self._take_tokens(rows, logits_MV[torch.tensor(source, device=logits_MV.device)])
        staying = [(row, number) for row, number in zip(rows, source, strict=True) if not self._ended(row)]
        if staying:
            if self._cache is None:
                self._cache = RowCache(computed)
            widest = max(row.cached for row in [*self._rows, *(row for row, _ in staying)])
            self._cache.place(len(self._rows), [number for _, number in staying], computed, widest)
            self._rows += [row for row, _ in staying]

    # ---- all rows ----

    def _forward(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Any, window: Window) -> Tensor:
        """Logits of the last column, float32."""
        device = self._model.device
        if self._handle is not None:
            self._handle.expect(window)
        output = self._model(
            input_ids=tokens.to(device),
            attention_mask=mask.long().to(device),
            position_ids=positions.to(device),
            past_key_values=cache,
            use_cache=True,
            **self._last_only,
        )
        if self._handle is not None:
            self._handle.verify()
        return output.logits[:, -1].float()

    def _take_tokens(self, rows: Sequence[_Row], logits_BV: Tensor) -> None:
        samplings = [row.request.sampling for row in rows]
        new = [len(row.new) for row in rows]
        generators = [row.generator for row in rows]
        token_B = next_tokens(
            logits_BV, samplings, new, self._end_tokens, lambda number: rows[number].history(), generators
        )
        for row, token in zip(rows, token_B.tolist(), strict=True):
            row.new.append(token)
            if self._on_token is not None:
                self._on_token(token)

    def _ended(self, row: _Row) -> bool:
        """Whether the row's last token was its last; then its completion is ready."""
        is_stop = row.new[-1] in self._ends
        if not is_stop and len(row.new) < row.request.sampling.max_new_tokens:
            return False
        kept = row.new[:-1] if is_stop else row.new
        self._finished.append(
            Completion(
                request=row.request,
                text=continuation(self._engine.loaded.tokenizer, row.prompt, kept),
                token_ids=tuple(kept),
                prompt_tokens=len(row.prompt),
                finish_reason="stop" if is_stop else "length",
                seconds=time.perf_counter() - row.started,
            )
        )
        return True

    def _drop(self, number: int) -> None:
        assert self._cache is not None
        self._cache.drop(number)
        last = self._rows.pop()
        if number < len(self._rows):
            self._rows[number] = last
        self._rows_changed = True

    def _steer(self, plans: list[SteeringPlan | None]) -> None:
        if self._handle is not None:
            self._handle.set(rows=plans)
        elif any(plans):
            self._handle = attach(self._model, rows=plans)


class StaticDecoder:
    """One batch after the other through `HFEngine.generate`, for models whose rows can't begin at different times."""

    def __init__(self, engine: HFEngine) -> None:
        self._engine = engine
        self._waiting: list[Request] = []
        self._reports: list[SteeringReport] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def start(self, requests: Sequence[Request], prompts: Sequence[list[int]]) -> None:
        self._waiting += requests

    def step(self) -> list[Completion]:
        done = self._engine.generate(self._waiting)
        self._waiting = []
        if done and done[0].report is not None:
            self._reports = [sum(self._reports, done[0].report)]
        return done

    def clear(self) -> None:
        self._waiting = []

    def report(self) -> SteeringReport | None:
        return self._reports[0] if self._reports else None

    def close(self) -> None:
        self.clear()


def _steers_prompt(plan: SteeringPlan | None) -> bool:
    return plan is not None and plan.positions != "generated"


def _chunks(groups: list[list[_Row]], most: int) -> Iterator[list[list[_Row]]]:
    """Groups in their order, as many as a forward pass takes."""
    chunk: list[list[_Row]] = []
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
