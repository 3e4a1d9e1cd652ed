"""How one router's logits are edited: the plans as tensors, what a forward call does to which token, and the tally.

It knows plans and routers, but not where tokens come from: `handle` works that out once per forward call.

Shapes: T tokens as routers see them (rows after rows), P distinct plans, N experts of a layer, W columns of its logits,
k experts chosen per token, C router calls.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steermoe import formulas
from steermoe.errors import SteeringError
from steermoe.formulas import Formula, Scale
from steermoe.routing.counts import numbers_in
from steermoe.routing.selection import Lists
from steermoe.routing.shape import RouterShape
from steermoe.steering.banks import Bank
from steermoe.steering.narrowing import narrowed
from steermoe.steering.plans import SteeringPlan

PENDING_LIMIT = 1 << 16
"""Choices that the tally collects before it counts them. A decode step stays far below; a long prompt exceeds it."""
KEPT_CALLS, KEPT_PLACES = 1 << 10, 1 << 8
"""Router calls whose choices may wait between forward calls to be counted together, and places in one such call."""
LISTED = ("forced_hits", "forced_places", "banned_hits", "banned_places")
"""What `Editor.listed` counts."""
IN_PLACE = (torch.bfloat16, torch.float32)
"""Types of logits that an operation with float32 may write into: it computes in float32 and rounds once, as `edit`."""


@dataclass(frozen=True, eq=False)
class RowLayout:
    """Which plan each token follows, where they differ.

    Attributes:
        plan_T: the plan's number; 0 where there is none.
        factor_T1: the factor for its strength.
        ways: each formula and scale in use, with [T, 1] marks of the tokens that use it.
    """

    plan_T: Tensor
    factor_T1: Tensor
    ways: tuple[tuple[Formula, Scale, Tensor], ...]
    _moved: dict[torch.device, "RowLayout"] = field(default_factory=dict)

    @classmethod
    def of(cls, plans: Sequence[SteeringPlan], numbers: Sequence[int], factor_BS: Tensor) -> "RowLayout":
        """The layout of rows that follow the plans with these numbers; -1 is no plan, with factors of 0."""
        plan_T = torch.tensor(numbers).clamp(min=0).repeat_interleave(factor_BS.shape[1])
        factor_T = factor_BS.flatten()
        ways = []
        for formula, scale in dict.fromkeys((plan.formula, plan.scale) for plan in plans):
            here_P = torch.tensor([(plan.formula, plan.scale) == (formula, scale) for plan in plans])
            ways.append((formula, scale, (here_P[plan_T] & (factor_T != 0))[:, None]))
        return cls(plan_T, factor_T[:, None], tuple(ways))

    @property
    def steered_T1(self) -> Tensor:
        """Which tokens are steered, bool."""
        return torch.stack([here_T1 for *_, here_T1 in self.ways]).any(0)

    def on(self, device: torch.device) -> "RowLayout":
        """The same on a device; moved once."""
        if self.plan_T.device == device:
            return self
        if device not in self._moved:
            here = (self.plan_T, self.factor_T1, *(here_T1 for *_, here_T1 in self.ways))
            plan_T, factor_T1, *heres = (one.to(device, non_blocking=True) for one in here)
            ways = tuple((formula, scale, own) for (formula, scale, _), own in zip(self.ways, heres, strict=True))
            self._moved[device] = RowLayout(plan_T, factor_T1, ways)
        return self._moved[device]


@dataclass(frozen=True, eq=False)
class Step:
    """How one forward call is steered.

    Attributes:
        tokens: how many tokens are steered and counted.
        counted_T: which ones; None for all.
        plan: the plan that all tokens follow, at `factor` times its strength; None if they differ.
        layout: then, which token follows which plan.
    """

    tokens: int | Tensor
    counted_T: Tensor | None
    plan: SteeringPlan | None = None
    factor: float = 1.0
    layout: RowLayout | None = None


class Editor:
    """Edits one router's logits and records what it chose.

    Args:
        name: for messages.
        router: its shape.
        tally: counts what it chose.
        chosen: extracts the chosen experts [T, k] from the router's output; None if nothing calls `observe`.

    Attributes:
        step: how the current forward call is steered in this layer; None if it is not.
        calls: edited calls of the router that the tally has counted.
        listed: places of forced experts in those calls that they took, all of them, and the same of banned ones;
            [4], or 0 without lists.
    """

    def __init__(
        self, name: str, router: RouterShape, tally: "Tally", chosen: Callable[[Any], Tensor] | None = None
    ) -> None:
        self.name = name
        self.router = router
        self._chosen = chosen
        self.bank: Bank
        self.step: Step | None = None
        self.calls = 0
        self.listed: int | Tensor = 0
        self._tally = tally

    def active(self) -> bool:
        return self.step is not None

    def edit(self, logits: Tensor) -> Tensor:
        step = self.step
        assert step is not None
        bank = self.bank.on(logits.device)
        flat = logits if logits.dim() == 2 else logits.flatten(0, -2)
        own = flat if flat.shape[1] == self.router.num_experts else flat[:, : self.router.num_experts]
        own = own if own.dtype == torch.float64 else own.float()
        eps = torch.finfo(logits.dtype).eps
        if step.plan is not None:
            steered = _edit_alike(own, bank, step.plan, step.factor, eps)
        else:
            steered = self._edit_rows(own, bank, step, eps)
        steered = narrowed(steered, logits.dtype)
        if steered.shape[1] != flat.shape[1]:
            steered = torch.cat([steered, flat[:, steered.shape[1] :]], -1)
        return steered if logits.dim() == 2 else steered.view_as(logits)

    def edit_in_place(self, logits: Tensor) -> Tensor:
        """As `edit`, bit for bit, by the fewest operations; may change the given tensor and return it."""
        step = self.step
        assert step is not None
        bank, plan = self.bank.on(logits.device), step.plan
        is_plain = logits.dim() == 2 and logits.shape[1] == self.router.num_experts and logits.dtype in IN_PLACE
        if plan is None or not is_plain or bank.may_lower or bank.has_lists or plan.scale == "paper":
            return self.edit(logits)
        push = bank.push if step.factor == 1 else bank.push * step.factor
        return formulas.apply_in_place(plan.formula, logits, push, bank.raised)

    def has_lists(self) -> bool:
        """Whether a plan of this call may force or ban experts here; their choice must then be caught."""
        return self.step is not None and self.bank.has_lists

    def lists(self, device: torch.device) -> Lists:
        """The experts that the tokens of this call force and ban, [T, N], or [1, N] for all."""
        step, bank = self.step, self.bank.on(device)
        assert step is not None
        if step.layout is None:
            return Lists(bank.forced, bank.banned)
        layout = step.layout.on(device)
        return Lists(bank.forced[layout.plan_T] & layout.steered_T1, bank.banned[layout.plan_T] & layout.steered_T1)

    def counts(self) -> int | Tensor | None:
        """How many experts the tokens of this call get: a number for all, or one for each [T]; None for k."""
        step, bank = self.step, self.bank
        if step is None or not bank.has_active:
            return None
        if step.layout is None:
            return int(bank.active[0]) or None
        layout = step.layout
        active_T = bank.active[layout.plan_T] * layout.steered_T1[:, 0]
        return active_T.where(active_T > 0, self.router.top_k)

    def runs(self) -> int:
        return max(1, len(numbers_in(self.counts())))

    def observe(self, output: Any) -> None:
        assert self.step is not None
        assert self._chosen is not None
        chosen_TK, places_TK = self._chosen(output), None
        if isinstance(self.counts(), Tensor):  # places that a token did not get repeat its first expert
            places_TK = chosen_TK < self.router.width
            chosen_TK = chosen_TK.where(places_TK, chosen_TK[:, :1])
        self._tally.add(self, self.step, chosen_TK, places_TK)

    def check_lists(self, counts: Mapping[str, int]) -> None:
        """Raise SteeringError if a counted call did not choose a forced expert, or chose a banned one.

        Args:
            counts: what `each_listed` makes of `listed`.
        """
        missed = counts["forced_places"] - counts["forced_hits"]
        if missed:
            wrong = f"left out a forced expert in {missed / counts['forced_places']:.1%}"
        elif counts["banned_hits"]:
            wrong = f"chose a banned expert in {counts['banned_hits'] / counts['banned_places']:.1%}"
        else:
            return
        raise SteeringError(
            f"router '{self.name}' {wrong} of its places: this architecture does not keep to lists; leave layer "
            f"{self.router.layer} out of them, and please report it"
        )

    def _edit_rows(self, logits: Tensor, bank: Bank, step: Step, eps: float) -> Tensor:
        """Apply each formula once to all tokens, with every token's own expert vector and strength."""
        assert step.layout is not None
        layout = step.layout.on(logits.device)
        if len(logits) != len(layout.plan_T):
            raise SteeringError(
                f"router '{self.name}' saw {len(logits)} tokens where the batch has {len(layout.plan_T)}: "
                "this model does not keep rows apart; steer all rows alike"
            )
        plan_T, out = layout.plan_T, logits
        push, raised = bank.push[plan_T] * layout.factor_T1, bank.raised[plan_T]
        for formula, scale, here_T1 in layout.ways:
            steered = formulas.apply(formula, logits, push, raised, scale, bank.may_lower)
            if bank.has_lists:
                steered = formulas.ban(formulas.force(steered, bank.forced[plan_T], eps), bank.banned[plan_T], eps)
            out = steered.where(here_T1, out)
        return out


