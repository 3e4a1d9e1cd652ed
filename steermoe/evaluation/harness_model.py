"""A steered model for EleutherAI's lm-evaluation-harness: the only importer of lm_eval, and imported late."""

import copy
from typing import Any

from lm_eval.models.huggingface import HFLM

from steermoe.evaluation.likelihood import Likelihood, likelihoods
from steermoe.models.loading import LoadedModel
from steermoe.steering.handle import steer
from steermoe.steering.plans import SteeringPlan


class SteeredLM(HFLM):  # type: ignore[misc]
    """The harness's model of transformers, steered by a plan.

    What is generated is steered as `generate` does. Where the likelihood of a continuation is measured, its context is
    the prompt and it counts as generated, in any batch and however the harness groups its requests. A text whose whole
    likelihood is measured (perplexity) is a continuation of one token.

    Args:
        loaded: the model; no steering may be attached to it.
        plan: how it is steered; None leaves it alone.
        batch_size: texts generated at once.
    """

    def __init__(self, loaded: LoadedModel, plan: SteeringPlan | None = None, batch_size: int = 8) -> None:
        tokenizer = copy.deepcopy(loaded.tokenizer)  # it is given a padding token
        super().__init__(loaded.model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)
        self.loaded, self.plan = loaded, plan

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood and whether it is the greedy continuation, of (texts, context tokens, continuation tokens)."""
        pairs = [_cut(context, rest, self.max_length) for _, context, rest in requests]
        found: list[Likelihood] = likelihoods(self.loaded, pairs, self.plan)
        answers = [(one.logprob, one.greedy) for one in found]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:  # parts of a longer text have none
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        if self.plan is None:
            return super()._model_generate(*args, **kwargs)
        with steer(self.model, rows=[self.plan], tokenizer=self.loaded.tokenizer):
            return super()._model_generate(*args, **kwargs)


def _cut(context: list[int], rest: list[int], most: int) -> tuple[list[int], list[int]]:
    """Without the beginning of a context that is too long for the model, which does not read the last token."""
    spare = len(context) + len(rest) - most - 1
    return context[max(0, spare) :] or context[-1:], rest
