"""Sampling in which every row of a batch has a random generator of its own: no row's text depends on its neighbours.

Rows with equal settings are processed together, with the same results as one by one.

Shapes: B rows, V tokens of the vocabulary, G rows with equal settings, S tokens of a row's history.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from steermoe.engines.decoding import Row
from steermoe.engines.request import Sampling

BLOCK = 1 << 18
"""Scores that are processed at once on a CPU: 2 MB of probabilities stay in its cache, 25 MB would not."""

History = Callable[[int], Tensor]
"""A row's own tokens so far, [S], prompt included, without padding."""


def next_tokens(
    scores: Tensor,
    samplings: Sequence[Sampling],
    new: Sequence[int],
    ends: Tensor,
    history: History,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """The next token of each row, [B]; arguments as for `warp` and `pick`."""
    rows = max(1, BLOCK // scores.shape[1]) if scores.device.type == "cpu" else len(scores)
    picked = []
    for first in range(0, len(scores), rows):
        here = slice(first, first + rows)
        own = partial(_shifted, history, first)
        warped = warp(scores[here], samplings[here], new[here], ends, own)
        picked.append(pick(warped, [sampling.do_sample for sampling in samplings[here]], generators[here]))
    return torch.cat(picked)


def _shifted(history: History, first: int, row: int) -> Tensor:
    return history(first + row)


def warp(scores: Tensor, samplings: Sequence[Sampling], new: Sequence[int], ends: Tensor, history: History) -> Tensor:
    """The scores [B, V] that tokens are drawn from, float32, each row with its own settings.

    Args:
        scores: [B, V], the model's logits.
        samplings: one per row.
        new: tokens that each row has so far.
        ends: tokens that end a text, excluded until a row has its `min_new_tokens`.
        history: called only for rows with a penalty.
    """
    # always a copy: the scores that `generate` passes are not ours to change
    warped = scores.to(torch.float32, copy=True)
    if early := [row for row, sampling in enumerate(samplings) if new[row] < sampling.min_new_tokens]:
        warped[_numbers(early, warped)[:, None], ends.to(warped.device, non_blocking=True)] = float("-inf")
    for row, sampling in enumerate(samplings):
        presence, frequency = sampling.penalties
        if (presence or frequency) and new[row]:
            own = history(row)[-new[row] :].to(warped.device, non_blocking=True)
            counts_V = torch.zeros(warped.shape[1], dtype=torch.long, device=warped.device)
            counts_V.scatter_add_(0, own, torch.ones_like(own))  # bincount waits for a GPU
            warped[row] -= presence * (counts_V > 0) + frequency * counts_V
    for rows in _alike(samplings).values():
        warpers = _warpers(*_warping(samplings[rows[0]]))
        if not warpers:
            continue
        penalised = samplings[rows[0]].repetition_penalty != 1
        own_GS = _stacked([history(row) for row in rows]) if penalised else torch.empty(len(rows), 0, dtype=torch.long)
        own_GS = own_GS.to(warped.device, non_blocking=True)
        if len(rows) == len(samplings):
            warped = warpers(own_GS, warped)
        else:
            index = _numbers(rows, warped)
            warped[index] = warpers(own_GS, warped[index])
    return warped


def pick(warped: Tensor, samples: Sequence[bool], generators: Sequence[torch.Generator]) -> Tensor:
    """The next token of each row, [B], drawn from the warped scores [B, V]; the likeliest unless the row samples."""
    drawing = [row for row, is_drawn in enumerate(samples) if is_drawn]
    if len(drawing) < len(samples):
        token_B = warped.argmax(-1)
        if not drawing:
            return token_B
    else:
        token_B = torch.empty(len(warped), dtype=torch.long, device=warped.device)
    index = _numbers(drawing, warped)
    scores = warped if len(drawing) == len(samples) else warped[index]
    numbers = [torch.rand(1, generator=generators[row], dtype=torch.float64) for row in drawing]
    number = torch.stack(numbers).to(warped.device, non_blocking=True)
    # float64: float32 sums the probabilities of a large vocabulary too inexactly
    cumulative = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
    drawn = torch.searchsorted(cumulative, number * cumulative[:, -1:], right=True)
    token_B[index] = drawn.clamp(max=warped.shape[-1] - 1)[:, 0]
    return token_B


def note_logprobs(rows: Sequence[Row[Any]], logits: Tensor, token_B: Tensor) -> None:
    """Tell the recorders of the rows that have one how likely their next tokens were, by the logits [B, V]."""
    traced = [number for number, row in enumerate(rows) if row.recorder is not None]
    if not traced:
        return
    index = _numbers(traced, logits)
    logprob_TV = logits[index].float().log_softmax(-1)
    found = logprob_TV.gather(-1, token_B.to(logits.device)[index, None])[:, 0].tolist()
    for number, logprob in zip(traced, found, strict=True):
        recorder = rows[number].recorder
        assert recorder is not None
        recorder.drew(logprob)


def _numbers(numbers: Sequence[int], like: Tensor) -> Tensor:
    """Numbers as a tensor on the device of another one, which is not waited for."""
    return torch.tensor(numbers, dtype=torch.long).to(like.device, non_blocking=True)


def generators_of(samplings: Sequence[Sampling]) -> list[torch.Generator]:
    """A random generator per row, from its own seed."""
    return [torch.Generator().manual_seed(sampling.seed) for sampling in samplings]


class RowSampler(LogitsProcessor):
    """Draws each row's token and makes it the only possible one, so that greedy decoding takes it.

    Args:
        samplings: one per row, [B].
        prompt_lengths: [B], tokens of each row's prompt, without padding.
        ends: tokens that end a text, excluded until a row has its `min_new_tokens`.
        on_tokens: called with the model's logits [B, V] and the tokens [B] that are drawn from them.
    """

    def __init__(
        self,
        samplings: Sequence[Sampling],
        prompt_lengths: Sequence[int],
        ends: Sequence[int],
        on_tokens: Callable[[Tensor, Tensor], None] | None = None,
    ) -> None:
        self.on_tokens = on_tokens
        self.samplings = samplings
        self.prompt_lengths = prompt_lengths
        self.width = max(prompt_lengths)
        self.ends = torch.tensor(sorted(ends), dtype=torch.long)
        self.generators = generators_of(samplings)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token_B = next_tokens(scores, self.samplings, *self._given(input_ids), self.generators)
        if self.on_tokens is not None:
            self.on_tokens(scores, token_B)
        return torch.full_like(scores, float("-inf")).scatter(-1, token_B[:, None], 0.0)

    def warp(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores [B, V] that tokens are drawn from; no row's history includes padding."""
        return warp(scores, self.samplings, *self._given(input_ids))

    def _given(self, input_ids: Tensor) -> tuple[list[int], Tensor, History]:
        def history(row: int) -> Tensor:
            return input_ids[row, self.width - self.prompt_lengths[row] :]

        return [input_ids.shape[1] - self.width] * len(self.samplings), self.ends, history


class RowLimits(StoppingCriteria):
    """Ends each row at its own number of new tokens.

    Args:
        limits: one per row, [B].
        width: columns of the padded prompts.
    """

    def __init__(self, limits: Sequence[int], width: int) -> None:
        self.limits = torch.tensor(limits)
        self.width = width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return self.limits.to(input_ids.device, non_blocking=True) <= input_ids.shape[1] - self.width


class _TopP(TopPLogitsWarper):
    """Transformers' own; on a CPU, from sorted values alone, since sorting with indices costs 40 times as much.

    Indices only matter if several tokens tie at the border; such rows are left to the original.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.device.type != "cpu" or scores.dtype != torch.float32:
            return super().__call__(input_ids, scores)
        import numpy as np

        values_GV = torch.from_numpy(np.sort(scores.numpy(), axis=-1))
        kept_GV = values_GV.softmax(-1).cumsum(-1) > 1 - self.top_p
        kept_GV[:, -self.min_tokens_to_keep :] = True
        first_G1 = kept_GV.int().argmax(-1, keepdim=True)
        border_G1 = values_GV.gather(-1, first_G1)
        before_G1 = values_GV.gather(-1, (first_G1 - 1).clamp(min=0))
        out = scores.masked_fill(scores < border_G1, self.filter_value)
        ties = ((before_G1 == border_G1) & (first_G1 > 0)).flatten() & ~torch.isneginf(border_G1).flatten()
        for row in ties.nonzero().flatten().tolist():
            out[row : row + 1] = super().__call__(input_ids[row : row + 1], scores[row : row + 1])
        return out


def _warping(sampling: Sampling) -> tuple[float, bool, float, int, float, float]:
    """Everything that decides how a row's scores are warped."""
    return (
        sampling.repetition_penalty,
        sampling.do_sample,
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
    )


@lru_cache(maxsize=256)
def _warpers(
    penalty: float, do_sample: bool, temperature: float, top_k: int, top_p: float, min_p: float
) -> LogitsProcessorList:
    """Transformers' own warpers, in its order."""
    found = LogitsProcessorList()
    if penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(float(penalty)))
    if do_sample:
        if temperature != 1:
            found.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            found.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            found.append(_TopP(top_p))
        if min_p:
            found.append(MinPLogitsWarper(float(min_p)))
    return found


def _alike(samplings: Sequence[Sampling]) -> dict[Hashable, list[int]]:
    """The rows in groups whose scores are warped alike."""
    groups: dict[Hashable, list[int]] = {}
    for row, sampling in enumerate(samplings):
        groups.setdefault(_warping(sampling), []).append(row)
    return groups


def _stacked(histories: Sequence[Tensor]) -> Tensor:
    """[G, S]; short ones are padded with their first token, which no penalty counts twice."""
    longest = max(map(len, histories))
    return torch.stack([torch.cat([own[:1].expand(longest - len(own)), own]) for own in histories])
