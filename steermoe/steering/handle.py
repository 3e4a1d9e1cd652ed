"""Attach steering to a model: the handle that swaps, reports and removes plans, one for all rows or one per row.

Shapes: B rows and S columns of a forward call, T = B*S tokens as routers see them.
"""

import functools
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from steermoe.errors import SteeringError
from steermoe.routing.counts import clear_note, set_counts
from steermoe.routing.intercept import intercept
from steermoe.routing.routers import chosen_experts, find_routers, language_model, shape_of
from steermoe.routing.selection import keep_lists
from steermoe.routing.tracker import Tracker, Window, turn_of
from steermoe.routing.wrapping import wrap_method
from steermoe.steering.banks import Bank, banks_for
from steermoe.steering.editing import RowLayout, Step, Tally, each_listed, listed_counts
from steermoe.steering.histories import Histories
from steermoe.steering.mapping import UNSTEERED, PlanMapping
from steermoe.steering.plans import (
    DEFAULT_FORMULA,
    DEFAULT_SCALE,
    DEFAULT_STRENGTH,
    LayerExpert,
    Schedule,
    SteeringPlan,
    plan_for,
)
from steermoe.steering.refusals import PACKED, OnceEditor, refuse_checkpointing, refuse_packing
from steermoe.steering.report import SteeringReport
from steermoe.steering.tags import ModelTags
from steermoe.vectors.vector import SteeringVector

__all__ = [
    "DEFAULT_FORMULA",
    "DEFAULT_SCALE",
    "DEFAULT_STRENGTH",
    "LayerExpert",
    "Schedule",
    "SteeringHandle",
    "SteeringPlan",
    "SteeringReport",
    "attach",
    "plan_for",
    "steer",
]

_STEERED: "weakref.WeakKeyDictionary[nn.Module, SteeringHandle]" = weakref.WeakKeyDictionary()
"""Attached handles, by the first router of their model, which no wrapper around the model hides."""


class _Steering(NamedTuple):
    """What plans come to; a forward call uses one from its beginning to its end.

    Attributes:
        plans: one for all rows, or one per row.
        numbers: each one's number in the mapping.
        banks: one per router.
    """

    plans: tuple[SteeringPlan | None, ...]
    mapping: PlanMapping
    numbers: list[int]
    banks: list[Bank]


