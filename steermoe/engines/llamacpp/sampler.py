"""Draws one row's next token with numpy, by the rules of `sampling.RowSampler`: equal logits and seed, equal token.

torch would take longer to import than all else that the first token needs, and its threads would wake for every token
and then compete with those of llama.cpp. Memory is used again: allocating this much for every token would cost more
than the arithmetic.

Shapes: V tokens of the vocabulary.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from steermoe.engines.request import Sampling

Floats = NDArray[np.float32]
BLOCK = 256
"""How many tokens' weights are summed together."""


class TorchRandom:
    """The numbers of `torch.rand(1, dtype=torch.float64)` with a seeded generator on a CPU, one after another.

    Both libraries have Matsumoto's and Nishimura's MT19937, seeded by its `init_genrand` with the seed's lower 32 bits.
    Of two of its words, the first is the higher half, and torch keeps the lower 53 bits.
    """

    def __init__(self, seed: int) -> None:
        self._words = np.random.RandomState(seed % 2**32)

    def draw(self) -> float:
        """From 0 on, below 1."""
        high, low = self._words.randint(0, 2**32, 2, dtype=np.uint32).tolist()
        return float((high << 32 | low) % 2**53) * 2.0**-53


class TokenSampler:
    """One row's draws, one after another.

    Args:
        sampling: its settings and seed.
        ends: tokens that end a text, excluded until the row has its `min_new_tokens`.
    """

    def __init__(self, sampling: Sampling, ends: Sequence[int]) -> None:
        self.sampling = sampling
        self._ends = np.array(sorted(ends), dtype=np.int64)
        self._random = TorchRandom(sampling.seed)
        self._scores = self._weights = np.zeros(0, dtype=np.float32)

    def draw(self, logits: Floats, context: Sequence[int], new_tokens: int) -> int:
        """The next token.

        Args:
            logits: [V], left as they are.
            context: prompt and new tokens so far, for the repetition penalty.
            new_tokens: how many of them are new.
        """
        warped = self.warp(logits, context, new_tokens)
        if not self.sampling.do_sample:
            return int(warped.argmax())
        drawn = self._random.draw()
        if len(self._weights) - len(warped) not in range(BLOCK):
            self._weights = np.zeros(-(-len(warped) // BLOCK) * BLOCK, dtype=np.float32)
        weights = self._weights[: len(warped)]
        np.exp(np.subtract(warped, warped.max(), out=weights), out=weights)
        # sums of blocks first, then sums within the block that is hit: a cumulative sum of everything is slow
        blocks = self._weights.reshape(-1, BLOCK)
        ends = blocks.sum(1, dtype=np.float64).cumsum()
        target = drawn * ends[-1]
        block = int(np.searchsorted(ends, target, side="right"))
        within = blocks[block].cumsum(dtype=np.float64)
        place = int(np.searchsorted(within, target - (ends[block - 1] if block else 0.0), side="right"))
        if place == BLOCK:  # by rounding
            place = int(np.flatnonzero(blocks[block])[-1])
        return block * BLOCK + place

    def warp(self, logits: Floats, context: Sequence[int], new_tokens: int) -> Floats:
        """The logits [V] that tokens are drawn from, in the order of transformers' own warpers.

        The next call may overwrite them.
        """
        sampling = self.sampling
        scores = logits
        if len(self._scores) != len(logits):
            self._scores = np.empty(len(logits), dtype=np.float32)
        if new_tokens < sampling.min_new_tokens and len(self._ends):
            scores = self._scores
            np.copyto(scores, logits)
            scores[self._ends] = -np.inf
        presence, frequency = sampling.penalties
        if (presence or frequency) and new_tokens:
            scores = scores.copy()
            seen, counts = np.unique(np.asarray(context[-new_tokens:], dtype=np.int64), return_counts=True)
            scores[seen] -= (presence + frequency * counts).astype(np.float32)
        if sampling.repetition_penalty != 1:
            scores = scores.copy()
            seen = np.unique(np.asarray(context, dtype=np.int64))
            penalty = np.float32(sampling.repetition_penalty)
            scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
        if not sampling.do_sample:
            return scores
        if sampling.temperature != 1:
            scores = np.divide(scores, np.float32(sampling.temperature), out=self._scores)
        if sampling.top_k:
            smallest = np.partition(scores, -min(sampling.top_k, len(scores)))[-min(sampling.top_k, len(scores))]
            scores = np.where(scores < smallest, np.float32(-np.inf), scores)
        if sampling.top_p < 1:
            scores = _keep_probable(scores, sampling.top_p)
        if sampling.min_p:
            weights = np.exp(scores - scores.max())  # probabilities over that of the likeliest
            scores = np.where(weights < np.float32(sampling.min_p), np.float32(-np.inf), scores)
        return scores


def _keep_probable(scores: Floats, top_p: float) -> Floats:
    """The likeliest tokens whose probabilities reach `top_p` together; always the likeliest one."""
    order = np.argsort(scores, kind="stable")
    weights = np.exp(scores[order] - scores[order[-1]])
    cumulative = np.cumsum(weights / weights.sum())
    removed = cumulative <= 1 - top_p
    removed[-1] = False
    kept = scores.copy()
    kept[order[removed]] = -np.inf
    return kept
