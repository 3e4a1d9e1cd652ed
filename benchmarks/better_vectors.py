"""Do better vectors steer more at equal damage? `python benchmarks/better_vectors.py [--quick] [--methods ...]
[--domains ...] [--budgets B ...] [-o FOLDER] [--minutes M] [--json FILE]`.

Four ways to make an expert vector for formula (4), each from the training texts of a domain and of no domain:

- `frequencies`: the shipped vector, which all others are compared with;
- `by-layer`: its layers, each with a strength of its own (`steermoe calibrate --by-layer`);
- `learned`: its numbers, changed by gradients (`steermoe vectors build --rule learned`), also where `build` would keep
  those from before;
- `stable`: its experts that hold when the texts are resampled (`--rule stable`), with the same numbers.

Each gets the largest strength whose 95th percentile of KL on held-out neutral texts stays within the budget. Then it
steers stories from held-out openings, and the judge of `steermoe evaluate` counts sound success. Differences are paired
by openings and seeds; a star marks those whose 95% bootstrap interval over openings does not contain 0.

Vectors, strengths and stories are kept in the folder, so the same command continues after an interruption. What is not
begun after `--minutes` is named. `--quick`: 12 openings, 1 seed, 12 texts, where a domain's rate is uncertain by 30
points; the whole takes hours on 2 cores.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from results import carry_out, write
from rich.console import Console
from rich.table import Table

from steermoe.discovery.packaged import NEUTRAL, packaged_texts
from steermoe.discovery.packaged_vectors import build_packaged
from steermoe.errors import count_of
from steermoe.evaluation.bootstrap import bootstrap
from steermoe.evaluation.by_layer import calibrate_layers, scaled
from steermoe.evaluation.classifier import DomainClassifier
from steermoe.evaluation.evaluate import Evaluation
from steermoe.evaluation.judge import Judge
from steermoe.evaluation.learning import LearningSettings, learn
from steermoe.evaluation.protocol import Condition, EvaluationSettings
from steermoe.evaluation.report import comparable
from steermoe.evaluation.results import ResultFolder
from steermoe.evaluation.texts import domain_list, heldout_texts
from steermoe.models.default import spec
from steermoe.models.default.stories import openings
from steermoe.models.loading import load
from steermoe.steering.plans import plan_for
from steermoe.vectors.file import read_vector, write_vector
from steermoe.vectors.library import load_vector
from steermoe.vectors.vector import SteeringVector

METHODS = ("frequencies", "by-layer", "learned", "stable")
"""The first is what the others are compared with."""
BUDGETS = (0.3, 1.0)
MAIN = "sound_success"
QUICK = {"openings": 12, "seeds": 1, "texts": 12}


class OutOfTime(Exception):
    """No further work is begun."""


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--domains", nargs="+", choices=spec.DOMAINS, default=list(spec.DOMAINS))
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS), help="95th percentile of KL, nats")
    parser.add_argument("--openings", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=24, help="neutral texts to measure damage on")
    parser.add_argument("--tokens", type=int, default=40, help="of a story")
    parser.add_argument("--steps", type=int, default=LearningSettings.steps, help="of learning")
    parser.add_argument("--quick", action="store_true", help=f"as {QUICK}")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("-o", "--output", type=Path, default=Path(tempfile.gettempdir()) / "steermoe-better-vectors")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    return args


class Bench:
    """Makes the vectors and their stories, or finds them in the folder, and judges them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self._begun = time.monotonic()
        self.domains = list(dict.fromkeys(args.domains))
        self.loaded = load()
        self.settings = EvaluationSettings(
            tuple(openings("heldout", args.openings)),
            seeds=args.seeds,
            max_new_tokens=args.tokens,
            forced_texts=args.texts,
        )
        self.shipped = {domain: load_vector(domain, self.loaded.shape, group=spec.NAME) for domain in self.domains}
        self._training = packaged_texts()
        self._heldout = heldout_texts(self.domains)
        self._stable: dict[str, SteeringVector] | None = None
        keywords = {domain: vector.info.keywords for domain, vector in self.shipped.items()}
        words = {domain: domain_list(domain, own) for domain, own in keywords.items()}
        unsteered = self._evaluation("unsteered", self.shipped).stories(Condition("unsteered"))
        classifier = DomainClassifier(self._heldout)
        self._judge = Judge(classifier, words, keywords, unsteered, args.openings, args.seeds)

    def check_time(self) -> None:
        if time.monotonic() - self._begun > 60 * self.args.minutes:
            raise OutOfTime

    # ---- vectors ----

    def vector(self, method: str, budget: float, domain: str) -> SteeringVector:
        """A domain's vector by a method, made now if the folder lacks it."""
        if method == "frequencies":
            return self.shipped[domain]
        path = self.args.output / "vectors" / f"{method}-{budget:g}" / f"{domain}.safetensors"
        if not path.exists():
            self.check_time()
            begun = time.process_time()
            write_vector(self._made(method, budget, domain), path)
            print(f"{method}, {budget:g} nats, {domain}: made in {time.process_time() - begun:.0f} s of CPU time")
        return read_vector(path)

    def _made(self, method: str, budget: float, domain: str) -> SteeringVector:
        start, own, neutral = self.shipped[domain], self._training[domain], self._training[NEUTRAL]
        if method == "by-layer":
            _, found = calibrate_layers(self.loaded, plan_for(start, 1.0), own, neutral, budget)
            print(f"  factors {found.factors}; gain {found.gain:+.3f}, {found.gain_alike:+.3f} with one for all")
            return scaled(start, found.factors)
        if method == "learned":
            settings = replace(LearningSettings(), budget=budget, steps=self.args.steps, keep_better=False)
            found = learn(self.loaded, start, own, neutral, settings)
            print(f"  gain {found.gain:+.3f}, {found.gain_at_start:+.3f} at the start")
            return found.vector
        if self._stable is None:
            self._stable = {vector.domain: vector for vector in build_packaged(self.loaded, stable=True)}
        return replace(start, weights=start.experts.where(self._stable[domain].experts != 0, 0.0))

    # ---- stories ----

    def _evaluation(self, name: str, vectors: dict[str, SteeringVector]) -> Evaluation:
        results = ResultFolder(self.args.output / name, comparable(self.loaded, vectors, self.settings))
        return Evaluation(self.loaded, vectors, self._heldout, self.settings, results)

    def measured(self, method: str, budget: float, domain: str) -> dict:
        """Sound success of each opening [O], damage and strength of a domain."""
        vector = self.vector(method, budget, domain)
        if method != METHODS[0] and vector.experts.equal(self.shipped[domain].experts):
            return self.measured(METHODS[0], budget, domain)
        # a folder for each domain, so that domains can be added later
        evaluation = self._evaluation(f"stories/{method}-{budget:g}/{domain}", {domain: vector})
        wanted = Condition("steered", domain, "max_scaled", "magnitude", budget=budget, strength=1.0)
        self.check_time()
        condition, _ = evaluation.within(wanted, budget)
        self.check_time()
        stories = evaluation.stories(condition)
        damage = evaluation.damage(condition)
        return {
            "success": self._judge.figures(stories, domain)[MAIN],
            "strength": condition.strength,
            "kl_p95": damage["kl_p95"],
            "kl_mean": damage["kl_mean"],
            "experts": int(vector.experts.count_nonzero()),
        }