class SteeringHandle:
    """Steering that is attached to a model. `set` changes it between tokens, `remove` takes it off.

    Create it with `attach`. Threads that share a model take turns: one call of `generate` at a time. A copied
    model (`copy.deepcopy`, `torch.save`, a spawned process) is not steered.
    """

    def __init__(self, model: nn.Module, plans: Sequence[SteeringPlan | None], tags: ModelTags | None = None) -> None:
        self._tags = tags or ModelTags()
        self._histories = Histories(self._tags)
        self._model = language_model(model)
        self._routers = find_routers(self._model)
        self._shape = shape_of(self._model, self._routers, sizes_only=True)
        first = self._routers[0].module
        if first in _STEERED:
            raise SteeringError(
                "this model is steered already: change that with handle.set(...), steer toward several domains with "
                "mix(...), or take it off first with handle.remove(), or steermoe.detach(model) if the handle is lost"
            )
        self._tally = Tally()
        self._editors = [
            OnceEditor(router.name, router.shape, self._tally, functools.partial(chosen_experts, router))
            for router in self._routers
        ]
        self._tokens_seen: int | Tensor = 0
        self._tokens_steered: int | Tensor = 0
        self._was_wanted = False
        self._calls_before: list[int] = []
        self._bypassed: dict[str, int] = {}
        self._layout: tuple[Any, RowLayout] | None = None
        self._steady: dict[int, Step | None] = {}
        self._setting = threading.Lock()
        self._used = self._wanted = self._steering(plans, None)
        self._use(self._wanted)
        with ExitStack() as undo:
            self._tracker = Tracker(self._model, self._before_forward, self._after_forward)
            undo.callback(self._tracker.close)
            for name in PACKED:
                if hasattr(self._model, name):
                    undo.callback(wrap_method(self._model, name, refuse_packing(lambda: self.plans)))
            for router, editor in zip(self._routers, self._editors, strict=True):
                # lists are kept in each run of a router's code, of which another number of experts may need several
                undo.callback(keep_lists(self._model, router, editor))
                undo.callback(set_counts(self._model, router, editor))
                undo.callback(intercept(self._model, router, editor))
            _STEERED[first] = self
            undo.callback(_STEERED.pop, first, None)
            self._undo = undo.pop_all()

    # ---- the user's side ----

    @property
    def plans(self) -> tuple[SteeringPlan | None, ...]:
        """One plan for all rows, or one per row; None leaves a row alone."""
        return self._wanted.plans

    def set(
        self,
        plan: SteeringPlan | None = None,
        *,
        rows: Sequence[SteeringPlan | None] | None = None,
        prompt_length: int | None = None,
        **changes: Any,
    ) -> None:
        """Change the steering from the next forward call on, without attaching again; from any thread.

        Args:
            plan: a new plan for all rows.
            rows: new plans, one per row; `[None]` pauses steering.
            prompt_length: columns that count as the prompt when the model is called directly, not by `generate`; the
                same for all rows, padding included.
            changes: fields of the plans to replace, such as `strength=2.0`.

        Raises:
            SteeringError: an invalid plan; the steering stays as it was.
        """
        if plan is not None and rows is not None:
            raise SteeringError("pass either one plan or plans for the rows, not both")
        if prompt_length is not None and (type(prompt_length) is not int or prompt_length < 0):
            raise SteeringError(
                f"prompt_length is {prompt_length!r:.60}, expected one whole number, 0 or more: the columns of the "
                "padded prompt, the same for all rows"
            )
        if unknown := sorted(changes.keys() - SteeringPlan.__dataclass_fields__.keys()):
            known = ", ".join(SteeringPlan.__dataclass_fields__)
            raise SteeringError(f"a plan has no {', '.join(unknown)}: it has {known}")
        with self._setting:
            plans = _checked(rows if rows is not None else [plan] if plan is not None else self._wanted.plans)
            if changes:
                plans = tuple(current and replace(current, **changes) for current in plans)
            if changes or plan is not None or rows is not None:
                self._wanted = self._steering(plans, self._wanted)
        if prompt_length is not None:
            self._tracker.prompt_length = prompt_length

    def expect(self, window: Window | None) -> None:
        """Say which tokens the next forward calls hold, for a caller whose rows begin at different times.

        Args:
            window: with an `index` per row; None to infer it again, as at first.
        """
        self._tracker.known_window = window

    def remove(self) -> None:
        """Take the steering off and leave the model as it was. Does nothing the second time.

        Waits while another thread generates.
        """
        with turn_of(self._model):
            self._undo.close()

    def report(self) -> SteeringReport:
        """What has been steered since `attach`; while another thread runs the model, up to its last forward call."""
        turn = turn_of(self._model)
        if turn.acquire(blocking=False):
            try:
                self._tally.count()
            finally:
                turn.release()
        return SteeringReport(
            router_calls=sum(editor.calls for editor in self._editors),
            tokens_seen=int(self._tokens_seen),
            tokens_steered=int(self._tokens_steered),
            hits=self._tally.hits,
            slots=self._tally.slots,
            **listed_counts(editor.listed for editor in self._editors),
        )

    def verify(self) -> None:
        """Make sure that what was asked for happened.

        Raises:
            SteeringError: in some forward call, a router that should have been steered was bypassed, did not choose a
                forced expert, or chose a banned one.
        """
        self._tally.settle()
        for editor, counts in zip(self._editors, each_listed(one.listed for one in self._editors), strict=True):
            if counts:
                editor.check_lists(counts)
        if self._bypassed:
            name, times = next(iter(self._bypassed.items()))
            raise SteeringError(
                f"{len(self._bypassed)} of {len(self._editors)} routers were to be steered but were bypassed (such as "
                f"'{name}', in {times} forward calls): a fused kernel or another library's wrapper replaced their "
                "forward; load the model without it, or attach the steering after it"
            )

    def require_steered_tokens(self) -> None:
        """As `verify`, and also raise if there was no token to steer."""
        self.verify()
        if self._was_wanted or not self._does_something:
            return
        seen = int(self._tokens_seen)
        if not seen:
            raise SteeringError(
                "steering was asked for, but the model was not called: call the model itself, or its generate, "
                "inside the block"
            )
        positions = sorted({plan.positions for plan in self.plans if plan})
        raise SteeringError(
            f"steering was asked for, but none of the {seen} tokens that the model saw was to be steered "
            f"(positions {', '.join(positions)}): generate some, or steer with positions='all'"
        )

    def __reduce__(self) -> NoReturn:
        raise SteeringError(
            "a handle belongs to its model and can't be copied or saved: copy the model, and attach its plans to that"
        )

    @property
    def editors(self) -> Sequence[OnceEditor]:
        """What edits each router's logits, [L]."""
        return self._editors

    # ---- plans ----

    @property
    def _does_something(self) -> bool:
        return any(plan and plan.does_something for plan in self.plans)

    def _steering(self, plans: Sequence[SteeringPlan | None], last: _Steering | None) -> _Steering:
        """What these plans come to, for a later forward call; reuses what the last one made for the same plans.

        Raises:
            SteeringError: no plans, or some that don't fit.
        """
        plans = _checked(plans)
        for plan in plans:
            self._tags.of(plan)
        if last is not None and last.mapping.plans and last.mapping.knows(plans):
            mapping, banks = last.mapping, last.banks
        else:
            mapping = PlanMapping(plans)
            banks = banks_for(self._shape, mapping.plans)
        return _Steering(plans, mapping, mapping.numbers(plans), banks)

    def _use(self, steering: _Steering) -> None:
        self._used = steering
        self._layout, self._steady = None, {}
        for editor, bank in zip(self._editors, steering.banks, strict=True):
            editor.bank = bank

    # ---- what the tracker calls ----

    def _before_forward(self, window: Window) -> None:
        wanted = self._wanted
        if wanted is not self._used:
            self._use(wanted)
        self._tokens_seen = self._tokens_seen + window.tokens
        step, trains = self._step(window), torch.is_grad_enabled()
        if step is not None:
            if trains:
                refuse_checkpointing(self._model)
            self._tokens_steered = self._tokens_steered + step.tokens
            self._was_wanted = True
        idle = 0
        for router, editor in zip(self._routers, self._editors, strict=True):
            if router.stack == window.stack:
                editor.step = None if editor.bank.is_idle else step
                editor.trains = trains
                idle += router.top_k if editor.bank.is_idle else 0
        if step is not None and idle:
            self._tally.pass_over(step.tokens * idle)
        self._calls_before = [editor.calls for editor in self._editors]

    def _after_forward(self, window: Window) -> None:
        self._tally.settle()
        for router, editor, before in zip(self._routers, self._editors, self._calls_before, strict=True):
            if router.stack == window.stack:
                if editor.step is not None and editor.calls == before:
                    self._bypassed[router.name] = self._bypassed.get(router.name, 0) + 1
                editor.step = None
                if editor.bank.has_active:
                    clear_note(router.module)

    def _step(self, window: Window) -> Step | None:
        """The step for these tokens, or None if none of them is steered; the last one where nothing can have changed.

        So it is from one generated token to the next, unless strengths change over tokens, or tags decide.
        """
        if not (window.is_generated and self._is_constant()):
            return self._new_step(window)
        if window.rows not in self._steady:
            self._steady[window.rows] = self._new_step(window)
        return self._steady[window.rows]

    def _is_constant(self) -> bool:
        """Whether plans steer all generated tokens alike."""
        plans = self._used.mapping.plans
        return all(plan.schedule.kind == "constant" and self._tags.of(plan) is None for plan in plans)

    def _new_step(self, window: Window) -> Step | None:
        numbers = self._numbers_over(window.rows)
        if max(numbers, default=UNSTEERED) == UNSTEERED:
            return None
        mapping = self._used.mapping
        plans = [None if number == UNSTEERED else mapping.plans[number] for number in numbers]
        factor_BS = mapping.factors(numbers, self._histories.index(window, plans))
        if not bool(factor_BS.any()):
            return None
        counted_T = None if window.counted is None else window.counted.flatten()
        if len(mapping.plans) == 1 and UNSTEERED not in numbers and bool((factor_BS == factor_BS[0, 0]).all()):
            return Step(window.tokens, counted_T, plan=mapping.plans[0], factor=float(factor_BS[0, 0]))
        steered_T = (factor_BS != 0).flatten()
        if counted_T is not None:
            counted_T = counted_T & steered_T.to(counted_T.device, non_blocking=True)
            tokens: int | Tensor = counted_T.sum()
        else:
            counted_T, tokens = steered_T, int(steered_T.sum())
        return Step(tokens, counted_T, layout=self._layout_for(numbers, factor_BS))

    def _numbers_over(self, rows: int) -> list[int]:
        """The number of each row's plan."""
        own = self._used.numbers
        if len(own) == 1:
            return own * rows
        repeats, rest = divmod(rows, len(own))
        if rest:
            raise SteeringError(
                f"{len(own)} row plans can't be laid over {rows} rows: give one plan per row, or one for all"
            )
        # beams and return sequences repeat each row
        return [number for number in own for _ in range(repeats)]

    def _layout_for(self, numbers: list[int], factor_BS: Tensor) -> RowLayout:
        """The layout; the last one if nothing changed, as between tokens while strengths are constant."""
        key = (numbers, factor_BS.tolist()) if factor_BS.shape[1] == 1 else None
        if key is None:
            return RowLayout.of(self._used.mapping.plans, numbers, factor_BS)
        if self._layout is None or self._layout[0] != key:
            self._layout = key, RowLayout.of(self._used.mapping.plans, numbers, factor_BS)
        return self._layout[1]


