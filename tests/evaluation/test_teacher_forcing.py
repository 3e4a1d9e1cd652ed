"""Reading texts with and without steering: figures compared with a computation by hand, bit-identity at strength 0."""

import pytest
import torch

from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.request import Completion, Request, Sampling
from steermoe.errors import GenerationError
from steermoe.evaluation.teacher_forcing import TeacherForcing, continuation_nats
from steermoe.steering.handle import attach
from steermoe.steering.plans import plan_for

TEXTS = ["a sentence of some length, about nothing at all", "another one that is longer than the first one was, by far"]
PROMPT = 16


@pytest.fixture(scope="module")
def teacher_forcing(tiny_model):
    return TeacherForcing(tiny_model, TEXTS)


def test_strength_zero_is_bit_identical(teacher_forcing, make_vector):
    assert teacher_forcing.largest_difference(plan_for(make_vector(), 0.0)) == 0
    assert teacher_forcing.largest_difference(plan_for(make_vector(), 4.0)) > 0


def test_figures_are_those_of_one_text_at_a_time(tiny_model, teacher_forcing, make_vector):
    plan, model = plan_for(make_vector(), 6.0, formula="additive"), tiny_model.model
    divergence, losses, usual = [], [], []
    for text in TEXTS:
        ids = torch.tensor([tiny_model.tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            plain = model(ids, use_cache=False).logits[0].log_softmax(-1)
            handle = attach(model, plan)
            handle.set(prompt_length=PROMPT)
            steered = model(ids, use_cache=False).logits[0].log_softmax(-1)
            handle.remove()
        torch.testing.assert_close(plain[:PROMPT], steered[:PROMPT], rtol=0, atol=1e-5)  # the prompt is not steered
        for place in range(PROMPT, ids.shape[1] - 1):
            divergence.append((steered[place].exp() * (steered[place] - plain[place])).sum())
            losses.append(-steered[place, ids[0, place + 1]])
            usual.append(-plain[place, ids[0, place + 1]])
    found = teacher_forcing.compare(plan)
    assert found.tokens == len(divergence)
    assert found.kl_mean == pytest.approx(float(torch.stack(divergence).mean()), rel=1e-3)
    assert found.kl_p95 == pytest.approx(float(torch.stack(divergence).quantile(0.95)), rel=1e-3)
    assert found.nats == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert found.nats_unsteered == pytest.approx(float(torch.stack(usual).mean()), rel=1e-5)
    assert 0 < found.kl_mean < found.kl_p95


def test_routing_figures(teacher_forcing, make_vector):
    weak = teacher_forcing.compare(plan_for(make_vector(), 0.01, formula="additive"))
    strong = teacher_forcing.compare(plan_for(make_vector(), 60.0, formula="additive"))
    assert weak.jaccard == pytest.approx(1, abs=0.02)
    assert strong.jaccard < weak.jaccard
    assert strong.vector_share == pytest.approx(0.5, abs=0.01)  # one of two slots
    assert 0.5 < strong.steered < 1


def test_the_model_is_unchanged(tiny_model, teacher_forcing, make_vector):
    ids = torch.tensor([tiny_model.tokenizer(TEXTS[0])["input_ids"]])
    with torch.inference_mode():
        before = tiny_model.model(ids).logits
        teacher_forcing.compare(plan_for(make_vector(), 6.0))
        assert torch.equal(before, tiny_model.model(ids).logits)


def test_texts_that_are_too_short(tiny_model):
    with pytest.raises(GenerationError, match="none of 1 text has more than 17 tokens"):
        TeacherForcing(tiny_model, ["short"])


def test_nats_of_continuations_do_not_depend_on_their_batch(tiny_model):
    requests = [Request(prompt, None, Sampling(max_new_tokens=n)) for prompt, n in (("hello", 5), ("a long prompt", 9))]
    done = [HFEngine(tiny_model).generate([request])[0] for request in requests]
    empty = Completion(requests[0], "", (), 5, "stop", 0.0)
    found = continuation_nats(tiny_model, [done[0], empty, done[1]])
    assert found[1] is None
    for completion, nats in zip(done, (found[0], found[2]), strict=True):
        prompt = tiny_model.tokenizer(completion.request.prompt)["input_ids"]
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        with torch.inference_mode():
            log = tiny_model.model(ids).logits[0].log_softmax(-1)
        own = [-float(log[len(prompt) - 1 + i, token]) for i, token in enumerate(completion.token_ids)]
        assert nats == pytest.approx(sum(own) / len(own), rel=1e-5)
