"""From embedded texts to domains: vectors are the clusters' mean routing, names suit files, labels are counted."""

import hashlib
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from steermoe.discovery.discover import DiscoveryOptions, discover, most_common
from steermoe.discovery.store import EmbeddedTexts, EmbeddingMeta, Text
from steermoe.discovery.wording import Wording
from steermoe.errors import CorpusError, SteerMoEError, VectorError
from steermoe.vectors.file import check_domain_name, read_vector, write_vector

LAYERS, EXPERTS = 4, 8
WORDS = {"sport": "referee goal", "food": "butter bread", "law": "judge witness"}


def embedded(sizes, share=0.8, seed=0, labels=True) -> EmbeddedTexts:
    """Texts of domains; each domain gives one expert per layer `share` of its choices."""
    random = np.random.default_rng(seed)
    texts, rows = [], []
    for expert, (domain, size) in enumerate(sizes.items()):
        mean = np.full(EXPERTS, (1 - share) / (EXPERTS - 1))
        mean[expert] = share
        for number in range(size):
            texts.append(Text(f"{domain}/{number}", f"the {WORDS[domain]} of day {number}", domain if labels else ""))
            rows.append(random.dirichlet(100 * mean, size=LAYERS))
    meta = EmbeddingMeta("tiny", "mixtral", (1, 3, 5, 7), EXPERTS, 2, complete=True, texts=len(texts))
    tokens = np.arange(1, len(texts) + 1)
    return EmbeddedTexts(meta, texts, tokens, np.array(rows, dtype=np.float32))


@pytest.fixture(autouse=True, scope="module")
def _extra():
    pytest.importorskip("umap")


@pytest.fixture(scope="module")
def found():
    return discover(embedded({"sport": 16, "food": 24, "law": 20}), DiscoveryOptions(threshold=1.5))


def test_clusters_are_the_domains_the_largest_first(found):
    assert [cluster.name for cluster in found.clusters] == ["bread-butter", "judge-witness", "goal-referee"]
    assert [cluster.size for cluster in found.clusters] == [24, 20, 16]
    assert [cluster.number for cluster in found.clusters] == [0, 1, 2]
    assert [cluster.labels for cluster in found.clusters] == [{"food": 24}, {"law": 20}, {"sport": 16}]
    assert [cluster.purity for cluster in found.clusters] == [1.0] * 3
    assert found.adjusted_rand == 1.0
    assert found.noise == 0
    assert found.name_of(0) == "bread-butter"
    assert found.name_of(-1) == ""


def test_a_vector_is_the_mean_of_its_texts(found):
    source = found.embedded
    for cluster in found.clusters:
        rows = [row for row, label in enumerate(found.clustering.labels) if label == cluster.number]
        vector = cluster.vector
        assert np.allclose(vector.frequency.numpy(), source.frequency[rows].mean(0), atol=1e-6)
        assert np.allclose(vector.baseline.numpy(), source.frequency.mean(0), atol=1e-6)
        assert vector.domain == cluster.name
        assert vector.layers == (1, 3, 5, 7)
        assert vector.relative
        assert vector.threshold == 1.5
        assert vector.info.keywords == cluster.words
        assert vector.info.title == ", ".join(cluster.words)
        assert (vector.info.model, vector.info.architecture, vector.info.top_k) == ("tiny", "mixtral", 2)
        assert vector.info.texts == cluster.size
        assert vector.info.tokens == sum(int(source.tokens[row]) for row in rows)
        joined = "\n".join(source.texts[row].text for row in rows)
        assert vector.info.corpus_sha256 == hashlib.sha256(joined.encode()).hexdigest()
        assert vector.info.created_by == "steermoe vectors discover"
        assert vector.chosen().keys() == {1, 3, 5, 7}
        assert cluster.note == ""


def test_a_vector_can_be_stored_in_a_file(found, tmp_path):
    vector = found.clusters[0].vector
    write_vector(vector, tmp_path / "x.safetensors")
    assert torch.equal(read_vector(tmp_path / "x.safetensors").experts, vector.experts)


def test_examples_are_the_texts_nearest_to_the_centre():
    source = embedded({"sport": 20, "food": 20})
    typical = source.frequency[:20].mean(0)
    source.frequency[7] = typical
    (sport,) = (c for c in discover(source).clusters if "sport" in c.labels)
    assert sport.examples[0] == "sport/7"
    assert len(set(sport.examples)) == 3