def _edit_alike(logits: Tensor, bank: Bank, plan: SteeringPlan, factor: float, eps: float) -> Tensor:
    """Edit all tokens alike, by the bank's only row."""
    push = bank.push if factor == 1 else bank.push * factor
    steered = formulas.apply(plan.formula, logits, push, bank.raised, plan.scale, bank.may_lower)
    if bank.has_lists:
        steered = formulas.ban(formulas.force(steered, bank.forced, eps), bank.banned, eps)
    return steered


def listed_counts(listed: Iterable[int | Tensor]) -> dict[str, int]:
    """The counts of `SteeringReport` for forced and banned experts, summed over routers."""
    whole = [counts for counts in each_listed(listed) if counts]
    return {name: sum(counts[name] for counts in whole) for name in LISTED}


def each_listed(listed: Iterable[int | Tensor]) -> list[dict[str, int]]:
    """As `listed_counts`, for each router; {} for one without lists. Waits once for each device."""
    given = list(listed)
    by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for place, counts in enumerate(given):
        if isinstance(counts, Tensor):
            by_device.setdefault(counts.device, []).append((place, counts))
    found: list[dict[str, int]] = [{} for _ in given]
    for here in by_device.values():
        together = torch.stack([counts for _, counts in here]).tolist()
        for (place, _), numbers in zip(here, together, strict=True):
            found[place] = dict(zip(LISTED, numbers, strict=True))
    return found


