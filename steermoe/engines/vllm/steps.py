"""What each forward call of a vLLM worker does to which token, with the package's own editors.

It knows no vLLM: `plugin` passes it the routers, the rows of each call and the logits. If graphs are captured,
everything that the edit reads is in tensors that stay in place, so that graphs can be replayed over new contents. On a
CPU, compiled kernels edit the logits (`steering.editing_numba`). What a call needs is kept for the next calls while
they need the same, as between tokens; otherwise a step would spend more on its rows than on its edits.

Shapes: R rows, T tokens of a forward call, C tokens and P plans of room, N experts of a layer.
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from steermoe.engines.vllm.selection import Choice, counted
from steermoe.engines.vllm.wire import unpack
from steermoe.errors import SteeringError
from steermoe.formulas import FORMULAS, SCALES, Formula, Scale
from steermoe.routing.selection import Lists, chosen_by
from steermoe.routing.shape import RouterShape
from steermoe.steering.banks import Bank
from steermoe.steering.editing import Editor, RowLayout, Step, Tally, listed_counts
from steermoe.steering.mapping import UNSTEERED, factor_table
from steermoe.steering.plans import SteeringPlan
from steermoe.steering.report import SteeringReport

WAYS: tuple[tuple[Formula, Scale], ...] = tuple((formula, scale) for formula in FORMULAS for scale in SCALES)
RECORD = "steermoe_record"
"""The key in `extra_args` by which a request asks for its choices to be counted."""
BANK_TENSORS = ("push", "raised", "forced", "banned", "wanted")


class Row(NamedTuple):
    """One request's tokens in a forward call.

    Attributes:
        request: its id.
        plan: its plan, packed by `wire.pack`; None if it is not steered.
        first: position of its first token in this call, counted from the beginning of its prompt.
        tokens: how many of its tokens the call holds.
        prompt: how many tokens its prompt has.
        is_recorded: whether the choices of its generated tokens are counted.
        numbers: of each of its tokens, for `SteeringPlan.factor`; None if they follow from its places.
    """

    request: str
    plan: bytes | None
    first: int
    tokens: int
    prompt: int
    is_recorded: bool = False
    numbers: tuple[int, ...] | None = None


class _Call(NamedTuple):
    """What one forward call does.

    Attributes:
        tokens: how many it holds.
        steered: how many of them are steered.
        passed_over: their top-k slots in routers that no plan does anything in.
        noted: the tokens whose choices are counted, by request.
        step: how they are steered; None if none is.
    """

    tokens: int
    steered: int
    passed_over: int
    noted: list[tuple[str, slice]]
    step: Step | None


@dataclass(eq=False)
class _Installed:
    """A plan in the banks.

    Attributes:
        number: its place there.
        way: its formula and scale, by their place in WAYS.
        used: the last forward call in which a row followed it.
    """

    number: int
    plan: SteeringPlan
    way: int
    used: int


class Steps:
    """The steering of one worker's model.

    Args:
        routers: those whose logits this worker computes, in the order of their layers.
        rows: each router's row in a vector; a pipeline-parallel stage has only some of a model's layers.
        capacity: the most tokens of a forward call, if calls are captured.
        plans: the most plans of a forward call.
        device: where logits are.
        graphs: whether calls may be captured and replayed; then no decision may depend on values of the host.
        choices: how each router chooses; None for one that chooses by a function of its model.

    Attributes:
        uses_kernels: whether compiled kernels edit the logits, and not torch.
        choices: as given.
        compiled: whether the model is compiled; then `chose` is not called, and lists are counted where they are kept.
        functions: the method by which each router chooses, as it was before steering, for compiled code.
        lists_reason: why plans with lists of experts are refused; "" if they are not.
    """

    def __init__(
        self,
        routers: Sequence[RouterShape],
        rows: Sequence[int],
        capacity: int,
        plans: int,
        device: torch.device,
        graphs: bool,
        choices: Sequence[Choice | None] = (),
    ) -> None:
        self.routers, self.rows, self._graphs = list(routers), list(rows), graphs
        self.choices, self.lists_reason = list(choices) or [None] * len(self.routers), ""
        self.compiled = False
        self.functions: list[Any] = [None] * len(self.routers)
        self._listed_R4 = torch.zeros(len(self.routers), 4, dtype=torch.long, device=device)
        self._tally = Tally()
        self.editors = [Editor(f"layer {router.layer}", router, self._tally) for router in routers]
        for editor in self.editors:
            editor.bank = _empty_bank(editor.router, plans, device, all_flags=graphs)
        room = capacity if graphs else 0
        self._plan_C = torch.zeros(room, dtype=torch.long, device=device)
        self._factor_C1 = torch.zeros(room, 1, device=device)
        self._here_WC1 = torch.zeros(len(WAYS), room, 1, dtype=torch.bool, device=device)
        self._installed: dict[bytes, _Installed] = {}
        self._free = list(range(plans))
        self._filled = self._calls = 0
        self._last: tuple[list[Any], Step] | None = None
        self.uses_kernels = device.type == "cpu" and not graphs
        self._formula_P = np.zeros(plans, dtype=np.int64)
        self._paper_P = np.zeros(plans, dtype=np.bool_)
        self._tokens_seen = self._tokens_steered = 0
        self._counts: dict[str, Tensor] = {}
        self._noted: list[tuple[str, slice]] = []
        self._rows: Sequence[Row] | None = None
        self._now: Step | None = None
        if self.uses_kernels:
            try:
                from steermoe.steering import (
                    editing_numba as kernels,  # not earlier: vLLM's start fails on numba's library
                )
            except (ImportError, RuntimeError):  # RuntimeError: numba finds no folder to keep code in
                self.uses_kernels = False
        if self.uses_kernels:
            self._kernels = kernels
            self._layers = [kernels.LayerEditor(editor.bank, self._formula_P, self._paper_P) for editor in self.editors]

    # ---- around a forward call ----

    def begin(self, rows: Sequence[Row]) -> None:
        """Take the rows of the next forward call, in the order of their tokens.

        The same list as in the last call does the same again, wherever its rows are by now (see `goes_on`).
        """
        self._calls += 1
        if self._graphs:
            self._tokens_seen += sum(row.tokens for row in rows)
            if any(row.plan for row in rows):
                self._tokens_steered += self._fill(*self._lay_out(rows))
            else:
                self._fill_nothing()
            return
        if rows is not self._rows:
            self._call = self._call_of(rows)
            self._rows = rows
        call = self._call
        self._tokens_seen += call.tokens
        self._tokens_steered += call.steered
        if call.passed_over:
            self._tally.pass_over(call.passed_over)
        self._noted, self._now = call.noted, call.step

    def end(self) -> None:
        """End the forward call: whatever else the model computes, such as dummy runs, is left alone."""
        self._now = None
        self._noted = []

    def goes_on(self, rows: Sequence[Row]) -> bool:
        """Whether the rows of the last call can be given again for the next token of each."""
        return not self._graphs and all(
            row.tokens == 1 and row.first > row.prompt and self._is_level(row) for row in rows
        )

    def _is_level(self, row: Row) -> bool:
        """Whether all generated tokens of a row are steered alike."""
        if row.plan is None:
            return True
        known = self._installed.get(row.plan)
        return row.numbers is None and known is not None and known.plan.schedule.kind == "constant"

    def _call_of(self, rows: Sequence[Row]) -> _Call:
        tokens, noted = sum(row.tokens for row in rows), _generated_tokens(rows)
        if not any(row.plan for row in rows):
            return _Call(tokens, 0, 0, noted, None)
        step = self._step(rows)
        steered = int(step.tokens)
        idle = sum(editor.router.top_k for editor in self.editors if editor.bank.is_idle)
        return _Call(tokens, steered, steered * idle, noted, step if steered else None)

    def edit(self, number: int, logits: Tensor) -> Tensor:
        """The edited logits [T, W] of the `number`-th router; the same tensor if there is nothing to do."""
        editor = self.editors[number]
        if self._graphs:
            editor.step = Step(0, None, layout=self._filled_layout(len(logits)))
            return editor.edit(logits)
        step = self._now
        if step is None or editor.bank.is_idle:
            return logits
        tokens = self._call.tokens
        if logits.shape[0] < tokens:
            raise SteeringError(
                f"the router of {editor.name} saw {len(logits)} tokens where the batch has {tokens}: tokens are "
                "split across workers here, which steermoe can't follow; run without expert or sequence parallelism"
            )
        if self.uses_kernels:
            return self._layers[number].edit(logits, self._token_plans)
        editor.step = step
        if len(logits) == tokens:
            return editor.edit(logits)
        return torch.cat([editor.edit(logits[:tokens]), logits[tokens:]])

    def choose(self, number: int, logits: Tensor, weights: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and experts [T, k] that keep to the tokens' lists; the same tensors if there is nothing to do.

        Args:
            number: the router's.
            logits: its edited logits [T, W].
            weights: the weights of its own choice.
            experts: its own choice.
        """
        choice, lists = self.choices[number], self._lists(number, len(logits))
        if choice is None or lists is None:
            return weights, experts
        found = choice.again(logits, lists, weights, experts)
        self._count(number, lists, found[1])
        return found

    def route(self, number: int, tokens: int, compute: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The weights and experts [T, k] that a routing function of the model computes, made to keep to the lists.

        Args:
            number: the router's.
            tokens: T, for how many tokens it computes them.
            compute: the function.

        Raises:
            SteeringError: it no longer chooses as in the trial at the start.
        """
        lists, router = self._lists(number, tokens), self.routers[number]
        if lists is None or self.lists_reason:
            return compute()
        found, was_caught = chosen_by(lists, router.top_k, compute)
        if not was_caught:
            raise SteeringError(
                f"the router of layer {router.layer} chooses its experts in a way that steermoe does not know, so none "
                "can be forced or banned in it: leave its layer out of these lists"
            )
        self._count(number, lists, found[1])
        return found

    def _lists(self, number: int, tokens: int) -> Lists | None:
        """The experts [T, N] that each token of this call forces and bans, padding included; None if none does."""
        editor = self.editors[number]
        if self._graphs:
            editor.step = Step(0, None, layout=self._filled_layout(tokens))
        else:
            if self._now is None or not editor.bank.has_lists:
                return None
            editor.step = self._now
        found = editor.lists(editor.bank.push.device)
        padding = tokens - len(found.forced)
        return found if not padding else Lists(*(pad(marks, (0, 0, 0, padding)) for marks in found))

    def _count(self, number: int, lists: Lists, experts: Tensor) -> None:
        """Count in a tensor that stays in place, so that graphs can be replayed."""
        if self.compiled:
            self._listed_R4[number].add_(counted(lists, experts))

    def chose(self, number: int, chosen_Tk: Tensor) -> None:
        """Count the experts that the `number`-th router chose; only if calls are not compiled."""
        editor = self.editors[number]
        step = self._now
        if step is not None and not editor.bank.is_idle:
            count = self._call.tokens
            self._tally.add(editor, step, chosen_Tk if chosen_Tk.shape[0] == count else chosen_Tk[:count])
        for request, tokens in self._noted:
            if request not in self._counts:
                experts = max(router.num_experts for router in self.routers)
                self._counts[request] = torch.zeros(len(self.routers), experts, dtype=torch.long)
            chosen = chosen_Tk[tokens].flatten().long().cpu()
            self._counts[request][number].scatter_add_(0, chosen, torch.ones_like(chosen))

    # ---- results ----

    def recorded(self) -> dict[str, list[tuple[int, list[int]]]]:
        """By request, what its generated tokens chose since the last call: for each router its row and counts [N]."""
        found, self._counts = self._counts, {}
        return {name: list(zip(self.rows, counts.tolist(), strict=True)) for name, counts in found.items()}

    def report(self) -> SteeringReport:
        """What was steered since the last report."""
        self._tally.count()
        calls = sum(editor.calls for editor in self.editors)
        tally = self._tally
        listed = listed_counts([*(editor.listed for editor in self.editors), self._listed_R4.sum(0)])
        self._listed_R4.zero_()
        found = SteeringReport(calls, self._tokens_seen, self._tokens_steered, tally.hits, tally.slots, **listed)
        self._tally = Tally()
        for editor in self.editors:
            editor.calls, editor.listed, editor._tally = 0, 0, self._tally
        self._tokens_seen = self._tokens_steered = 0
        return found

    # ---- the rows of a call as tensors ----

    def _step(self, rows: Sequence[Row]) -> Step:
        """What the call does; the last call's step if that was the same."""
        key = [(row.plan, row.tokens, self._place(row)) for row in rows]
        if self._last is None or self._last[0] != key:
            plan_T, factor_T, way_T = self._lay_out(rows)
            steered_T = way_T >= 0
            ways = tuple((*WAYS[way], (way_T == way)[:, None]) for way in way_T[steered_T].unique().tolist())
            layout = RowLayout(plan_T, factor_T[:, None], ways)
            self._last = key, Step(int(steered_T.sum()), steered_T, layout=layout)
            if self.uses_kernels:
                self._token_plans = self._kernels.TokenPlans(plan_T.numpy(), factor_T.numpy())
        return self._last[1]

    def _place(self, row: Row) -> int | tuple[int, ...]:
        """The part of a row's position that decides its factors: 0 where all generated tokens are steered alike."""
        index = row.first - row.prompt
        if row.plan is None:
            return 0
        if row.numbers is not None and not (len(row.numbers) == 1 and row.numbers[0] >= 0):
            return row.numbers
        index = index if row.numbers is None else row.numbers[0]
        known = self._installed.get(row.plan)
        return 0 if index > 0 and known is not None and known.plan.schedule.kind == "constant" else index

    def _lay_out(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
        """Plan number, factor and way of each token, [T]; way -1 for tokens that are not steered."""
        tokens_R = torch.tensor([row.tokens for row in rows])
        start_R = tokens_R.cumsum(0) - tokens_R
        index_R = torch.tensor([row.first - row.prompt for row in rows])
        index_T = (index_R - start_R).repeat_interleave(tokens_R)
        index_T += torch.arange(len(index_T))
        for row, start in zip(rows, start_R.tolist(), strict=True):
            if row.numbers is not None:
                index_T[start : start + row.tokens] = torch.tensor(row.numbers)
        followed = dict.fromkeys(row.plan for row in rows if row.plan is not None)
        installed = [self._find(data, followed) for data in followed]
        entry_of: dict[bytes | None, int] = {data: entry for entry, data in enumerate(followed)}
        entry_of[None] = UNSTEERED
        entry_T = torch.tensor([entry_of[row.plan] for row in rows]).repeat_interleave(tokens_R)
        table_PT = torch.stack(factor_table([one.plan for one in installed], index_T))
        factor_T = table_PT[entry_T, torch.arange(len(entry_T))]
        plan_T = torch.tensor([*(one.number for one in installed), 0])[entry_T]
        way_T = torch.tensor([*(one.way for one in installed), -1])[entry_T].where(factor_T != 0, -1)
        return plan_T, factor_T, way_T

    def _fill(self, plan_T: Tensor, factor_T: Tensor, way_T: Tensor) -> int:
        """Copy a call to where graphs read it; returns how many of its tokens are steered."""
        tokens = len(plan_T)
        self._check_room(tokens)
        self._plan_C[:tokens].copy_(plan_T, non_blocking=True)
        self._factor_C1[:tokens, 0].copy_(factor_T, non_blocking=True)
        here_WT1 = (way_T == torch.arange(len(WAYS))[:, None])[..., None]
        self._here_WC1[:, :tokens].copy_(here_WT1, non_blocking=True)
        self._here_WC1[:, tokens : self._filled] = False
        self._filled = tokens
        return int((way_T >= 0).sum())

    def _fill_nothing(self) -> None:
        if self._filled:
            self._here_WC1[:, : self._filled] = False
            self._filled = 0

    def _filled_layout(self, tokens: int) -> RowLayout:
        self._check_room(tokens)
        ways = tuple((*way, here_C1[:tokens]) for way, here_C1 in zip(WAYS, self._here_WC1, strict=True))
        return RowLayout(self._plan_C[:tokens], self._factor_C1[:tokens], ways)

    def _check_room(self, tokens: int) -> None:
        if tokens > len(self._plan_C):
            raise SteeringError(f"a call of {tokens} tokens is larger than the {len(self._plan_C)} that vLLM announced")

    # ---- plans in the banks ----

    def _find(self, data: bytes, keep: Container[bytes]) -> _Installed:
        """A plan's place in the banks; if they are full, it replaces a plan that no row of this call follows."""
        found = self._installed.get(data)
        if found is None:
            known = self._installed
            if not self._free:
                oldest = min((key for key in known if key not in keep), key=lambda key: known[key].used)
                self._free.append(known.pop(oldest).number)
            plan = unpack(data)
            if self.lists_reason and (plan.force or plan.ban):
                raise SteeringError(
                    f"experts can't be forced or banned here: {self.lists_reason}; use --engine hf, or a vector"
                )
            found = _Installed(self._free.pop(), plan, WAYS.index((plan.formula, plan.scale)), 0)
            self._install(found)
            known[data] = found
        found.used = self._calls
        return found

    def _install(self, new: _Installed) -> None:
        self._tally.count()  # it reads the plans that are in the banks now
        self._last = None
        self._formula_P[new.number] = FORMULAS.index(new.plan.formula)
        self._paper_P[new.number] = new.plan.scale == "paper"
        for number, (editor, row) in enumerate(zip(self.editors, self.rows, strict=True)):
            own = Bank.of(editor.router, row, [new.plan])
            for name in BANK_TENSORS:
                getattr(editor.bank, name)[new.number] = getattr(own, name)[0].to(editor.bank.push.device)
            if self.uses_kernels:
                self._layers[number].install(new.number, own)
            if not self._graphs:
                editor.bank = replace(
                    editor.bank,
                    is_idle=editor.bank.is_idle and own.is_idle,
                    has_lists=bool((editor.bank.forced | editor.bank.banned).any()),
                    may_lower=editor.bank.may_lower or own.may_lower,
                )


def _empty_bank(router: RouterShape, plans: int, device: torch.device, *, all_flags: bool) -> Bank:
    """Room for plans that do nothing yet; `all_flags` if no decision may depend on a flag."""
    marks_PN = torch.zeros(plans, router.num_experts, dtype=torch.bool, device=device)
    return Bank(
        push=torch.zeros(plans, router.num_experts, device=device),
        raised=marks_PN.clone(),
        forced=marks_PN.clone(),
        banned=marks_PN.clone(),
        wanted=torch.zeros(plans, router.width, dtype=torch.bool, device=device),
        active=torch.zeros(plans, dtype=torch.long, device=device),
        may_lower=all_flags,
        has_lists=all_flags,
        has_active=False,
        is_idle=not all_flags,
    )


def _generated_tokens(rows: Sequence[Row]) -> list[tuple[str, slice]]:
    """The generated tokens of each recorded request in a call."""
    found, at = [], 0
    for row in rows:
        start = at + max(0, row.prompt - row.first)
        if row.is_recorded and start < at + row.tokens:
            found.append((row.request, slice(start, at + row.tokens)))
        at += row.tokens
    return found
