"""The choice that vLLM's routers make again for tokens with lists, against one that is made number by number."""

import pytest
import torch

from steermoe.engines.vllm.selection import Choice
from steermoe.routing.selection import Lists

EXPERTS, TOP_K, TOKENS = 8, 2, 40


def scores_of(scoring, z):
    sigmoid = 1 / (1 + torch.exp(-z))
    return {"softmax": torch.exp(z) / torch.exp(z).sum(), "sigmoid": sigmoid}.get(scoring, torch.log1p(z.exp()).sqrt())


def by_hand(choice, z, forced, banned):
    """One token's experts, best first, and the scores that their weights are made of."""
    scores = scores_of(choice.scoring, z)
    by = scores if choice.biases is None else scores + choice.biases
    size = EXPERTS // choice.groups
    groups = [list(range(first, first + size)) for first in range(0, EXPERTS, size)]
    best = [
        sum(sorted((float(by[n]) for n in group), reverse=True)[: 1 if choice.biases is None else 2])
        for group in groups
    ]
    used = sorted(range(len(groups)), key=lambda g: -best[g])[: choice.groups_used]
    allowed = [n for g in used for n in groups[g] if n not in banned]
    if len(allowed) < TOP_K:
        allowed = [n for n in range(EXPERTS) if n not in banned]
    others = sorted((n for n in allowed if n not in forced), key=lambda n: -float(by[n]))
    return [*forced, *others][:TOP_K], scores


CHOICES = [
    Choice(scoring, renormalizes, biases, groups, 1, factor=2.5)
    for scoring in ("softmax", "sigmoid", "sqrtsoftplus")
    for renormalizes in (True, False)
    for biases in (None, torch.linspace(4, -4, EXPERTS))
    for groups in (1, 2)
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize(("forced", "banned"), [([6], []), ([2, 6], []), ([], [0, 1, 3]), ([5], [0, 1, 4, 7])], ids=str)
def test_tokens_with_lists_keep_to_them_and_others_keep_their_bits(choice, forced, banned):
    z_TN = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0)) * 2
    has_lists_T1 = torch.arange(TOKENS)[:, None] % 3 > 0
    marks = [
        has_lists_T1 & torch.isin(torch.arange(EXPERTS), torch.tensor(named, dtype=torch.long))
        for named in (forced, banned)
    ]
    first = [by_hand(choice, z, [], []) for z in z_TN]
    experts = torch.tensor([chosen for chosen, _ in first], dtype=torch.int32)
    factor = 2.5
    weights = torch.stack([scores[chosen] for chosen, scores in first]) * factor
    if choice.renormalizes:
        weights = weights / weights.sum(-1, keepdim=True) * factor
    weights[has_lists_T1[:, 0] & (torch.arange(TOKENS) % 5 == 0)] = float("nan")  # as where all chosen are banned
    new_weights, new_experts = choice.again(z_TN, Lists(*marks), weights, experts)
    assert new_experts.dtype == experts.dtype
    for token, z in enumerate(z_TN):
        if not has_lists_T1[token]:
            assert torch.equal(new_weights[token], weights[token])
            assert torch.equal(new_experts[token], experts[token])
            continue
        chosen, scores = by_hand(choice, z, forced, banned)
        expected = scores[chosen] * factor
        if choice.renormalizes:
            expected = expected / expected.sum() * factor
        found = dict(zip(new_experts[token].tolist(), new_weights[token].tolist(), strict=True))
        assert found == pytest.approx(dict(zip(chosen, expected.tolist(), strict=True)), rel=1e-4)
