"""Attach steering to a model: plans, one for all rows of a batch or one a row, and the handle that swaps, reports and removes them.

Shapes: B rows and S columns of a forward call, T = B*S tokens as routers see them, P distinct plans, N experts of a layer.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from steermoe import formulas
from steermoe.errors import SteeringError
from steermoe.formulas import FORMULAS, SCALES, Formula, Scale
from steermoe.routers import Router, chosen_experts, find_routers, intercept
from steermoe.tracking import POSITIONS, Positions, Tracker, Window
from steermoe.vectors import SteeringVector

DEFAULT_FORMULA: Formula = "zero_max_scaled"
DEFAULT_SCALE: Scale = "magnitude"
DEFAULT_STRENGTH = 4.0

LayerExpert = tuple[int, int]
"""(decoder layer, expert)."""


@dataclass(frozen=True)
class Schedule:
    """How strength changes over the generated tokens; prompt tokens, where they are steered, take the full strength.

    `constant`; `decay:N` falls linearly to 0 over N tokens, as in the authors' notebook; `window:A-B` steers tokens A to B-1 only.
    """

    kind: str = "constant"
    start: int = 0
    stop: int = 0

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        if text == "constant":
            return cls()
        if (match := re.fullmatch(r"decay:(\d+)", text)) and int(match[1]) > 0:
            return cls("decay", 0, int(match[1]))
        if (match := re.fullmatch(r"window:(\d+)-(\d+)", text)) and int(match[1]) < int(match[2]):
            return cls("window", int(match[1]), int(match[2]))
        raise SteeringError(
            f"schedule '{text}' is unknown: use constant, decay:N (N over 0) or window:A-B (A below B), counted in tokens"
        )

    def factor(self, index: Tensor) -> Tensor:
        """What to multiply the strength with, for generated token number `index` (negative in the prompt)."""
        if self.kind == "constant":
            return torch.ones(index.shape)
        if self.kind == "decay":
            return (1 - index.clamp(min=0) / self.stop).clamp(min=0)
        return ((index < 0) | ((index >= self.start) & (index < self.stop))).float()

    def __str__(self) -> str:
        return {
            "constant": "constant",
            "decay": f"decay:{self.stop}",
            "window": f"window:{self.start}-{self.stop}",
        }[self.kind]


@dataclass(frozen=True)
class SteeringPlan:
    """Everything that decides how tokens are steered.

    Attributes:
        vector: the expert vector to steer with; None if only `force` and `ban` are wanted.
        strength: c of the formulas; negative steers away from the domain.
        formula: `additive` (3), `max_scaled` (4) or `zero_max_scaled` (5).
        scale: see `formulas.Scale`.
        positions: `generated` tokens (the default), `prompt` or `all`.
        schedule: a Schedule or its text.
        layers: decoder layers (first, last), both included, to restrict steering to; None for all.
        force, ban: experts that every steered token must, or must not, be sent to, each as (decoder layer, expert).

    Raises:
        SteeringError: an unknown name, a strength that is not a finite number, or nothing to do.
    """

    vector: SteeringVector | None = None
    strength: float = DEFAULT_STRENGTH
    formula: Formula = DEFAULT_FORMULA
    scale: Scale = DEFAULT_SCALE
    positions: Positions = "generated"
    schedule: Schedule = field(default_factory=Schedule)
    layers: tuple[int, int] | None = None
    force: tuple[LayerExpert, ...] = ()
    ban: tuple[LayerExpert, ...] = ()

    def __post_init__(self) -> None:
        for name, known in (("formula", FORMULAS), ("scale", SCALES), ("positions", POSITIONS)):
            if getattr(self, name) not in known:
                raise SteeringError(f"{name} '{getattr(self, name)}' is unknown: use {', '.join(known)}")
        if isinstance(self.schedule, str):
            object.__setattr__(self, "schedule", Schedule.parse(self.schedule))
        if not abs(self.strength) < float("inf"):
            raise SteeringError(f"strength {self.strength} must be a finite number")
        if self.layers is not None and not 0 <= self.layers[0] <= self.layers[1]:
            raise SteeringError(f"layers {self.layers[0]}-{self.layers[1]} is no range: give first and last, counted from 0")
        if self.vector is None and not self.force and not self.ban:
            raise SteeringError("a plan needs a vector, or experts to force or ban")
        if both := set(self.force) & set(self.ban):
            raise SteeringError(f"experts {sorted(both)} are both forced and banned")

    @property
    def does_something(self) -> bool:
        return bool(self.force or self.ban) or (self.vector is not None and self.strength != 0)

    def factor(self, index: Tensor) -> Tensor:
        """How strongly each token is steered, as a multiple of the strength; `index` as in `Schedule.factor`."""
        wanted = {"generated": index >= 0, "prompt": index < 0, "all": torch.ones_like(index, dtype=torch.bool)}
        return self.schedule.factor(index) * wanted[self.positions] * self.does_something


@dataclass(frozen=True)
class SteeringReport:
    """What steering did.

    Attributes:
        router_calls: calls of a router whose logits were changed.
        tokens_seen: tokens that the model processed, prompt included, padding not.
        tokens_steered: those of them that were steered.
        vector_share: share of the steered tokens' top-k slots that went to experts of their vector, 0 to 1.
    """

    router_calls: int
    tokens_seen: int
    tokens_steered: int
    vector_share: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class _Bank:
    """The distinct plans of a batch as tensors for one layer, [P, N] each."""

    experts: Tensor
    forced: Tensor
    banned: Tensor
    has_lists: bool
    is_idle: bool
    """No plan does anything in this layer."""


@dataclass(frozen=True, eq=False)
class _Step:
    """How the current forward call is steered. `slot` and `factor` are None when all tokens follow plan 0 alike."""

    factor: float = 1.0
    slot_T1: Tensor | None = None
    factor_T1: Tensor | None = None
    rows: int = 0


class SteeringHandle:
    """Steering that is attached to a model. `set` changes it between tokens, `remove` takes it off.

    Made by `attach`; not by hand.
    """

    def __init__(self, model: nn.Module, plans: Sequence[SteeringPlan | None]) -> None:
        self._model = model
        self._routers = find_routers(model)
        self._exit = ExitStack()
        self._tokens_seen = self._tokens_steered = self._tokens_wanted = 0
        self._steps: dict[str, _Step | None] = {"encoder": None, "decoder": None}
        self._install(plans)
        try:
            self._tracker = Tracker(model, self._before_forward)
            self._exit.callback(self._tracker.close)
            self._editors = [_Editor(self, number, router) for number, router in enumerate(self._routers)]
            for editor in self._editors:
                self._exit.callback(intercept(model, editor.router, editor))
        except BaseException:
            self._exit.close()
            raise

    # ---- the user's side ----

    @property
    def plans(self) -> tuple[SteeringPlan | None, ...]:
        """One plan for all rows, or one a row; None leaves a row alone."""
        return self._plans

    def set(
        self,
        plan: SteeringPlan | None = None,
        *,
        rows: Sequence[SteeringPlan | None] | None = None,
        prompt_length: int | None = None,
        **changes: Any,
    ) -> None:
        """Change the steering from the next forward call on, without attaching anew.

        Args:
            plan: a new plan for all rows.
            rows: new plans, one a row.
            prompt_length: columns to take for the prompt when the model is called directly and not by `generate`.
            changes: fields of the present plans to replace, such as `strength=2.0`.
        """
        if prompt_length is not None:
            self._tracker.prompt_length = prompt_length
        if rows is not None:
            self._install(rows)
        elif plan is not None:
            self._install([plan])
        if changes:
            if isinstance(changes.get("schedule"), str):
                changes["schedule"] = Schedule.parse(changes["schedule"])
            self._install([current and replace(current, **changes) for current in self._plans])

    def remove(self) -> None:
        """Take the steering off; the model is as it was. Does nothing the second time."""
        self._exit.close()

    def report(self) -> SteeringReport:
        """What has been steered since attaching."""
        slots = sum(editor.slots for editor in self._editors)
        hits = sum(float(editor.hits) for editor in self._editors)
        return SteeringReport(
            router_calls=sum(editor.calls for editor in self._editors),
            tokens_seen=self._tokens_seen,
            tokens_steered=self._tokens_steered,
            vector_share=hits / slots if slots else 0.0,
        )

    def verify(self) -> None:
        """Make sure that what was asked for happened.

        Raises:
            SteeringError: tokens were to be steered, but some router that should have steered them was never called.
        """
        idle = [e.router.name for e in self._editors if not e.calls and not e.bank.is_idle and e.router.stack == "decoder"]
        if self._tokens_wanted and idle:
            raise SteeringError(
                f"{self._tokens_wanted} tokens were to be steered, but {len(idle)} of {len(self._editors)} routers never "
                f"ran (first '{idle[0]}'): a fused kernel or another wrapper bypasses them; load the model without it"
            )

    def require_steered_tokens(self) -> None:
        """As `verify`, and raise too if no token was there to be steered at all."""
        self.verify()
        if self._tokens_wanted or not any(plan and plan.does_something for plan in self._plans):
            return
        positions = sorted({plan.positions for plan in self._plans if plan})
        raise SteeringError(
            f"steering was asked for, but none of the {self._tokens_seen} tokens that the model saw was to be steered "
            f"(positions {', '.join(positions)}): generate some, or steer with positions='all'"
        )

    # ---- what the tracker and the editors ask ----

    def _install(self, plans: Sequence[SteeringPlan | None]) -> None:
        if not plans:
            raise SteeringError("no plans given: pass a plan, or one a row (None for rows to leave alone)")
        distinct = list(dict.fromkeys(id(plan) for plan in plans if plan))
        by_id = {id(plan): plan for plan in plans if plan}
        active = [by_id[key] for key in distinct]
        banks = [self._bank(number, router, active) for number, router in enumerate(self._routers)]
        self._plans = tuple(plans)
        self._active = active
        self._slots = [distinct.index(id(plan)) if plan else -1 for plan in plans]
        self._banks = banks
        self._strengths = torch.tensor([plan.strength for plan in active] or [0.0])

    def _bank(self, number: int, router: Router, plans: Sequence[SteeringPlan]) -> _Bank:
        model_name = getattr(getattr(self._model, "config", None), "name_or_path", "") or type(self._model).__name__
        layers = [r.layer for r in self._routers]
        experts = torch.zeros(max(1, len(plans)), router.num_experts)
        forced, banned = experts.bool(), experts.bool()
        for slot, plan in enumerate(plans):
            if plan.vector is not None:
                architecture = getattr(getattr(self._model, "config", None), "model_type", "")
                widths = [r.num_experts for r in self._routers]
                plan.vector.check_fits(layers, widths, model_name, architecture)
            for listed, marks in ((plan.force, forced), (plan.ban, banned)):
                for layer, expert in listed:
                    if layer not in layers or not 0 <= expert < router.num_experts:
                        raise SteeringError(
                            f"expert ({layer}, {expert}) does not exist: {model_name} has routers in layers "
                            f"{layers[0]} to {layers[-1]}, experts 0 to {router.num_experts - 1}"
                        )
                    marks[slot, expert] |= layer == router.layer
            if plan.layers is not None and not any(plan.layers[0] <= layer <= plan.layers[1] for layer in layers):
                raise SteeringError(
                    f"layers {plan.layers[0]}-{plan.layers[1]} hold no router: the model has them in {layers[0]}-{layers[-1]}"
                )
            if plan.layers is not None and not plan.layers[0] <= router.layer <= plan.layers[1]:
                forced[slot] = banned[slot] = False
            elif plan.vector is not None and plan.strength:
                experts[slot, : plan.vector.num_experts] = plan.vector.experts[number]
        has_lists = bool(forced.any() or banned.any())
        return _Bank(experts, forced, banned, has_lists, not has_lists and not experts.any())

    def _before_forward(self, window: Window) -> None:
        self._tokens_seen += window.tokens
        self._steps["decoder"] = self._step(window, window.generated_index(), window.mask)
        if window.encoder_columns:
            self._tokens_seen += window.encoder_tokens
            index = torch.full((window.encoder_columns,), -1)
            self._steps["encoder"] = self._step(window, index, window.encoder_mask)

    def _step(self, window: Window, index: Tensor, mask: Tensor | None) -> _Step | None:
        """The step for these columns, or None if nothing in it is steered."""
        factors_PS = [plan.factor(index) for plan in self._active]
        if not any(bool(factor.any()) for factor in factors_PS):
            return None
        if len(self._slots) == 1:
            slots = self._slots * window.rows
        elif window.rows % len(self._slots) == 0:  # beams and return sequences repeat each row
            slots = [slot for slot in self._slots for _ in range(window.rows // len(self._slots))]
        else:
            raise SteeringError(
                f"{len(self._slots)} row plans can't be laid over {window.rows} rows: give one plan a row, or one for all"
            )
        if len(set(slots)) == 1 and bool((factors_PS[0] == factors_PS[0][0]).all()):
            count = window.rows * len(index) if mask is None else int(mask.sum())
            self._tokens_wanted += count
            self._tokens_steered += count
            return _Step(factor=float(factors_PS[0][0]), rows=window.rows * len(index))
        factors_PS.append(torch.zeros(len(index)))  # slot -1, the unsteered rows
        factor_BS = torch.stack([factors_PS[slot] for slot in slots])
        steered = factor_BS != 0
        count = int((steered if mask is None else steered & mask.cpu()).sum())
        self._tokens_wanted += count
        self._tokens_steered += count
        slot_T1 = torch.tensor(slots).clamp(min=0).repeat_interleave(len(index))[:, None]
        return _Step(slot_T1=slot_T1, factor_T1=factor_BS.flatten()[:, None], rows=factor_BS.numel())


class _Editor:
    """The handle's hand in one router: edits its logits and counts what it chose."""

    def __init__(self, handle: SteeringHandle, number: int, router: Router) -> None:
        self.handle = handle
        self.number = number
        self.router = router
        self.calls = self.slots = 0
        self.hits: Tensor | float = 0.0
        self._on_device: tuple[_Bank, _Bank] | None = None

    @property
    def bank(self) -> _Bank:
        return self.handle._banks[self.number]

    @property
    def step(self) -> _Step | None:
        return self.handle._steps[self.router.stack]

    def active(self) -> bool:
        return self.step is not None and not self.bank.is_idle

    def edit(self, logits: Tensor) -> Tensor:
        step = self.step
        assert step is not None
        bank = self._bank_on(logits.device)
        flat = logits.flatten(0, -2)
        precise = flat[:, : self.router.num_experts].to(torch.promote_types(logits.dtype, torch.float32))
        if step.slot_T1 is None:
            steered = self._apply(self.handle._active[0], precise, bank, 0, step.factor)
        else:
            if len(flat) != step.rows:
                raise SteeringError(
                    f"router '{self.router.name}' saw {len(flat)} tokens where the batch has {step.rows}: "
                    "rows can't be told apart in this model; steer all rows alike"
                )
            steered = self._apply_by_row(precise, bank, step)
        self.calls += 1
        if steered.shape[-1] == flat.shape[-1]:
            return steered.to(logits.dtype).view_as(logits)
        return torch.cat([steered.to(logits.dtype), flat[:, self.router.num_experts :]], -1).view_as(logits)

    def observe(self, output: Any) -> None:
        step = self.step
        assert step is not None
        chosen = chosen_experts(self.router, output)
        wanted = (self._bank_on(chosen.device).experts > 0) | self._bank_on(chosen.device).forced
        if wanted.shape[1] <= self.router.width - 1:  # a chosen column beyond the experts is nobody's
            wanted = torch.nn.functional.pad(wanted, (0, self.router.width - wanted.shape[1]))
        if step.slot_T1 is None:
            self.hits = self.hits + wanted[0][chosen].sum()
            self.slots += chosen.numel()
        else:
            slot_T1, steered = step.slot_T1.to(chosen.device), step.factor_T1.to(chosen.device) != 0  # type: ignore[union-attr]
            hits = wanted[slot_T1.squeeze(1)].gather(1, chosen) & steered
            self.hits = self.hits + hits.sum()
            self.slots += int(steered.sum()) * chosen.shape[1]

    def _apply(self, plan: SteeringPlan, logits: Tensor, bank: _Bank, slot: Any, factor: float | Tensor) -> Tensor:
        strength = plan.strength * factor
        steered = formulas.BY_NAME[plan.formula](logits, bank.experts[slot], strength, plan.scale)
        if bank.has_lists:
            steered = formulas.ban(formulas.force(steered, bank.forced[slot]), bank.banned[slot])
        return steered

    def _apply_by_row(self, logits: Tensor, bank: _Bank, step: _Step) -> Tensor:
        """Rows of different plans: each formula once, over all tokens, with every token's own expert vector and strength."""
        assert step.slot_T1 is not None and step.factor_T1 is not None
        slot_T1, factor_T1 = step.slot_T1.to(logits.device), step.factor_T1.to(logits.device)
        slot_T = slot_T1.squeeze(1)
        strength_T1 = self.handle._strengths.to(logits.device)[slot_T1] * factor_T1
        out = logits
        ways = dict.fromkeys((plan.formula, plan.scale) for plan in self.handle._active)
        for formula, scale in ways:
            steered = formulas.BY_NAME[formula](logits, bank.experts[slot_T], strength_T1, scale)
            if bank.has_lists:
                steered = formulas.ban(formulas.force(steered, bank.forced[slot_T]), bank.banned[slot_T])
            here = torch.tensor([(p.formula, p.scale) == (formula, scale) for p in self.handle._active])
            out = torch.where(here.to(logits.device)[slot_T1] & (factor_T1 != 0), steered, out)
        return out

    def _bank_on(self, device: torch.device) -> _Bank:
        source = self.bank
        if source.experts.device == device:
            return source
        if self._on_device is None or self._on_device[0] is not source or self._on_device[1].experts.device != device:
            moved = replace(
                source,
                experts=source.experts.to(device),
                forced=source.forced.to(device),
                banned=source.banned.to(device),
            )
            self._on_device = (source, moved)
        return self._on_device[1]


