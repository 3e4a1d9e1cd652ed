"""From embedded texts to domains: clusters, their names, a steering vector for each (Shchukin 2024). Writes no files.

Shapes: B texts, L MoE layers, N experts per layer, D features per text.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from steermoe.discovery import clustering
from steermoe.discovery.clustering import Clustering, Floats, Metric
from steermoe.discovery.keywords import Keyword, cluster_keywords
from steermoe.discovery.store import EmbeddedTexts
from steermoe.errors import SteerMoEError, VectorError
from steermoe.vectors.file import check_domain_name
from steermoe.vectors.vector import DEFAULT_THRESHOLD, SteeringVector, VectorInfo

CREATED_BY = "steermoe vectors discover"
NUM_KEYWORDS = 10
NUM_EXAMPLES = 3
NAME_WORDS = 2
MAX_NAME = 40

Names = Mapping[int | str, str]
"""New names of clusters, by their number or by the name made from their keywords."""


@dataclass(frozen=True)
class DiscoveryOptions:
    """How domains are found.

    Attributes:
        threshold: see `SteeringVector`.
        relative: compare with the corpus baseline. If nothing exceeds that, the vector is cut at `threshold` / N.
        cluster_dimensions, neighbours, assign_noise, seed: see `clustering.cluster`.
        min_cluster_size: see `clustering.cluster`; None chooses it.
        metric: see `clustering.cluster`; None is "hellinger", or "cosine" if the features include hidden states.
    """

    threshold: float = DEFAULT_THRESHOLD
    relative: bool = True
    cluster_dimensions: int = 5
    min_cluster_size: int | None = None
    neighbours: int = 15
    metric: Metric | None = None
    assign_noise: bool = False
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Cluster:
    """A domain that was found.

    Attributes:
        number: 0 is the largest cluster.
        name: made from the first keywords, like "football-match"; unique, and allowed as a file name.
        size: number of texts.
        keywords: the most typical first.
        examples: ids of the texts nearest to its centre.
        labels: how many of its texts have each known label, the most frequent first.
        purity: share of the most frequent label among the texts that have one; None without labels.
        vector: None if no expert exceeds a threshold.
        note: a remark on the vector, or "".
    """

    number: int
    name: str
    size: int
    keywords: tuple[Keyword, ...]
    examples: tuple[str, ...]
    labels: dict[str, int]
    purity: float | None
    vector: SteeringVector | None
    note: str = ""

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(keyword.word for keyword in self.keywords)


@dataclass(frozen=True, eq=False)
class Discovery:
    """All domains of a corpus.

    Attributes:
        adjusted_rand: agreement of the clusters with the known labels (1 is perfect, 0 is chance), over the texts that
            have one; noise counts as a cluster of its own. None without labels.
        noise: number of texts in no cluster.
        options: as given, with the cluster size and metric that were used.
    """

    embedded: EmbeddedTexts
    clustering: Clustering
    clusters: tuple[Cluster, ...]
    adjusted_rand: float | None
    noise: int
    options: DiscoveryOptions

    def name_of(self, label: int) -> str:
        """The name of a cluster by its number; "" for noise."""
        return self.clusters[label].name if label >= 0 else ""


def discover(
    embedded: EmbeddedTexts,
    options: DiscoveryOptions | None = None,
    *,
    names: Names | None = None,
    progress: Callable[[str], None] | None = None,
) -> Discovery:
    """Find the domains of a corpus and build a steering vector for each.

    A vector is the mean routing embedding of its cluster's texts. With `relative` its E keeps what exceeds `threshold`
    times the mean of all texts, which leaves out experts that are popular everywhere; without, what exceeds
    `threshold` / N (the paper).

    Args:
        embedded: texts with their routing embeddings.
        options: thresholds and clustering.
        names: new names of clusters, by number or by the name they would have.
        progress: called with a short description of each step.

    Raises:
        CorpusError: too few texts, or an option out of range. VectorError: a new name that is not allowed, or for a
            cluster that doesn't exist. SteerMoEError: an extra is missing.
    """
    options = options or DiscoveryOptions()
    for name in (names or {}).values():
        check_domain_name(name)
    if options.threshold < 0 or not np.isfinite(options.threshold):
        raise VectorError(f"threshold {options.threshold} must be a finite number, 0 or more")
    notify = progress or (lambda step: None)
    metric: Metric = options.metric or ("hellinger" if embedded.hidden is None else "cosine")
    notify(f"Clustering {len(embedded)} texts ...")
    features = embedded.features()
    found = clustering.cluster(
        features,
        cluster_dimensions=options.cluster_dimensions,
        min_cluster_size=options.min_cluster_size,
        neighbours=options.neighbours,
        metric=metric,
        assign_noise=options.assign_noise,
        seed=options.seed,
    )
    notify("Finding keywords ...")
    keywords = cluster_keywords([text.text for text in embedded.texts], found.labels, NUM_KEYWORDS)
    notify("Building vectors ...")
    options = replace(options, min_cluster_size=found.min_cluster_size, metric=metric)
    points, baseline = clustering.transform(features, metric), _mean(embedded.frequency)
    clusters = []
    for number, name in enumerate(_name_clusters(keywords, names or {})):
        members = np.flatnonzero(found.labels == number)
        cluster = _describe(embedded, number, name, keywords[number], members, points)
        vector, note = _build_vector(embedded, cluster, members, baseline, options)
        clusters.append(replace(cluster, vector=vector, note=note))
    rand = _adjusted_rand(embedded.labels, found)
    return Discovery(embedded, found, tuple(clusters), rand, int((found.labels < 0).sum()), options)


def _describe(
    embedded: EmbeddedTexts,
    number: int,
    name: str,
    keywords: Sequence[Keyword],
    members: NDArray[np.int64],
    points: Floats,
) -> Cluster:
    """A cluster without its vector; its texts are `members`, and `points` [B, D] come from `clustering.transform`."""
    labels = most_common([label for label in (embedded.texts[i].label for i in members) if label])
    central = members[clustering.nearest_to_mean(points[members], NUM_EXAMPLES)]
    return Cluster(
        number=number,
        name=name,
        size=len(members),
        keywords=tuple(keywords),
        examples=tuple(embedded.texts[index].id for index in central),
        labels=labels,
        purity=max(labels.values()) / sum(labels.values()) if labels else None,
        vector=None,
    )


def _build_vector(
    embedded: EmbeddedTexts, cluster: Cluster, members: NDArray[np.int64], baseline: Floats, options: DiscoveryOptions
) -> tuple[SteeringVector | None, str]:
    """The vector of a cluster, or None; and a remark on it, or ""."""
    import torch

    meta = embedded.meta
    corpus = "\n".join(embedded.texts[index].text for index in members)
    info = VectorInfo(
        title=", ".join(cluster.words),
        keywords=cluster.words,
        model=meta.model,
        architecture=meta.architecture,
        top_k=meta.top_k,
        texts=len(members),
        tokens=int(embedded.tokens[members].sum()) or None,
        corpus_sha256=hashlib.sha256(corpus.encode()).hexdigest(),
        created_by=CREATED_BY,
    )
    vector = SteeringVector(
        cluster.name,
        torch.from_numpy(_mean(embedded.frequency[members])),
        meta.layers,
        threshold=options.threshold,
        baseline=torch.from_numpy(baseline),
        relative=options.relative,
        info=info,
    )
    return _cut(vector, len(members) / len(embedded))


def _cut(vector: SteeringVector, share: float) -> tuple[SteeringVector | None, str]:
    """The vector, cut at 1/N if nothing exceeds the baseline, None if nothing exceeds either; and the reason.

    `share` of all texts are the vector's own. They are part of the baseline, so F is at most 1 / share times as large.
    """
    if vector.experts.any():
        return vector, ""
    absolute = f"{vector.threshold:g} / {vector.num_experts}"
    if not vector.relative:
        return None, f"no vector: no expert's share exceeds {absolute}; a lower threshold keeps more"
    missed = f"no expert's share exceeds {vector.threshold:g} x the baseline"
    if 1 / share <= vector.threshold:
        missed += f" (with {share:.0%} of all texts it can't exceed {1 / share:.2g} x)"
    if (fallback := vector.with_threshold(vector.threshold)).experts.any():
        return fallback, f"{missed}; cut at {absolute} instead"
    return None, f"no vector: {missed}, nor {absolute}; a lower threshold keeps more"


def _mean(frequency_BLN: Floats) -> Floats:
    return frequency_BLN.mean(axis=0, dtype=np.float64).astype(np.float32)


def _adjusted_rand(labels: Sequence[str], found: Clustering) -> float | None:
    if not any(labels):
        return None
    try:
        from sklearn.metrics import adjusted_rand_score
    except ImportError as error:
        raise SteerMoEError(f"discovery needs scikit-learn ({error}): pip install 'steermoe[discover]'") from error

    known = [index for index, label in enumerate(labels) if label]
    return float(adjusted_rand_score([labels[index] for index in known], found.labels[known]))


def most_common(labels: Sequence[str]) -> dict[str, int]:
    """How often each label occurs, the most frequent first, ties by name."""
    return dict(sorted(Counter(labels).items(), key=lambda item: (-item[1], item[0])))


def _name_clusters(keywords: Mapping[int, Sequence[Keyword]], names: Names) -> list[str]:
    """A name for each cluster, in the order of their numbers: the given one, or one made from its keywords.

    Raises:
        VectorError: a name for a cluster that doesn't exist, or the same name for two.
    """
    own: list[str] = []
    for number in sorted(keywords):
        name = _name_from([keyword.word for keyword in keywords[number]]) or f"cluster-{number}"
        own.append(f"{name}-{number}" if name in own else name)
    given = {}
    for key, name in names.items():
        number = key if isinstance(key, int) else own.index(key) if key in own else -1
        if not 0 <= number < len(own):
            there = ", ".join(f"{number} ({name})" for number, name in enumerate(own)) or "none"
            raise VectorError(f"no cluster '{key}' to be named '{name}'; there are: {there}")
        given[number] = name
    final = [given.get(number, name) for number, name in enumerate(own)]
    if twice := [name for name, count in Counter(final).items() if count > 1]:
        raise VectorError(f"two clusters would be named '{twice[0]}': give each its own name")
    return final


def _name_from(words: Sequence[str]) -> str:
    """The first words as a domain name: Latin letters without accents; "" if no word can be written that way."""
    parts: list[str] = []
    for word in words:
        latin = unicodedata.normalize("NFKD", word.casefold()).encode("ascii", "ignore").decode()
        latin = re.sub("[^a-z0-9]", "", latin)
        if len(latin) >= max(2, len(word) // 2 + 1) and len("-".join([*parts, latin])) <= MAX_NAME:
            parts.append(latin)
        if len(parts) == NAME_WORDS:
            break
    return "-".join(parts)
