"""Sampling in which every row of a batch has a random generator of its own, so that its text does not depend on its neighbours."""

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from steermoe.engines.base import Sampling


class RowSampler(LogitsProcessor):
    """Draws each row's token and leaves only it possible, so that greedy decoding then takes it.

    Args:
        samplings: one a row, [B].
    """

    def __init__(self, samplings: list[Sampling]) -> None:
        self.warpers = [_warpers(sampling) for sampling in samplings]
        self.generators = [torch.Generator().manual_seed(sampling.seed) for sampling in samplings]
        self.samples = torch.tensor([sampling.do_sample for sampling in samplings])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = [
            warp(input_ids[row : row + 1], scores[row : row + 1].float()) for row, warp in enumerate(self.warpers)
        ]
        warped_BV = torch.cat(rows)
        cumulative_BV = warped_BV.softmax(-1).cumsum(-1)
        drawn_B1 = torch.stack([torch.rand(1, generator=generator) for generator in self.generators]).to(scores.device)
        picked_B1 = torch.searchsorted(cumulative_BV, drawn_B1 * cumulative_BV[:, -1:], right=True)
        picked_B1 = picked_B1.clamp(max=scores.shape[-1] - 1)
        greedy_B1 = warped_BV.argmax(-1, keepdim=True)
        token_B1 = torch.where(self.samples.to(scores.device)[:, None], picked_B1, greedy_B1)
        return torch.full_like(scores, float("-inf")).scatter(-1, token_B1, 0.0)


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    """Transformers' own, in its own order."""
    found = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.do_sample:
        if sampling.temperature != 1:
            found.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            found.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            found.append(TopPLogitsWarper(sampling.top_p))
    return found
