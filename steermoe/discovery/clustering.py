"""Find groups of texts in their routing embeddings, and their places on a map. Knows no texts and no models.

Two algorithms: the consensus of many clusterings, and UMAP with HDBSCAN (Shchukin 2024).

Shapes: B texts, D features per text, K dimensions to cluster in.
"""

import contextlib
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from steermoe.discovery.consensus import NOISE as NOISE
from steermoe.discovery.consensus import (
    Floats,
    Labels,
    consensus,
    principal_components,
    quietly,
    sample_of,
    smallest_cluster,
)
from steermoe.errors import CorpusError, SteerMoEError

Metric = Literal["hellinger", "euclidean", "cosine"]
METRICS = get_args(Metric)
Selection = Literal["eom", "leaf"]
SELECTIONS = get_args(Selection)
Algorithm = Literal["consensus", "hdbscan"]
ALGORITHMS = get_args(Algorithm)
DIMENSIONS = 5
"""In which HDBSCAN clusters by default."""
MIN_CLUSTERS = 3
"""There must be enough texts for this many clusters of the minimum size: fewer are no different from noise."""
DENSITY_NEIGHBOURS = 10
"""HDBSCAN measures density by the distance to at most this neighbour; a larger number makes more texts noise."""
LEAST_NEIGHBOURS, FEW_CLUSTERS = 2, 4
"""With few texts UMAP looks at no more than a quarter of them (the size of one of four clusters), else all would be
neighbours.
"""
LEAST_SIZE, SIZES_TRIED = 2, 12
"""The smallest cluster, and how many minimum sizes are tried at first for a wanted number of clusters."""
MANY_TEXTS, MAP_COMPONENTS = 10_000, 50
"""More texts than the first are laid out by this many principal components: UMAP's search for neighbours takes minutes
in thousands of dimensions, and most of them are the chance of few tokens."""
SPECTRAL_LEAST = 20
"""UMAP's spectral initialisation needs clearly more texts than dimensions."""

Probabilities = NDArray[np.float64]


@dataclass(frozen=True)
class Method:
    """How texts are clustered.

    Attributes:
        algorithm: "consensus" of many clusterings (see `consensus`), or "hdbscan" on UMAP's layout (the paper). None is
            "consensus", or "hdbscan" if `cluster_dimensions` or `selection` is given, which only HDBSCAN has.
        cluster_dimensions: K; None is 5.
        min_cluster_size: the fewest texts in a cluster; by default `default_min_cluster_size`.
        clusters: the wanted number of clusters, in place of their size.
        selection: which of HDBSCAN's nested clusters are taken: "eom" the most stable ones of any size, "leaf" the
            smallest, which are more and of more equal size; None is "eom".
        neighbours: neighbours of each text that UMAP looks at, at most a quarter of all texts; more show larger
            structures.
        metric: distance between two texts. "hellinger" is the euclidean distance of square roots, made for shares.
        assign_noise: put each text that is in no cluster into the one with the nearest mean features.
        seed: for UMAP and the consensus.
    """

    cluster_dimensions: int | None = None
    min_cluster_size: int | None = None
    clusters: int | None = None
    selection: Selection | None = None
    neighbours: int = 15
    metric: Metric = "hellinger"
    assign_noise: bool = False
    seed: int = 0
    algorithm: Algorithm | None = None

    @property
    def by_consensus(self) -> bool:
        if self.algorithm is None:
            return self.cluster_dimensions is None and self.selection is None
        return self.algorithm == "consensus"


@dataclass(frozen=True, eq=False)
class Clustering:
    """Where each text is on the map, and in which cluster.

    Attributes:
        map_B2: position of each text on the map, [B, 2] float32.
        labels: cluster of each text, [B]; 0 is the largest cluster, -1 is noise.
        probabilities: how certainly each text is in its cluster, [B], 0 to 1; 0 for noise, assigned or not.
        min_cluster_size: the size that was used.
        was_noise: which texts were in no cluster at first, [B]; assigned noise has a cluster all the same.
    """

    map_B2: Floats
    labels: Labels
    probabilities: Probabilities
    min_cluster_size: int
    was_noise: NDArray[np.bool_]

    @property
    def num_clusters(self) -> int:
        return int(self.labels.max(initial=NOISE)) + 1


