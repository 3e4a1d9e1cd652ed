"""Sampling against transformers' own logits processors and against the distribution that it should follow."""

from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig, TopKLogitsWarper, TopPLogitsWarper

from steermoe.engines.hf.sampling import RowLimits, RowSampler
from steermoe.engines.request import Sampling
from steermoe.errors import GenerationError
from tests.support import steering_models as tiny

SCORES = torch.randn(1, tiny.VOCABULARY, generator=torch.Generator().manual_seed(0)) * 3


@pytest.fixture(scope="module")
def model():
    return tiny.build("mixtral")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 0.3, "top_k": 7},
        {"temperature": 1.5, "top_p": 0.6},
        {"top_k": 20, "top_p": 0.8, "repetition_penalty": 1.4},
        {"min_p": 0.05},
        {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.2, "repetition_penalty": 1.4},
        {"do_sample": False, "min_p": 0.9},
        {"repetition_penalty": 2.0, "temperature": 2.0},
        {"min_new_tokens": 3},
        {"do_sample": False, "repetition_penalty": 1.7, "temperature": 0.1, "top_k": 1},
    ],
    ids=str,
)
def test_scores_equal_those_of_transformers(model, options):
    """The very processors that `generate` builds from the same options, on a prompt of 5 with 2 new tokens."""
    ids, sampling = tiny.prompt(7), Sampling(**options)
    given = {name: getattr(sampling, name) for name in ("do_sample", "temperature", "top_p", "top_k", "min_p")}
    config = GenerationConfig(
        **given,
        repetition_penalty=float(sampling.repetition_penalty),
        min_new_tokens=sampling.min_new_tokens or None,
        eos_token_id=tiny.END,
    )
    model._prepare_special_tokens(config, device="cpu")
    theirs = model._get_logits_processor(config, input_ids_seq_length=5, encoder_input_ids=ids[:, :5], device="cpu")
    ours = RowSampler([sampling], [5], [tiny.END]).warp(ids, SCORES)
    assert torch.equal(ours, theirs(ids, SCORES.clone()))


def test_drawn_tokens_follow_the_distribution():
    """6,000 rows with seeds of their own, in one call: within four standard errors of the probabilities."""
    rows = 6_000
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0, float("-inf"), 3.0]])
    samplings = [Sampling(seed=seed, temperature=0.8, top_k=4) for seed in range(rows)]
    expected = RowSampler(samplings[:1], [1], []).warp(torch.ones(1, 1, dtype=torch.long), scores).softmax(-1)[0]
    sampler = RowSampler(samplings, [1] * rows, [])
    picked = sampler(torch.ones(rows, 1, dtype=torch.long), scores.expand(rows, -1))
    assert ((picked == 0).sum(-1) == 1).all()
    assert torch.isneginf(picked).sum() == rows * 5
    found = picked.argmax(-1).bincount(minlength=6) / rows
    error = (expected * (1 - expected) / rows).sqrt()
    assert ((found - expected).abs() <= 4 * error).all()
    assert found[3:5].tolist() == [0, 0]


def test_rows_have_their_own_settings_seeds_and_history():
    """Any row of a mixed batch draws what it draws alone, without the padding on its left."""
    samplings = [
        Sampling(seed=1),
        Sampling(seed=1, temperature=2.0),
        Sampling(do_sample=False, repetition_penalty=5.0),
        Sampling(seed=3, top_k=3, repetition_penalty=1.3, min_new_tokens=9),
        Sampling(seed=4, temperature=3.0, min_p=1.0),
    ]
    lengths = [6, 3, 2, 5, 4]
    batch = tiny.left_padded([tiny.prompt(length, seed=length) for length in lengths])["input_ids"]
    scores = torch.randn(5, tiny.VOCABULARY, generator=torch.Generator().manual_seed(5))
    scores[:, tiny.PAD] += 6  # which a penalty on padding would bring down
    together = RowSampler(samplings, lengths, [tiny.END])(batch, scores)
    for row, length in enumerate(lengths):
        alone = RowSampler(samplings[row : row + 1], [length], [tiny.END])
        assert torch.equal(alone(batch[row : row + 1, 6 - length :], scores[row : row + 1])[0], together[row])
    assert int(together[2].argmax()) == tiny.PAD
    assert int(together[4].argmax()) == int(scores[4].argmax())


def test_min_p_counts_after_temperature():
    """Probabilities of 1/2, 1/4, 1/8, 1/8: min-p 0.3 keeps two tokens at temperature 1, one at 0.5, all at 2."""
    scores = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    ids = torch.ones(1, 1, dtype=torch.long)
    for temperature, kept in ((1.0, [1, 1, 0, 0]), (0.5, [1, 0, 0, 0]), (2.0, [1, 1, 1, 1])):
        warped = RowSampler([Sampling(temperature=temperature, min_p=0.3)], [1], []).warp(ids, scores)
        assert torch.isfinite(warped[0]).int().tolist() == kept


