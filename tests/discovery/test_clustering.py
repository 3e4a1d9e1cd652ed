"""Clusters of synthetic routing: they are found, reproducible, numbered by size, and noise stays noise."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from steermoe.discovery import clustering
from steermoe.discovery.clustering import (
    METRICS,
    Method,
    agreement_of_seeds,
    cluster,
    default_min_cluster_size,
    transform,
)
from steermoe.errors import CorpusError, SteerMoEError

LAYERS, EXPERTS, TOKENS = 4, 8, 200


def routing(sizes, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Shares [B, L*N] of groups that each prefer different experts, and the group of each text, in random order."""
    random = np.random.default_rng(seed)
    preferred = random.dirichlet(np.full(EXPERTS, 0.3), size=(len(sizes), LAYERS))
    groups = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    rows = [
        [random.multinomial(TOKENS, random.dirichlet(30 * layer + 0.1)) / TOKENS for layer in preferred[group]]
        for group in groups
    ]
    return np.array(rows, dtype=np.float32).reshape(len(groups), -1), groups


def agreement(labels, groups) -> float:
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    return sklearn_metrics.adjusted_rand_score(groups, labels)


@pytest.fixture(autouse=True, scope="module")
def _extra():
    pytest.importorskip("umap")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dimensions", [None, 2, 5])
def test_groups_are_found_the_largest_first(metric, dimensions):
    features, groups = routing([30, 60, 40])
    found = cluster(features, Method(metric=metric, cluster_dimensions=dimensions))
    assert agreement(found.labels, groups) > 0.9
    assert found.map_B2.shape == (130, 2)
    assert found.map_B2.dtype == np.float32
    sizes = np.bincount(found.labels[found.labels >= 0])
    assert sizes.tolist() == sorted(sizes, reverse=True)
    assert found.num_clusters == len(sizes) == 3
    assert ((found.probabilities >= 0) & (found.probabilities <= 1)).all()
    assert (found.probabilities[found.labels < 0] == 0).all()


def test_torch_keeps_its_number_of_threads():
    """Numba sets OpenMP's, which is torch's too; a fork would wait for threads that it lacks."""
    import torch

    before = torch.get_num_threads()
    cluster(routing([30, 30])[0])
    assert torch.get_num_threads() == before


def test_the_seed_makes_it_reproducible():
    features, _ = routing([20, 20, 20])
    first, again, other = cluster(features), cluster(features), cluster(features, Method(seed=1))
    assert np.array_equal(first.map_B2, again.map_B2)
    assert np.array_equal(first.labels, again.labels)
    assert not np.array_equal(first.map_B2, other.map_B2)


def test_two_dimensions_cluster_in_the_map_itself(monkeypatch):
    laid_out = []
    embed = clustering._embed

    def keep(*arguments, **options):
        laid_out.append(embed(*arguments, **options))
        return laid_out[-1]

    monkeypatch.setattr(clustering, "_embed", keep)
    clustered_in = []
    densest = clustering._densest
    monkeypatch.setattr(clustering, "_densest", lambda at, *rest: (clustered_in.append(at), densest(at, *rest))[1])
    found = cluster(routing([15, 15])[0], Method(cluster_dimensions=2))
    assert len(laid_out) == 1
    assert clustered_in[0] is found.map_B2


@pytest.mark.parametrize(("texts", "size"), [(6, 2), (29, 2), (60, 6), (100, 10), (1000, 32), (40_000, 200)])
def test_default_size(texts, size):
    assert default_min_cluster_size(texts) == size


@pytest.mark.parametrize(
    ("sizes", "dimensions"), [([3, 3], 5), ([2, 2, 2], 2), ([5, 4], 10), ([8, 8, 8], 5), ([8, 8, 8], None)]
)
def test_few_texts(sizes, dimensions):
    features, groups = routing(sizes, seed=1)
    found = cluster(features, Method(cluster_dimensions=dimensions))
    assert agreement(found.labels, groups) > 0.6
    assert np.isfinite(found.map_B2).all()


