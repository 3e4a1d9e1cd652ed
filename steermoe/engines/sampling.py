"""Sampling in which every row of a batch has a random generator of its own: no row's text depends on its neighbours.

Shapes: B rows, V tokens of the vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from steermoe.engines.base import Sampling


class RowSampler(LogitsProcessor):
    """Draws each row's token and leaves only it possible, so that greedy decoding then takes it.

    Args:
        samplings: one a row, [B].
        prompt_lengths: [B], tokens of each row's prompt, padding not counted.
        ends: tokens that end a text, kept away until a row has its `min_new_tokens`.
    """

    def __init__(self, samplings: Sequence[Sampling], prompt_lengths: Sequence[int], ends: Sequence[int]) -> None:
        self.samplings = samplings
        self.prompt_lengths = prompt_lengths
        self.width = max(prompt_lengths)
        self.ends = torch.tensor(sorted(ends), dtype=torch.long)
        self.warpers = [_warpers(sampling) for sampling in samplings]
        self.generators = [torch.Generator().manual_seed(sampling.seed) for sampling in samplings]
        self.samples = torch.tensor([sampling.do_sample for sampling in samplings])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        warped_BV = self.warp(input_ids, scores)
        # float64: the sum of a large vocabulary's probabilities is not exact enough in float32
        cumulative_BV = warped_BV.softmax(-1, dtype=torch.float64).cumsum(-1)
        drawn = [torch.rand(1, generator=generator, dtype=torch.float64) for generator in self.generators]
        drawn_B1 = torch.stack(drawn).to(scores.device)
        picked_B1 = torch.searchsorted(cumulative_BV, drawn_B1 * cumulative_BV[:, -1:], right=True)
        picked_B1 = picked_B1.clamp(max=scores.shape[-1] - 1)
        greedy_B1 = warped_BV.argmax(-1, keepdim=True)
        token_B1 = torch.where(self.samples.to(scores.device)[:, None], picked_B1, greedy_B1)
        return torch.full_like(scores, float("-inf")).scatter(-1, token_B1, 0.0)

    def warp(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores [B, V] that tokens are drawn from: each row under its own settings, its padding left out."""
        new_tokens = input_ids.shape[1] - self.width
        rows = []
        for row, (sampling, warpers) in enumerate(zip(self.samplings, self.warpers, strict=True)):
            own = scores[row : row + 1].float()
            if new_tokens < sampling.min_new_tokens:
                own = own.index_fill(-1, self.ends.to(own.device), float("-inf"))
            rows.append(warpers(input_ids[row : row + 1, self.width - self.prompt_lengths[row] :], own))
        return torch.cat(rows)


class RowLimits(StoppingCriteria):
    """Ends each row at its own number of new tokens.

    Args:
        limits: one a row, [B].
        width: columns of the padded prompts.
    """

    def __init__(self, limits: Sequence[int], width: int) -> None:
        self.limits = torch.tensor(limits)
        self.width = width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return self.limits.to(input_ids.device) <= input_ids.shape[1] - self.width


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    """Transformers' own, in its own order."""
    found = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.do_sample:
        if sampling.temperature != 1:
            found.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            found.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            found.append(TopPLogitsWarper(sampling.top_p))
    return found
