"""What the rows of a watched model have read, for plans that follow tags among a text's tokens.

Shapes: B rows, S columns of a forward call.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from steermoe.errors import SteeringError
from steermoe.routing.tracker import Window
from steermoe.steering.plans import SteeringPlan
from steermoe.steering.segments import Segments, Tags
from steermoe.steering.tags import ModelTags


class Histories:
    """Numbers the tokens of each row by what the row has read, from the first column of its prompt on.

    Args:
        tags: the model's.
    """

    def __init__(self, tags: ModelTags) -> None:
        self._tags = tags
        self._rows: list[tuple[SteeringPlan | None, Segments | None]] = []
        self._read: list[list[int]] = []

    def index(self, window: Window, plans: Sequence[SteeringPlan | None]) -> Tensor:
        """The numbers of the tokens of a call, for `SteeringPlan.factor`; [S] or [B, S].

        Args:
            window: the call.
            plans: one per row.

        Raises:
            SteeringError: a plan follows tags, and what the text is can't be known.
        """
        index = window.generated_index()
        if window.stack == "encoder":  # the prompt's last token is the decoder's first
            return index - 1
        tags = [self._tags.of(plan) for plan in plans]
        if not any(tags) or window.index is not None:
            return index
        if window.ids is None:
            if window.is_prompt:  # no token of a prompt depends on its tags
                return index
            raise SteeringError(f"{_follows(plans, tags)}, but this call passes no input_ids: pass them")
        if window.reorders:
            raise SteeringError(
                f"{_follows(plans, tags)}, which beam search reorders: pass num_beams=1, or steer with positions prompt"
            )
        self._take(window, window.ids.tolist())
        rows = [self._segments(row, plan, own, window) for row, (plan, own) in enumerate(zip(plans, tags, strict=True))]
        index_BS = index.expand(len(plans), -1).clone()
        for row, segments in enumerate(rows):
            if segments is not None:
                index_BS[row] = torch.tensor(segments.numbers[window.first :])
        return index_BS

    def _take(self, window: Window, ids: list[list[int]]) -> None:
        """Add the tokens of a call to those that were read before it."""
        if window.first == 0:
            self._read, self._rows = [[] for _ in ids], []
        known = {len(tokens) for tokens in self._read}
        if len(self._read) != len(ids) or min(known, default=0) < window.first:
            raise SteeringError(
                f"this call continues {len(ids)} texts after {window.first} tokens that were not read under this "
                "steering: attach it before the prompt is read, and keep the rows as they are"
            )
        for tokens, new in zip(self._read, ids, strict=True):
            tokens[window.first :] = new  # also where drafted tokens were not accepted

    def _segments(self, row: int, plan: SteeringPlan | None, tags: Tags | None, window: Window) -> Segments | None:
        """A row's tokens read; again from the first one if its plan is another now."""
        if len(self._rows) <= row:
            self._rows.append((None, None))
        last_plan, segments = self._rows[row]
        if plan is None or tags is None:
            segments = None
        elif segments is None or last_plan != plan or segments.prompt != window.prompt_length:
            segments = Segments(plan.positions, tags, window.prompt_length)
        if segments is not None:
            segments.cut(window.first)
            segments.read(self._read[row][len(segments.tokens) :])
        self._rows[row] = plan, segments
        return segments


def _follows(plans: Sequence[SteeringPlan | None], tags: Sequence[Tags | None]) -> str:
    plan = next(plan for plan, own in zip(plans, tags, strict=True) if plan is not None and own is not None)
    return f"steering at positions {plan.positions} follows the tags in each row's text"
