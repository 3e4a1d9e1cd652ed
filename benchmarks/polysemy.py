"""Which of two readings of a word steering makes likelier: `python benchmarks/polysemy.py [--json FILE]`.

The texts are those of the PyPI package domainsteer (MIT; `pip install --no-deps domainsteer`), which this project did
not write and does not copy: questions such as "What can a ring encircle?" with an answer from one field of research ("a
planet") and one from another field or from everyday life ("a finger"). Measured is the log-likelihood per token of the
reading that belongs to the wanted domain less that of the other one, in nats; nothing is generated, nobody judges.

`FIELDS` maps our domains to the package's 144 fields (groups of the Australian and New Zealand Standard Research
Classification), before anything was measured: whole divisions where there is one, groups where the division is wider.
The wanted reading is the field's. Music has no group (of the performing arts the package has theatre and dance only,
and music is the *other* reading there), food has one, sport has sports science.

`EVERYDAY` asks the other way round. In items of all other fields, the second reading often comes from one of our
domains ("What does cadence set?": a sampling interval, or musical rhythm); the package names where it comes from, and
those names are mapped. The wanted reading is then the package's "trap". This covers music, and sport, food and law as
everyday life knows them.

Conditions: unsteered; steered toward the domain; toward another one (all seven in turn, one per item); with the
domain's experts shuffled. Any disturbance may favour one reading, such as the more common one, so the last column is
the effect of the right experts less that of the shuffled ones. Intervals: 95%, paired bootstrap over items; over all
domains, items are resampled within their domains, whose means count alike.
"""

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from steermoe.evaluation.bootstrap import RESAMPLES, bootstrap
from steermoe.evaluation.likelihood import encode_pair, likelihoods
from steermoe.evaluation.protocol import shuffled
from steermoe.models.loading import LoadedModel, load
from steermoe.steering.plans import SteeringPlan, plan_for
from steermoe.vectors.library import vectors_for

FIELDS = {
    "biology": ("3101", "3104", "3107", "3108", "3109"),
    "food": ("3210",),
    "law": ("4801", "4802", "4803", "4804", "4805", "4806", "4807"),
    "medicine": (
        "3201", "3202", "3203", "3204", "3207", "3208", "3209", "3211", "3212", "3213", "3214", "3215",
    ),
    "software": ("4604", "4605", "4606", "4612", "4613"),
    "space": ("4001", "5101", "5109"),
    "sport": ("4207",),
}  # fmt: skip
"""Biology: biochemistry and cells, evolution, microbes, plants, animals; without bioinformatics and biotechnology.
Food: nutrition and dietetics. Law: its division. Medicine: the division of biomedical and clinical sciences without
nutrition, biochemistry and biotechnology. Software: security, data management, systems, software engineering, theory of
computation. Space: aerospace engineering, astronomy, space sciences. Sport: sports science and exercise."""
EVERYDAY = {
    "food": ("food", "cooking", "baking"),
    "law": ("law",),
    "medicine": ("medicine",),
    "music": ("music",),
    "software": ("programming", "computing", "software"),
    "sport": ("sports",),
}
"""Biology and space are the second reading of fewer than ten items."""
PARTS = ("fields", "everyday")
FORMATS = {
    "question": "Question: {question}\nAnswer:",
    "plain": "{question}",
}
SPECIFIC = "right less shuffled"
CONDITIONS = ("right", "foreign", "shuffled", SPECIFIC)
BAR = 0.3


@dataclass(frozen=True)
class Item:
    """A question with two readings of one word; `ours` is the one that belongs to the domain."""

    part: str
    domain: str
    field: str
    term: str
    question: str
    ours: str
    other: str


def read_items(parts: Sequence[str], domains: Sequence[str], sentences: bool) -> list[Item]:
    """The package's items of the mapped fields, and those whose second reading is from a mapped part of life."""
    try:
        from domainsteer import iter_benchmark
    except ImportError as error:
        raise SystemExit(f"the items come with another package ({error}): pip install --no-deps domainsteer") from error
    of_field = {field: domain for domain, fields in FIELDS.items() for field in fields}
    of_life = {name: domain for domain, names in EVERYDAY.items() for name in names}
    found = []
    for group in iter_benchmark():
        field = group["cluster_id"]
        for record in group["items"]:
            texts = record["gold"], record["baseline_trap"]
            if sentences:
                texts = record["gold_responses"][0], record["trap_responses"][0]
            life = of_life.get(record["dominant_prior"])
            for part, domain, (ours, other) in (
                ("fields", of_field.get(field), texts),
                ("everyday", life if life != of_field.get(field) else None, texts[::-1]),
            ):
                if domain in domains and part in parts:
                    found.append(Item(part, domain, field, record["term"], record["question"], ours, other))
    return found


