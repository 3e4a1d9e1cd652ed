"""Which plan each row of a batch follows, and how strongly that plan steers each of the row's tokens.

Pure arithmetic on plans: it knows no model, no engine, and nothing of how logits are edited.

Shapes: B rows, S columns of a forward call, P plans.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from steermoe.steering.plans import SteeringPlan

UNSTEERED = -1
"""The number of rows and tokens that follow no plan."""


class PlanMapping:
    """The distinct plans of a batch, numbered in the order in which its rows first follow them.

    Equal plans share a number.

    Args:
        rows: one plan a row; None for an unsteered row.

    Attributes:
        plans: the distinct plans; a plan's number is its index here.
    """

    def __init__(self, rows: Iterable[SteeringPlan | None] = ()) -> None:
        self.plans = tuple(dict.fromkeys(plan for plan in rows if plan is not None))
        self._numbers: dict[SteeringPlan | None, int] = {None: UNSTEERED}
        self._numbers.update((plan, number) for number, plan in enumerate(self.plans))
        self._kept: tuple[list[int], list[SteeringPlan], Tensor] | None = None

    def knows(self, rows: Iterable[SteeringPlan | None]) -> bool:
        """Whether other rows follow no further plan, so that whatever was made from the plans serves them too."""
        return self._numbers.keys() >= set(rows)

    def numbers(self, rows: Iterable[SteeringPlan | None]) -> list[int]:
        """The number of each row's plan, UNSTEERED for None.

        Raises:
            KeyError: a plan that it does not know.
        """
        return [self._numbers[plan] for plan in rows]

    def factors(self, numbers: list[int], index: Tensor) -> Tensor:
        """[B, S], by how much each token's strength is multiplied: 0 where it is not steered.

        The rows of the result may share memory. What depends on the numbers alone is kept for the next call: rows
        seldom change from token to token.

        Args:
            numbers: one a row, as of `numbers`.
            index: each token's index among the generated ones, negative in the prompt; [S] for all rows, or [B, S].
        """
        if self._kept is None or self._kept[0] != numbers:
            used = sorted(set(numbers) - {UNSTEERED})
            row_of = {UNSTEERED: UNSTEERED, **{number: row for row, number in enumerate(used)}}
            rows = torch.tensor([row_of[number] for number in numbers])
            self._kept = list(numbers), [self.plans[number] for number in used], rows
        _, plans, row_B = self._kept
        if len(plans) == 1 and UNSTEERED not in numbers:
            return plans[0].factor(index).expand(len(numbers), -1)
        table = factor_table(plans, index)
        return table[row_B] if index.dim() == 1 else table[row_B, torch.arange(len(row_B))]


def factor_table(plans: Sequence[SteeringPlan], index: Tensor) -> Tensor:
    """[P + 1, ...], by how much each plan multiplies the strength of each token; UNSTEERED is the last row, of zeros.

    Args:
        plans: [P].
        index: each token's index among the generated ones, negative in the prompt, in any shape.
    """
    return torch.stack([*(plan.factor(index) for plan in plans), torch.zeros(index.shape)])
