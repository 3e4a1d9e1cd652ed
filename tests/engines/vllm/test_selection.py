"""The choice that vLLM's routers make again for tokens with lists, against one that is made number by number."""

import pytest
import torch

from steermoe.engines.vllm.selection import TRIAL_TOKENS, Choice, counted, keeps_to_lists
from steermoe.engines.vllm.steps import Row, Steps
from steermoe.engines.vllm.wire import pack
from steermoe.errors import SteeringError
from steermoe.routing.selection import Lists
from steermoe.routing.shape import RouterShape
from steermoe.steering.plans import SteeringPlan

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


SHAPE = RouterShape(0, EXPERTS, EXPERTS, TOP_K)


def by_topk(hidden, logits):
    """As Cohere's: sigmoids of large logits tie."""
    return logits.sigmoid().topk(TOP_K, -1)


def by_largest_twice(hidden, logits):
    """As Phi's."""
    first = logits.max(-1, keepdim=True)
    second = logits.scatter(-1, first.indices, float("-inf")).max(-1, keepdim=True)
    return torch.cat([first.values, second.values], -1), torch.cat([first.indices, second.indices], -1)


def by_group(hidden, logits):
    """As InternS1's: one expert of each group."""
    weights, experts = logits.softmax(-1).unflatten(-1, (TOP_K, -1)).topk(1, -1)
    return weights.flatten(1), (experts + torch.arange(TOP_K)[:, None] * (EXPERTS // TOP_K)).flatten(1)


def by_kernel(hidden, logits):
    """By an operation that isn't caught, as a kernel is not."""
    experts = torch.cat([logits.kthvalue(EXPERTS - place, -1, keepdim=True).indices for place in range(TOP_K)], -1)
    return logits.gather(1, experts), experts


def by_more_than_logits(hidden, logits):
    raise AssertionError("needs the tokens too")


@pytest.mark.parametrize(
    ("function", "keeps"),
    [
        (by_topk, True),
        (by_largest_twice, True),
        (by_group, False),
        (by_kernel, False),
        (by_more_than_logits, False),
    ],
)
def test_a_routing_function_is_tried_before_it_is_trusted(function, keeps):
    assert keeps_to_lists(function, SHAPE, torch.zeros(TRIAL_TOKENS, 4)) is keeps


def listed_steps(plan, graphs=False, compiled=True, choices=(None,)):
    """Steps in a call of three tokens of a plan and one without."""
    steps = Steps([SHAPE], [0], 16, 4, torch.device("cpu"), graphs, choices)
    steps.compiled = compiled
    steps.begin([Row("a", pack(plan), 0, 3, 2), Row("b", None, 0, 1, 2)])
    return steps


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("function", [by_topk, by_largest_twice])
def test_functions_keep_to_lists_and_are_counted(function, graphs):
    steps = listed_steps(SteeringPlan(force=((0, 5),), ban=((0, 1), (0, 2)), positions="all"), graphs)
    logits = 30 + torch.randn(6, EXPERTS, generator=torch.Generator().manual_seed(1))  # two tokens of padding
    logits[:, 5] = -30
    weights, experts = steps.route(0, 6, lambda: function(None, logits))
    assert experts[:3].eq(5).any(-1).all()
    assert not torch.isin(experts[:3], torch.tensor([1, 2])).any()
    own = function(None, logits)
    assert torch.equal(weights[3:], own[0][3:])
    assert torch.equal(experts[3:], own[1][3:])
    report = steps.report()
    assert (report.forced_hits, report.forced_places, report.banned_hits, report.banned_places) == (3, 3, 0, 6)
    assert steps.report().forced_places == 0
    steps.end()
    steps.begin([Row("b", None, 0, 1, 2)])
    assert torch.equal(steps.route(0, 6, lambda: function(None, logits))[1], own[1])
    assert steps.report().forced_places == 0


def test_a_function_that_chooses_otherwise_than_in_the_trial_is_an_error():
    steps = listed_steps(SteeringPlan(force=((0, 5),), positions="all"))
    with pytest.raises(SteeringError, match="router of layer 0 chooses its experts in a way that steermoe does not"):
        steps.route(0, 4, lambda: by_kernel(None, torch.randn(4, EXPERTS)))


@pytest.mark.parametrize("graphs", [False, True])
def test_choices_made_again_are_counted_where_nothing_else_counts_them(graphs):
    plan = SteeringPlan(force=((0, 5),), ban=((0, 1), (0, 2)), positions="all")
    logits = torch.randn(4, EXPERTS, generator=torch.Generator().manual_seed(1)) * 100  # softmax ends, scores tie at 0
    weights, experts = logits.softmax(-1).topk(TOP_K, -1)
    for compiled in (True, False):
        steps = listed_steps(plan, graphs, compiled, [Choice("softmax", True)])
        _, chosen = steps.choose(0, logits, weights, experts)
        assert chosen[:3].eq(5).any(-1).all()
        assert not torch.isin(chosen[:3], torch.tensor([1, 2])).any()
        report = steps.report()
        expected = (3, 3, 0, 6) if compiled else (0, 0, 0, 0)  # by `chose`, which reads what vLLM captures
        assert (report.forced_hits, report.forced_places, report.banned_hits, report.banned_places) == expected


def test_counts_show_what_does_not_keep_to_lists():
    lists = Lists(torch.eye(EXPERTS, dtype=torch.bool)[[1, 1, 0]], torch.eye(EXPERTS, dtype=torch.bool)[[2, 0, 3]])
    assert counted(lists, torch.tensor([[1, 2], [3, 4], [-1, -1]])).tolist() == [1, 3, 1, 3]