def _checked(plans: Sequence[SteeringPlan | None]) -> tuple[SteeringPlan | None, ...]:
    if not plans:
        raise SteeringError("no plans given: pass a plan, or one per row (None for rows to leave alone)")
    for plan in plans:
        if plan is not None and not isinstance(plan, SteeringPlan):
            raise SteeringError(f"{plan!r:.60} is no plan: make one with plan_for(vector)")
    return tuple(plans)


def handles_of(modules: Iterable[nn.Module]) -> list[SteeringHandle]:
    """The handles that are attached to the models whose modules these are."""
    return [_STEERED[module] for module in modules if module in _STEERED]


def attach(
    model: nn.Module,
    plan: SteeringPlan | None = None,
    *,
    rows: Sequence[SteeringPlan | None] | None = None,
    tokenizer: Any = None,
) -> SteeringHandle:
    """Steer a model until the handle's `remove`.

    A model is steered by one handle at a time: two would act on each other's logits, and one that was forgotten, as
    happens in notebooks, would go unnoticed. `handle.set` changes a steering, `mix` steers toward several domains.

    Args:
        model: any transformers model with routers, or remote code that is built like one.
        plan: one plan for all rows of every batch.
        rows: instead, one plan per row; None leaves the row exactly as it would be without steering.
        tokenizer: the model's, which knows its tags: positions thinking, answer and tool-calls need it, and with it the
            other positions leave tool calls alone.

    Returns:
        the handle. If attaching fails, nothing is left behind.

    Raises:
        UnsupportedModel: no router to steer. CompatibilityError: a vector of another model.
        SteeringError: an invalid plan, or a model that is already steered.
    """
    if (plan is None) == (rows is None):
        raise SteeringError("pass either one plan or plans for the rows, not both and not neither")
    tags = None if tokenizer is None else ModelTags.of_tokenizer(tokenizer, _ends_of(model))
    return SteeringHandle(model, [plan] if rows is None else list(rows), tags)


