"""How well `vectors discover` finds the sources of labelled corpora that nobody here wrote.

`python benchmarks/outside.py --corpus FOLDER_OR_FILE [--seeds 0 10] [--json FILE]`

A corpus is a JSONL file with `text` and `label`; a folder holds several. Each is read whole and cut to its first 40
words (`--words`), and the repository's stories come beside them: the held-out ones, and 45 of each topic from those the
routers were trained on. Texts are embedded once with the default model and kept in `--work`; every figure is the median
of the seeds, with the lowest and the highest.

`discover` has no number of clusters; k-means is given the true one. Noise counts as a cluster of its own in all
measures. The second table compares routing with mean hidden states as text embeddings, like MTEB and 2410.10814: the
v-measure of k-means, and how often a text's nearest neighbour has its label.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from steermoe.discovery.clustering import Method, labels_of, transform
from steermoe.discovery.embed_corpus import embed_corpus
from steermoe.discovery.embedder import EmbeddingOptions
from steermoe.discovery.store import EmbeddedTexts, Text
from steermoe.errors import CorpusError
from steermoe.models.default.pull import default_model_folder
from steermoe.models.default.stories import load_stories
from steermoe.models.loading import LoadedModel, load

MEASURES = ("ARI", "NMI", "v-measure", "noise", "clusters", "largest")
TRAINING_STORIES = 45
LEAST_OF_MEDIAN, MOST_NOISE, GIANT = 0.9, 0.25, 0.6
"""The bars: the lowest ARI as a share of the median, the noise, and the largest cluster."""


def read_corpus(path: Path, words: int | None = None) -> list[Text]:
    """The texts of a JSONL file, or their first words."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    if missing := [n for n, record in enumerate(records, 1) if not record.get("text") or not record.get("label")]:
        raise CorpusError(f"'{path}', line {missing[0]}: expected `text` and `label`")
    texts = [" ".join(r["text"].split()[:words]) if words else r["text"] for r in records]
    return [Text(f"{path.stem}:{n}", text, r["label"]) for n, (text, r) in enumerate(zip(texts, records, strict=True))]


def own_stories() -> dict[str, list[Text]]:
    """Held-out stories, and some of those that the routers were trained on."""
    seen: Counter[str] = Counter()
    training = []
    for story in load_stories("train"):
        seen[story.topic] += 1
        if seen[story.topic] <= TRAINING_STORIES:
            training.append(Text(story.id, story.text, story.topic))
    heldout = [Text(story.id, story.text, story.topic) for story in load_stories("heldout")]
    return {"own stories, held out": heldout, "own stories, trained on": training}


def cases_of(paths: Sequence[Path], words: int, stories: bool) -> dict[str, list[Text]]:
    files = [file for path in paths for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]
    if not files and paths:
        raise CorpusError(f"no *.jsonl file in '{paths[0]}'")
    cases = {}
    for file in files:
        cases[file.stem] = read_corpus(file)
        if words:
            cases[f"{file.stem}, {words} words"] = read_corpus(file, words)
    return cases | (own_stories() if stories else {})


def embed(loaded: LoadedModel | None, name: str, texts: list[Text], work: Path) -> EmbeddedTexts:
    folder = work / default_model_folder().name / "".join(c if c.isalnum() else "_" for c in name)
    store, _ = embed_corpus(loaded or load(), texts, folder, EmbeddingOptions(hidden=True))
    return store.load()


# ---- measures ----


def measure(labels: np.ndarray, known: Sequence[str]) -> dict[str, float]:
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, v_measure_score

    sizes = np.bincount(labels[labels >= 0], minlength=1)
    return {
        "ARI": float(adjusted_rand_score(known, labels)),
        "NMI": float(normalized_mutual_info_score(known, labels)),
        "v-measure": float(v_measure_score(known, labels)),
        "noise": float((labels < 0).mean()),
        "clusters": float((sizes > 0).sum()),
        "largest": float(sizes.max() / len(labels)),
    }


