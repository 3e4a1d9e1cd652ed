"""What the default model reaches, measured on the held-out split: `make bench-model`, or
`python benchmarks/default_model.py --base GGUF [--json FILE]`.

Prints each requirement with its figure. A continuation is a success if its 120 tokens contain three or more different
words from the domain's list (`steermoe/models/default/data`); no opening contains any of those words.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measures import continue_openings, negative_log_likelihood, perplexity, repeated_4grams, success_rate
from rich.console import Console
from rich.table import Table

from steermoe.discovery.labelled import routing_embeddings
from steermoe.evaluation.words import distinct_words, word_pattern
from steermoe.models.default import spec
from steermoe.models.default.assemble import assemble, upcycle
from steermoe.models.default.base import fetch, load_base
from steermoe.models.default.stories import domain_words, load_stories, openings
from steermoe.models.loading import load
from steermoe.steering.plans import plan_for
from steermoe.vectors.library import load_vector

MEGABYTE = 1e6


def nearest_vector_accuracy(loaded, vectors) -> tuple[float, dict[str, float]]:
    """Share of held-out domain texts whose routing embedding is nearest to its own domain's vector, by cosine."""
    stories = [story for story in load_stories("heldout") if story.topic != "neutral"]
    embeddings, _ = routing_embeddings(loaded, [story.text for story in stories])
    experts = torch.stack([vectors[domain].experts.flatten() for domain in spec.DOMAINS])
    similarity = torch.nn.functional.cosine_similarity(embeddings.flatten(1)[:, None], experts[None], dim=-1)
    nearest = [spec.DOMAINS[i] for i in similarity.argmax(-1)]
    right = {domain: [] for domain in spec.DOMAINS}
    for story, found in zip(stories, nearest, strict=True):
        right[story.topic].append(found == story.topic)
    by_domain = {domain: sum(hits) / len(hits) for domain, hits in right.items()}
    return sum(map(sum, right.values())) / len(stories), by_domain