def _ends_of(model: nn.Module) -> list[int]:
    """The tokens at which the model's generation configuration ends a text."""
    ends: Any = getattr(getattr(language_model(model), "generation_config", None), "eos_token_id", None)
    return list(ends) if isinstance(ends, list | tuple) else [] if ends is None else [ends]


@contextmanager
def steer(
    model: nn.Module,
    vector: SteeringVector | None = None,
    strength: float | None = None,
    *,
    rows: Sequence[SteeringPlan | None] | None = None,
    tokenizer: Any = None,
    **plan: Any,
) -> Iterator[SteeringHandle]:
    """Steer a model inside a `with` block.

    Args:
        model: as in `attach`.
        vector: the domain's vector.
        strength: c; by default the strength that the vector was calibrated with.
        rows: instead of a vector for all, one plan per row.
        tokenizer: as in `attach`.
        plan: further fields of `SteeringPlan`.

    Raises:
        SteeringError: as `attach`; at the end of the block, if steering was asked for but no token was steered.
    """
    if rows is not None and (vector is not None or strength is not None or plan):
        raise SteeringError("pass either a vector with its settings or plans for the rows, not both")
    one = plan_for(vector, strength, **plan) if rows is None else None
    handle = attach(model, one, rows=rows, tokenizer=tokenizer)
    with ExitStack() as undo:
        undo.callback(handle.remove)
        yield handle
        handle.require_steered_tokens()
