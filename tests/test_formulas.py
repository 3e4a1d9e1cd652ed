"""The formulas against numbers computed by hand, with E, c and z small enough to check every case mentally."""

import pytest
import torch

from steermoe import formulas
from steermoe.formulas import BY_NAME, FORMULAS, SCALES

EXPERTS = [0.0, 0.4, 0.0, 0.1]
POSITIVE = [2.0, -1.0, 1.0, 0.5]
"""Its largest logit is 2."""
NEGATIVE = [-2.0, -1.0, -3.0, -4.0]
"""Its largest logit is -1: the two scales differ in sign."""

CASES = [
    # formula, scale, c, z, expected
    ("additive", "paper", 2.0, POSITIVE, [2.0, -0.2, 1.0, 0.7]),
    ("additive", "magnitude", 2.0, POSITIVE, [2.0, -0.2, 1.0, 0.7]),
    ("additive", "magnitude", 2.0, NEGATIVE, [-2.0, -0.2, -3.0, -3.8]),
    ("additive", "magnitude", -2.0, POSITIVE, [2.0, -1.8, 1.0, 0.3]),
    ("max_scaled", "paper", 2.0, POSITIVE, [2.0, 0.6, 1.0, 0.9]),
    ("max_scaled", "magnitude", 2.0, POSITIVE, [2.0, 0.6, 1.0, 0.9]),
    ("max_scaled", "paper", 2.0, NEGATIVE, [-2.0, -1.8, -3.0, -4.2]),
    ("max_scaled", "magnitude", 2.0, NEGATIVE, [-2.0, -0.2, -3.0, -3.8]),
    ("max_scaled", "magnitude", -2.0, POSITIVE, [2.0, -2.6, 1.0, 0.1]),
    ("max_scaled", "magnitude", -2.0, NEGATIVE, [-2.0, -1.8, -3.0, -4.2]),
    ("zero_max_scaled", "paper", 2.0, POSITIVE, [2.0, 1.6, 1.0, 0.4]),
    ("zero_max_scaled", "magnitude", 2.0, POSITIVE, [2.0, 1.6, 1.0, 0.4]),
    ("zero_max_scaled", "paper", 2.0, NEGATIVE, [-2.0, -0.8, -3.0, -0.2]),
    ("zero_max_scaled", "magnitude", 2.0, NEGATIVE, [-2.0, 0.8, -3.0, 0.2]),
    ("zero_max_scaled", "paper", -2.0, POSITIVE, [2.0, -1.6, 1.0, -0.4]),
    ("zero_max_scaled", "magnitude", -2.0, POSITIVE, [2.0, -1.6, 1.0, -0.4]),
    # away from experts with low logits: zeroing would raise them to -0.8 and -0.2, so they stay
    ("zero_max_scaled", "magnitude", -2.0, NEGATIVE, [-2.0, -1.0, -3.0, -4.0]),
    ("zero_max_scaled", "paper", -2.0, NEGATIVE, [-2.0, 0.8, -3.0, 0.2]),
]


@pytest.mark.parametrize(("formula", "scale", "strength", "logits", "expected"), CASES)
def test_by_hand(formula, scale, strength, logits, expected):
    steered = BY_NAME[formula](torch.tensor([logits]), torch.tensor(EXPERTS), strength, scale)
    torch.testing.assert_close(steered, torch.tensor([expected]))


@pytest.mark.parametrize(("formula", "scale", "strength", "logits", "expected"), CASES)
def test_a_strength_for_each_token_is_the_same_as_a_number(formula, scale, strength, logits, expected):
    logits_TN = torch.tensor([logits, POSITIVE])
    strength_T1 = torch.tensor([[strength], [1.0]])
    steered = BY_NAME[formula](logits_TN, torch.tensor(EXPERTS), strength_T1, scale)
    alone = BY_NAME[formula](logits_TN[1:], torch.tensor(EXPERTS), 1.0, scale)
    torch.testing.assert_close(steered, torch.cat([torch.tensor([expected]), alone]))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("formula", FORMULAS)
def test_experts_for_each_token(formula, scale):
    logits_TN = torch.tensor([POSITIVE, NEGATIVE])
    experts_TN = torch.tensor([EXPERTS, EXPERTS[::-1]])
    together = BY_NAME[formula](logits_TN, experts_TN, 2.0, scale)
    for token in (0, 1):
        alone = BY_NAME[formula](logits_TN[token : token + 1], experts_TN[token], 2.0, scale)
        torch.testing.assert_close(together[token : token + 1], alone)


@pytest.mark.parametrize("formula", FORMULAS)
def test_scales_agree_where_the_largest_logit_is_positive(formula):
    logits_TN = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    logits_TN[:, 0] = logits_TN[:, 0].abs()
    experts = torch.tensor([0.0, 0.3, 0.0, 0.0, 0.2, 0.0, 0.0, 0.0])
    paper, magnitude = (BY_NAME[formula](logits_TN, experts, 3.0, scale) for scale in SCALES)
    assert torch.equal(paper, magnitude)
    assert not torch.equal(paper, logits_TN)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("formula", FORMULAS)
