"""Which plan each row of a batch follows, and how strongly that plan steers each of the row's tokens.

Pure arithmetic on plans: it knows no model and no engine, and not how logits are edited.

Shapes: B rows, S columns of a forward call, P plans.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from steermoe.steering.plans import SteeringPlan

if TYPE_CHECKING:
    from torch import Tensor

UNSTEERED = -1
"""The number of rows and tokens that follow no plan."""


class PlanMapping:
    """The distinct plans of a batch, numbered in the order in which its rows first follow them.

    Equal plans share a number.

    Args:
        rows: one plan per row; None for an unsteered row.

    Attributes:
        plans: the distinct plans; a plan's number is its index here.
    """

    def __init__(self, rows: Iterable[SteeringPlan | None] = ()) -> None:
        self.plans = tuple(dict.fromkeys(plan for plan in rows if plan is not None))
        self._numbers: dict[SteeringPlan | None, int] = {None: UNSTEERED}
        self._numbers.update((plan, number) for number, plan in enumerate(self.plans))
        self._kept: _Entries | None = None

    def knows(self, rows: Iterable[SteeringPlan | None]) -> bool:
        """Whether these rows follow no other plans, so that what was built from the plans serves them too."""
        return self._numbers.keys() >= set(rows)

    def numbers(self, rows: Iterable[SteeringPlan | None]) -> list[int]:
        """The number of each row's plan, UNSTEERED for None.

        Raises:
            KeyError: a plan that it does not know.
        """
        return [self._numbers[plan] for plan in rows]

    def factors(self, numbers: list[int], index: "Tensor") -> "Tensor":
        """[B, S], the factor for each token's strength; 0 where the token is not steered.

        The rows of the result may share memory. What depends only on the numbers is kept for the next call, since
        rows seldom change from token to token.

        Args:
            numbers: one per row, as `numbers` returns them.
            index: each token's index among the generated ones, negative in the prompt; [S] for all rows, or [B, S].
        """
        if self._kept is None or self._kept.numbers != numbers:
            self._kept = self._entries_of(numbers)
        _, plans, entries, entry_B = self._kept
        if len(plans) == 1 and UNSTEERED not in entries:
            return plans[0].factor(index).expand(len(entries), -1)
        import torch

        table = factor_table(plans, index)
        if index.dim() == 1:
            return torch.stack([table[entry] for entry in entries])
        return torch.stack(table)[entry_B, torch.arange(len(entries))]

    def _entries_of(self, numbers: list[int]) -> "_Entries":
        import torch

        used = sorted(set(numbers) - {UNSTEERED})
        entry_of = {UNSTEERED: UNSTEERED, **{number: entry for entry, number in enumerate(used)}}
        entries = [entry_of[number] for number in numbers]
        return _Entries(list(numbers), [self.plans[number] for number in used], entries, torch.tensor(entries))


class _Entries(NamedTuple):
    """Where rows find their factors in a table that holds only the plans they follow.

    Attributes:
        numbers: each row's plan, by its number in the mapping.
        plans: the plans of the table.
        entries, entry_B: each row's entry of the table, as a list and as a tensor.
    """

    numbers: list[int]
    plans: list[SteeringPlan]
    entries: list[int]
    entry_B: "Tensor"


def factor_table(plans: Sequence[SteeringPlan], index: "Tensor") -> "list[Tensor]":
    """Each plan's factors for the strength, in the shape of `index`; the last entry is zeros, for UNSTEERED.

    Args:
        plans: [P]; the result has P + 1 tensors.
        index: each token's index among the generated ones, negative in the prompt, in any shape.
    """
    import torch

    return [*(plan.factor(index) for plan in plans), torch.zeros(index.shape)]
