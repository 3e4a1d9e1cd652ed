"""Compare completions of one prompt: how steering changed the routing, and which of the domain's words appear."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steermoe.engines.request import Completion
from steermoe.evaluation.words import distinct_words, word_pattern
from steermoe.vectors.vector import SteeringVector


@dataclass(frozen=True, eq=False)
class Column:
    """One text of a comparison.

    Attributes:
        label: such as "unsteered" or "sport".
        detail: formula and strength.
        shares: for each vector of the comparison, the share of the text's top-k slots that its experts got, 0 to 1.
        words: where the text contains a keyword of any of the vectors: (start, end) characters.
        word_count: the number of different keywords, by domain.
    """

    completion: Completion
    label: str
    detail: str
    shares: dict[str, float]
    words: tuple[tuple[int, int], ...]
    word_count: dict[str, int]

    def as_dict(self, model: str) -> dict[str, Any]:
        """The completion's JSON with the comparison's figures added."""
        record = self.completion.as_dict(model)
        return {**record, "vector_shares": self.shares, "distinct_keywords": self.word_count}


def compare_completions(completions: Sequence[Completion]) -> list[Column]:
    """Columns for recorded completions of the same prompt (`Engine.generate(..., record=True)`), in their order."""
    vectors = {
        plan.vector.domain: plan.vector
        for plan in (completion.request.plan for completion in completions)
        if plan is not None and plan.vector is not None
    }
    patterns = {name: word_pattern(vector.info.keywords) for name, vector in vectors.items() if vector.info.keywords}
    columns = []
    for completion in completions:
        plan = completion.request.plan
        spans = {m.span() for pattern in patterns.values() for m in pattern.finditer(completion.text)}
        columns.append(
            Column(
                completion=completion,
                label="unsteered" if plan is None else plan.vector.domain if plan.vector else "forced experts",
                detail="" if plan is None else f"{plan.formula}, strength {plan.strength:g}",
                shares={
                    n: vector_share(completion.frequency, v)
                    for n, v in vectors.items()
                    if completion.frequency is not None
                },
                words=tuple(sorted(spans)),
                word_count={n: len(distinct_words(completion.text, pattern)) for n, pattern in patterns.items()},
            )
        )
    return columns


def vector_share(frequency: Tensor, vector: SteeringVector) -> float:
    """Share of top-k slots that went to the vector's experts, mean over layers.

    Args:
        frequency: routing embedding F [L, N] of a text.
        vector: its experts are those with E > 0.
    """
    return float((frequency[:, : vector.num_experts] * (vector.experts > 0)).sum(-1).mean())