def test_experts_outside_the_vector_keep_their_logits(formula, scale):
    logits_TN = torch.tensor([POSITIVE, NEGATIVE])
    steered = BY_NAME[formula](logits_TN, torch.tensor(EXPERTS), 5.0, scale)
    assert torch.equal(steered[:, [0, 2]], logits_TN[:, [0, 2]])


@pytest.mark.parametrize("strength", [-3.0, torch.tensor([[-3.0]])])
def test_negative_strength_never_raises_a_logit(strength):
    logits_TN = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) - 1
    steered = formulas.zero_max_scaled(logits_TN, torch.tensor(EXPERTS), strength, "magnitude")
    assert (steered <= logits_TN).all()
    assert (steered < logits_TN).any()


def test_a_negative_expert_weight_lowers_its_logit():
    steered = formulas.zero_max_scaled(torch.tensor([POSITIVE]), torch.tensor([0.0, 0.0, -0.5, 0.0]), 2.0)
    torch.testing.assert_close(steered, torch.tensor([[2.0, -1.0, -1.0, 0.5]]))


@pytest.mark.parametrize("formula", FORMULAS)
def test_logits_are_not_changed_in_place(formula):
    logits_TN = torch.tensor([POSITIVE])
    BY_NAME[formula](logits_TN, torch.tensor(EXPERTS), 2.0, "magnitude")
    assert logits_TN.tolist() == [POSITIVE]


@pytest.mark.parametrize("logits", [POSITIVE, NEGATIVE])
def test_force_lifts_above_all_others(logits):
    forced = formulas.force(torch.tensor([logits]), torch.tensor([False, False, True, True]))
    top = max(logits) + formulas.FORCE_MARGIN
    assert forced.tolist() == [[logits[0], logits[1], top, top]]


@pytest.mark.parametrize("logits", [POSITIVE, NEGATIVE])
def test_ban_pushes_below_all_others_and_stays_finite(logits):
    banned_TN = torch.tensor([[True, False, False, False]])
    banned = formulas.ban(torch.tensor([logits]), banned_TN)
    assert banned[0, 1:].tolist() == logits[1:]
    assert banned[0, 0] == max(logits) - formulas.BAN_DEPTH
    assert banned.softmax(-1)[0, 0] == 0
    assert banned.softmax(-1).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1.0, 300.0, 3e4, 1e7])
def test_force_and_ban_survive_rounding(dtype, size):
    """Where a step between two numbers of the type is larger than the margin."""
    if size > torch.finfo(dtype).max / 4:
        pytest.skip("such logits are infinite in this type")
    eps = torch.finfo(dtype).eps
    logits_TN = (torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * size).to(dtype).float()
    marks = torch.arange(8)
    steered = formulas.ban(formulas.force(logits_TN, marks == 3, eps), marks == 5, eps).to(dtype)
    others = steered[:, [0, 1, 2, 4, 6, 7]]
    assert (steered[:, 3:4] > others).all()
    assert (steered[:, 5:6] < others).all()


def test_a_banned_expert_is_below_logits_that_were_pushed_far_down():
    banned = formulas.ban(torch.tensor([[5.0, -1e6, 3e5, 0.0]]), torch.tensor([True, False, False, False]))
    assert banned.argmin() == 0


def test_force_and_ban_of_each_token():
    wanted_TN = torch.tensor([[True, False], [False, True]])
    assert formulas.force(torch.zeros(2, 2), wanted_TN).argmax(-1).tolist() == [0, 1]
    assert formulas.ban(torch.zeros(2, 2), wanted_TN).argmin(-1).tolist() == [0, 1]


def test_logits_that_sink_stay_within_reach_of_a_sigmoid():
    logits_TN = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [-300.0, -310.0, -305.0]])
    push_TN = torch.tensor([[-1e6, -2e6, -1e6], [-42.0, -42.0, -42.0], [0.0, -1e6, -80.0], [0.0, 0.0, 0.0]])
    steered_TN = formulas.apply("additive", logits_TN, push_TN, push_TN > 0, "magnitude")
    assert steered_TN.tolist() == [
        [-40.0, -87.0, -41.0],  # all sank: they move up together, and none below the floor
        [-39.0, -41.0, -40.0],  # not that far
        [3.0, -87.0, -78.0],
        [-300.0, -310.0, -305.0],  # they were there before
    ]
    assert bool((steered_TN[:3].sigmoid() > 0).all())


@pytest.mark.parametrize("push", [-1000.0, -90.0])
def test_softmax_does_not_notice_that_logits_stay_in_reach(push):
    logits_TN = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)) * 3
    for lowered in (16, 15, 3):
        push_N = torch.tensor([push] * lowered + [0.0] * (16 - lowered))
        bounded_TN = formulas.apply("additive", logits_TN, push_N, push_N > 0, "magnitude")
        torch.testing.assert_close(bounded_TN.softmax(-1), (logits_TN + push_N).softmax(-1), atol=1e-4, rtol=1e-3)