def test_labels_that_are_partly_known():
    source = embedded({"sport": 20, "food": 20})
    texts = [replace(text, label="") if number % 2 else text for number, text in enumerate(source.texts)]
    texts[0] = replace(texts[0], label="food")
    found = discover(EmbeddedTexts(source.meta, texts, source.tokens, source.frequency))
    sport = next(cluster for cluster in found.clusters if "sport" in cluster.labels)
    assert sport.labels == {"sport": 9, "food": 1}
    assert sport.purity == 0.9
    assert 0.6 < found.adjusted_rand < 1


def test_without_labels_there_is_no_agreement():
    found = discover(embedded({"sport": 20, "food": 20}, labels=False))
    assert found.adjusted_rand is None
    assert {cluster.purity for cluster in found.clusters} == {None}
    assert {tuple(cluster.labels) for cluster in found.clusters} == {()}


def test_noise_counts_as_a_group_in_the_agreement(monkeypatch):
    from steermoe.discovery import clustering

    labels = np.repeat([0, -1], 20)
    monkeypatch.setattr(clustering, "_densest", lambda at, *_: (labels, (labels >= 0).astype(float)))
    found = discover(embedded({"sport": 20, "food": 20}), DiscoveryOptions(algorithm="hdbscan"))
    assert found.adjusted_rand == 1.0
    assert found.noise == 20
    assert len(found.clusters) == 1


# ---- thresholds ----


@pytest.mark.parametrize(
    ("share", "options", "relative", "note"),
    [
        (0.8, {"threshold": 1.5}, True, ""),
        (0.8, {"threshold": 3.0, "relative": False}, False, ""),
        (0.8, {"threshold": 3.0}, False, r"(with 50% of all texts it can't exceed 2 x); cut at 3 / 8 instead"),
        (0.3, {"threshold": 3.0}, None, "no vector: no expert's share exceeds 3 x the baseline (with 50%"),
        (0.3, {"threshold": 1.9}, False, "no expert's share exceeds 1.9 x the baseline; cut at 1.9 / 8 instead"),
        (0.3, {"threshold": 3.0, "relative": False}, None, "no vector: no expert's share exceeds 3 / 8; a lower"),
    ],
)
def test_if_nothing_exceeds_the_baseline_the_cut_is_the_papers_or_there_is_no_vector(share, options, relative, note):
    found = discover(embedded({"sport": 20, "food": 20}, share=share), DiscoveryOptions(**options))
    assert len(found.clusters) == 2
    for cluster in found.clusters:
        assert (cluster.vector.relative if cluster.vector else None) == relative
        assert note in cluster.note
        assert bool(cluster.note) == bool(note)
        if cluster.vector is not None:
            assert cluster.vector.experts.any()


@pytest.mark.parametrize("threshold", [-1.0, float("nan"), float("inf")])
def test_impossible_thresholds(threshold):
    with pytest.raises(VectorError, match="must be a finite number, 0 or more"):
        discover(embedded({"sport": 10, "food": 10}), DiscoveryOptions(threshold=threshold))


def test_a_thin_vector_is_cut_lower_unless_its_threshold_was_asked_for():
    source = embedded({"sport": 15, "food": 30, "law": 30}, share=0.4)
    source.frequency[:15, 0] = [0.79, *[0.03] * 7]  # in one layer sport's expert exceeds the baseline three times
    source.frequency[15:, 0, 0] = 0.01
    source.frequency[:] /= source.frequency.sum(-1, keepdims=True)
    thin, lowered = (
        next(c for c in discover(source, options).clusters if "sport" in c.labels)
        for options in (DiscoveryOptions(threshold=3.0), None)
    )
    assert (thin.vector.chosen()[1], thin.vector.threshold, thin.note) == ({0: pytest.approx(0.79)}, 3.0, "")
    assert {layer for layer, experts in thin.vector.chosen().items() if experts} == {1}
    assert all(0 in experts for experts in lowered.vector.chosen().values())
    assert lowered.vector.threshold < 3
    assert "since 3 x the baseline reaches 1 of 4 layers that set its texts apart" in lowered.note


# ---- names ----


