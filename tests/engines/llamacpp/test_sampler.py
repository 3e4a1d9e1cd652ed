"""The numpy sampler against the torch one: the same logits and seed give the same token."""

import numpy as np
import pytest
import torch

from steermoe.engines.hf.sampling import RowSampler
from steermoe.engines.llamacpp.sampler import TokenSampler, TorchRandom
from steermoe.engines.request import Sampling

VOCABULARY = 500
SETTINGS = [
    {},
    {"temperature": 1.0},
    {"temperature": 1.7, "top_k": 20},
    {"top_p": 0.8},
    {"top_p": 0.01},
    {"top_k": 1000, "top_p": 0.95, "repetition_penalty": 1.3},
    {"min_p": 0.1},
    {"min_p": 1.0, "temperature": 3.0},
    {"min_p": 0.3, "temperature": 2.0, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.3},
    {"repetition_penalty": 0.5},
    {"do_sample": False},
    {"do_sample": False, "repetition_penalty": 2.0},
    {"min_new_tokens": 3, "temperature": 2.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_draws_as_the_torch_sampler(settings, seed):
    sampling = Sampling(seed=seed, **settings)
    ends = [2, 7, 8]
    prompt = [5, 9, 9, 30]
    theirs = RowSampler([sampling], [len(prompt)], ends)
    ours = TokenSampler(sampling, ends)
    generator = torch.Generator().manual_seed(100 + seed)
    new: list[int] = []
    for _ in range(12):
        logits = torch.randn(1, VOCABULARY, generator=generator) * 3
        logits[0, ends] += 4
        context = torch.tensor([[*prompt, *new]])
        wanted = int(theirs(context, logits.clone()).argmax())
        before = logits.clone()
        warped = torch.from_numpy(ours.warp(logits[0].numpy(), [*prompt, *new], len(new)))
        torch.testing.assert_close(warped, theirs.warp(context, logits.clone())[0], rtol=1e-6, atol=1e-6)
        token = ours.draw(logits[0].numpy(), [*prompt, *new], len(new))
        assert torch.equal(logits, before)
        assert token == wanted
        new.append(token)


def test_the_rarest_token_can_be_drawn():
    sampler = TokenSampler(Sampling(temperature=1.0), [])
    logits = np.zeros(3, dtype=np.float32)
    assert {sampler.draw(logits, [], 0) for _ in range(100)} == {0, 1, 2}


def test_logits_of_another_length_are_not_drawn_from_what_was_kept():
    sampler, rng = TokenSampler(Sampling(temperature=0.5, min_new_tokens=9, seed=1), [0]), np.random.default_rng(0)
    for length in (300, 700, 20, 700):
        logits = rng.normal(size=length).astype(np.float32)
        wanted = logits / np.float32(0.5)
        wanted[0] = -np.inf
        assert np.array_equal(sampler.warp(logits, [], 0), wanted)
        assert 0 < sampler.draw(logits, [], 0) < length


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**32 + 7, 2**63 - 1])
def test_random_numbers_are_those_of_torch(seed):
    ours, generator = TorchRandom(seed), torch.Generator().manual_seed(seed)
    drawn = [ours.draw() for _ in range(700)]
    assert drawn == [torch.rand(1, generator=generator, dtype=torch.float64).item() for _ in range(700)]
    assert len(set(drawn)) == 700
