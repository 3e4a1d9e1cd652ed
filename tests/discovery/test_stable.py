"""Experts that hold under resampling, against a reference in numpy that draws texts one by one."""

import json

import numpy as np
import pytest
import torch

from steermoe.discovery.stable import LEAST_SHARE, RESAMPLES, SEED, keep_stable, stable_vectors
from steermoe.errors import VectorError
from steermoe.vectors.vector import SteeringVector, VectorInfo


def frequencies(rows):
    """F [B, 1, N], each row divided by its sum."""
    found = torch.tensor(rows, dtype=torch.float32)[:, None]
    return found / found.sum(-1, keepdim=True)


def vector_from(embeddings, domain="sport", *, relative=True, threshold=1.5):
    means = {name: one.mean(0) for name, one in embeddings.items()}
    baseline = torch.stack(list(means.values())).mean(0)
    info = VectorInfo(created_by="steermoe vectors build")
    return SteeringVector(
        domain, means[domain], (0,), threshold=threshold, baseline=baseline, relative=relative, info=info
    )


STEADY = [[6, 1, 1, 1, 1]] * 9
"""Nine texts that all use expert 0."""
ONE_OF_A_KIND = [[0, 0, 0, 0, 30]]
"""One text that uses expert 4 alone."""
OTHERS = [[1, 3, 3, 2, 1]] * 10


def test_an_expert_of_one_text_is_left_out():
    embeddings = {"sport": frequencies(STEADY + ONE_OF_A_KIND), "food": frequencies(OTHERS)}
    vector = vector_from(embeddings, threshold=1.2)
    assert vector.experts[0].nonzero().flatten().tolist() == [0, 4]
    kept = keep_stable(vector, embeddings)
    assert kept.experts[0].nonzero().flatten().tolist() == [0]
    assert kept.experts[0, 0] == vector.experts[0, 0]
    assert kept.frequency.equal(vector.frequency)
    assert kept.info.created_by == "steermoe vectors build --rule stable"
    assert kept.info.title == "sport: 1 of 2 experts hold when resampled"


@pytest.mark.parametrize("relative", [True, False])
def test_as_drawn_one_by_one(relative):
    generator = np.random.default_rng(1)
    embeddings = {
        name: frequencies((generator.random((12, 8)) ** 4 + 0.01).tolist()) for name in ("sport", "food", "law", "art")
    }
    threshold = 1.1 if relative else 0.75
    vector = vector_from(embeddings, relative=relative, threshold=threshold)
    draws = {name: np.random.default_rng(SEED).integers(12, size=(RESAMPLES, 12)) for name in embeddings}
    above = np.zeros(8)
    for number in range(RESAMPLES):
        means = {name: one[draws[name][number]].double().mean(0)[0].numpy() for name, one in embeddings.items()}
        usual = np.mean(list(means.values()), 0) if relative else 1 / 8
        above += means["sport"] > threshold * usual
    expected = np.where(above >= LEAST_SHARE * RESAMPLES, vector.experts[0].numpy(), 0)
    assert 0 < np.count_nonzero(expected) < np.count_nonzero(vector.experts.numpy())
    assert np.array_equal(keep_stable(vector, embeddings).experts[0].numpy(), expected)


def test_nothing_that_holds_is_an_error():
    even = [[1, 1, 1, 1, 1]]
    embeddings = {"sport": frequencies(even * 9 + ONE_OF_A_KIND), "food": frequencies(even * 10)}
    with pytest.raises(VectorError, match=r"'sport': none of 1 expert exceeds the threshold in 90% of 50 resamples"):
        keep_stable(vector_from(embeddings, threshold=1.1), embeddings)


def test_texts_that_are_alike_keep_all_experts(tiny_model):
    corpora = {"sport": ["A goal!"] * 5, "food": ["Salt and a pan."] * 5}
    from steermoe.discovery.labelled import vectors_from_labelled

    plain = vectors_from_labelled(tiny_model, corpora, threshold=1.1)
    stable = stable_vectors(tiny_model, corpora, threshold=1.1)
    assert [one.experts.tolist() for one in stable] == [one.experts.tolist() for one in plain]


def test_build_keeps_what_holds(run, tiny_checkpoint, bare_search_path):
    for domain, lines in {"sport": ["A goal!", "The team ran."], "food": ["Salt and a pan.", "bread"]}.items():
        (bare_search_path / domain).mkdir()
        for number, line in enumerate(lines):
            (bare_search_path / domain / f"{number}.txt").write_text(line)
    arguments = ["vectors", "build", "--texts", "sport=sport", "--texts", "food=food", "--model", tiny_checkpoint]
    result = run(*arguments, "--rule", "stable", "--threshold", "1.1", "--json")
    assert result.code == 0, result.err
    records = json.loads(result.out)
    assert {record["created_by"] for record in records} == {"steermoe vectors build --rule stable"}
    assert all("hold when resampled" in record["title"] for record in records)