@pytest.mark.parametrize(("options", "expected"), [({}, "give at least 6"), ({"min_cluster_size": 7}, "at least 21")])
def test_too_few_texts(options, expected):
    with pytest.raises(CorpusError, match=rf"5 texts are too few .*{expected}"):
        cluster(routing([3, 2])[0], Method(**options))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"neighbours": 1}, "neighbours is 1: give 2 or more"),
        ({"cluster_dimensions": 0}, "cluster_dimensions is 0"),
        ({"min_cluster_size": 1}, "min_cluster_size is 1"),
        ({"seed": -1}, "seed is -1"),
        ({"clusters": 1}, "clusters is 1: give 2 or more"),
        ({"clusters": 11}, "20 texts are too few for 11 clusters: give at least 22 texts"),
        ({"clusters": 3, "min_cluster_size": 4}, "give clusters or min_cluster_size, not both"),
        ({"selection": "root"}, "selection 'root' is unknown: use eom or leaf"),
        ({"algorithm": "kmeans"}, "algorithm 'kmeans' is unknown: use consensus or hdbscan"),
        ({"algorithm": "consensus", "selection": "leaf"}, "selection is leaf, which the consensus does not have"),
        ({"algorithm": "consensus", "cluster_dimensions": 3}, "cluster_dimensions is 3, which the consensus does not"),
        ({"metric": "manhattan"}, "metric 'manhattan' is unknown: use hellinger, euclidean, cosine"),
    ],
)
def test_options_out_of_range(options, expected):
    with pytest.raises(CorpusError, match=expected):
        cluster(routing([10, 10])[0], Method(**options))