def test_clusters_are_renamed_by_number_or_name():
    source = embedded({"sport": 20, "food": 24})
    found = discover(source, DiscoveryOptions(threshold=1.5), names={0: "kitchen", "goal-referee": "football"})
    assert [cluster.name for cluster in found.clusters] == ["kitchen", "football"]
    assert [cluster.vector.domain for cluster in found.clusters] == ["kitchen", "football"]


def test_a_new_name_in_any_script():
    found = discover(embedded({"sport": 20, "food": 24}), names={0: "погода", 1: "カ\u3099"})
    assert [cluster.name for cluster in found.clusters] == ["погода", "ガ"]
    assert [cluster.vector.domain for cluster in found.clusters] == ["погода", "ガ"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({5: "x"}, r"no cluster '5' to be named 'x'; there are: 0 \(bread-butter\), 1 \(goal-referee\)"),
        ({"golf": "x"}, "no cluster 'golf'"),
        ({-1: "x"}, "no cluster '-1'"),
        ({0: "x", 1: "x"}, "two clusters would be named 'x'"),
        ({0: "goal-referee"}, "two clusters would be named 'goal-referee'"),
        ({0: "../x"}, "domain name '../x' is not allowed"),
    ],
)
def test_names_that_are_not_allowed(names, expected):
    with pytest.raises(VectorError, match=expected):
        discover(embedded({"sport": 20, "food": 24}), names=names)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("Crème brûlée", "brulee-creme"),
        ("мяч ворота", "ворота-мяч"),
        ("足球 ball", "ball-足球"),
        ("मैच गोल", "गोल-मैच"),
        ("x1", "cluster-0"),
        ("a" * 50 + " kite", "kite"),
    ],
)
def test_names_suit_files(words, name):
    source = embedded({"sport": 20, "food": 18})
    texts = [replace(text, text=words) if text.label == "sport" else text for text in source.texts]
    found = discover(EmbeddedTexts(source.meta, texts, source.tokens, source.frequency))
    assert found.clusters[0].name == name
    assert all(check_domain_name(cluster.name) for cluster in found.clusters)


def test_clusters_without_keywords_have_names():
    source = embedded({"sport": 20, "food": 18})
    texts = [replace(text, text="1 2 3") for text in source.texts]
    found = discover(EmbeddedTexts(source.meta, texts, source.tokens, source.frequency))
    assert [cluster.name for cluster in found.clusters] == ["cluster-0", "cluster-1"]


def test_two_clusters_of_the_same_words_have_two_names():
    from steermoe.discovery.discover import _name_clusters
    from steermoe.discovery.keywords import Keyword

    words = [Keyword("goal", 2.0), Keyword("team", 1.0)]
    assert _name_clusters({0: words, 1: words, 2: []}, {}) == ["goal-team", "goal-team-1", "cluster-2"]


# ---- other ----


def test_hidden_states_are_compared_by_cosine():
    source = embedded({"sport": 20, "food": 20})
    hidden = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    hidden[:20] += 5
    hidden[20:] -= 5  # a direction as well: noise alone has all directions, and may be more clusters than one
    found = discover(replace(source, hidden=hidden))
    assert found.options.metric == "cosine"
    assert found.adjusted_rand == 1.0
    assert discover(source).options.metric == "hellinger"


def test_options_and_progress_are_reported():
    steps = []
    source = embedded({"sport": 20, "food": 20})
    options = DiscoveryOptions(seed=3, neighbours=9, cluster_dimensions=2)
    found = discover(source, options, progress=steps.append)
    assert steps == [
        "Clustering 40 texts ...",
        "Clustering with 2 other seeds ...",
        "Finding keywords ...",
        "Building vectors ...",
    ]
    assert (found.options.seed, found.options.neighbours, found.options.cluster_dimensions) == (3, 9, 2)
    assert (found.options.min_cluster_size, found.options.algorithm, found.options.selection) == (4, "hdbscan", "eom")
    assert not found.options.hidden


def test_hidden_states_can_be_left_out():
    source = embedded({"sport": 20, "food": 20})
    mixed = np.tile(np.eye(2, dtype=np.float32), (20, 1)) * 9 - 4  # they say nothing about the domain
    found = discover(replace(source, hidden=mixed), DiscoveryOptions(hidden=False))
    assert (found.adjusted_rand, found.options.metric, found.options.hidden) == (1.0, "hellinger", False)