def compared(found: dict[str, dict], base: dict[str, dict]) -> dict:
    """A method's figures over domains, and their paired differences from the first method's."""
    success = np.mean([one["success"] for one in found.values()], axis=0)
    usual = np.mean([base[domain]["success"] for domain in found], axis=0)
    of_success, difference = bootstrap(success), bootstrap(success - usual)
    assert of_success is not None
    assert difference is not None
    return {
        "success": of_success.as_dict(),
        "difference": difference.as_dict(),
        **{name: float(np.mean([one[name] for one in found.values()])) for name in ("kl_p95", "kl_mean")},
        "domains": {domain: {**one, "success": float(np.mean(one["success"]))} for domain, one in found.items()},
    }


def print_table(rows: list[dict], title: str, domains: list[str]) -> None:
    table = Table("budget", "method", "sound success", "less frequencies", "KL p95", "KL mean", *domains, title=title)
    for row in rows:
        interval, difference = row["success"], row["difference"]
        is_apart = difference["low"] > 0 or difference["high"] < 0
        table.add_row(
            f"{row['budget']:g}",
            row["method"],
            f"{interval['mean']:.0%} [{interval['low']:.0%}, {interval['high']:.0%}]",
            f"{100 * difference['mean']:+.0f} [{100 * difference['low']:+.0f}, {100 * difference['high']:+.0f}]"
            + "*" * is_apart,
            f"{row['kl_p95']:.2f}",
            f"{row['kl_mean']:.3f}",
            *(f"{row['domains'][domain]['success']:.0%}" for domain in domains),
        )
    Console(width=170).print(table)


def measure_all(bench: Bench, each: Callable[[str, float, dict], None]) -> None:
    """Measure method after method at each budget, and hand each result on.

    Raises:
        OutOfTime: something is left.
    """
    methods = list(dict.fromkeys((METHODS[0], *bench.args.methods)))
    for budget in bench.args.budgets:
        for method in methods:
            each(method, budget, {domain: bench.measured(method, budget, domain) for domain in bench.domains})


def run(args: argparse.Namespace) -> None:
    bench, rows, base = Bench(args), [], {}

    def keep(method: str, budget: float, found: dict) -> None:
        base.setdefault(budget, found)
        rows.append({"budget": budget, "method": method, **compared(found, base[budget])})

    try:
        measure_all(bench, keep)
    except OutOfTime:
        print(f"after {args.minutes:g} minutes something is left: the same command continues", file=sys.stderr)
    counts = (args.openings, "opening"), (args.seeds, "seed"), (len(bench.domains), "domain")
    title = f"{bench.loaded.name}: {' x '.join(count_of(*one) for one in counts)}, {args.tokens} tokens, formula (4)"
    print_table(rows, title, bench.domains)
    if args.json:
        about = {"model": bench.loaded.name, **{name: vars(args)[name] for name in (*QUICK, "tokens", "steps")}}
        write(args.json, json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    carry_out(run, parsed())