def differences(
    loaded: LoadedModel,
    items: Sequence[Item],
    prompt: str,
    plans: Callable[[int, Item], SteeringPlan | None],
    progress: Callable[[int], None],
) -> np.ndarray:
    """Nats per token of our reading less those of the other one, [items]."""
    pairs, own = [], []
    for number, item in enumerate(items):
        for reading in (item.ours, item.other):
            pairs.append(encode_pair(loaded.tokenizer, prompt.format(question=item.question), f" {reading}"))
            own.append(plans(number, item))
    found = np.array([one.per_token for one in likelihoods(loaded, pairs, own, progress=progress)])
    return found[::2] - found[1::2]


def over_domains(values: dict[str, np.ndarray], seed: int = 0) -> dict[str, float] | None:
    """The mean over domains of each domain's mean over items, with its interval."""
    if not values:
        return None
    random = np.random.default_rng(seed)
    draws = [one[random.integers(len(one), size=(RESAMPLES, len(one)))].mean(1) for one in values.values()]
    low, high = np.quantile(np.mean(draws, 0), [0.025, 0.975])
    mean = float(np.mean([one.mean() for one in values.values()]))
    return {"mean": mean, "low": float(low), "high": float(high), "domains": len(values)}


def summary(items: Sequence[Item], found: dict[str, np.ndarray], part: str) -> dict[str, dict]:
    """Of each domain and of "all": items, share won and effect by condition."""
    rows: dict[str, dict] = {}
    moved = {name: values - found["unsteered"] for name, values in found.items() if name != "unsteered"}
    moved[SPECIFIC] = found["right"] - found["shuffled"]
    own = {
        domain: np.array([i for i, item in enumerate(items) if (item.part, item.domain) == (part, domain)])
        for domain in sorted({item.domain for item in items if item.part == part})
    }
    for domain, which in own.items():
        effects = {name: bootstrap(values[which]) for name, values in moved.items()}
        rows[domain] = {
            "items": len(which),
            "won": {name: float((values[which] > 0).mean()) for name, values in found.items()},
            "effect": {name: effect.as_dict() for name, effect in effects.items() if effect},
        }
    rows["all"] = {
        "items": sum(map(len, own.values())),
        "won": {name: float(np.mean([row["won"][name] for row in rows.values()])) for name in found},
        "effect": {
            name: over_domains({domain: values[which] for domain, which in own.items()})
            for name, values in moved.items()
        },
    }
    return rows


def show(rows: dict[str, dict], title: str) -> None:
    """The conditions of every run with their intervals, then the means of those that were asked for."""
    table = Table("domain", "items", "won unsteered", "won steered", *CONDITIONS, title=title)
    for domain, row in rows.items():
        cells = [f"{e['mean']:+.2f} [{e['low']:+.2f}, {e['high']:+.2f}]" for e in map(row["effect"].get, CONDITIONS)]
        won = [f"{row['won'][name]:.0%}" for name in ("unsteered", "right")]
        table.add_row(domain, str(row["items"]), *won, *cells)
    Console(width=150).print(table)
    further = [name for name in rows["all"]["effect"] if name not in CONDITIONS]
    if further:
        table = Table("condition", *rows, title=title)
        for name in further:
            table.add_row(name, *(f"{row['effect'][name]['mean']:+.2f}" for row in rows.values()))
        Console(width=150).print(table)


