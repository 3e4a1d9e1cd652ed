"""Weights of tokens by gradients, and counts of choices by weight, against a second computation of each."""

import numpy as np
import pytest
import torch

from steermoe.discovery.token_weights import PERCENTILE, count_choices, heavy_and_light, weigh_choices
from steermoe.errors import VectorError
from steermoe.routing.recording import record_routing

TEXTS = ["A goal! I saw it.", "The team ran and ran."]


def weights_of(loaded, ids):
    """Gradient x embedding of each token, by a full backward pass and the loss of transformers."""
    embedded = []
    layer = loaded.model.get_input_embeddings()

    def keep(module, args, output):
        output.retain_grad()
        embedded.append(output)

    hook = layer.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            loaded.model(input_ids=ids, labels=ids).loss.backward()
    finally:
        hook.remove()
        loaded.model.zero_grad()
    (one,) = embedded
    return (one.grad * one).norm(dim=-1)[0].detach().numpy()


def test_counts_are_those_of_the_tokens_that_weigh_much(tiny_model):
    rows = [torch.tensor([tiny_model.tokenizer(text)["input_ids"]]) for text in TEXTS]
    letters = [char for text in TEXTS for char in text]  # a token of the tiny model is a byte
    weights = [weights_of(tiny_model, ids) for ids in rows]
    bar = np.percentile([w for w, char in zip(np.concatenate(weights), letters, strict=True) if char != " "], 15)
    heavy, light, total = 0, 0, 0
    for text, ids, weight in zip(TEXTS, rows, weights, strict=True):
        is_light = [c != " " and (c in "!." or c in "aAiI" or w <= bar) for c, w in zip(text, weight, strict=True)]
        is_heavy = [c != " " and not light for c, light in zip(text, is_light, strict=True)]
        for name, mask in (("heavy", is_heavy), ("light", is_light), ("total", [True] * len(text))):
            with torch.no_grad(), record_routing(tiny_model.model) as record:
                record.restrict(torch.tensor([mask]))
                tiny_model.model(input_ids=ids)
            heavy = heavy + record.counts[0] if name == "heavy" else heavy
            light = light + record.counts[0] if name == "light" else light
            total = total + record.counts[0] if name == "total" else total
    found = weigh_choices(tiny_model, TEXTS)
    assert torch.equal(found.heavy, heavy)
    assert torch.equal(found.light, light)
    assert torch.equal(found.total, total)
    assert found.tokens.tolist() == [len(text) for text in TEXTS]


def test_the_model_is_left_as_it_was(tiny_model):
    weigh_choices(tiny_model, TEXTS[:1])
    assert all(weight.requires_grad and weight.grad is None for weight in tiny_model.model.parameters())


def test_what_weighs_little_whatever_its_gradient():
    words = ["goal", "", "The", "!", "team", "и", "гол"]
    heavy, light = heavy_and_light(words, torch.tensor([0.2, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0]))
    assert heavy.tolist() == [False, False, False, False, True, False, True]
    assert light.tolist() == [True, False, True, True, False, True, False]
    assert PERCENTILE == 15
    nothing, none = heavy_and_light(["", ""], torch.ones(2))
    assert not nothing.any()
    assert not none.any()


def test_choices_of_no_expert_do_not_count():
    assert count_choices(torch.tensor([[[0, 1], [1, 3]], [[2, 2], [3, 3]]]), 3).tolist() == [[1, 2, 0], [0, 0, 2]]


def test_one_token_has_no_gradient(tiny_model):
    found = weigh_choices(tiny_model, ["x"])
    assert not found.heavy.any()
    assert torch.equal(found.light, found.total)


def test_a_model_without_gradients_is_named(tiny_model, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("element 0 of tensors\ndoes not require grad")

    monkeypatch.setattr(torch.autograd, "grad", fails)
    with pytest.raises(VectorError, match=r"tiny-mixtral gives no gradients .*: use another rule$") as found:
        weigh_choices(tiny_model, TEXTS)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(("texts", "message"), [([], "no texts"), (["a", ""], "text 1 has no tokens")])
def test_empty_input_is_named(tiny_model, texts, message):
    with pytest.raises(VectorError, match=message):
        weigh_choices(tiny_model, texts)
