"""Find the strength to ship each default vector with: `python benchmarks/strengths.py [--write]`.

On openings of the *training* split, so that the held-out ones stay unseen: for each domain and strength the share of
continuations with three or more different words of the domain, and their negative log-likelihood under the unsteered
model. Chosen is the smallest strength whose success is within `--slack` of the best one's among those that cost at
most `--budget` nats.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from measures import continue_openings, negative_log_likelihood, success_rate
from rich.console import Console
from rich.table import Table

from steermoe.default_model import spec
from steermoe.default_model.stories import domain_words, openings
from steermoe.library import load_vector, packaged_vectors, write_vector
from steermoe.models import load
from steermoe.steering import DEFAULT_FORMULA, DEFAULT_SCALE, SteeringPlan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--vectors", type=Path, default=packaged_vectors() / spec.NAME)
    parser.add_argument("--domains", nargs="*", default=list(spec.DOMAINS))
    parser.add_argument("--strengths", type=float, nargs="*", default=[2.0, 3.0, 4.0, 6.0])
    parser.add_argument("--openings", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--slack", type=float, default=0.05)
    parser.add_argument("--budget", type=float, default=0.4, help="nats above the unsteered texts")
    parser.add_argument("--write", action="store_true", help="write the chosen strengths into the vector files")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    loaded = load(args.model)
    prompts = openings("train", args.openings)
    plain = continue_openings(loaded, prompts, None, args.tokens)
    usual = negative_log_likelihood(loaded.model, loaded, plain)
    figures: dict[str, dict] = {"unsteered": {"nll": usual}}
    table = Table(title=f"success / extra nats a token, {args.openings} openings of the training split")
    for name in ("domain", "unsteered", *(f"{c:g}" for c in args.strengths), "chosen"):
        table.add_column(name, justify="right")
    for domain in args.domains:
        words, vector = domain_words(domain), load_vector(args.vectors / f"{domain}.safetensors", loaded.model)
        results = []
        for strength in args.strengths:
            plan = SteeringPlan(vector, strength, DEFAULT_FORMULA, DEFAULT_SCALE)
            done = continue_openings(loaded, prompts, plan, args.tokens)
            extra = negative_log_likelihood(loaded.model, loaded, done) - usual
            results.append((strength, success_rate([c.text for c in done], words), extra))
        affordable = [r for r in results if r[2] <= args.budget] or [min(results, key=lambda r: r[2])]
        best = max(success for _, success, _ in affordable)
        chosen = next(strength for strength, success, _ in affordable if success >= best - args.slack)
        figures[domain] = {"results": results, "chosen": chosen}
        base_rate = success_rate([c.text for c in plain], words)
        table.add_row(domain, f"{base_rate:.0%}", *(f"{s:.0%} / {e:+.2f}" for _, s, e in results), f"{chosen:g}")
        print(domain, results, flush=True)
        if args.write:
            info = replace(vector.info, strength=chosen, formula=DEFAULT_FORMULA, scale=DEFAULT_SCALE)
            write_vector(replace(vector, info=info), args.vectors / f"{domain}.safetensors")
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
