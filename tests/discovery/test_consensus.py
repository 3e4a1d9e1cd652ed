"""Consensus of clusterings: any number of clear groups is found, shading ones alike with every seed."""

import numpy as np
import pytest

from steermoe.discovery import consensus as module
from steermoe.discovery.clustering import adjusted_rand
from steermoe.discovery.consensus import NOISE, consensus, smallest_cluster
from steermoe.errors import CorpusError


@pytest.fixture(autouse=True, scope="module")
def _extra():
    pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def _few_runs(monkeypatch):
    monkeypatch.setattr(module, "RUNS", 60)


def clouds(sizes, spread, seed=0, dimensions=12) -> tuple[np.ndarray, np.ndarray]:
    """Points around as many means, and the mean of each point."""
    random = np.random.default_rng(seed)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    means = random.normal(size=(len(sizes), dimensions))
    points = means[groups] + random.normal(scale=spread, size=(len(groups), dimensions))
    return points.astype(np.float32), groups


@pytest.mark.parametrize("sizes", [[60, 60], [10, 40, 25], [12] * 12])
def test_clear_groups_are_found_however_many(sizes):
    points, groups = clouds(sizes, spread=0.15)
    labels, firm = consensus(points, 0, smallest_cluster(len(points)))
    assert adjusted_rand(labels, groups) == 1.0
    assert ((firm > 0.2) & (firm <= 1)).all()


def test_shading_groups_are_the_same_with_every_seed():
    points, groups = clouds([50, 40, 30, 20], spread=0.8)
    runs = [consensus(points, seed, 6)[0] for seed in range(3)]
    assert min(adjusted_rand(runs[0], other) for other in runs[1:]) > 0.75
    assert min(adjusted_rand(labels, groups) for labels in runs) > 0.6
    assert all((labels == NOISE).mean() <= module.MOST_NOISE for labels in runs)


def test_the_seed_makes_it_reproducible():
    points, _ = clouds([20, 30], spread=1.0)
    first, again = consensus(points, 3, 2), consensus(points, 3, 2)
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])


def test_too_small_a_group_is_noise():
    points, groups = clouds([40, 40, 3], spread=0.1)
    labels, firm = consensus(points, 0, 5)
    assert set(labels[groups == 2]) == {NOISE}
    assert (firm[groups == 2] == 0).all()
    assert adjusted_rand(labels[groups < 2], groups[groups < 2]) == 1.0


def test_a_wanted_number_is_a_cut_of_the_tree():
    points, groups = clouds([30, 30, 30, 30], spread=0.2)
    assert adjusted_rand(consensus(points, 0, 3, clusters=4)[0], groups) == 1.0
    pairs, _ = consensus(points, 0, 3, clusters=2)
    assert all(len(set(pairs[groups == group])) == 1 for group in range(4))
    with pytest.raises(CorpusError, match=r"do not fall into 61 clusters, but into 2, 3, 4[\d, ]*: ask for one"):
        consensus(points, 0, 3, clusters=61)


def test_texts_outside_the_sample_go_where_their_neighbours_are(monkeypatch):
    monkeypatch.setattr(module, "SAMPLE", 60)
    monkeypatch.setattr(module, "CHUNK", 50)
    points, groups = clouds([80, 70, 50], spread=0.2)
    labels, firm = consensus(points, 0, smallest_cluster(200))
    assert adjusted_rand(labels, groups) == 1.0
    assert (firm > 0).all()


@pytest.mark.parametrize(("texts", "size"), [(6, 2), (20, 2), (60, 3), (136, 6), (1000, 16), (40_000, 100)])
def test_smallest_cluster(texts, size):
    assert smallest_cluster(texts) == size
