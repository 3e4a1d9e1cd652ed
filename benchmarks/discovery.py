"""How well domains are found, and how fast texts are embedded: `make bench-discovery`, or
`python benchmarks/discovery.py [--work DIR] [--json FILE] [--only clusters ...]`.

All on the default model and the repository's stories, without their openings. Parts: `clusters` (agreement with the
true topics, keywords), `heldout` (the same on stories that neither model nor vectors have seen), `steering` (discovered
and labelled vectors compared), `speed` (A B A B in one process), `memory` (400 and 40,000 texts compared).
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from measures import continue_openings, success_rate
from rich.console import Console
from rich.table import Table

from steermoe.discovery.discover import Discovery, discover
from steermoe.discovery.embed_corpus import embed_corpus, embedder
from steermoe.discovery.embedder import EmbeddingOptions
from steermoe.discovery.embedder_hf import batches
from steermoe.discovery.store import EmbeddedTexts, Text
from steermoe.models.default import spec
from steermoe.models.default.pull import default_model_folder
from steermoe.models.default.stories import domain_words, load_stories, openings
from steermoe.models.loading import load
from steermoe.routing.routers import find_routers
from steermoe.steering.plans import plan_for
from steermoe.vectors.vector import SteeringVector

PARTS = ("clusters", "heldout", "steering", "speed", "memory")
FORMULA, STRENGTH = "zero_max_scaled", 6.0


class Report:
    """Figures for JSON, and a row for each with its target for readers."""

    def __init__(self) -> None:
        self.figures: dict = {}
        self.rows: list[tuple[str, str, str, str]] = []

    def add(self, name: str, value, shown: str, wanted: str = "", met: bool | None = None) -> None:
        self.figures[name] = value
        mark = {True: "ok", False: "MISS", None: ""}[met]
        self.rows.append((mark, name, shown, wanted))
        print(f"{mark:4} {name}: {shown}{f' (wanted {wanted})' if wanted else ''}", file=sys.stderr, flush=True)


def embed_stories(loaded, split: str, folder: Path) -> EmbeddedTexts:
    texts = [Text(story.id, story.rest, story.topic) for story in load_stories(split)]
    store, _ = embed_corpus(loaded, texts, folder / split, EmbeddingOptions(hidden=True))
    return store.load()


def agreement(embedded: EmbeddedTexts, report: Report, prefix: str) -> Discovery:
    """Adjusted Rand index with the true topics, of our clusters and of other methods."""
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics import adjusted_rand_score

    routing = replace(embedded, hidden=None)
    found = discover(routing)
    topics = len(spec.TOPICS)
    words = TfidfVectorizer(stop_words="english", min_df=2).fit_transform([text.text for text in embedded.texts])
    guess = KMeans(topics, n_init=10, random_state=0).fit_predict(words)
    by_words = float(adjusted_rand_score(embedded.labels, guess))
    from steermoe.discovery.clustering import Method, cluster

    hidden = cluster(embedded.hidden - embedded.hidden.mean(0), Method(metric="cosine"))
    by_hidden = float(adjusted_rand_score(embedded.labels, hidden.labels))
    both = discover(embedded)
    ours = found.adjusted_rand
    report.add(f"{prefix}: adjusted Rand index", ours, f"{ours:.3f}", ">= 0.8", ours >= 0.8)
    report.add(f"{prefix}: k-means on tf-idf", by_words, f"{by_words:.3f}", "lower than ours", by_words < ours)
    report.add(f"{prefix}: mean hidden states, same clustering", by_hidden, f"{by_hidden:.3f}")
    report.add(f"{prefix}: routing and hidden states", both.adjusted_rand, f"{both.adjusted_rand:.3f}")
    shown = f"{len(found.clusters)} clusters, {found.noise} of {len(embedded)} texts in none"
    report.add(f"{prefix}: clusters", len(found.clusters), shown)
    for each in found.clusters:
        label = next(iter(each.labels))
        shown = f"{each.size} texts, {each.purity:.0%} {label}: {', '.join(each.words)}"
        report.add(f"{prefix}: cluster {each.number}", {"label": label, "keywords": each.words}, shown)
    return found


def compare_steering(loaded, embedded: EmbeddedTexts, found: Discovery, count: int, report: Report) -> None:
    """Success of discovered and of labelled vectors on held-out openings, with the same seeds for both."""
    prompts = openings("heldout", count)
    labels = np.array(embedded.labels)
    baseline = torch.from_numpy(embedded.frequency.mean(0))
    rates = {}
    for domain in spec.DOMAINS:
        own = [c for c in found.clusters if c.vector is not None and next(iter(c.labels)) == domain]
        labelled = SteeringVector(
            domain,
            torch.from_numpy(embedded.frequency[labels == domain].mean(0)),
            embedded.meta.layers,
            baseline=baseline,
            relative=True,
        )
        vectors = {"labelled": labelled, "discovered": own[0].vector if own else None}
        for kind, vector in vectors.items():
            texts = (
                continue_openings(loaded, prompts, plan_for(vector, STRENGTH, formula=FORMULA))
                if vector is not None
                else []
            )
            rate = success_rate([text.text for text in texts], domain_words(domain)) if texts else 0.0
            rates.setdefault(kind, {})[domain] = rate
        print(f"steered {domain}: {rates['labelled'][domain]:.0%}, {rates['discovered'][domain]:.0%}", file=sys.stderr)
    means = {kind: statistics.mean(by_domain.values()) for kind, by_domain in rates.items()}
    ratio = means["discovered"] / means["labelled"]
    report.figures["steering rates"] = rates
    shown = f"{ratio:.2f} ({means['discovered']:.0%} of {means['labelled']:.0%})"
    report.add("steering, discovered / labelled vectors", ratio, shown, ">= 0.8", ratio >= 0.8)


# ---- speed ----


def one_by_one(model, tokenizer, texts: list[str]) -> int:
    """The paper's authors' method: hooks record the gates while `generate` runs one text at a time. Returns tokens."""
    chosen: list[list] = []
    routers = find_routers(model)
    hooks = [r.module.register_forward_hook(lambda module, args, out: chosen.append(out)) for r in routers]
    total = 0
    for text in texts:
        chosen.clear()
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=512)
        model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        counts = np.zeros((len(routers), routers[0].num_experts))
        for layer, out in enumerate(chosen):
            indices = next(t for t in out if not t.is_floating_point())
            for expert in indices.flatten().tolist():
                counts[layer, expert] += 1
        counts /= counts.sum(1, keepdims=True)
        total += inputs["input_ids"].numel()
    for hook in hooks:
        hook.remove()
    return total


def bare_forward(loaded, texts: list[str]) -> int:
    """The same batches through the model without its head, recording nothing. Returns tokens."""
    ids = loaded.tokenizer(texts, truncation=True, max_length=512)["input_ids"]
    lengths = [len(one) for one in ids]
    order = sorted(range(len(ids)), key=lengths.__getitem__)
    with torch.inference_mode():
        for batch in batches(order, lengths, EmbeddingOptions().batch_tokens):
            width = max(lengths[i] for i in batch)
            padded = torch.tensor([ids[i] + [0] * (width - lengths[i]) for i in batch])
            mask = torch.tensor([[1] * lengths[i] + [0] * (width - lengths[i]) for i in batch])
            loaded.model.base_model(input_ids=padded, attention_mask=mask, use_cache=False)
    return sum(lengths)


def ours(loaded, texts: list[str]) -> int:
    with embedder(loaded) as embed:
        return int(embed.texts(texts).tokens.sum())


def measure_speed(loaded, report: Report, rounds: int) -> None:
    """Tokens per second of the three methods, in turn, for whole stories and for beginnings."""
    stories = [story.rest for story in load_stories("heldout")]
    kinds = {"stories": stories[::6], "first six words": [" ".join(text.split()[:6]) for text in stories]}
    for kind, texts in kinds.items():
        few = texts[:: max(1, len(texts) // 24)]
        ways = {
            "embed": lambda texts=texts: ours(loaded, texts),
            "bare": lambda texts=texts: bare_forward(loaded, texts),
            "authors": lambda few=few: one_by_one(loaded.model, loaded.tokenizer, few),
        }
        speeds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(rounds + 1):
            for way, run in ways.items():
                started = time.perf_counter()
                tokens = run()
                if turn:  # the first round warms up
                    speeds[way].append(tokens / (time.perf_counter() - started))
        median = {way: statistics.median(values) for way, values in speeds.items()}
        report.figures[f"speeds, {kind}"] = speeds
        length = statistics.mean(len(ids) for ids in loaded.tokenizer(texts)["input_ids"])
        ranges = {way: f"{median[way]:.0f} ({min(v):.0f}-{max(v):.0f})" for way, v in speeds.items()}
        report.add(f"tokens/s, {kind} of {length:.0f} tokens", median, ", ".join(f"{w} {r}" for w, r in ranges.items()))
        against, of_bare = median["embed"] / median["authors"], median["embed"] / median["bare"]
        report.add(f"embed / authors' way, {kind}", against, f"{against:.2f}", ">= 5", against >= 5)
        report.add(f"embed / bare forward, {kind}", of_bare, f"{of_bare:.2f}", ">= 0.95", of_bare >= 0.95)


# ---- memory ----

MEASURED = """
import pathlib, re, sys
from steermoe.discovery.embed_corpus import embed_corpus
from steermoe.discovery.embedder import EmbeddingOptions
from steermoe.discovery.store import Text
from steermoe.models.default.stories import load_stories
from steermoe.models.loading import load
stories = [story.rest for story in load_stories()]
texts = (Text(f"t{n}", stories[n % len(stories)]) for n in range(int(sys.argv[1])))
embed_corpus(load(dtype=sys.argv[3]), texts, sys.argv[2], EmbeddingOptions(max_tokens=4))
print(int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1024)
"""
"""The kernel's peak for this program alone; `ru_maxrss` would start from that of its parent."""