class Tally:
    """Counts router calls, the steered tokens' top-k slots, and those of them that went to experts of their plans.

    Choices are kept until `count`, which handles all layers of a forward call at once, or of many, and never waits for
    a device. Nothing else is written while the model runs, so that torch.compile, which guards what it reads, compiles
    it once.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[Editor, Step, Bank, Tensor, Tensor | None]] = []
        self._waiting = self._pending.copy()
        self._hits: dict[torch.device, Tensor] = {}
        self._slots: int | Tensor = 0
        self._places: dict[torch.device, Tensor] = {}

    def add(self, editor: Editor, step: Step, chosen_Tk: Tensor, places_Tk: Tensor | None = None) -> None:
        self._pending.append((editor, step, editor.bank, chosen_Tk, places_Tk))
        if not torch.compiler.is_compiling() and len(self._pending) * chosen_Tk.numel() > PENDING_LIMIT:
            self.count()

    def pass_over(self, slots: int | Tensor) -> None:
        """Count slots of steered tokens in routers that their plans leave alone; none of them is a hit."""
        self._slots = self._slots + slots

    def settle(self) -> None:
        """After a forward call: count its router calls, and what they chose unless that can wait for later ones.

        It waits for the sake of speed, on a CPU: a device may use the memory of choices again in the next call.
        """
        new, self._pending = self._pending, []
        for editor, *_ in new:
            editor.calls += 1
        self._waiting += new
        if len(self._waiting) > KEPT_CALLS or any(
            bank.has_lists or chosen.numel() > KEPT_PLACES or chosen.device.type != "cpu"
            for _, _, bank, chosen, _ in new
        ):
            self.count()

    def count(self) -> None:
        """Count what is pending, and what waits."""
        for editor, *_ in self._pending:
            editor.calls += 1
        pending, self._pending, self._waiting = [*self._waiting, *self._pending], [], []
        groups: dict[Any, list[tuple[Step, Bank, Tensor, Tensor | None]]] = {}
        for editor, step, bank, chosen, places in pending:
            if bank.has_lists:
                editor.listed = editor.listed + _count_listed(step, bank, chosen)
            own = None if step.layout is None and step.counted_T is None else step
            key = (own, bank.wanted.shape, chosen.shape, chosen.device, places is None)
            groups.setdefault(key, []).append((step, bank, chosen, places))
        for calls in groups.values():
            self._count_alike(calls[0][0], [call[1:] for call in calls])

    def _count_alike(self, step: Step, group: list[tuple[Bank, Tensor, Tensor | None]]) -> None:
        banks, chosen = [bank for bank, *_ in group], [one for _, one, _ in group]
        places = [one for *_, one in group if one is not None]
        chosen_CTk = torch.stack(chosen).long()
        device = chosen_CTk.device
        wanted_CPW = torch.stack([bank.on(device).wanted for bank in banks])
        calls, tokens, top_k = chosen_CTk.shape
        if step.layout is None:
            wanted_CTW = wanted_CPW[:, :1].expand(-1, tokens, -1)
        else:
            wanted_CTW = wanted_CPW[:, step.layout.on(device).plan_T]
        hits_CTk = wanted_CTW.gather(-1, chosen_CTk)
        steered: int | Tensor = tokens
        if step.counted_T is not None and len(step.counted_T) == tokens:
            hits_CTk = hits_CTk & step.counted_T.to(device, non_blocking=True)[:, None]
            steered = step.tokens
        if places:  # tokens with different numbers of experts
            places_CTk = torch.stack(places)
            if step.counted_T is not None and len(step.counted_T) == tokens:
                places_CTk = places_CTk & step.counted_T.to(device, non_blocking=True)[:, None]
            self._hits[device] = self._hits.get(device, 0) + (hits_CTk & places_CTk).sum()
            self._places[device] = self._places.get(device, 0) + places_CTk.sum()
            return
        self._hits[device] = self._hits.get(device, 0) + hits_CTk.sum()
        self._slots = self._slots + steered * (top_k * calls)

    @property
    def hits(self) -> int:
        """How many of the slots went to experts that their tokens' plans raise or force."""
        return sum(int(hits) for hits in self._hits.values())

    @property
    def slots(self) -> int:
        """Top-k slots of the steered tokens, over all calls that were counted or passed over."""
        return int(self._slots) + sum(int(places) for places in self._places.values())


def _count_listed(step: Step, bank: Bank, chosen_Tk: Tensor) -> Tensor:
    """Places of forced experts that they took, all of them, and the same of banned ones, [4]."""
    device, tokens = chosen_Tk.device, len(chosen_Tk)
    bank = bank.on(device)
    marks_2TN = torch.stack([bank.forced, bank.banned])
    if step.layout is not None:
        layout = step.layout.on(device)
        marks_2TN = marks_2TN[:, layout.plan_T] & layout.steered_T1
    if step.counted_T is not None and len(step.counted_T) == tokens:
        marks_2TN = marks_2TN & step.counted_T.to(device, non_blocking=True)[:, None]
    marks_2TN = marks_2TN.expand(-1, tokens, -1)
    was_chosen_TW = bank.wanted.new_zeros(tokens, bank.wanted.shape[1]).scatter_(1, chosen_Tk.long(), True)
    taken_2 = (marks_2TN & was_chosen_TW[:, : marks_2TN.shape[2]]).sum((1, 2))
    return torch.stack([taken_2, marks_2TN.sum((1, 2))], 1).flatten()
