"""From embedded texts to domains: clusters, their names, a steering vector for each (Shchukin 2024). Writes no files.

Shapes: B texts, L MoE layers, N experts per layer, D features per text.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steermoe.discovery import clustering
from steermoe.discovery.clustering import Algorithm, Clustering, Method, Metric, Selection
from steermoe.discovery.consensus import Floats
from steermoe.discovery.cutting import cut
from steermoe.discovery.keywords import Keyword, cluster_keywords
from steermoe.discovery.store import EmbeddedTexts
from steermoe.discovery.wording import Wording, wording_of
from steermoe.errors import CorpusError, VectorError, count_of
from steermoe.vectors.file import check_domain_name, normal_name
from steermoe.vectors.vector import DEFAULT_THRESHOLD, SteeringVector, VectorInfo

CREATED_BY = "steermoe vectors discover"
NUM_KEYWORDS = 10
NUM_EXAMPLES = 3
NAME_WORDS = 2
MAX_NAME = 40
OTHER_SEEDS, STABILITY_TEXTS = 2, 2000
"""Other seeds that are tried, with at most this many texts: each takes about as long as the map."""
DOMINANT, STABLE = 0.5, 0.7
"""A cluster with more than the first share of all texts is reported, like an agreement of seeds below the second."""
LEAST_WORDING, SHREDDED = 0.15, 3.5
"""Clusters that follow the words less than this above chance are reported; tokens per word that are a sign of why."""
MANY_WORDS = 5
"""Texts with fewer words are short, or in a script without spaces."""
ADVICE_NONE = "give more, longer or more different texts"
ADVICE_DOMINANT = "try --selection leaf, or --clusters with the number of domains that you expect"
ADVICE_NOISE = "try a smaller --min-cluster-size, or --assign-noise"
ADVICE_SEED = "give more or longer texts, or try another --neighbours or --selection"

Names = Mapping[int | str, str]
"""New names of clusters, by their number or by the name made from their keywords."""


@dataclass(frozen=True)
class DiscoveryOptions:
    """How domains are found.

    Attributes:
        threshold: see `SteeringVector`. None is 3, or lower for clusters whose vector would steer too few of the layers
            that set them apart (see `cutting.cut`); a number is kept.
        relative: compare with the corpus baseline. If nothing exceeds that, the vector is cut at `threshold` / N.
        algorithm, cluster_dimensions, min_cluster_size, neighbours, assign_noise, seed: see `clustering.Method`.
        metric: see `clustering.Method`; None is "hellinger", or "cosine" if the features include hidden states.
        clusters, selection: see `clustering.Method`.
        hidden: cluster by mean hidden states too, if the embeddings have them; vectors are of the routing alone.
        other_seeds: cluster with this many other seeds too, to see whether the clusters depend on the seed; None is 2
            for up to `STABILITY_TEXTS` texts, else 0.
    """

    threshold: float | None = None
    relative: bool = True
    cluster_dimensions: int | None = None
    min_cluster_size: int | None = None
    neighbours: int = 15
    metric: Metric | None = None
    assign_noise: bool = False
    seed: int = 0
    clusters: int | None = None
    selection: Selection | None = None
    other_seeds: int | None = None
    hidden: bool = True
    algorithm: Algorithm | None = None


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
            have one; noise counts as a cluster of its own. None without clusters or without two different labels.
        noise: number of texts in no cluster.
        options: as given, with the threshold, cluster size, metric and other seeds that were used.
        stability: the lowest agreement with the clusters that other seeds give, in the same measure; None if no other
            seed was tried.
        wording: whether the clusters follow the words of the texts; None if there is too little to compare.
    """

    embedded: EmbeddedTexts
    clustering: Clustering
    clusters: tuple[Cluster, ...]
    adjusted_rand: float | None
    noise: int
    options: DiscoveryOptions
    stability: float | None = None
    wording: Wording | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What speaks against the clusters, and what to do about it; a line each."""
        texts, sizes = len(self.embedded), [cluster.size for cluster in self.clusters]
        if not sizes:
            return (f"no cluster was found: the model routes these texts alike; {ADVICE_NONE}",)
        found = []
        largest, second = sizes[0], max(sizes[1:], default=0)
        if largest > DOMINANT * texts and largest > 2 * second:
            found.append(
                f"cluster '{self.clusters[0].name}' has {largest:,} of {texts:,} texts: it may hold several domains; "
                f"{ADVICE_DOMINANT}"
            )
        if self.noise > DOMINANT * texts:
            found.append(f"{self.noise:,} of {texts:,} texts are in no cluster; {ADVICE_NOISE}")
        if self.stability is not None and self.stability < STABLE:
            found.append(
                f"another seed gives other clusters (adjusted Rand index {self.stability:.2f}, 1 is the same): take "
                f"them as one of several views; {ADVICE_SEED}"
            )
        if self.wording is not None and self.wording.above_chance < LEAST_WORDING:
            found.append(
                f"the clusters hardly follow the words: {self.wording.share:.0%} of the texts are with the one that is "
                f"nearest by words, by chance {self.wording.chance:.0%}; the model's routing says little about these "
                f"texts{self._why_shredded()}"
            )
        return tuple(found)

    def _why_shredded(self) -> str:
        """That the model cuts words into many tokens, or ""; of texts in scripts that put spaces between words."""
        most = self.embedded.meta.max_tokens
        read = [number for number, tokens in enumerate(self.embedded.tokens) if tokens < most]  # the others were cut
        words = [len(self.embedded.texts[number].text.split()) for number in read]
        if not words:
            return ""
        tokens = float(np.median(self.embedded.tokens[read] / np.maximum(words, 1)))
        if tokens < SHREDDED or np.median(words) < MANY_WORDS:
            return ""
        return f": it cuts a word into {tokens:.1f} tokens, so it hardly knows their language"

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
    seeds = _check(options, len(embedded))
    names = {old: check_domain_name(name) for old, name in (names or {}).items()}
    notify = progress or (lambda step: None)
    if not options.hidden:
        embedded = replace(embedded, hidden=None)
    metric: Metric = options.metric or ("hellinger" if embedded.hidden is None else "cosine")
    method = Method(**{f.name: getattr(options, f.name) for f in fields(Method)} | {"metric": metric})
    notify(f"Clustering {len(embedded)} texts ...")
    features = embedded.features()
    found = clustering.cluster(features, method)
    if seeds:
        notify(f"Clustering with {count_of(seeds, 'other seed')} ...")
    others = [(options.seed + step) % 2**32 for step in range(1, seeds + 1)]
    stability = clustering.agreement_of_seeds(features, found, method, others)
    notify("Finding keywords ...")
    keywords = cluster_keywords([text.text for text in embedded.texts], found.labels, NUM_KEYWORDS)
    notify("Building vectors ...")
    baseline = _mean(embedded.frequency)
    clusters = []
    for number, name in enumerate(_name_clusters(keywords, names)):
        members = np.flatnonzero(found.labels == number)
        points = clustering.transform(features[members], metric)  # all texts' at once would be a copy of the corpus
        cluster = _describe(embedded, number, name, keywords[number], members, points)
        vector, note = _build_vector(embedded, cluster, members, baseline, options)
        clusters.append(replace(cluster, vector=vector, note=note))
    return Discovery(
        embedded,
        found,
        tuple(clusters),
        _agreement(embedded.labels, found),
        int((found.labels < 0).sum()),
        replace(options, **_used(options, method, found), other_seeds=seeds, hidden=embedded.hidden is not None),
        stability,
        wording_of([text.text for text in embedded.texts], found.labels),
    )


def _used(options: DiscoveryOptions, method: Method, found: Clustering) -> dict[str, Any]:
    """Options as they were used, where they were left open."""
    used: dict[str, Any] = {"min_cluster_size": found.min_cluster_size, "metric": method.metric}
    if method.by_consensus:
        used["algorithm"] = "consensus"
    else:
        used |= {"algorithm": "hdbscan", "selection": options.selection or "eom"}
        used["cluster_dimensions"] = options.cluster_dimensions or clustering.DIMENSIONS
    if options.threshold is None:
        used["threshold"] = DEFAULT_THRESHOLD
    return used


def _check(options: DiscoveryOptions, texts: int) -> int:
    """The number of other seeds to cluster with.

    Raises:
        VectorError: an impossible threshold. CorpusError: a negative number of seeds.
    """
    if options.threshold is not None and not 0 <= options.threshold < np.inf:
        raise VectorError(f"threshold {options.threshold} must be a finite number, 0 or more")
    if options.other_seeds is None:
        return OTHER_SEEDS if texts <= STABILITY_TEXTS else 0
    if options.other_seeds < 0:
        raise CorpusError(f"other_seeds is {options.other_seeds}: give 0 or more")
    return options.other_seeds


def _describe(
    embedded: EmbeddedTexts,
    number: int,
    name: str,
    keywords: Sequence[Keyword],
    members: NDArray[np.int64],
    points: Floats,
) -> Cluster:
    """A cluster without its vector; its texts are `members`; their `points` [*, D] come from `clustering.transform`."""
    labels = most_common([label for label in (embedded.texts[i].label for i in members) if label])
    central = members[clustering.nearest_to_mean(points, NUM_EXAMPLES)]
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
        fingerprint=meta.routers,
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
        threshold=DEFAULT_THRESHOLD if options.threshold is None else options.threshold,
        baseline=torch.from_numpy(baseline),
        relative=options.relative,
        info=info,
    )
    return cut(vector, len(members) / len(embedded), adapt=options.threshold is None)


def _mean(frequency_BLN: Floats) -> Floats:
    return frequency_BLN.mean(axis=0, dtype=np.float64).astype(np.float32)


def _agreement(labels: Sequence[str], found: Clustering) -> float | None:
    """Of the clusters with the known labels; None if there are no clusters, or not two labels, to agree on."""
    if len({label for label in labels if label}) < 2 or not found.num_clusters:
        return None
    known = [index for index, label in enumerate(labels) if label]
    return clustering.adjusted_rand([labels[index] for index in known], found.labels[known])


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
    """The first words as a domain name: Latin letters without accents, others as they are; "" if no word allows it."""
    parts: list[str] = []
    for word in words:
        part = _in_a_name(word)
        if part and len("-".join([*parts, part])) <= MAX_NAME:
            parts.append(part)
        if len(parts) == NAME_WORDS:
            break
    return "-".join(parts)


def _in_a_name(word: str) -> str:
    """A word without accents if it is Latin, else in its own script; "" if neither can be part of a name."""
    latin = unicodedata.normalize("NFKD", word.casefold()).encode("ascii", "ignore").decode()
    latin = re.sub("[^a-z0-9]", "", latin)
    if len(latin) >= max(2, len(word) // 2 + 1):
        return latin
    return (normal_name(word) or "") if not latin else ""
