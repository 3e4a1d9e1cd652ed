"""What is lost where only a router's choice can be moved: `python benchmarks/choice_only.py [--domains ...]`.

`steermoe models bake --choice-only` adds c E to the scores that a router chooses by, and leaves the weights of the
chosen experts alone; formula (3), z + c E, changes both. Models whose routers have such a bias are too large for this
comparison. So the default model's own routers, which choose the largest logits and weigh them by a softmax, are made to
choose by z + c E and to weigh by z: that is what the bias does where the scores are the logits themselves. Where scores
are sigmoids, the same c moves the choice further.

The two experts of each topic have equal logits. With the model's own two experts a token they are chosen together and
weigh 1/2 each, and the two ways came out the same to the bit. Four experts a token, the default here, are two topics,
which are weighed against each other.

Each domain is steered in both ways at the same strengths, all at all positions. Damage is the KL per token on neutral
texts; a text succeeds if the classifier of `steermoe evaluate` finds the domain most likely.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.request import Request, Sampling
from steermoe.errors import SteerMoEError
from steermoe.evaluation.bootstrap import bootstrap
from steermoe.evaluation.classifier import DomainClassifier
from steermoe.evaluation.judge import Judge
from steermoe.evaluation.results import StoryRecord
from steermoe.evaluation.teacher_forcing import TeacherForcing, TextFigures
from steermoe.evaluation.texts import domain_list, heldout_texts, neutral_texts
from steermoe.files import atomic_path
from steermoe.models.default import spec
from steermoe.models.default.stories import openings
from steermoe.models.loading import LoadedModel, load
from steermoe.routing.routers import find_routers
from steermoe.steering.banks import banks_for
from steermoe.steering.handle import steer
from steermoe.steering.plans import SteeringPlan
from steermoe.vectors.library import load_vector
from steermoe.vectors.vector import SteeringVector

LEAST = 1e-6
"""A strength that changes nothing."""
UNSTEERED, FORMULA, CHOICE = "unsteered", "formula (3)", "choice only"


@dataclass(frozen=True)
class Row:
    """One way to steer toward one domain; of its texts, the values for each opening."""

    domain: str
    way: str
    strength: float
    damage: TextFigures
    success: list[float]
    repeated: list[float]


def choosing(module: Any, push: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """The forward of a router of the default model that chooses by z + c E [N] and weighs by z."""

    def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden, module.weight).float()
        chosen = (logits + push).topk(module.top_k, dim=-1).indices
        return logits, logits.gather(-1, chosen).softmax(-1).type_as(hidden), chosen

    return forward


@contextmanager
def steered(loaded: LoadedModel, plan: SteeringPlan, way: str) -> Iterator[None]:
    """The model as a plan of formula (3) steers it, or with its choice alone moved as far."""
    with ExitStack() as undo:
        if way == FORMULA:
            undo.enter_context(steer(loaded.model, rows=[plan]))
        else:
            for router, bank in zip(find_routers(loaded.model), banks_for(loaded.shape, [plan]), strict=True):
                router.module.forward = choosing(router.module, bank.push[0])
                undo.callback(delattr, router.module, "forward")
        yield


class Kept:
    """Results in a JSON file by what they are of, so that an interrupted run can go on."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._results = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {}

    def of(self, what: str, make: Callable[[], Any]) -> Any:
        if what not in self._results:
            self._results[what] = make()
            if self._path is not None:
                with atomic_path(self._path) as partial:
                    partial.write_text(json.dumps(self._results) + "\n", encoding="utf-8")
        return self._results[what]