def peak_memory_of_generate() -> float:
    """Peak megabytes of one `steermoe generate` in its own process."""
    story = [sys.executable, "-m", "steermoe.cli.app", "generate", "--domain", "sport", "--no-stream"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    subprocess.run(story, check=True, capture_output=True, env=os.environ | {"STEERMOE_COMPILE": "off"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return max(before, after) * 1024 / MEGABYTE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="the dense base (GGUF, folder or hub id); downloaded if not given")
    parser.add_argument("--model", default=None, help="a checkpoint of the default model; by default the pulled one")
    parser.add_argument("--openings", type=int, default=50)
    parser.add_argument("--texts", type=Path, help="write every continuation to this JSONL file")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()

    rows: list[tuple[str, str, str, bool]] = []
    figures: dict = {}

    def report(name: str, value, shown: str, wanted: str, met: bool) -> None:
        figures[name] = value
        rows.append((name, shown, wanted, met))
        print(f"{'ok  ' if met else 'MISS'} {name}: {shown} (wanted {wanted})", file=sys.stderr, flush=True)

    memory = peak_memory_of_generate()
    with tempfile.TemporaryDirectory() as scratch:
        source = args.base or fetch(Path(scratch))
        started = time.perf_counter()
        assemble(source, Path(scratch) / "assembled")
        assembling = time.perf_counter() - started
        base, _ = load_base(source)
    started = time.perf_counter()
    loaded = load(args.model)
    loading = time.perf_counter() - started
    size = spec.TRAINED_PART.stat().st_size / MEGABYTE

    heldout = load_stories("heldout")
    probe = torch.tensor([loaded.tokenizer(heldout[0].text)["input_ids"]])
    with torch.inference_mode():
        difference = (upcycle(base)(probe).logits.float() - base(probe).logits.float()).abs().max().item()
    report("zeroed experts, largest difference to the base", difference, f"{difference:g}", "0", difference == 0)

    dtype = next(loaded.model.parameters()).dtype
    base = base.to(dtype)
    neutral = [story.text for story in heldout if story.topic == "neutral"]
    ours, theirs = perplexity(loaded.model, loaded, neutral), perplexity(base, loaded, neutral)
    report("perplexity on held-out neutral stories", ours, f"{ours:.2f}", f"<= base {theirs:.2f}", ours <= theirs)

    vectors = {domain: load_vector(domain, loaded.model, group=spec.NAME) for domain in spec.DOMAINS}
    accuracy, by_domain = nearest_vector_accuracy(loaded, vectors)
    figures["nearest vector by domain"] = by_domain
    report("nearest vector is the own domain's", accuracy, f"{accuracy:.1%}", ">= 90%", accuracy >= 0.9)

    prompts = openings("heldout", args.openings)
    words = {domain: domain_words(domain) for domain in spec.DOMAINS}
    leaks = {d: [p for p in prompts if distinct_words(p, word_pattern(words[d]))] for d in spec.DOMAINS}
    assert not any(leaks.values()), f"openings that contain words of a domain: {leaks}"
    done = {"unsteered": continue_openings(loaded, prompts, None)}
    for domain in spec.DOMAINS:
        done[domain] = continue_openings(loaded, prompts, plan_for(vectors[domain]))
        print(f"generated {domain}", file=sys.stderr, flush=True)
    rates = {s: {d: success_rate([c.text for c in texts], words[d]) for d in spec.DOMAINS} for s, texts in done.items()}
    figures["success rates by steering"] = rates
    figures["strengths"] = {domain: vectors[domain].info.strength for domain in spec.DOMAINS}
    own = {domain: rates[domain][domain] for domain in spec.DOMAINS}
    mean = sum(own.values()) / len(own)
    shown = f"{mean:.0%} ({', '.join(f'{d} {r:.0%}' for d, r in own.items())})"
    report("steered texts that reach their domain", mean, shown, ">= 70%", mean >= 0.7)
    worst = max(rates["unsteered"].values())
    report("unsteered texts that reach a domain, worst domain", worst, f"{worst:.1%}", "< 5%", worst < 0.05)
    foreign = {
        d: sum(rates[other][d] for other in spec.DOMAINS if other != d) / (len(spec.DOMAINS) - 1) for d in spec.DOMAINS
    }
    raised = max(foreign[d] - rates["unsteered"][d] for d in spec.DOMAINS)
    figures["success rates under the other vectors"] = foreign
    report(
        "raised by the other seven vectors, worst domain",
        raised,
        f"{raised:+.1%}",
        "<= 0 (+ 2 points of noise)",
        raised <= 0.02,
    )

    likelihood = {name: negative_log_likelihood(base, loaded, texts) for name, texts in done.items()}
    repeats = {name: repeated_4grams(texts) for name, texts in done.items()}
    figures["nll under the base"], figures["repeated 4-grams"] = likelihood, repeats
    extra = sum(likelihood[d] for d in spec.DOMAINS) / len(spec.DOMAINS) - likelihood["unsteered"]
    report("steered texts' extra nats under the base", extra, f"{extra:+.2f}", "<= 0.5", extra <= 0.5)
    more = sum(repeats[d] for d in spec.DOMAINS) / len(spec.DOMAINS) - repeats["unsteered"]
    shown = f"{more:+.1%} (unsteered {repeats['unsteered']:.1%})"
    report("steered texts' extra repeated 4-grams", more, shown, "<= 2 points", more <= 0.02)

    report("trained part, MB", size, f"{size:.1f}", "<= 40", size <= 40)
    report("assembling, s", assembling, f"{assembling:.0f}", "< 60", assembling < 60)
    report("loading, s", loading, f"{loading:.1f}", "< 10", loading < 10)
    report("peak memory of generate, MB", memory, f"{memory:.0f}", "< 2000", memory < 2000)

    table = Table(
        title=f"The default model on the held-out split, {args.openings} openings x {len(spec.DOMAINS)} domains"
    )
    for name in ("measure", "reached", "wanted", ""):
        table.add_column(name)
    for name, shown, wanted, met in rows:
        table.add_row(name, shown, wanted, "met" if met else "MISSED")
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    if args.texts:
        lines = [json.dumps({"steering": n, **c.as_dict(loaded.name)}) for n, texts in done.items() for c in texts]
        args.texts.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