def summary(runs: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """Median, least and most of each measure."""
    values = {name: [run[name] for run in runs] for name in MEASURES}
    return {name: [statistics.median(these), min(these), max(these)] for name, these in values.items()}


def features_of(embedded: EmbeddedTexts) -> dict[str, np.ndarray]:
    """What k-means is given, by name."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    hidden = embedded.hidden - embedded.hidden.mean(0)
    words = TfidfVectorizer(stop_words="english", min_df=2).fit_transform([text.text for text in embedded.texts])
    return {
        "routing": transform(replace(embedded, hidden=None).features(), "hellinger"),
        "tf-idf": words,
        "mean hidden states": transform(hidden, "cosine"),
        "routing + hidden states": embedded.features(),
    }


def nearest_neighbour(features: np.ndarray, known: Sequence[str]) -> float:
    """Share of texts whose nearest other text, by cosine, has the same label."""
    unit = transform(features - features.mean(0), "cosine")
    likeness = unit @ unit.T
    np.fill_diagonal(likeness, -np.inf)
    labels = np.array(known)
    return float((labels[likeness.argmax(1)] == labels).mean())


def compare(embedded: EmbeddedTexts, seeds: Sequence[int]) -> dict:
    from sklearn.cluster import KMeans

    known = embedded.labels
    sources = len(set(known))
    began = time.perf_counter()
    routing = replace(embedded, hidden=None)
    found = {"discover": discovered(routing, seeds, algorithm="consensus")}
    seconds = (time.perf_counter() - began) / len(seeds)
    found["discover + hidden states"] = discovered(embedded, seeds, algorithm="consensus")
    found["HDBSCAN"] = discovered(routing, seeds, algorithm="hdbscan")
    features = features_of(embedded)
    for name, matrix in features.items():
        found[f"k-means, {name}"] = [
            KMeans(sources, n_init=10, random_state=seed).fit_predict(matrix) for seed in seeds
        ]
    methods = {name: summary([measure(labels, known) for labels in runs]) for name, runs in found.items()}
    like_mteb = {
        name: {
            "v-measure": methods[f"k-means, {name}"]["v-measure"][0],
            "neighbour": nearest_neighbour(features[name], known),
        }
        for name in features
        if name != "tf-idf"
    }
    return {
        "texts": len(known),
        "sources": dict(Counter(known)),
        "tokens": float(embedded.tokens.mean()),
        "seconds": seconds,
        "methods": methods,
        "embeddings": like_mteb,
    }


def discovered(embedded: EmbeddedTexts, seeds: Sequence[int], algorithm: str) -> list[np.ndarray]:
    """The clusters of `vectors discover`, for each seed."""
    method = Method(algorithm=algorithm, metric="hellinger" if embedded.hidden is None else "cosine")
    return [labels_of(embedded.features(), replace(method, seed=seed)) for seed in seeds]


def misses(case: dict) -> list[str]:
    """The bars that discovery misses, on routing alone and with hidden states, in words."""
    means = case["methods"]["k-means, routing"]
    return [
        f"{name}: {miss}"
        for name in ("discover", "discover + hidden states")
        for miss in misses_of(case["methods"][name], means)
    ]


def misses_of(ours: dict, means: dict) -> list[str]:
    median, least, _ = ours["ARI"]
    found = []
    if least < LEAST_OF_MEDIAN * median:
        found.append(f"lowest ARI {least:.3f} is under {LEAST_OF_MEDIAN} of the median {median:.3f}")
    if median < means["ARI"][0]:
        found.append(f"median ARI {median:.3f} is under that of k-means, {means['ARI'][0]:.3f}")
    if ours["largest"][2] > GIANT:
        found.append(f"a cluster has {ours['largest'][2]:.0%} of the texts")
    if ours["noise"][2] > MOST_NOISE:
        found.append(f"{ours['noise'][2]:.0%} are in no cluster")
    return found


# ---- tables ----


def print_case(console: Console, name: str, case: dict) -> None:
    title = f"{name}: {case['texts']} texts of {case['tokens']:.0f} tokens, {len(case['sources'])} sources"
    table = Table("method", *MEASURES, title=title)
    for method, figures in case["methods"].items():
        table.add_row(method, *(spread(measure, figures[measure]) for measure in MEASURES))
    console.print(table)
    verdict = "; ".join(case["misses"]) or "all bars are met"
    console.print(f"{verdict}; {case['seconds']:.1f} s for each discovery\n")


def spread(measure: str, figures: Sequence[float]) -> str:
    form = "{:.0%}" if measure in ("noise", "largest") else "{:.0f}" if measure == "clusters" else "{:.3f}"
    middle, least, most = (form.format(value) for value in figures)
    return middle if least == most else f"{middle} ({least} to {most})"


def print_embeddings(console: Console, cases: dict[str, dict]) -> None:
    kinds = list(next(iter(cases.values()))["embeddings"])
    table = Table("corpus", *kinds, title="v-measure of k-means / nearest neighbour of the same label")
    for name, case in cases.items():
        figures = [case["embeddings"][kind] for kind in kinds]
        table.add_row(name, *(f"{each['v-measure']:.3f} / {each['neighbour']:.0%}" for each in figures))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, nargs="*", default=[], help="JSONL files, or folders of them")
    parser.add_argument("--words", type=int, default=40, help="cut each corpus, as a second case; 0: no")
    parser.add_argument("--no-stories", action="store_true", help="leave out the repository's own stories")
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 10), metavar=("FIRST", "END"))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "steermoe-bench-outside")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    console = Console(width=160)
    cases, loaded = {}, load()
    for name, texts in cases_of(args.corpus, args.words, not args.no_stories).items():
        print(f"{name}: {len(texts)} texts ...", file=sys.stderr, flush=True)
        case = compare(embed(loaded, name, texts, args.work), range(*args.seeds))
        case["misses"] = misses(case)
        cases[name] = case
        print_case(console, name, case)
    print_embeddings(console, cases)
    if args.json:
        args.json.write_text(json.dumps(cases, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
