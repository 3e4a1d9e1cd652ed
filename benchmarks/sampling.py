"""Which sampling the steered stories are best with: `make bench-sampling`, or
`python benchmarks/sampling.py [--settings T,P,M ...] [--openings N] [--domains ...] [--texts FILE] [--json FILE]`.

Stories of the held-out openings, steered toward each domain at its vector's own strength, are drawn with each setting:
temperature T, top-p P (1: off) and min-p M (0: off). The judge of `steermoe evaluate` looks at them; what is usual it
learns from unsteered stories with the default sampling, so that one measure holds for all settings.

Settings with as much sound success as the default one (their mean is not below its 95% interval) are ranked by the
mean of three ranks: damaged texts (fewer is better), variety (the mean of distinct-1, -2 and -3) and repeated 4-grams.
Differences from the default are paired over openings; a star marks those whose 95% interval does not contain 0.

Stories are kept in the folder --output, those of each setting and domain in a file of their own. So an interrupted run
can be resumed, and more settings can be added later. A setting that would not end within `--minutes` of generating is
not begun and is named; the same command continues later.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from results import carry_out, write
from rich.console import Console
from rich.table import Table

from steermoe.engines.request import Sampling
from steermoe.errors import SteerMoEError, count_of
from steermoe.evaluation.bootstrap import bootstrap
from steermoe.evaluation.classifier import DomainClassifier
from steermoe.evaluation.evaluate import Evaluation
from steermoe.evaluation.judge import FIGURES, Judge
from steermoe.evaluation.protocol import Condition, EvaluationSettings, own_condition
from steermoe.evaluation.report import comparable
from steermoe.evaluation.results import ResultFolder, StoryRecord
from steermoe.evaluation.texts import domain_list, heldout_texts
from steermoe.models.default import spec
from steermoe.models.default.stories import openings
from steermoe.models.loading import load
from steermoe.vectors.library import load_vector

MAIN = "sound_success"
DISTINCT = ("distinct_1", "distinct_2", "distinct_3")
SHOWN = (MAIN, "success", "damaged", *DISTINCT, "repeated_4", "nats")
SHARES = (MAIN, "success", "damaged", "repeated_4")
BEST = 2
"""Settings whose stories are written to read, beside the default one."""


@dataclass(frozen=True)
class Setting:
    """One way to draw tokens."""

    temperature: float
    top_p: float
    min_p: float

    def __str__(self) -> str:
        return f"T {self.temperature:g}, top-p {self.top_p:g}, min-p {self.min_p:g}"

    @property
    def folder(self) -> str:
        return f"t{self.temperature:g}-p{self.top_p:g}-m{self.min_p:g}"


DEFAULT = Setting(Sampling().temperature, Sampling().top_p, Sampling().min_p)
GRID = (
    DEFAULT,
    Setting(1.0, 1.0, 0.1),
    Setting(0.7, 0.9, 0.0),
    Setting(0.7, 1.0, 0.05),
    Setting(1.0, 0.9, 0.0),
    Setting(0.85, 1.0, 0.1),
    Setting(1.2, 1.0, 0.2),
)
"""The most important first."""

Means = dict[str, np.ndarray]
"""Each figure's mean over domains for each opening [O]."""


def setting_of(text: str) -> Setting:
    """A setting as it is written on the command line."""
    try:
        temperature, top_p, min_p = map(float, text.split(","))
        Sampling(temperature=temperature, top_p=top_p, min_p=min_p)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"'{text}' is no setting: expected temperature,top-p,min-p such as 1,0.95,0.05"
        ) from error
    except SteerMoEError as error:
        raise argparse.ArgumentTypeError(f"'{text}': {error}") from error
    return Setting(temperature, top_p, min_p)


