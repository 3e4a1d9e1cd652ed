"""Vectors of topics in words against the shipped ones: `python benchmarks/topics.py [--work DIR] [--only cosine ...]`.

Each of the default model's eight domains is named in two other ways, neither of which holds its name. Parts: `cosine`
(of the expert vectors), `success` (of steering with them, at calibrated strengths, on the same openings and seeds).
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from steermoe.discovery.topic import build_topics, domain_of
from steermoe.discovery.writing import Writing
from steermoe.evaluation.provision import calibrate_kept
from steermoe.models.default import spec
from steermoe.models.default.stories import openings
from steermoe.models.loading import LoadedModel, load
from steermoe.vectors.file import read_vector, write_vector
from steermoe.vectors.vector import SteeringVector

ROOT = Path(__file__).parents[1]
PARTS = ("cosine", "success")
TOPICS = {
    "biology": ("cells and genes", "plants and animals under the microscope"),
    "food": ("cooking and recipes", "baking bread in a kitchen"),
    "law": ("judges and courtrooms", "a trial and its witnesses"),
    "medicine": ("doctors and hospitals", "the treatment of sick people"),
    "music": ("songs and orchestras", "playing the piano"),
    "software": ("programming and computer code", "finding the bug in an app"),
    "space": ("planets and astronauts", "rockets and telescopes"),
    "sport": ("football and tournaments", "athletes in a stadium"),
}
LEAST_COSINE, LEAST_SUCCESS, LEAST_DOMAINS = 0.8, 0.7, 6


def shipped(domain: str) -> SteeringVector:
    return read_vector(ROOT / "steering_vectors" / spec.NAME / f"{domain}.safetensors")


def cosine(one: SteeringVector, other: SteeringVector) -> float:
    return float(torch.nn.functional.cosine_similarity(one.experts.flatten(), other.experts.flatten(), dim=0))


def build(loaded: LoadedModel, folder: Path, writing: Writing, style: str | None) -> dict[str, SteeringVector]:
    """The vectors of all topics by topic; those that are in the folder are read."""
    made = {}
    topics = [topic for pair in zip(*TOPICS.values(), strict=True) for topic in pair]
    for topic in topics:
        path = folder / f"{domain_of(topic)}.safetensors"
        started = time.perf_counter()
        if not path.exists():
            (found,) = build_topics(
                loaded,
                {domain_of(topic): topic},
                writing,
                style=style,
                on_remark=lambda remark: print(remark, file=sys.stderr),
            )
            write_vector(found.vector, path)
        made[topic] = read_vector(path)
        print(
            f"{topic}: {time.perf_counter() - started:.0f} s, {made[topic].threshold:g} x; "
            f"{', '.join(made[topic].info.keywords)}",
            file=sys.stderr,
            flush=True,
        )
    return made


def success(loaded: LoadedModel, folder: Path, which: int, count: int, seeds: int) -> dict[str, dict[str, float]]:
    """Sound success of the shipped vectors and of those of each domain's topic number `which`."""
    from steermoe.evaluation.protocol import Design, EvaluationSettings
    from steermoe.evaluation.report import evaluate_into
    from steermoe.evaluation.texts import packaged_texts

    own = {}
    for domain, topics in TOPICS.items():
        path = folder / f"{domain_of(topics[which])}.safetensors"
        if read_vector(path).info.strength is None:
            calibrate_kept(loaded, path)
        own[domain] = replace(read_vector(path), domain=domain)
        print(f"{topics[which]}: strength {own[domain].info.strength:g}", file=sys.stderr, flush=True)
    settings = EvaluationSettings(tuple(openings("heldout", count)), seeds=seeds, forced_texts=4)
    rates = {}
    for name, vectors in (("shipped", {domain: shipped(domain) for domain in TOPICS}), (f"topic {which + 1}", own)):
        where = folder / f"evaluation-{name.replace(' ', '-')}"
        summary = evaluate_into(where, loaded, vectors, packaged_texts(), settings, Design(controls=False))
        rates[name] = {
            row["domain"]: row["figures"]["sound_success"]["mean"]
            for row in summary["conditions"]
            if row["kind"] == "steered"
        }
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "steermoe-bench-topics")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--style", choices=("chat", "openings"), help="default: as `vectors build --topic`")
    parser.add_argument("--texts", type=int, default=Writing().texts)
    parser.add_argument("--new-tokens", type=int, default=Writing().new_tokens)
    parser.add_argument("--which", type=int, nargs="+", default=[0, 1], help="paraphrases whose success is measured")
    parser.add_argument("--openings", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    loaded = load()
    made = build(loaded, args.work, Writing(args.texts, args.new_tokens), args.style)
    cosines = {domain: [cosine(made[topic], shipped(domain)) for topic in own] for domain, own in TOPICS.items()}
    figures: dict = {"cosine": cosines}
    table = Table("domain", "topics", "cosine", "sound success", "of the shipped vector's")
    rates: dict[str, dict[str, float]] = {}
    if "success" in args.only:
        for which in args.which:
            rates |= success(loaded, args.work, which, args.openings, args.seeds)
        figures["success"] = rates
    reached = 0
    for domain, topics in TOPICS.items():
        own = [rates[f"topic {which + 1}"][domain] for which in args.which] if rates else []
        ratio = statistics.mean(own) / max(rates["shipped"][domain], 1e-9) if own else None
        reached += min(cosines[domain]) >= LEAST_COSINE and (ratio is None or ratio >= LEAST_SUCCESS)
        table.add_row(
            domain,
            ", ".join(topics),
            " ".join(f"{value:.2f}" for value in cosines[domain]),
            " ".join(f"{value:.0%}" for value in own),
            "" if ratio is None else f"{ratio:.2f}",
        )
    Console(width=140).print(table)
    print(f"{reached} of {len(TOPICS)} domains reach the bar, wanted {LEAST_DOMAINS}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