@pytest.mark.parametrize("clusters", [2, 4])
@pytest.mark.parametrize("selection", ["eom", "leaf", None])
def test_the_wanted_number_of_clusters(clusters, selection):
    features, groups = routing([120 // clusters] * clusters)
    found = cluster(features, Method(clusters=clusters, selection=selection, neighbours=10))
    assert found.num_clusters == clusters
    parts = [found.labels[groups == group] for group in range(clusters)]
    whole = [part for part in parts if (part == np.bincount(part[part >= 0]).argmax()).mean() > 0.8]
    assert len(whole) == clusters  # a group is not split
    assert np.bincount(found.labels[found.labels >= 0]).min() >= found.min_cluster_size


def test_a_number_of_clusters_that_is_not_there():
    places = np.repeat(np.eye(3, dtype=np.float32), 20, axis=0) + np.random.default_rng(0).normal(0, 1e-3, (60, 3))
    with pytest.raises(CorpusError, match=r"gives 25 clusters, they give [\d, ]+: ask for one of these numbers"):
        clustering._wanted(places.astype(np.float32), 25, "eom")


def test_leaves_are_more_than_the_most_stable_clusters(monkeypatch):
    chosen = []
    monkeypatch.setattr(clustering, "_densest", lambda at, size, selection: (chosen.append(selection), nothing)[1])
    nothing = np.full(20, -1), np.zeros(20)
    cluster(routing([10, 10])[0], Method(selection="leaf"))
    assert chosen == ["leaf"]


def test_clusters_that_do_not_hang_on_the_seed_agree():
    features, _ = routing([30, 60, 40])
    method = Method()
    found = cluster(features, method)
    assert agreement_of_seeds(features, found, method, [1, 2]) > 0.9
    assert agreement_of_seeds(features, found, method, []) is None


def test_clusters_that_hang_on_the_seed_do_not_agree(monkeypatch):
    features, _ = routing([10, 10])
    found = cluster(features)
    mixed = np.arange(20) % 2
    monkeypatch.setattr(clustering, "_densest", lambda at, *_: (mixed, np.ones(20)))
    assert agreement_of_seeds(features, found, Method(algorithm="hdbscan"), [1]) < 0.3


@pytest.mark.parametrize("metric", METRICS)
def test_many_texts_are_laid_out_by_their_principal_components(monkeypatch, metric):
    import umap

    features, groups = routing([30, 60, 40])
    seen = []
    laid_out = umap.UMAP.fit_transform
    monkeypatch.setattr(umap.UMAP, "fit_transform", lambda self, X: seen.append((self.metric, X)) or laid_out(self, X))
    monkeypatch.setattr(clustering, "MANY_TEXTS", 130)
    cluster(features, Method(metric=metric))
    monkeypatch.setattr(clustering, "MANY_TEXTS", 129)
    monkeypatch.setattr(clustering, "MAP_COMPONENTS", 6)
    found = cluster(features, Method(metric=metric, algorithm="hdbscan"))
    points = transform(features, metric)
    (_, whole), *few = seen
    assert np.array_equal(whole, points)
    assert [(name, places.shape) for name, places in few] == [("euclidean", (130, 6))] * 2
    centred = points - points.mean(0)
    values = np.linalg.svd(centred, compute_uv=False)
    assert np.isclose(np.linalg.norm(few[0][1]), np.linalg.norm(values[:6]), rtol=0.01)
    assert agreement(found.labels, groups) > 0.9


@pytest.mark.parametrize("texts", [6, 40])
@pytest.mark.parametrize("value", [0.0, 0.125])
def test_texts_that_are_all_alike_are_noise(texts, value):
    found = cluster(np.full((texts, 32), value, dtype=np.float32))
    assert found.num_clusters == 0
    assert (found.labels == -1).all()
    assert (found.map_B2 == 0).all()


def test_copies_of_texts_do_no_harm():
    features, _ = routing([2, 2])
    found = cluster(np.repeat(features, 12, axis=0), Method(min_cluster_size=8))
    assert np.isfinite(found.map_B2).all()
    assert all(len(set(found.labels[start : start + 12])) == 1 for start in range(0, 48, 12))


def test_noise_is_assigned_to_the_nearest_mean_on_request(monkeypatch):
    features = np.eye(4, dtype=np.float32)[[0, 0, 1, 1, 2, 2, 0]] + 0.01
    features[6, 1] += 0.2
    labels = np.array([0, 0, 1, 1, 2, 2, -1])
    monkeypatch.setattr(clustering, "_densest", lambda at, *_: (labels, np.where(labels < 0, 0.0, 1.0)))
    density = Method(algorithm="hdbscan")
    left, assigned = cluster(features, density), cluster(features, replace(density, assign_noise=True))
    assert left.labels.tolist() == labels.tolist()
    assert assigned.labels.tolist() == [0, 0, 1, 1, 2, 2, 0]
    assert assigned.probabilities[6] == 0
    assert assigned.was_noise.tolist() == left.was_noise.tolist() == [False] * 6 + [True]


def test_noise_stays_noise_without_clusters(monkeypatch):
    nothing = np.full(20, -1)
    monkeypatch.setattr(clustering, "_densest", lambda at, *_: (nothing, np.zeros(20)))
    assert (cluster(routing([10, 10])[0], Method(algorithm="hdbscan", assign_noise=True)).labels == -1).all()


def test_one_option_of_hdbscan_is_enough_to_take_it():
    assert Method().by_consensus
    assert Method(min_cluster_size=4, clusters=None, neighbours=9).by_consensus
    assert not Method(selection="eom").by_consensus
    assert not Method(cluster_dimensions=2).by_consensus
    assert not Method(algorithm="hdbscan").by_consensus


def test_transforms():
    shares = np.array([[0.25, 0.75], [1.0, 0.0]], dtype=np.float32)
    assert np.allclose(transform(shares, "hellinger") ** 2, shares)
    assert np.allclose(np.linalg.norm(transform(shares, "hellinger"), axis=1), 1)
    assert np.allclose(np.linalg.norm(transform(shares, "cosine"), axis=1), 1)
    assert transform(shares, "euclidean") is shares
    assert not np.isnan(transform(np.zeros((2, 2), dtype=np.float32), "cosine")).any()


def test_hellinger_is_for_shares():
    with pytest.raises(CorpusError, match=r"go down to -0.5 .*use metric cosine or euclidean"):
        transform(np.array([[0.5, -0.5]], dtype=np.float32), "hellinger")


@pytest.mark.parametrize("metric", METRICS)
def test_broken_embeddings(metric):
    with pytest.raises(CorpusError, match="NaN or infinity"):
        transform(np.array([[0.5, np.nan]], dtype=np.float32), metric)


@pytest.mark.parametrize(("module", "package"), [("umap", "umap-learn"), ("sklearn.cluster", "scikit-learn")])
def test_a_library_is_missing(monkeypatch, module, package):
    if module != "umap":
        monkeypatch.setattr(clustering, "_embed", lambda points, *rest, **options: points[:, :2])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SteerMoEError, match=rf"needs {package} .*pip install 'steermoe\[discover\]'"):
        cluster(routing([10, 10])[0])