def at_least(least: int):
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is too few, or no number: expected {least} or more")
        return int(text)

    return read


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", type=setting_of, metavar="T,P,M", default=list(GRID))
    parser.add_argument("--openings", type=at_least(2), default=50)
    parser.add_argument("--domains", nargs="+", choices=spec.DOMAINS, default=spec.DOMAINS)
    parser.add_argument("--tokens", type=at_least(40), default=40, help="of a story; distinct n-grams need 40")
    parser.add_argument("--seeds", type=at_least(1), default=1)
    parser.add_argument("--model", help="a checkpoint of the default model; by default the pulled one")
    parser.add_argument("--vectors", type=Path, help="folder of vectors to search first")
    parser.add_argument("-o", "--output", type=Path, default=Path(tempfile.gettempdir()) / "steermoe-bench-sampling")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--texts", type=Path, help="write stories of the best settings and of the default one, to read")
    parser.add_argument("--read", type=at_least(1), default=30, help="how many stories of each")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


class Bench:
    """Generates the stories of each setting, or finds them in the folder, and judges them."""

    def __init__(self, args: argparse.Namespace) -> None:
        try:
            self.openings = openings("heldout", args.openings)
        except ValueError as error:
            raise SteerMoEError(f"--openings {args.openings} is too many: {error}") from error
        self.domains = list(dict.fromkeys(args.domains))
        self._texts = heldout_texts(self.domains)
        self._loaded = load(args.model)
        self._vectors = {
            domain: load_vector(
                domain, self._loaded.shape, folder=args.vectors, group=None if args.vectors else spec.NAME
            )
            for domain in self.domains
        }
        self.model = self._loaded.name
        self.strengths = {domain: own_condition(vector).strength for domain, vector in self._vectors.items()}
        self._settings = EvaluationSettings(tuple(self.openings), seeds=args.seeds, max_new_tokens=args.tokens)
        self._folder = args.output
        keywords = {domain: vector.info.keywords for domain, vector in self._vectors.items()}
        words = {domain: domain_list(domain, own) for domain, own in keywords.items()}
        unsteered = self._of(DEFAULT).stories(Condition("unsteered"))
        classifier = DomainClassifier(self._texts)
        self._judge = Judge(classifier, words, keywords, unsteered, len(self.openings), args.seeds)
        self.unsteered = mean_over([self._judge.figures(unsteered, domain) for domain in self.domains])

    def _of(self, setting: Setting) -> Evaluation:
        settings = replace(self._settings, temperature=setting.temperature, top_p=setting.top_p, min_p=setting.min_p)
        results = ResultFolder(self._folder / setting.folder, comparable(self._loaded, self._vectors, settings))
        return Evaluation(self._loaded, self._vectors, self._texts, settings, results)

    def stories(self, setting: Setting) -> dict[str, list[StoryRecord]]:
        """By domain."""
        evaluation = self._of(setting)
        return {domain: evaluation.stories(own_condition(vector)) for domain, vector in self._vectors.items()}

    def means(self, stories: dict[str, list[StoryRecord]]) -> Means:
        return mean_over([self._judge.figures(own, domain) for domain, own in stories.items()])


def mean_over(tables: list[Means]) -> Means:
    """Each figure's mean over domains [O], without what is missing; NaN if nothing is left."""
    stacked = {name: np.ma.masked_invalid(np.stack([table[name] for table in tables])) for name in FIGURES}
    return {name: values.mean(0).filled(np.nan) for name, values in stacked.items()}


def figures_of(means: Means, default: Means) -> dict:
    """Figures with their intervals, and their differences from the default setting."""

    def intervals(values: Means) -> dict:
        found = {name: bootstrap(of_openings) for name, of_openings in values.items()}
        return {name: one and one.as_dict() for name, one in found.items()}

    differences = {name: means[name] - default[name] for name in FIGURES}
    return {"figures": intervals(means), "differences": intervals(differences)}


def rank(found: dict[Setting, dict]) -> dict[Setting, float]:
    """The settings with as much sound success as the default one, the best first, each with its mean rank."""
    from scipy.stats import rankdata

    least = found[DEFAULT]["figures"][MAIN]["low"]
    equal = [setting for setting, one in found.items() if one["figures"][MAIN]["mean"] >= least]
    known = [{name: one["mean"] for name, one in found[setting]["figures"].items() if one} for setting in equal]
    measures = (
        [one["damaged"] for one in known],
        [-sum(one.get(name, 0.0) for name in DISTINCT) for one in known],
        [one["repeated_4"] for one in known],
    )
    ranks = np.mean([rankdata(measure) for measure in measures], axis=0)
    return dict(sorted(zip(equal, map(float, ranks), strict=True), key=lambda pair: pair[1]))