class Bench:
    """Steers the default model in both ways, and judges what it writes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.openings, self.args, self.kept = openings("heldout", args.openings), args, Kept(args.json)
        self.loaded = load(None, dtype="float32")
        for router in find_routers(self.loaded.model):
            router.module.top_k = args.active
        self.vectors = {name: load_vector(name, self.loaded.shape, group=spec.NAME) for name in args.domains}
        self.unsteered = self.kept.of(self.about(UNSTEERED), self.stories)
        keywords = {name: vector.info.keywords for name, vector in self.vectors.items()}
        words = {name: domain_list(name, own) for name, own in keywords.items()}
        classifier = DomainClassifier(heldout_texts(args.domains))
        self.judge = Judge(classifier, words, keywords, records(self.unsteered), len(self.openings), 1)

    @cached_property
    def forcing(self) -> TeacherForcing:
        return TeacherForcing(self.loaded, neutral_texts()[: self.args.texts])

    def about(self, *what: object) -> str:
        """What is measured, with all that it depends on."""
        args = self.args
        sizes = f"{args.active} experts, {args.openings} openings, {args.tokens} tokens, {args.texts} texts"
        return ", ".join(map(str, (*what, sizes)))

    def stories(self, plan: SteeringPlan | None = None) -> list[dict[str, Any]]:
        """One continuation of each opening by the model as it is now, and as a plan steers it."""
        engine = HFEngine(self.loaded, compiled=False)
        sampled = [Sampling(max_new_tokens=self.args.tokens, seed=number) for number in range(len(self.openings))]
        requests = [Request(opening, plan, how) for opening, how in zip(self.openings, sampled, strict=True)]
        done = engine.generate(requests)
        return [
            {"text": one.text, "token_ids": list(one.token_ids), "finish_reason": one.finish_reason} for one in done
        ]

    def damage(self, domain: str, strength: float, way: str) -> TextFigures:
        plan = plan_of(self.vectors[domain], strength)

        def read() -> dict[str, Any]:
            wanted = torch.stack([bank.wanted[0] for bank in banks_for(self.loaded.shape, [plan])])
            forcing = self.forcing  # reads the texts unsteered first
            with steered(self.loaded, plan, way):
                return forcing.compare_as_is(wanted).as_dict()

        return TextFigures(**self.kept.of(self.about("damage", domain, way, strength), read))

    def row(self, domain: str, strength: float, way: str) -> Row:
        def write() -> list[dict[str, Any]]:
            plan = plan_of(self.vectors[domain], strength)
            if way == FORMULA:
                return self.stories(plan)
            with steered(self.loaded, plan, way):
                return self.stories()

        stories = self.kept.of(self.about("stories", domain, way, strength), write)
        return self.judged(domain, strength, way, stories, self.damage(domain, strength, way))

    def judged(self, domain: str, strength: float, way: str, stories: Any, damage: TextFigures) -> Row:
        figures = self.judge.figures(records(stories), domain)
        return Row(domain, way, strength, damage, list(figures["success"]), list(figures["repeated_4"]))


def records(stories: Sequence[dict[str, Any]]) -> list[StoryRecord]:
    return [
        StoryRecord(number, 0, one["text"], tuple(one["token_ids"]), one["finish_reason"], 0.0, {}, None)
        for number, one in enumerate(stories)
    ]


def plan_of(vector: SteeringVector, strength: float) -> SteeringPlan:
    return SteeringPlan(vector, strength, formula="additive", positions="all")


def cells(rows: Sequence[Row]) -> tuple[str, ...]:
    """Means over rows; of the texts with their 95% interval."""
    found = []
    for values in ([row.success for row in rows], [row.repeated for row in rows]):
        interval = bootstrap(np.array(values).mean(0))
        found.append(f"{interval.mean:.0%} [{interval.low:.0%}, {interval.high:.0%}]" if interval else "-")
    means = [np.mean([getattr(row.damage, name) for row in rows]) for name in ("kl_mean", "kl_p95", "vector_share")]
    return f"{rows[0].strength:g}", f"{means[0]:.3f}", f"{means[1]:.2f}", f"{means[2]:.0%}", *found


def measured(args: argparse.Namespace) -> Iterator[Row]:
    """The rows of each domain."""
    bench = Bench(args)
    for domain in bench.vectors:
        yield bench.judged(domain, 0.0, UNSTEERED, bench.unsteered, bench.damage(domain, LEAST, CHOICE))
        for strength in args.strengths:
            for way in (FORMULA, CHOICE):
                yield bench.row(domain, strength, way)


def run(args: argparse.Namespace) -> None:
    rows = []
    for row in measured(args):
        rows.append(row)
        print(f"{row.domain}, {row.way}: {', '.join(cells([row]))}", file=sys.stderr, flush=True)
    titles = ("strength", "KL mean", "KL 95%", "slots of domain experts", "success", "repeated 4-grams")
    table = Table("way", *titles, title=f"{', '.join(args.domains)}: {args.active} experts, {args.openings} openings")
    for way, strength in dict.fromkeys((row.way, row.strength) for row in rows):
        table.add_row(way, *cells([row for row in rows if (row.way, row.strength) == (way, strength)]))
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domains", nargs="+", choices=spec.DOMAINS, default=["sport", "food", "space"])
    parser.add_argument("--openings", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=40, help="of a story")
    parser.add_argument("--texts", type=int, default=6, help="neutral texts that damage is measured on")
    parser.add_argument("--active", type=int, default=4, help="experts of a token; the model has 2")
    parser.add_argument("--strengths", nargs="+", type=float, default=[4.0, 8.0, 16.0])
    parser.add_argument("--json", type=Path, help="keep results in this file; the same command goes on there")
    try:
        run(parser.parse_args())
    except SteerMoEError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
