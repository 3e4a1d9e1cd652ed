"""What `steermoe vectors discover` takes on large corpora: `python benchmarks/large_corpus.py [--shapes 30x18 48x128]`.

Whole commands on embeddings that are drawn, not computed: 40 domains of uneven size, each with its own distribution
over experts in every layer; a text's distribution is a Dirichlet draw around its domain's, a tenth of the texts lie
between two domains, and F counts the choices of 100 tokens. Their texts are sentences of the default model's stories.
The script prints wall time, CPU time and peak memory of each command, and what 40,000 texts take beside 10,000.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DOMAINS, BETWEEN, SPREAD, TOKENS, SENTENCES = 40, 0.1, 40.0, 100, 4
"""Domains; share of texts between two of them; concentration around a domain's experts; tokens and sentences a text."""
MOST_MINUTES, MOST_GIB, MOST_OVER_LINEAR = 10, 6, 1.3


def draw(folder: Path, texts: int, layers: int, experts: int, top_k: int) -> None:
    """Write embeddings of `texts` texts [B, L, N] into a folder, as `steermoe embed` would."""
    from steermoe.discovery.store import EmbeddingMeta, EmbeddingStore, Text
    from steermoe.models.default.stories import load_stories

    random = np.random.default_rng(0)
    meta = EmbeddingMeta("drawn", "drawn", tuple(range(layers)), experts, top_k)
    centres_CLN = random.dirichlet(np.full(experts, 0.5), (DOMAINS, layers))
    everyone_LN = random.dirichlet(np.full(experts, 0.5), layers)
    centres_CLN = 0.5 * centres_CLN + 0.5 * everyone_LN
    sizes_C = random.dirichlet(np.full(DOMAINS, 3.0))
    sentences: dict[str, list[str]] = {}
    for story in load_stories():
        sentences.setdefault(story.topic, []).extend(story.rest.split(". "))
    topics = sorted(sentences)
    store = EmbeddingStore.create(folder, meta)
    store.begin()
    for number, start in enumerate(range(0, texts, 256)):
        count = min(256, texts - start)
        domain, other = random.choice(DOMAINS, count, p=sizes_C), random.integers(DOMAINS, size=count)
        mixed = np.where(random.random(count) < BETWEEN, 0.5, 0.0)[:, None, None]
        mean_BLN = (1 - mixed) * centres_CLN[domain] + mixed * centres_CLN[other]
        shares_BLN = random.standard_gamma(SPREAD * mean_BLN) + 1e-9
        shares_BLN /= shares_BLN.sum(-1, keepdims=True)
        frequency = (random.multinomial(TOKENS * top_k, shares_BLN) / (TOKENS * top_k)).astype(np.float32)
        written = [
            Text(f"t{start + row}", ". ".join(random.choice(sentences[topics[of % len(topics)]], SENTENCES)), f"d{of}")
            for row, of in enumerate(domain.tolist())
        ]
        store.write_shard(number, written, [TOKENS] * count, frequency, None)
    store.finish(texts)


@dataclass(frozen=True)
class Cost:
    """What a process took: seconds of wall and CPU time, and its peak memory in GiB."""

    wall: float
    cpu: float
    peak: float


def cost_of(command: list[str]) -> Cost:
    """Run a command to its end.

    Raises:
        SystemExit: it failed.
    """
    started = time.perf_counter()
    process = os.posix_spawn(command[0], command, os.environ)
    _, status, used = os.wait4(process, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return Cost(time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=("30x18x2", "48x128x8"), help="layers x experts x top-k")
    parser.add_argument("--texts", type=int, nargs="+", default=(10_000, 40_000))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "steermoe-large-corpus")
    parser.add_argument("--draw", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.draw:
        draw(Path(args.draw[0]), *map(int, args.draw[1:]))
        return
    for shape in args.shapes:
        costs = {}
        for texts in args.texts:
            folder = args.work / f"{shape}-{texts}"
            if not (folder / "meta.json").exists() or not json.loads((folder / "meta.json").read_text())["complete"]:
                cost_of([sys.executable, __file__, "--draw", str(folder), str(texts), *shape.split("x")])
            command = [sys.executable, "-m", "steermoe", "vectors", "discover", str(folder), "--force"]
            costs[texts] = found = cost_of([*command, "-o", str(args.work / f"{shape}-{texts}-report")])
            print(
                f"{shape}, {texts:,} texts: {found.wall / 60:.1f} minutes, {found.cpu / 60:.1f} of CPU (wanted <= "
                f"{MOST_MINUTES}), peak {found.peak:.2f} GiB (wanted <= {MOST_GIB})",
                flush=True,
            )
        few, many = min(costs), max(costs)
        over = costs[many].cpu / costs[few].cpu / (many / few)
        print(f"{shape}: CPU time against linear {over:.2f} (wanted <= {MOST_OVER_LINEAR})", flush=True)


if __name__ == "__main__":
    main()
