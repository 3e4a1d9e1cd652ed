"""Which plan each row of a batch follows, and how strongly that plan steers each of the row's tokens.

Pure arithmetic on plans: it knows no model, no engine, and nothing of how logits are edited.

Shapes: B rows, S columns of a forward call.
"""

from collections.abc import Iterable, Mapping, Sequence

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

    def knows(self, rows: Iterable[SteeringPlan | None]) -> bool:
        """Whether other rows follow no further plan, so that whatever was made from the plans serves them too."""
        return self._numbers.keys() >= set(rows)

    def numbers(self, rows: Iterable[SteeringPlan | None]) -> list[int]:
        """The number of each row's plan, UNSTEERED for None.

        Raises:
            KeyError: a plan that it does not know.
        """
        return [self._numbers[plan] for plan in rows]

    def factors(self, numbers: Sequence[int], index: Tensor) -> Tensor:
        """[B, S], by how much each token's strength is multiplied: 0 where it is not steered.

        The result may share memory between rows.

        Args:
            numbers: one a row, as of `numbers`.
            index: each token's index among the generated ones, negative in the prompt; [S] for all rows, or [B, S].
        """
        used = sorted(set(numbers) - {UNSTEERED})
        if len(used) == 1 and UNSTEERED not in numbers:
            factor = self.plans[used[0]].factor(index)
            return factor if factor.dim() == 2 else factor.expand(len(numbers), -1)
        plans = {number: self.plans[number] for number in used}
        return factors_of_tokens(plans, torch.tensor(numbers)[:, None], index)


def factors_of_tokens(plans: Mapping[int, SteeringPlan], number: Tensor, index: Tensor) -> Tensor:
    """By how much each token's strength is multiplied, float32; 0 for tokens that follow none of the plans.

    Args:
        plans: by their numbers.
        number: of each token's plan.
        index: each token's index among the generated ones, negative in the prompt. Its shape and that of `number`
            broadcast to the result's.
    """
    factor = torch.zeros(torch.broadcast_shapes(number.shape, index.shape), dtype=torch.float32)
    for of_plan, plan in plans.items():
        factor = torch.where(number == of_plan, plan.factor(index), factor)
    return factor