def measure_memory(report: Report) -> None:
    """Peak memory of a process that embeds 400 or 40,000 texts, 4 tokens of each."""
    for dtype in ("float32", "bfloat16"):
        peaks = {}
        for count in (400, 40_000):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-c", MEASURED, str(count), folder, dtype]
                peaks[count] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        ratio = peaks[40_000] / peaks[400]
        shown = f"{peaks[40_000]:.0f} MiB against {peaks[400]:.0f}, ratio {ratio:.3f}"
        name = f"peak memory, 40,000 against 400 texts, {dtype}"
        report.add(name, peaks, shown, "<= 1.1 times", ratio <= 1.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "steermoe-bench-discovery")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--openings", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    report = Report()
    loaded = load()
    report.figures["dtype"], report.figures["threads"] = str(loaded.model.dtype), torch.get_num_threads()
    args.work = args.work / default_model_folder().name
    if "speed" in args.only:
        measure_speed(loaded, report, args.rounds)
    if {"clusters", "steering"} & set(args.only):
        embedded = embed_stories(loaded, "train", args.work)
        found = agreement(embedded, report, "training stories")
        if "steering" in args.only:
            compare_steering(loaded, embedded, found, args.openings, report)
    if "heldout" in args.only:
        agreement(embed_stories(loaded, "heldout", args.work), report, "held-out stories")
    if "memory" in args.only:
        measure_memory(report)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    report.add("peak memory of this process", peak, f"{peak:.0f} MiB")
    table = Table("", "measure", "reached", "wanted")
    for row in report.rows:
        table.add_row(*row)
    Console(width=160).print(table)
    if args.json:
        args.json.write_text(json.dumps(report.figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