def test_texts_without_a_cluster():
    source = embedded({"sport": 20, "food": 20})
    found = discover(replace(source, frequency=np.full_like(source.frequency, 1 / EXPERTS)))
    assert found.clusters == ()
    assert found.noise == 40
    assert found.adjusted_rand is None
    assert found.stability is None
    (warning,) = found.warnings
    assert warning.startswith("no cluster was found: the model routes these texts alike; give more")


def test_one_label_is_nothing_to_agree_on():
    source = embedded({"sport": 20, "food": 20})
    texts = [replace(text, label="all") for text in source.texts]
    found = discover(replace(source, texts=texts))
    assert len(found.clusters) == 2
    assert found.adjusted_rand is None
    assert {cluster.purity for cluster in found.clusters} == {1.0}


# ---- what speaks against the clusters ----


def test_good_clusters_have_no_warnings(found):
    assert found.warnings == ()
    assert found.stability > 0.9
    assert found.options.other_seeds == 2


def test_clusters_that_hang_on_the_seed(found):
    (warning,) = replace(found, stability=0.115).warnings
    assert warning.startswith("another seed gives other clusters (adjusted Rand index 0.12, 1 is the same)")
    assert "--neighbours" in warning


@pytest.mark.parametrize(
    ("sizes", "warned"), [((418, 50, 32), True), ((260, 200, 40), False), ((240, 130, 130), False)]
)
def test_a_dominant_cluster(found, sizes, warned):
    clusters = tuple(replace(cluster, size=size) for cluster, size in zip(found.clusters, sizes, strict=True))
    source = replace(found.embedded, texts=[found.embedded.texts[0]] * 500)
    warnings = replace(found, embedded=source, clusters=clusters).warnings
    expected = (
        f"cluster 'bread-butter' has {sizes[0]} of 500 texts: it may hold several domains; try --selection leaf, or "
        "--clusters with the number of domains that you expect"
    )
    assert warnings == ((expected,) if warned else ())


def test_noise_that_is_most_of_the_corpus(found):
    source = replace(found.embedded, texts=[found.embedded.texts[0]] * 500)
    (warning,) = replace(found, embedded=source, noise=440).warnings
    assert warning == "440 of 500 texts are in no cluster; try a smaller --min-cluster-size, or --assign-noise"


def test_clusters_that_do_not_follow_the_words(found):
    assert found.wording.share == 1.0
    assert found.wording.chance == pytest.approx((24**2 + 20**2 + 16**2) / 60**2)
    whole = replace(found.embedded, tokens=np.full(60, 9))  # six words a text
    no_better = replace(found, embedded=whole, wording=Wording(0.4, 0.36))
    (warning,) = no_better.warnings
    assert warning.startswith("the clusters hardly follow the words: 40% of the texts are with the one that is nearest")
    assert "by chance 36%" in warning
    assert "language" not in warning
    shredded = replace(found.embedded, tokens=np.full(60, 40))
    assert (
        replace(no_better, embedded=shredded)
        .warnings[0]
        .endswith(": it cuts a word into 6.7 tokens, so it hardly knows their language")
    )


def test_other_seeds_on_request(monkeypatch):
    from steermoe.discovery import discover as module

    source = embedded({"sport": 20, "food": 20})
    assert discover(source, DiscoveryOptions(other_seeds=0)).stability is None
    monkeypatch.setattr(module, "STABILITY_TEXTS", 39)
    large = discover(source)
    assert (large.options.other_seeds, large.stability) == (0, None)
    assert discover(source, DiscoveryOptions(other_seeds=1)).stability == 1.0
    with pytest.raises(CorpusError, match="other_seeds is -1: give 0 or more"):
        discover(source, DiscoveryOptions(other_seeds=-1))


def test_a_wanted_number_of_clusters():
    found = discover(embedded({"sport": 16, "food": 24, "law": 20}), DiscoveryOptions(clusters=3, selection="leaf"))
    assert [cluster.size for cluster in found.clusters] == [24, 20, 16]
    assert (found.options.clusters, found.options.selection) == (3, "leaf")


def test_most_common():
    assert list(most_common(["b", "a", "b", "c"]).items()) == [("b", 2), ("a", 1), ("c", 1)]


def test_scikit_learn_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(SteerMoEError, match=r"pip install 'steermoe\[discover\]'"):
        discover(embedded({"sport": 20, "food": 20}))
