"""Contrasts of two sets of texts: activation rates, risk differences, lists of experts, and vectors from them."""

import pytest
import torch

from steermoe.discovery.contrast import activation_rate, contrastive_vector, risk_difference, strongest
from steermoe.discovery.labelled import contrasts, vectors_from_labelled
from steermoe.errors import VectorError
from steermoe.routing.recording import record_routing

SPORT, FOOD, LAW = ["A goal!", "The team ran."], ["Salt, pepper and a pan.", "bread"], ["0123456789", "(1) (2) (3)"]
DIFFERENCE = torch.tensor([[0.4, -0.3, 0.0], [0.05, 0.2, -0.5]])


def test_activation_rate_is_the_share_of_tokens(tiny_model):
    ids = [torch.tensor([tiny_model.tokenizer(text)["input_ids"]]) for text in SPORT]
    counts, frequencies = 0, []
    for one in ids:
        with torch.no_grad(), record_routing(tiny_model.model) as record:
            tiny_model.model(input_ids=one)
        counts = counts + record.counts[0]
        frequencies.append(record.frequency()[0])
    tokens = torch.tensor([one.shape[1] for one in ids])
    rate = activation_rate(torch.stack(frequencies), tokens, top_k=2)
    assert torch.allclose(rate, counts / tokens.sum(), atol=1e-6)
    assert torch.equal(risk_difference(rate, rate), torch.zeros_like(rate))


def test_strongest_experts_of_all_layers_with_their_sign():
    assert [tuple(e)[:2] for e in strongest(DIFFERENCE, [3, 7], 2)] == [(3, 0), (7, 1)]
    banned = strongest(DIFFERENCE, [3, 7], 9, least=True)
    assert [tuple(e)[:2] for e in banned] == [(7, 2), (3, 1)]
    assert [round(e.difference, 2) for e in banned] == [-0.5, -0.3]


def test_contrastive_vector_keeps_what_is_clearly_more_active():
    vector = contrastive_vector("sport", DIFFERENCE, [3, 7])
    assert vector.chosen() == {3: {0: pytest.approx(0.4)}, 7: {1: pytest.approx(0.2)}}
    with pytest.raises(VectorError, match=r"at most 40\.0%.*--min-difference"):
        contrastive_vector("sport", DIFFERENCE, [3, 7], min_difference=0.6)


def test_labelled_vectors_share_a_baseline_in_which_domains_count_the_same(tiny_model):
    corpora = {"sport": SPORT, "food": FOOD * 5, "law": LAW}
    vectors = vectors_from_labelled(tiny_model, corpora, threshold=1.2)
    assert [vector.domain for vector in vectors] == ["sport", "food", "law"]
    mean = torch.stack([vector.frequency for vector in vectors]).mean(0)
    assert all(torch.allclose(vector.baseline, mean) for vector in vectors)
    assert all(vector.relative for vector in vectors)
    assert vectors[1].info.texts == 10
    assert vectors[0].info.created_by == "steermoe vectors build"
    (alone,) = vectors_from_labelled(tiny_model, {"sport": SPORT}, threshold=1.2)
    assert not alone.relative
    assert torch.equal(alone.frequency, vectors[0].frequency)


def test_a_vector_that_would_steer_nothing_is_rejected(tiny_model):
    with pytest.raises(VectorError, match=r"no expert exceeds 7\.5 times the mean frequency 1/N, the largest is"):
        vectors_from_labelled(tiny_model, {"sport": SPORT, "food": FOOD}, threshold=7.5)


def test_contrasts_of_sets(tiny_model):
    (made,) = contrasts(tiny_model, {"sport": SPORT}, LAW, min_difference=0.05, count=3)
    assert made.vector.weights.max() > 0.05
    assert made.vector.weights.min() == 0
    assert len(made.force) == len(made.ban) == 3
    assert all(expert.difference > 0 for expert in made.force)
    assert all(expert.difference < 0 for expert in made.ban)
    with pytest.raises(VectorError, match="route alike"):
        contrasts(tiny_model, {"sport": SPORT}, SPORT)