@pytest.mark.parametrize("min_p", [0.0, 1e-9, 0.3, 1.0])
def test_min_p_leaves_tokens_above_its_share_of_the_likeliest(min_p):
    scores = torch.randn(64, tiny.VOCABULARY, generator=torch.Generator().manual_seed(2)) * 3
    samplings = [Sampling(seed=seed, temperature=1.0, min_p=min_p) for seed in range(64)]
    ids = torch.ones(64, 1, dtype=torch.long)
    warped = RowSampler(samplings, [1] * 64, []).warp(ids, scores)
    share = scores.softmax(-1) / scores.softmax(-1).amax(-1, keepdim=True)
    assert torch.equal(torch.isfinite(warped), share >= min_p)
    drawn = RowSampler(samplings, [1] * 64, [])(ids, scores).argmax(-1)
    assert torch.equal(drawn, scores.argmax(-1)) == (min_p == 1)
    plain = [replace(sampling, min_p=0.0) for sampling in samplings]
    assert torch.equal(drawn, RowSampler(plain, [1] * 64, [])(ids, scores).argmax(-1)) == (min_p < 0.3)


def test_same_seed_same_draws_and_others_differ():
    def draws(seed: int) -> list[int]:
        sampler = RowSampler([Sampling(seed=seed, temperature=1.0)], [1], [])
        return [int(sampler(torch.ones(1, 1, dtype=torch.long), SCORES / 3).argmax()) for _ in range(20)]

    assert draws(7) == draws(7)
    assert len({tuple(draws(seed)) for seed in range(10)}) == 10


def test_minimum_keeps_every_end_away_until_reached():
    sampler = RowSampler([Sampling(min_new_tokens=2), Sampling()], [3, 3], {5, 6})
    for new, kept_away in ((0, True), (1, True), (2, False)):
        warped = sampler.warp(torch.ones(2, 3 + new, dtype=torch.long), SCORES.expand(2, -1))
        assert torch.isneginf(warped[0, [5, 6]]).tolist() == [kept_away] * 2
        assert not torch.isneginf(warped[1]).any()


def test_row_limits():
    limits = RowLimits([1, 3, 2], width=4)
    assert [limits(torch.ones(3, 4 + new), None).tolist() for new in (1, 2, 3)] == [
        [True, False, False],
        [True, False, True],
        [True, True, True],
    ]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0 .* 1 or more"),
        ({"min_new_tokens": 121}, "min_new_tokens 121 .* 0 to max_new_tokens"),
        ({"temperature": 0.0}, "temperature 0.0 .* --no-do-sample"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.1}, "top_p 1.1 .* at most 1"),
        ({"top_k": -1}, "top_k -1 .* 0 to"),
        ({"min_p": -0.1}, "min_p -0.1 .* 0 to 1"),
        ({"min_p": 1.1}, "min_p 1.1 .* 0 to 1"),
        ({"min_p": float("nan")}, "min_p nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0 .* above 0"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_values_out_of_range(wrong, match):
    with pytest.raises(GenerationError, match=match):
        replace(Sampling(), **wrong)


@pytest.mark.parametrize("rounded", [False, True], ids=["no ties", "ties"])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
def test_top_p_by_sorted_values_has_the_bits_of_transformers(rounded, top_p):
    """With ties at the border too, as bfloat16 logits have them, and where top-k has been before."""
    scores = torch.randn(12, 3000, generator=torch.Generator().manual_seed(1)) * 3
    scores = scores.bfloat16().float() if rounded else scores
    for given in (scores, TopKLogitsWarper(40)(None, scores)):
        samplings = [Sampling(top_p=top_p, temperature=1.0)] * 12
        ours = RowSampler(samplings, [1] * 12, []).warp(torch.ones(12, 1, dtype=torch.long), given)
        assert torch.equal(ours, TopPLogitsWarper(top_p)(None, given))


def test_rows_in_blocks_draw_the_same(monkeypatch):
    samplings = [Sampling(seed=i, repetition_penalty=1 + i % 2, do_sample=i % 3 > 0, top_k=i % 4) for i in range(13)]
    ids, scores = tiny.prompt(5, rows=13), SCORES.expand(13, -1) / 2
    whole = RowSampler(samplings, [5] * 13, [tiny.END])(ids, scores)
    monkeypatch.setattr("steermoe.engines.hf.sampling.BLOCK", 3 * tiny.VOCABULARY)
    assert torch.equal(RowSampler(samplings, [5] * 13, [tiny.END])(ids, scores), whole)
