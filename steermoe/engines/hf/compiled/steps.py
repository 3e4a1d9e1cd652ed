"""Run compiled steps over the rows of a cache, with every row's own steering, and report what was steered.

Shapes: as in `step`; P distinct plans.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from steermoe.engines.hf.cache import RowCache
from steermoe.engines.hf.compiled.artifacts import CompiledStep, Kind, facts_of, find_step, folder_of
from steermoe.engines.hf.compiled.choices import OwnChoices
from steermoe.routing.routers import find_routers, shape_of
from steermoe.steering.banks import Bank, banks_for
from steermoe.steering.editing import listed_counts
from steermoe.steering.editing_graph import Edits, count_listed
from steermoe.steering.mapping import PlanMapping
from steermoe.steering.plans import SteeringPlan
from steermoe.steering.report import SteeringReport
from steermoe.steering.tracing import Choices


class CompiledSteps:
    """A model's compiled steps, looked up when they are first needed.

    They keep using the weights that the model has then. For one decoder at a time, which begins with `reset`.

    Attributes:
        missing: those that were looked for and have never been compiled.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._routers = find_routers(model)
        self._shape = shape_of(model, self._routers, sizes_only=True)
        self._steps: dict[Kind, CompiledStep | None] = {}
        self.missing: set[Kind] = set()
        self._mapping = PlanMapping()
        self._rows: list[SteeringPlan | None] = []
        self._numbers: list[int] = []
        self._banks: list[Bank] = []
        self._steered_routers = 0
        self._laid_out: tuple[Any, list[Tensor], Tensor, int] | None = None
        self._last: tuple[Tensor, Tensor] | None = None
        self._own: OwnChoices | None = None
        self.reset()

    def reset(self) -> None:
        """Start a new report."""
        self._tokens_seen = self._tokens_steered = self._router_calls = self._slots = 0
        self._hits = torch.zeros((), dtype=torch.long)
        self._listed = torch.zeros(4, dtype=torch.long)

    def serves(self, rows: int) -> bool:
        """Whether there is a step for this many rows."""
        return self._step(rows) is not None

    def promise(self, rows: int) -> bool:
        """As `serves`, but a step that is not loaded yet stays so, and may turn out to be damaged.

        Loading takes part of a second, which the first token of a text need not wait for.
        """
        kind = _kind(rows)
        if kind not in self._steps:
            facts = facts_of(self._model, kind)
            if facts is not None and facts.pays:
                return True
            self._lacks(kind)
        return self._steps[kind] is not None

    def show_choices(self, rows: int) -> bool:
        """Whether the step for this many rows shows what its routers choose."""
        step = self._step(rows)
        return step is not None and step.traces

    def forward(
        self,
        cache: RowCache,
        tokens_B1: Tensor,
        cached_B: Tensor,
        plans: Sequence[SteeringPlan | None],
        index_B: Tensor,
    ) -> Tensor:
        """The next logits [B, V], float32.

        Args:
            cache: the cache of the rows; it grows by a column.
            tokens_B1: each row's last token.
            cached_B: how many tokens each row has in the cache.
            plans: one per row.
            index_B: the number of each row's last token, as its plan counts it.
        """
        step = self._step(len(tokens_B1))
        assert step is not None
        column, states = cache.claim()
        columns = torch.arange(states[0].shape[2])
        mask_BC = (columns >= (column - cached_B)[:, None]) & (columns <= column)
        edits, wanted_RBN, steered = self._edits(plans, index_B)
        has_lists = any(bank.has_lists for bank in self._banks)
        logits_BV, chosen_RBk, logits_RBW = step(
            tokens_B1, cached_B[:, None], mask_BC.long(), torch.tensor([column]), states, edits
        )
        self._last = chosen_RBk, logits_RBW
        self._tokens_seen += len(tokens_B1)
        if steered:
            self._tokens_steered += steered
            self._router_calls += self._steered_routers
            self._hits += wanted_RBN.gather(-1, chosen_RBk).sum()
            self._slots += steered * chosen_RBk.shape[-1] * len(chosen_RBk)
            if has_lists:
                self._listed += count_listed(edits, chosen_RBk)
        return logits_BV

    def choices(self) -> tuple[Choices, Choices]:
        """The experts that the last call of `forward` chose, and those that it would have chosen without steering.

        Only if the steps `show_choices`.
        """
        assert self._last is not None
        assert self._laid_out is not None
        (chosen_RBk, logits_RBW), (_, factors) = self._last, self._laid_out[0]
        unsteered_RBk = chosen_RBk
        if any(factors):
            if self._own is None:
                self._own = OwnChoices(self._model)
            is_steered = torch.tensor(factors)[:, None] != 0
            unsteered_RBk = torch.where(is_steered, self._own.of(logits_RBW), chosen_RBk)
        chosen, unsteered = (one.transpose(0, 1).numpy().astype(np.int32) for one in (chosen_RBk, unsteered_RBk))
        return chosen, unsteered

    def saw(self, tokens: int) -> None:
        """Count tokens of prompts that the model itself computed."""
        self._tokens_seen += tokens

    def report(self) -> SteeringReport:
        """What was steered in all these steps."""
        return SteeringReport(
            router_calls=self._router_calls,
            tokens_seen=self._tokens_seen,
            tokens_steered=self._tokens_steered,
            hits=int(self._hits),
            slots=self._slots,
            **listed_counts([self._listed]),
        )

    def _step(self, rows: int) -> CompiledStep | None:
        kind = _kind(rows)
        if kind not in self._steps:
            step = find_step(self._model, kind)
            if step is None:
                self._lacks(kind)
            else:
                self._steps[kind] = step
        return self._steps[kind]

    def _lacks(self, kind: Kind) -> None:
        self._steps[kind] = None
        if not folder_of(self._model, kind).is_dir():
            self.missing.add(kind)

    def _edits(self, plans: Sequence[SteeringPlan | None], index_B: Tensor) -> tuple[list[Tensor], Tensor, int]:
        """The edits, the experts they raise or force, and how many rows are steered; kept while nothing changes."""
        if self._rows != plans:
            self._follow(plans)
        numbers = self._numbers
        factor_B = self._mapping.factors(numbers, index_B[:, None])[:, 0]
        key = numbers, factor_B.tolist()
        if self._laid_out is None or self._laid_out[0] != key:
            self._laid_out = key, *self._lay_out(numbers, factor_B)
        return self._laid_out[1:]

    def _follow(self, rows: Sequence[SteeringPlan | None]) -> None:
        """Number the rows' plans; only new plans cost anything."""
        if not self._mapping.knows(rows):
            mapping = PlanMapping(rows)
            self._banks = banks_for(self._shape, mapping.plans)
            self._steered_routers = sum(not bank.is_idle for bank in self._banks)
            self._mapping, self._laid_out = mapping, None
        self._rows, self._numbers = list(rows), self._mapping.numbers(rows)

    def _lay_out(self, numbers: list[int], factor_B: Tensor) -> tuple[list[Tensor], Tensor, int]:
        experts = self._routers[0].num_experts
        if not factor_B.any():
            edits = Edits.none(len(self._routers), len(numbers), experts)
            return list(edits.tensors()), edits.forced, 0
        edits = Edits.of(self._mapping.plans, self._banks, numbers, factor_B)
        plan_B = torch.tensor(numbers).clamp(min=0)
        wanted = torch.stack([bank.wanted[plan_B] for bank in self._banks]) & (factor_B != 0)[:, None]
        return list(edits.tensors()), wanted, int((factor_B != 0).sum())


def _kind(rows: int) -> Kind:
    return "one" if rows == 1 else "many"