def default_min_cluster_size(texts: int) -> int:
    """For HDBSCAN: the square root of the number of texts, but at most a tenth of it and at least 2.

    6 texts: 2. 60: 6. 1,000: 32. 40,000: 200. (For the consensus: `smallest_cluster`.)
    """
    return max(2, min(texts // 10, round(math.sqrt(texts))))


def cluster(features: Floats, method: Method | None = None) -> Clustering:
    """Cluster texts by their features.

    By consensus, see `consensus`. By HDBSCAN (Campello 2013), after UMAP (McInnes 2018) has laid the texts out in
    `cluster_dimensions` with no minimum distance (`min_dist` 0). A two-dimensional UMAP is the map for the picture. The
    paper clusters in the map itself: `cluster_dimensions=2`. The same seed gives the same clusters on the same machine.

    Args:
        features: [B, D].
        method: how.

    Raises:
        CorpusError: too few texts, features that are not finite or don't suit the metric, an option out of range, or a
            number of clusters that is not found. SteerMoEError: umap-learn or scikit-learn is missing.
    """
    method = method or Method()
    points, size = _prepared(features, method)
    if not np.ptp(points, axis=0).any():
        return _nothing(len(points), size)
    map_B2 = _embed(points, method, 2, min_dist=0.0 if method.cluster_dimensions == 2 else 0.1)
    labels, probabilities, size = _grouped(points, size, method, map_B2)
    labels = _largest_first(labels)
    was_noise = labels == NOISE
    if method.assign_noise:
        labels = _assign(points, labels)
    return Clustering(map_B2, labels, probabilities, size, was_noise)


def labels_of(features: Floats, method: Method | None = None) -> Labels:
    """The labels that `cluster` gives, without the time for a map; raises the same."""
    method = method or Method()
    points, size = _prepared(features, method)
    if not np.ptp(points, axis=0).any():
        return _nothing(len(points), size).labels
    labels = _largest_first(_grouped(points, size, method)[0])
    return _assign(points, labels) if method.assign_noise else labels


def _prepared(features: Floats, method: Method) -> tuple[Floats, int]:
    """Features in the form that the metric compares, and the smallest size of a cluster; everything is checked."""
    default = smallest_cluster if method.by_consensus else default_min_cluster_size
    size = default(len(features)) if method.min_cluster_size is None else method.min_cluster_size
    _check(len(features), size, method)
    return transform(features, method.metric), size


def _grouped(
    points: Floats, size: int, method: Method, map_B2: Floats | None = None
) -> tuple[Labels, Probabilities, int]:
    """Labels and probabilities, [B] each, and the smallest size of a cluster that was used."""
    if method.by_consensus:
        labels, probabilities = consensus(points, method.seed, size, method.clusters)
        return labels, probabilities, min(size, int(np.bincount(labels[labels >= 0], minlength=1).min()) or size)
    places_BK = map_B2 if map_B2 is not None and method.cluster_dimensions == 2 else _places(points, method)
    if method.clusters is None:
        return *_densest(places_BK, size, method.selection or "eom"), size
    size, labels, probabilities = _wanted(places_BK, method.clusters, method.selection or "eom")
    return labels, probabilities, size


def agreement_of_seeds(features: Floats, found: Clustering, method: Method, seeds: Sequence[int]) -> float | None:
    """The lowest adjusted Rand index of the clusters with those that other seeds give; 1 is the same, 0 is chance.

    None without clusters or seeds. Costs a clustering for each seed.

    Args:
        features: [B, D].
        found: their clusters.
        method: how they were found; `seeds` take the place of its seed.
        seeds: other seeds.
    """
    if not found.num_clusters or not seeds:
        return None
    points = transform(features, method.metric)
    first = np.where(found.was_noise, NOISE, found.labels)
    agreements = []
    for seed in seeds:
        if method.by_consensus:
            labels = _by_another_seed(points, seed, found.min_cluster_size, method.clusters)
        else:
            places_BK = _places(points, replace(method, seed=seed))
            labels, _ = _densest(places_BK, found.min_cluster_size, method.selection or "eom")
        agreements.append(adjusted_rand(first, labels))
    return min(agreements)


def _by_another_seed(points: Floats, seed: int, size: int, clusters: int | None) -> Labels:
    """The consensus of another seed; if its tree has no cut into the wanted number, the cut that it prefers."""
    try:
        return consensus(points, seed, size, clusters)[0]
    except CorpusError:
        return consensus(points, seed, size)[0]


def adjusted_rand(labels: Sequence[str] | Labels, others: Labels) -> float:
    """How well two groupings of the same texts agree: 1 is the same, 0 is chance (Hubert and Arabie 1985).

    Raises:
        SteerMoEError: scikit-learn is missing.
    """
    try:
        from sklearn.metrics import adjusted_rand_score
    except ImportError as error:
        raise SteerMoEError(f"discovery needs scikit-learn ({error}): pip install 'steermoe[discover]'") from error
    return float(adjusted_rand_score(labels, others))


def transform(features: Floats, metric: Metric) -> Floats:
    """Features [B, D] in the form that their metric compares: square roots, unit vectors, or unchanged.

    Raises:
        CorpusError: an unknown metric, values that are not finite, or negative ones under "hellinger".
    """
    if metric not in METRICS:
        raise CorpusError(f"metric '{metric}' is unknown: use {', '.join(METRICS)}")
    if not np.isfinite(features).all():
        raise CorpusError("the embeddings contain NaN or infinity: remove their folder and run `steermoe embed` again")
    if metric == "cosine":
        return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    if metric == "euclidean":
        return features
    if features.min(initial=0) < 0:
        raise CorpusError(
            f"metric 'hellinger' compares shares, but the features go down to {features.min():.3g} (hidden states?): "
            "use metric cosine or euclidean"
        )
    return np.sqrt(features)


def nearest_to_mean(points: Floats, count: int) -> list[int]:
    """The rows of [B, D] that are closest to their mean, the closest first."""
    return [int(i) for i in np.argsort(np.linalg.norm(points - points.mean(0), axis=1), kind="stable")[:count]]


def _nothing(texts: int, size: int) -> Clustering:
    """For texts that are all alike: UMAP would spread them randomly, and HDBSCAN would find clusters in that."""
    labels = np.full(texts, NOISE, dtype=np.int64)
    return Clustering(np.zeros((texts, 2), dtype=np.float32), labels, np.zeros(texts), size, labels == NOISE)


def _check(texts: int, size: int, method: Method) -> None:
    counts = {"cluster_dimensions": method.cluster_dimensions, "min_cluster_size": size}
    counts |= {"neighbours": method.neighbours, "clusters": method.clusters}
    for name, value in counts.items():
        if value is not None and value < 2:
            raise CorpusError(f"{name} is {value}: give 2 or more")
    if not 0 <= method.seed < 2**32:
        raise CorpusError(f"seed is {method.seed}: give a whole number from 0 to {2**32 - 1}")
    if method.algorithm not in (None, *ALGORITHMS):
        raise CorpusError(f"algorithm '{method.algorithm}' is unknown: use {' or '.join(ALGORITHMS)}")
    for name in ("selection", "cluster_dimensions"):
        if method.algorithm == "consensus" and (given := getattr(method, name)) is not None:
            raise CorpusError(f"{name} is {given}, which the consensus does not have: leave it out, or take hdbscan")
    if method.selection not in (None, *SELECTIONS):
        raise CorpusError(f"selection '{method.selection}' is unknown: use {' or '.join(SELECTIONS)}")
    if method.clusters is not None:
        if method.min_cluster_size is not None:
            raise CorpusError("give clusters or min_cluster_size, not both: the number of clusters decides their size")
        if texts < LEAST_SIZE * method.clusters:
            raise CorpusError(
                f"{texts} texts are too few for {method.clusters} clusters: "
                f"give at least {LEAST_SIZE * method.clusters} texts, or a smaller number"
            )
    elif texts < MIN_CLUSTERS * size:
        raise CorpusError(
            f"{texts} texts are too few to find clusters of {size} or more: give at least {MIN_CLUSTERS * size} texts"
            + ("" if size == LEAST_SIZE else ", or a smaller min_cluster_size")
        )


def _places(points: Floats, method: Method) -> Floats:
    """The layout in which HDBSCAN clusters."""
    return _embed(points, method, method.cluster_dimensions or DIMENSIONS, min_dist=0.0)


@contextlib.contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Keep torch's number of threads: it is OpenMP's, which numba sets to that of the CPUs when it runs UMAP."""
    torch = sys.modules.get("torch")
    before = None if torch is None else torch.get_num_threads()
    try:
        yield
    finally:
        if torch is not None:
            torch.set_num_threads(before)


def _embed(points: Floats, method: Method, dimensions: int, *, min_dist: float) -> Floats:
    """UMAP's layout [B, dimensions]."""
    texts, metric = len(points), "cosine" if method.metric == "cosine" else "euclidean"
    if texts > MANY_TEXTS:  # of unit vectors, which cosine compares, euclidean distance has the same neighbours
        chosen = sample_of(texts, np.random.default_rng(method.seed))
        points, metric = principal_components(points, chosen, method.seed, MAP_COMPONENTS), "euclidean"
    with quietly(), torch_threads_kept():
        try:
            from umap import UMAP
        except ImportError as error:
            raise SteerMoEError(f"clustering needs umap-learn ({error}): pip install 'steermoe[discover]'") from error
        layout = UMAP(
            n_components=dimensions,
            n_neighbors=min(method.neighbours, max(LEAST_NEIGHBOURS, texts // FEW_CLUSTERS)),
            metric=metric,
            min_dist=min_dist,
            init="spectral" if texts >= max(SPECTRAL_LEAST, 2 * dimensions) else "random",
            random_state=method.seed,
            n_jobs=1,
        ).fit_transform(points)
    # A text that is far from all others has no edge in UMAP's graph and no position: put it in the middle.
    return np.nan_to_num(np.asarray(layout, dtype=np.float32), posinf=0.0, neginf=0.0)


def _densest(places_BK: Floats, size: int, selection: Selection) -> tuple[Labels, Probabilities]:
    """HDBSCAN's labels and probabilities, [B] each."""
    with quietly():
        try:
            from sklearn.cluster import HDBSCAN
        except ImportError as error:
            raise SteerMoEError(f"clustering needs scikit-learn ({error}): pip install 'steermoe[discover]'") from error
        found = HDBSCAN(
            min_cluster_size=size,
            min_samples=min(size, DENSITY_NEIGHBOURS),
            cluster_selection_method=selection,
            copy=True,
        ).fit(places_BK)
    return found.labels_.astype(np.int64), np.nan_to_num(found.probabilities_.astype(np.float64))


def _wanted(places_BK: Floats, clusters: int, selection: Selection) -> tuple[int, Labels, Probabilities]:
    """The minimum size that gives the wanted number of clusters with the least noise; and what HDBSCAN finds with it.

    Larger sizes give fewer clusters, so between two sizes with too many and too few a third is tried.

    Raises:
        CorpusError: no size gives that number.
    """
    tried: dict[int, tuple[Labels, Probabilities]] = {}

    def count(size: int) -> int:
        if size not in tried:
            tried[size] = _densest(places_BK, size, selection)
        return int(tried[size][0].max(initial=NOISE)) + 1

    for size in np.unique(np.geomspace(LEAST_SIZE, len(places_BK) // clusters, SIZES_TRIED).round().astype(int)):
        count(int(size))
    for low, high in itertools.pairwise(sorted(tried)):
        while high - low > 1 and count(low) > clusters > count(high):
            middle = (low + high) // 2
            low, high = (low, middle) if count(middle) <= clusters else (middle, high)
    if right := [size for size in tried if count(size) == clusters]:
        size = min(right, key=lambda size: (int((tried[size][0] == NOISE).sum()), -size))
        return size, *tried[size]
    there = ", ".join(map(str, sorted({count(size) for size in tried})))
    raise CorpusError(
        f"no minimum size of a cluster gives {clusters} clusters, they give {there}: ask for one of these numbers, or "
        f"for selection {'eom' if selection == 'leaf' else 'leaf'}"
    )


def _largest_first(labels: Labels) -> Labels:
    """The same clusters, numbered by decreasing size, ties by their first text."""
    numbers, first, sizes = np.unique(labels, return_index=True, return_counts=True)
    order = np.lexsort((first, -sizes))
    new = {int(numbers[old]): rank for rank, old in enumerate(i for i in order if numbers[i] >= 0)}
    return np.array([new.get(int(label), NOISE) for label in labels], dtype=np.int64)


def _assign(points: Floats, labels: Labels) -> Labels:
    """Put noise into the cluster with the nearest mean; without clusters it stays noise."""
    if labels.max(initial=NOISE) < 0:
        return labels
    means = np.stack([points[labels == number].mean(0) for number in range(labels.max() + 1)])
    assigned = labels.copy()
    for index in np.flatnonzero(labels == NOISE):
        assigned[index] = np.linalg.norm(means - points[index], axis=1).argmin()
    return assigned
