"""What a model without vectors costs and gets: `python benchmarks/on_demand.py [--work DIR] [--only build ...]`.

Parts: `build` (vectors of all packaged domains against a bare forward pass over the same tokens, A B A B in one
process, and a vector from 100 texts), `calibrate` (one domain), `success` (vectors so built against the shipped ones),
`tiny` (the whole first call of `steermoe generate` on tiny checkpoints of four families, written to disk).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from steermoe.discovery.embedder_hf import batches
from steermoe.discovery.labelled import routing_embeddings, vectors_from_labelled
from steermoe.discovery.packaged import packaged_texts
from steermoe.discovery.packaged_vectors import MAX_TOKENS, build_packaged
from steermoe.evaluation.provision import calibrate_kept
from steermoe.models.default import spec
from steermoe.models.default.stories import openings
from steermoe.models.loading import LoadedModel, load
from steermoe.vectors.file import write_vector

ROOT = Path(__file__).parents[1]
PARTS = ("build", "calibrate", "success", "tiny")
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
SEEDS = {"gpt_oss": 2}
"""Of random weights whose experts tell letters apart; with others no vector can steer, and the command says so."""


class Report:
    """Figures for JSON, and a row for each with its target for readers."""

    def __init__(self) -> None:
        self.figures: dict = {}
        self.rows: list[tuple[str, str, str, str]] = []

    def add(self, name: str, value, shown: str, wanted: str = "", met: bool | None = None) -> None:
        self.figures[name] = value
        self.rows.append(({True: "ok", False: "MISS", None: ""}[met], name, shown, wanted))
        print(f"{name}: {shown}{f' (wanted {wanted})' if wanted else ''}", file=sys.stderr, flush=True)


def timed(run) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def bare_forward(loaded: LoadedModel, texts: list[str]) -> None:
    """The same texts in the same batches through the whole model without its head; nothing is recorded."""
    ids = loaded.tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
    lengths = [len(one) for one in ids]
    order = sorted(range(len(ids)), key=lengths.__getitem__)
    with torch.inference_mode():
        for batch in batches(order, lengths, 2048):
            width = max(lengths[i] for i in batch)
            padded = torch.tensor([ids[i] + [0] * (width - lengths[i]) for i in batch])
            mask = torch.tensor([[1] * lengths[i] + [0] * (width - lengths[i]) for i in batch])
            loaded.model.base_model(input_ids=padded, attention_mask=mask, use_cache=False)


def measure_build(loaded: LoadedModel, texts_each: int, rounds: int, report: Report) -> None:
    texts = {domain: own[:texts_each] for domain, own in packaged_texts().items()}
    flat = [text for own in texts.values() for text in own]
    seconds: dict[str, list[float]] = {"build": [], "bare": []}
    routing_embeddings(loaded, flat[:2])
    for _ in range(rounds):
        seconds["build"].append(timed(lambda: vectors_from_labelled(loaded, texts, max_tokens=MAX_TOKENS)))
        seconds["bare"].append(timed(lambda: bare_forward(loaded, flat)))
    median = {way: statistics.median(values) for way, values in seconds.items()}
    ratio = median["build"] / median["bare"]
    shown = f"{ratio:.2f} ({median['build']:.0f} and {median['bare']:.0f} s for {len(flat)} texts)"
    report.add("building all vectors / one bare forward pass", ratio, shown, "<= 1.3", ratio <= 1.3)
    hundred = median["build"] * 100 / len(flat)
    shown = f"{hundred:.0f} s (repeng, another method: 60 s for a 7B model on a 4090)"
    report.add("a vector from 100 texts", hundred, shown, "< 60 s", hundred < 60)


def built_vectors(loaded: LoadedModel, folder: Path) -> Path:
    """The folder of the vectors of all packaged domains, built unless they are there."""
    own = folder / "built"
    if not (own / "sport.safetensors").exists():
        for vector in build_packaged(loaded):
            write_vector(vector, own / f"{vector.domain}.safetensors")
    return own


def measure_calibration(loaded: LoadedModel, folder: Path, domains: list[str], report: Report) -> None:
    from steermoe.vectors.file import read_vector

    taken = []
    for domain in domains:
        path = built_vectors(loaded, folder) / f"{domain}.safetensors"
        vector = read_vector(path)
        if vector.info.strength is not None:
            write_vector(replace(vector, info=replace(vector.info, strength=None)), path)
        cpu = time.process_time()
        seconds = timed(lambda path=path: calibrate_kept(loaded, path))
        taken.append(seconds)
        info = read_vector(path).info
        print(
            f"{domain}: strength {info.strength:g}, {info.damage:.2f} nats, {seconds:.0f} s, "
            f"{time.process_time() - cpu:.0f} s of CPU time",
            file=sys.stderr,
            flush=True,
        )
    median = statistics.median(taken)
    report.add("calibrating one domain", taken, f"{median:.0f} s", "< 30 s", median < 30)


def measure_success(loaded: LoadedModel, folder: Path, count: int, seeds: int, report: Report) -> None:
    """Sound success of both sets of vectors at their own strengths, on the same openings with the same seeds."""
    from steermoe.evaluation.protocol import Design, EvaluationSettings
    from steermoe.evaluation.report import evaluate_into
    from steermoe.evaluation.texts import packaged_texts as judged_texts
    from steermoe.vectors.file import read_vector

    own = built_vectors(loaded, folder)
    for domain in spec.DOMAINS:
        if read_vector(own / f"{domain}.safetensors").info.strength is None:
            calibrate_kept(loaded, own / f"{domain}.safetensors")
    shipped = ROOT / "steering_vectors" / spec.NAME
    sets = {
        name: {domain: read_vector(place / f"{domain}.safetensors") for domain in spec.DOMAINS}
        for name, place in (("shipped", shipped), ("built", own))
    }
    settings = EvaluationSettings(tuple(openings("heldout", count)), seeds=seeds, forced_texts=4)
    rates: dict[str, dict[str, float]] = {}
    for name, vectors in sets.items():
        summary = evaluate_into(
            folder / f"evaluation-{name}", loaded, vectors, judged_texts(), settings, Design(controls=False)
        )
        rates[name] = {
            row["domain"]: row["figures"]["sound_success"]["mean"]
            for row in summary["conditions"]
            if row["kind"] == "steered"
        }
    report.figures["success"] = rates
    means = {name: statistics.mean(one.values()) for name, one in rates.items()}
    ratio = means["built"] / means["shipped"]
    shown = f"{ratio:.2f} ({means['built']:.0%} and {means['shipped']:.0%})"
    report.add("success of built / shipped vectors", ratio, shown, ">= 0.9", ratio >= 0.9)


def measure_tiny(folder: Path, report: Report) -> None:
    """`steermoe generate --model FOLDER --domain sport` in a process of its own, with empty caches."""
    sys.path.insert(0, str(ROOT))
    from tests.support import steering_models as tiny

    for family in FAMILIES:
        where = folder / f"tiny-{family}"
        tiny.build(family, seed=SEEDS.get(family, 0)).save_pretrained(where)
        tiny.byte_tokenizer().save_pretrained(where)
        with tempfile.TemporaryDirectory() as home:
            places = {"XDG_DATA_HOME": home, "STEERMOE_CACHE": f"{home}/cache", "STEERMOE_COMPILE": "off"}
            arguments = ["generate", "A dog", "--model", str(where), "-d", "sport", "--max-new-tokens", "20"]
            started = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", "steermoe", *arguments],
                env=os.environ | places,
                capture_output=True,
                text=True,
                check=False,
            )
            seconds = time.perf_counter() - started
        if done.returncode:
            raise SystemExit(done.stderr)
        print(done.stderr, file=sys.stderr)
        report.add(f"the first call, tiny {family}", seconds, f"{seconds:.0f} s", "< 30 s", seconds < 30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "steermoe-bench-on-demand")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--texts", type=int, default=40, help="texts per domain in the A B A B measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--domains", nargs="+", default=["sport", "law", "food"], help="calibrated one by one")
    parser.add_argument("--openings", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    report = Report()
    if set(args.only) - {"tiny"}:
        loaded = load()
        report.figures["dtype"], report.figures["threads"] = str(loaded.model.dtype), torch.get_num_threads()
    if "build" in args.only:
        measure_build(loaded, args.texts, args.rounds, report)
    if "calibrate" in args.only:
        measure_calibration(loaded, args.work, args.domains, report)
    if "success" in args.only:
        measure_success(loaded, args.work, args.openings, args.seeds, report)
    if "tiny" in args.only:
        measure_tiny(args.work, report)
    table = Table("", "measure", "reached", "wanted")
    for row in report.rows:
        table.add_row(*row)
    Console(width=140).print(table)
    if args.json:
        args.json.write_text(json.dumps(report.figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
