"""Likelihood of given continuations: compared with one text at a time, in one batch with other plans and lengths."""

from dataclasses import replace

import pytest
import torch

from steermoe.errors import GenerationError, SteeringError
from steermoe.evaluation.likelihood import encode_pair, likelihoods
from steermoe.steering.handle import steer
from steermoe.steering.plans import plan_for

TEXTS = [("hello", " there"), ("a much longer prompt than that", " and"), ("one", " two three four five"), ("ab", "c")]


@pytest.fixture(scope="module")
def pairs(tiny_model):
    return [encode_pair(tiny_model.tokenizer, *text) for text in TEXTS]


def alone(model, prompt, rest, plan):
    """Nats of a continuation, read without a batch; `prompt_length` says where it begins."""
    ids = torch.tensor([[*prompt, *rest[:-1]]])
    with torch.inference_mode():
        if plan is None:
            log = model(ids, use_cache=False).logits[0].log_softmax(-1)
        else:
            with steer(model, rows=[plan]) as handle:
                handle.set(prompt_length=len(prompt))
                log = model(ids, use_cache=False).logits[0].log_softmax(-1)
    return sum(float(log[len(prompt) - 1 + number, token]) for number, token in enumerate(rest))


@pytest.mark.parametrize("positions", ["all", "last-prompt", "generated", "prompt"])
def test_rows_of_one_batch_are_as_alone(tiny_model, pairs, make_vector, positions):
    plan = plan_for(make_vector(), 60.0, formula="additive", positions=positions)
    plans = [plan, None, replace(plan, strength=-60.0), plan if positions != "generated" else None]
    found = likelihoods(tiny_model, pairs, plans)
    for one, (prompt, rest), own in zip(found, pairs, plans, strict=True):
        assert one.tokens == len(rest)
        assert one.logprob == pytest.approx(alone(tiny_model.model, prompt, rest, own), abs=1e-4)
        assert one.per_token == one.logprob / len(rest)
    plain = likelihoods(tiny_model, pairs)
    assert abs(plain[0].logprob - found[0].logprob) > 6e-4
    assert plain[1].logprob == pytest.approx(found[1].logprob, abs=1e-4)


def test_batches_do_not_matter_and_progress_counts_all(tiny_model, pairs, make_vector):
    plan, seen = plan_for(make_vector(), 9.0, positions="all"), []
    one, many = (likelihoods(tiny_model, pairs, plan, batch_tokens=n, progress=seen.append) for n in (1, 1000))
    assert [a.logprob for a in one] == pytest.approx([b.logprob for b in many], abs=1e-4)
    assert sum(seen) == 2 * len(pairs)


def test_greedy(tiny_model, pairs):
    prompt, _ = pairs[0]
    with torch.inference_mode():
        best = int(tiny_model.model(torch.tensor([prompt])).logits[0, -1].argmax())
    likely, unlikely = likelihoods(tiny_model, [(prompt, [best]), (prompt, [best - 1])])
    assert likely.greedy
    assert not unlikely.greedy


def test_nothing_steered_and_tags_are_refused(tiny_model, pairs, make_vector):
    with pytest.raises(SteeringError, match="none of the 2 tokens"):
        likelihoods(tiny_model, [pairs[3]], plan_for(make_vector(), positions="generated"))
    with pytest.raises(SteeringError, match="positions 'thinking' follow tags"):
        likelihoods(tiny_model, pairs, plan_for(make_vector(), positions="thinking"))


def test_pairs_are_cut_where_the_prompt_ends(tiny_model):
    prompt, rest = encode_pair(tiny_model.tokenizer, "ab ", "cd")
    assert tiny_model.tokenizer.decode(prompt) == "ab"
    assert tiny_model.tokenizer.decode(rest) == " cd"
    with pytest.raises(GenerationError, match="adds no token"):
        encode_pair(tiny_model.tokenizer, "ab", "")