def attach(
    model: nn.Module,
    plan: SteeringPlan | None = None,
    *,
    rows: Sequence[SteeringPlan | None] | None = None,
) -> SteeringHandle:
    """Steer a model until the handle's `remove`.

    Args:
        model: any model of transformers with routers, or remote code that is built alike.
        plan: one plan for all rows of every batch.
        rows: instead, one plan a row; None leaves the row exactly as it would be without steering.

    Returns:
        the handle. If attaching fails, nothing is left behind.

    Raises:
        UnsupportedModel: no router to steer. CompatibilityError: a vector of another model. SteeringError: a wrong plan.
    """
    if (plan is None) == (rows is None):
        raise SteeringError("pass either one plan or plans for the rows, not both and not neither")
    return SteeringHandle(model, [plan] if rows is None else list(rows))


@contextmanager
def steer(
    model: nn.Module,
    vector: SteeringVector | None = None,
    strength: float | None = None,
    *,
    rows: Sequence[SteeringPlan | None] | None = None,
    **plan: Any,
) -> Iterator[SteeringHandle]:
    """Steer a model inside a `with` block.

    Args:
        model: as in `attach`.
        vector: the domain's vector.
        strength: c; by default the strength that the vector was calibrated to.
        rows: plans a row instead of a vector for all.
        plan: further fields of `SteeringPlan`.

    Raises:
        SteeringError: at the end of the block, if no token was steered though steering was asked for.
    """
    if rows is None:
        handle = attach(model, plan_for(vector, strength, **plan))
    else:
        handle = attach(model, rows=rows)
    with ExitStack() as stack:
        stack.callback(handle.remove)
        yield handle
        handle.require_steered_tokens()


def plan_for(vector: SteeringVector | None, strength: float | None = None, **fields: Any) -> SteeringPlan:
    """A plan whose strength, formula and scale are, where not given, the ones the vector was calibrated with."""
    info = vector.info if vector is not None else None
    if strength is None:
        strength = info.strength if info and info.strength is not None else DEFAULT_STRENGTH
    for name in ("formula", "scale"):
        if fields.get(name) is None:
            fields[name] = getattr(info, name, None) or {"formula": DEFAULT_FORMULA, "scale": DEFAULT_SCALE}[name]
    return SteeringPlan(vector, strength, **fields)