def cell(one: dict, name: str) -> str:
    interval, difference = one["figures"][name], one["differences"][name]
    if interval is None:
        return "-"
    shown = f"{interval['mean']:.1%}" if name in SHARES else f"{interval['mean']:.3f}"
    if name == MAIN:
        shown += f" [{interval['low']:.0%}, {interval['high']:.0%}]"
    return shown + "*" * bool(difference and (difference["low"] > 0 or difference["high"] < 0))


def print_table(found: dict[Setting, dict], ranks: dict[Setting, float], unsteered: dict, title: str) -> None:
    table = Table("setting", *(name.replace("_", " ") for name in SHOWN), "mean rank", title=title)
    for setting in [*ranks, *(one for one in found if one not in ranks)]:
        name = f"{setting} (default)" if setting == DEFAULT else str(setting)
        place = f"{ranks[setting]:.2f}" if setting in ranks else "less success"
        table.add_row(name, *(cell(found[setting], figure) for figure in SHOWN), place)
    table.add_row("unsteered", *(cell(unsteered, figure).rstrip("*") for figure in SHOWN), "")
    Console(width=170).print(table)


def to_read(bench: Bench, stories: dict[Setting, dict[str, list[StoryRecord]]], count: int) -> str:
    """Stories of each setting as Markdown: the same domains and openings for all, spread evenly, none chosen."""
    parts = []
    for setting, by_domain in stories.items():
        parts.append(f"# {setting}{' (default)' if setting == DEFAULT else ''}")
        domains, each = list(by_domain), min(map(len, by_domain.values()))
        shown = min(count, each * len(domains))
        for place in range(shown):
            domain = domains[place % len(domains)]
            story = by_domain[domain][place * each // shown]
            parts.append(f"{place + 1}. {domain}: **{bench.openings[story.opening]}**{story.text}")
    return "\n\n".join(parts) + "\n"


def run(args: argparse.Namespace) -> None:
    bench, spent, longest = Bench(args), 0.0, 0.0
    stories: dict[Setting, dict[str, list[StoryRecord]]] = {}
    means: dict[Setting, Means] = {}
    settings = list(dict.fromkeys((DEFAULT, *args.settings)))
    for setting in settings:
        if spent and spent + longest > 60 * args.minutes:
            left = "; ".join(map(str, settings[len(stories) :]))
            print(f"within {args.minutes:g} minutes there is no time for {left}: run this again", file=sys.stderr)
            break
        begun, used = time.monotonic(), time.process_time()
        stories[setting] = bench.stories(setting)
        means[setting] = bench.means(stories[setting])
        took = f"{time.monotonic() - begun:.0f} s, {time.process_time() - used:.0f} of them on the CPU"
        spent, longest = spent + time.monotonic() - begun, max(longest, time.monotonic() - begun)
        print(f"{setting}: {took}", file=sys.stderr, flush=True)
    found = {setting: figures_of(one, means[DEFAULT]) for setting, one in means.items()}
    ranks, unsteered = rank(found), figures_of(bench.unsteered, means[DEFAULT])
    counts = (len(bench.openings), "opening"), (args.seeds, "seed"), (len(bench.domains), "domain")
    title = f"{bench.model}: {' x '.join(count_of(*one) for one in counts)}, {args.tokens} tokens; best first"
    print_table(found, ranks, unsteered, title)
    if args.texts:
        best = [setting for setting in ranks if setting != DEFAULT][:BEST]
        chosen = {setting: stories[setting] for setting in (*best, DEFAULT)}
        write(args.texts, to_read(bench, chosen, args.read))
    if args.json:
        rows = [{**vars(setting), "mean_rank": ranks.get(setting), **found[setting]} for setting in found]
        about = {"model": bench.model, "openings": bench.openings, "strengths": bench.strengths}
        about |= {"seeds": args.seeds, "tokens": args.tokens, "default": vars(DEFAULT)}
        record = {**about, "ranked": [vars(setting) for setting in ranks], "settings": rows, "unsteered": unsteered}
        write(args.json, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    carry_out(run, parsed())