def verdicts(rows: dict[str, dict]) -> Iterator[str]:
    """What the bar asks for, and whether it is met."""
    right, foreign = rows["all"]["effect"]["right"], rows["all"]["effect"]["foreign"]
    below = [domain for domain, row in rows.items() if row["effect"]["right"]["mean"] <= 0]
    noise = foreign["low"] <= 0 <= foreign["high"]
    mark = "ok  " if right["mean"] >= BAR else "MISS"
    yield f"{mark} toward the right domain {right['mean']:+.2f}, wanted {BAR:+.2f}"
    yield f"{'MISS' if below else 'ok  '} domains at 0 or below: {', '.join(below) or 'none'}, wanted none"
    yield f"{'ok  ' if noise else 'MISS'} toward a foreign domain {foreign['mean']:+.2f}, wanted within its noise"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: smollm2-moe")
    parser.add_argument("--vectors", type=Path, help="a folder of vectors to search first")
    parser.add_argument("--domains", nargs="+", help="default: all that the model has vectors of")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--positions", choices=("all", "last-prompt", "generated"), default="all")
    parser.add_argument("--strength", type=float, default=1.0, help="multiple of the vectors' own strengths")
    parser.add_argument("--format", choices=FORMATS, default="question")
    parser.add_argument(
        "--sentences", action="store_true", help="readings as whole sentences, not in one to three words"
    )
    parser.add_argument("--items", type=int, default=90, help="most items of a domain and part, evenly spread")
    parser.add_argument("--bands", type=int, default=0, help="also steer each of N bands of layers alone")
    parser.add_argument("--each", action="store_true", help="also steer every item toward each domain")
    parser.add_argument("--json", type=Path, help="write figures and items to this file")
    return parser.parse_args()


def spread_evenly(items: list[Item], most: int) -> list[Item]:
    """At most `most` items of each part and domain, evenly spread over its fields."""
    kept = []
    for key in dict.fromkeys((item.part, item.domain) for item in items):
        own = [item for item in items if (item.part, item.domain) == key]
        kept += [own[i] for i in sorted({round(place) for place in np.linspace(0, len(own) - 1, min(most, len(own)))})]
    return kept


def conditions(
    args: argparse.Namespace, loaded: LoadedModel, domains: Sequence[str]
) -> dict[str, Callable[[int, Item], SteeringPlan | None]]:
    """How each condition steers an item, by its name."""
    vectors = vectors_for(loaded.shape, list(domains), folder=args.vectors)
    if len(vectors) < 2 or not set(domains) <= vectors.keys():
        sys.exit(f"the model needs vectors of two domains or more, of these among them: {', '.join(domains)}")
    plans = {name: plan_for(vector, positions=args.positions) for name, vector in vectors.items()}
    plans = {name: replace(plan, strength=args.strength * plan.strength) for name, plan in plans.items()}
    mixed_up = {name: replace(plan, vector=shuffled(plan.vector)) for name, plan in plans.items()}

    def foreign(number: int, item: Item) -> SteeringPlan:
        others = [plan for name, plan in plans.items() if name != item.domain]
        return others[number % len(others)]

    found = {
        "unsteered": lambda number, item: None,
        "right": lambda number, item: plans[item.domain],
        "foreign": foreign,
        "shuffled": lambda number, item: mixed_up[item.domain],
    }
    layers = loaded.shape.routers[-1].layer + 1
    for band in range(args.bands):
        ends = band * layers // args.bands, (band + 1) * layers // args.bands - 1
        banded = {name: replace(plan, layers=ends) for name, plan in plans.items()}
        found[f"layers {ends[0]}-{ends[1]}"] = lambda number, item, own=banded: own[item.domain]
    if args.each:
        found |= {f"toward {name}": lambda number, item, plan=plan: plan for name, plan in plans.items()}
    return found


def main() -> None:
    args = arguments()
    started = time.perf_counter()
    loaded = load(args.model)
    domains = list(vectors_for(loaded.shape, [], folder=args.vectors))  # foreign ones too, whatever is asked for
    wanted = args.domains or domains
    items = spread_evenly(read_items(args.parts, wanted, args.sentences), args.items)
    if not items:
        raise SystemExit(f"no items of {', '.join(wanted)} in {', '.join(args.parts)}: name other domains or parts")
    found = {}
    for name, plans in conditions(args, loaded, domains).items():
        found[name] = differences(loaded, items, FORMATS[args.format], plans, lambda pairs: None)
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    version = importlib.metadata.version("domainsteer")
    settings = {
        "model": loaded.name, "fingerprint": loaded.shape.fingerprint, "dtype": str(loaded.model.dtype),
        "domainsteer": version, "positions": args.positions, "strength": args.strength, "format": args.format,
        "sentences": args.sentences,
    }  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    tables = {part: summary(items, found, part) for part in args.parts if any(i.part == part for i in items)}
    for part, rows in tables.items():
        show(rows, f"{part}: nats per token toward our reading, less unsteered")
    if "fields" in tables:
        print("\n".join(verdicts(tables["fields"])))
    if args.json:
        of_items = [
            asdict(item) | {name: float(values[i]) for name, values in found.items()} for i, item in enumerate(items)
        ]
        figures = {"settings": settings, **tables, "items": of_items, "seconds": time.perf_counter() - started}
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
