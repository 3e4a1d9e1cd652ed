"""How steering changes what a GGUF file predicts on given texts in llama.cpp, for calibration.

Shapes: T tokens of a text, of which S are scored, V vocabulary, L MoE layers, N experts per layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steermoe.engines.llamacpp.rows import CALL_TOKENS, factors_of
from steermoe.errors import GenerationError, count_of
from steermoe.evaluation.teacher_forcing import MAX_TOKENS, PROMPT_TOKENS
from steermoe.steering.plans import SteeringPlan

if TYPE_CHECKING:
    from steermoe.engines.llamacpp.engine import LlamaCppEngine


@dataclass(frozen=True)
class GGUFFigures:
    """As `TextFigures`, so far as calibration needs it."""

    kl_p95: float
    jaccard: float


class GGUFForcing:
    """Texts on which plans are compared with the unsteered model, whose predictions are kept in half precision.

    Args:
        engine: the GGUF file; nothing else may use it meanwhile.
        texts: what to read; texts that are too short are left out.
        prompt_tokens: tokens at the beginning of each that are not steered.
        max_tokens: tokens read of each text, at most.

    Raises:
        GenerationError: no text is long enough.
    """

    def __init__(
        self,
        engine: "LlamaCppEngine",
        texts: Sequence[str],
        *,
        prompt_tokens: int = PROMPT_TOKENS,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        self._engine, self._prompt = engine, prompt_tokens
        encoded = [engine.tokenizer.encode(text)[:max_tokens] for text in texts]
        self._texts = [ids for ids in encoded if len(ids) > prompt_tokens + 1]
        if not self._texts:
            raise GenerationError(
                f"none of {count_of(len(texts), 'text')} has more than {prompt_tokens + 1} tokens: "
                "give longer texts to measure on"
            )
        self._unsteered = [self._read(ids, None) for ids in self._texts]

    def compare(self, plan: SteeringPlan) -> GGUFFigures:
        """Read the texts with steering.

        Raises:
            SteeringError: the plan does not fit the model, or llama.cpp can't steer this architecture.
        """
        divergences, overlaps = [], []
        for ids, (before_SV, chosen_SLN) in zip(self._texts, self._unsteered, strict=True):
            logits_SV, steered_SLN = self._read(ids, plan)
            log_SV, base_SV = logits_SV.float().log_softmax(-1), before_SV.float().log_softmax(-1)
            divergences.append((log_SV.exp() * (log_SV - base_SV)).sum(-1))
            common = np.minimum(steered_SLN, chosen_SLN).sum(-1)
            overlaps.append((common / np.maximum(steered_SLN, chosen_SLN).sum(-1).clip(min=1)).ravel())
        return GGUFFigures(
            float(torch.cat(divergences).quantile(0.95)),
            float(np.concatenate(overlaps).mean()),
        )

    def _read(self, ids: Sequence[int], plan: SteeringPlan | None) -> tuple[Tensor, NDArray[np.int64]]:
        """The logits [S, V] that predict the tokens after the prompt, and the experts chosen for them [S, L, N]."""
        context, state = self._engine.context(1, len(ids)), self._engine.state
        state.install([] if plan is None else [plan])
        state.record(len(ids))
        factor_T = factors_of(plan, self._prompt, len(ids) - self._prompt)
        read: list[NDArray[np.float16]] = []
        for start in range(0, len(ids), CALL_TOKENS):
            part = ids[start : start + CALL_TOKENS]
            places = np.arange(start, start + len(part), dtype=np.int32)
            slots = np.full(len(part), -1 if plan is None else 0, dtype=np.int32)
            state.steer(slots, factor_T[places], np.arange(len(part), dtype=np.int32), places)
            context.forward(part, places.tolist(), [0] * len(part), None)
            state.verify()
            read += [context.logits(row).astype(np.float16) for row in range(len(part))]
        scored = slice(self._prompt, len(ids) - 1)
        chosen = state.counts[scored]
        state.record(0)
        return torch.from_numpy(np.stack(read[scored])), chosen
