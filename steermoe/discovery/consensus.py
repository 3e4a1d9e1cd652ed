"""Groups that many rough clusterings agree on: evidence accumulation (Fred and Jain 2005). Knows no texts.

Each of `RUNS` k-means clusterings sees another part of the texts and has another k, from coarse to fine. How often two
texts are together, of the runs that saw both, is their likeness; average linkage over it gives a tree. If a cut of the
tree separates the texts well (a silhouette of `CLEAR`), it gives the clusters. Otherwise texts shade into each other,
and groups that are together in fewer than `TOGETHER` of the runs are different clusters. So nobody chooses a number of
clusters, and one seed gives what another gives.

Shapes: B texts, S texts of the sample, D features per text, P principal components.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steermoe.errors import CorpusError, SteerMoEError

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
NOISE = -1
"""The label of texts that are in no cluster."""
LEAST = 2
"""The fewest texts of a cluster."""
RUNS, SHARE = 200, 0.8
"""How many clusterings, and the share of the texts that each sees."""
TOGETHER = 0.4
"""Groups of texts that are together in fewer of the runs are different clusters."""
CLEAR = 0.5
"""A mean silhouette that shows "a reasonable structure" (Kaufman and Rousseeuw 1990)."""
FEWEST, FINEST = 2, 2.0
"""The smallest k, and the largest as a multiple of the square root of the number of texts."""
COMPONENTS = 20
"""Principal components that are clustered: the others are mostly the chance of few tokens."""
SAMPLE = 3000
"""At most this many texts are clustered; the others go where their nearest neighbours are."""
VOTERS = 10
"""How many nearest neighbours decide on a text outside the sample."""
CHUNK = 2000
"""Texts that are compared with the sample at a time."""
MOST_NOISE = 0.25
"""A cut that leaves more texts outside all clusters is too fine."""
VARIANTS = 4
"""Cuts into the same number of clusters differ in which texts are outside; this many are judged."""
JUDGED = 500
"""Silhouettes are taken over at most this many texts."""


def consensus(
    points: Floats, seed: int, least_size: int, clusters: int | None = None
) -> tuple[Labels, NDArray[np.float64]]:
    """The cluster of each text, and how firmly it is in it.

    Args:
        points: [B, D], in which euclidean distance is meant.
        seed: for the clusterings and the sample.
        least_size: groups of fewer texts are noise.
        clusters: the number of clusters to cut the tree into, if necessary with smaller ones among them.

    Returns:
        labels [B], `NOISE` for none; and for each text the mean share of runs in which it was together with the others
        of its cluster [B], or outside the sample the share of its neighbours there; 0 for noise.

    Raises:
        CorpusError: no cut gives that number of clusters. SteerMoEError: scikit-learn is missing.
    """
    try:
        import sklearn.cluster
        import sklearn.decomposition
        import sklearn.metrics
        import sklearn.neighbors  # noqa: F401
    except ImportError as error:
        raise SteerMoEError(f"clustering needs scikit-learn ({error}): pip install 'steermoe[discover]'") from error
    random = np.random.default_rng(seed)
    texts = len(points)
    chosen = sample_of(texts, random)
    places_BP = principal_components(points, chosen, seed)
    numbers = _numbers(texts, len(chosen))
    together_SS = _together(places_BP[chosen], numbers, random)
    least = max(LEAST, round(least_size * len(chosen) / texts))
    if clusters is None:
        labels_S = _best(_tree(together_SS), least, numbers[-1], _judge(places_BP[chosen], random))
    else:
        labels_S = _wanted(_tree(together_SS), least, clusters)
    firm_S = _firmness(together_SS, labels_S)
    if len(chosen) == texts:
        return labels_S, firm_S
    labels, firm = _spread(places_BP, chosen, labels_S, firm_S)
    if clusters is None:
        labels = _only_large(labels, least_size)
    return labels, np.where(labels == NOISE, 0.0, firm)


def smallest_cluster(texts: int) -> int:
    """Half the square root of the number of texts, but at most a twentieth of it and at least 2.

    20 texts: 2. 136: 6. 1,000: 16. 40,000: 100.
    """
    return max(2, min(texts // 20, round(texts**0.5 / 2)))


def sample_of(texts: int, random: np.random.Generator) -> NDArray[np.int64]:
    """The texts that are clustered, ascending: all of them, or `SAMPLE`."""
    return np.arange(texts) if texts <= SAMPLE else np.sort(random.permutation(texts)[:SAMPLE])


def principal_components(points: Floats, chosen: NDArray[np.int64], seed: int, components: int = COMPONENTS) -> Floats:
    """The places [B, P] of all texts among the first components of the chosen ones."""
    from sklearn.decomposition import PCA

    with quietly():
        count = min(components, len(chosen) - 1, points.shape[1])
        reduction = PCA(count, svd_solver="randomized", random_state=seed).fit(points[chosen])
        parts = [reduction.transform(points[i : i + CHUNK]) for i in range(0, len(points), CHUNK)]
    return np.concatenate(parts).astype(np.float32)


def _numbers(texts: int, sampled: int) -> list[int]:
    """The k of each run, evenly spaced by their logarithms."""
    most = max(FEWEST + 1, min(FINEST * texts**0.5, SHARE * sampled / 2))
    return [int(k) for k in np.exp(np.linspace(np.log(FEWEST), np.log(most + 1 - 1e-6), RUNS))]


def _together(places_SP: Floats, numbers: list[int], random: np.random.Generator) -> Floats:
    """How often two texts are in one cluster, as a share of the runs that saw both, [S, S]."""
    from sklearn.cluster import KMeans

    count = len(places_SP)
    together_SS = np.zeros((count, count), dtype=np.uint16)
    seen_SR = np.zeros((count, len(numbers)), dtype=np.float32)
    for run, k in enumerate(numbers):
        part = random.permutation(count)[: max(k, round(SHARE * count))]
        labels = -1 - np.arange(count)  # what this run has not seen is with nothing else
        with quietly():
            means = KMeans(k, n_init=1, random_state=int(random.integers(2**31)))
            labels[part] = means.fit_predict(places_SP[part])
        together_SS += labels[:, None] == labels
        seen_SR[part, run] = 1
    shares_SS = together_SS / np.maximum(seen_SR @ seen_SR.T, 1)
    np.fill_diagonal(shares_SS, 1)
    return np.minimum(shares_SS, 1).astype(np.float32)


def _tree(together_SS: Floats) -> NDArray[np.float64]:
    """Average linkage, as scipy writes it: a row for each merge, the lowest first."""
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    return linkage(squareform(1 - together_SS, checks=False), "average")


def _cuts(tree: NDArray[np.float64], least: int, most: int) -> Iterator[tuple[int, Labels]]:
    """Number of clusters and labels [S] of cuts, the coarsest first, `VARIANTS` for each number up to `most`.

    Groups of fewer than `least` texts are noise.
    """
    from scipy.cluster.hierarchy import fcluster

    seen: dict[int, set[bytes]] = {}
    for height in np.unique(tree[:, 2])[::-1]:
        labels = _large(fcluster(tree, height, "distance"), least)
        count = int(labels.max()) + 1
        if (labels == NOISE).mean() > MOST_NOISE or count > most:
            return
        variants = seen.setdefault(count, set())
        sizes = np.bincount(labels - NOISE).tobytes()
        if count > 1 and len(variants) < VARIANTS and sizes not in variants:
            variants.add(sizes)
            yield count, labels


Judge = Callable[[Labels], float]
"""How well labels [S] separate the texts, up to 1: their silhouette, times the share of the texts that have a cluster.
"""


def _judge(places_SP: Floats, random: np.random.Generator) -> Judge:
    from sklearn.metrics import pairwise_distances, silhouette_score

    judged = random.permutation(len(places_SP))[:JUDGED]
    apart = pairwise_distances(places_SP[judged])

    def judge(labels: Labels) -> float:
        own = labels[judged]
        kept = np.flatnonzero(own != NOISE)
        if not 1 < len(np.unique(own[kept])) < len(kept):
            return -1.0
        silhouette = silhouette_score(apart[np.ix_(kept, kept)], own[kept], metric="precomputed")
        return float(silhouette) * len(kept) / len(own)

    return judge


def _best(tree: NDArray[np.float64], least: int, most: int, judge: Judge) -> Labels:
    """The labels of the cut that separates the texts best, if it does so clearly; else those at `TOGETHER`."""
    from scipy.cluster.hierarchy import fcluster

    usual = _large(fcluster(tree, 1 - TOGETHER, "distance"), least)
    cuts = [labels for _, labels in _cuts(tree, least, most)]
    if not cuts:
        return np.full_like(usual, NOISE)
    scores = [judge(labels) for labels in cuts]
    if max(scores) >= CLEAR:
        return cuts[int(np.argmax(scores))]
    return usual if (usual == NOISE).mean() <= MOST_NOISE and usual.max() > 0 else cuts[-1]


def _wanted(tree: NDArray[np.float64], least: int, clusters: int) -> Labels:
    """The cut into a wanted number of clusters.

    Raises:
        CorpusError: there is none.
    """
    there: set[int] = set()
    for size in (least, LEAST):
        for count, labels in _cuts(tree, size, 2 * clusters):
            if count == clusters:
                return labels
            there.add(count)
    if not there:
        raise CorpusError(f"the texts do not fall into {clusters} clusters, but shade into each other: give more texts")
    numbers = ", ".join(map(str, sorted(there)))
    raise CorpusError(
        f"the texts do not fall into {clusters} clusters, but into {numbers}: ask for one of these numbers"
    )


def _large(groups: NDArray[Any], least: int) -> Labels:
    """Groups numbered from 0; those of fewer texts are noise."""
    _, groups, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    new = np.where(sizes >= least, np.cumsum(sizes >= least) - 1, NOISE)
    return new[groups].astype(np.int64)


def _only_large(labels: Labels, least: int) -> Labels:
    """The same clusters, without those of fewer texts, numbered from 0."""
    large = _large(labels, least)  # which takes the texts outside for a group
    kept = np.unique(large[(labels != NOISE) & (large != NOISE)])
    return np.where(labels == NOISE, NOISE, np.where(np.isin(large, kept), np.searchsorted(kept, large), NOISE))


def _firmness(together_SS: Floats, labels: Labels) -> NDArray[np.float64]:
    firm = np.zeros(len(labels))
    for number in range(labels.max(initial=NOISE) + 1):
        own = np.flatnonzero(labels == number)
        rows = together_SS[np.ix_(own, own)].astype(np.float64)
        firm[own] = (rows.sum(1) - np.diag(rows)) / max(len(own) - 1, 1)
    return firm


def _spread(
    places_BP: Floats, chosen: NDArray[np.int64], labels_S: Labels, firm_S: NDArray[np.float64]
) -> tuple[Labels, NDArray[np.float64]]:
    """Labels and firmness of all texts: those outside the sample take the ones of most of their neighbours in it."""
    from sklearn.neighbors import KNeighborsClassifier

    labels = np.empty(len(places_BP), dtype=np.int64)
    firm = np.empty(len(places_BP))
    vote = KNeighborsClassifier(VOTERS).fit(places_BP[chosen], labels_S)
    for start in range(0, len(places_BP), CHUNK):
        part = slice(start, start + CHUNK)
        shares = vote.predict_proba(places_BP[part])
        labels[part] = vote.classes_[shares.argmax(1)]
        firm[part] = np.where(labels[part] == NOISE, 0.0, shares.max(1))
    labels[chosen], firm[chosen] = labels_S, firm_S
    return labels, firm


@contextlib.contextmanager
def quietly() -> Iterator[Any]:
    """Silence warnings: UMAP's about its seed and isolated texts, numba's and sklearn's deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
