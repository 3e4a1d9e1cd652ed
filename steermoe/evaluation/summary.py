"""Figures of a whole evaluation, ready for JSON: conditions with intervals, groups over domains, controls, and formulas
compared at equal damage and at equal success.

Shapes: D domains, O openings.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from steermoe.evaluation.bootstrap import RESAMPLES, Interval, bootstrap, share_worse
from steermoe.evaluation.judge import FIGURES, Floats, Judge
from steermoe.evaluation.protocol import Condition
from steermoe.evaluation.results import StoryRecord
from steermoe.formulas import FORMULAS

MAIN = "sound_success"
"""The figure that stands for success if only one is shown."""
EQUAL_SUCCESS = (0.3, 0.5)
"""Rates of success at which the formulas' damage is compared."""

FigureTable = dict[str, Floats]


class EvaluationSummary:
    """Collects conditions as they are finished and computes their figures.

    Args:
        judge: turns stories into figures.
        unsteered: the stories to compare with.
        domains: all that are evaluated.
    """

    def __init__(self, judge: Judge, unsteered: Sequence[StoryRecord], domains: Sequence[str]) -> None:
        self.judge = judge
        self.domains = list(domains)
        self._unsteered = {domain: judge.figures(unsteered, domain) for domain in domains}
        self._rows: list[dict[str, Any]] = []
        self._figures: dict[str, FigureTable] = {}
        self._most_likely = {"unsteered": judge.most_likely(unsteered)}
        self._foreign: dict[str, dict[str, Floats]] = {}

    def add(
        self,
        condition: Condition,
        stories: Sequence[StoryRecord],
        damage: Mapping[str, float] | None = None,
        lift: float | None = None,
    ) -> None:
        """Add a condition of one domain, with what was measured on texts (`TextFigures`), if anything was."""
        figures = self.judge.figures(stories, condition.domain)
        key = f"{condition.name}|{condition.group}"
        self._figures[key] = figures
        against = self._unsteered[condition.domain]
        differences = {name: figures[name] - against[name] for name in FIGURES}
        texts: dict[str, float] = dict(damage or {})
        if damage:
            texts["perplexity_ratio"] = float(np.exp(damage["nats"] - damage["nats_unsteered"]))
        if lift is not None:
            texts["lift"] = lift
        self._rows.append(
            {
                **condition.as_dict(),
                "figures": _intervals(figures),
                "differences": _intervals(differences),
                "worse": share_worse(differences["probability"]),
                "on_texts": texts,
            }
        )
        if condition.kind == "steered":
            self._most_likely[f"{condition.domain}|{condition.group}"] = self.judge.most_likely(stories)
            others = [domain for domain in self.domains if domain != condition.domain]
            self._foreign[key] = {domain: self.judge.success(stories, domain) for domain in others}

    def as_dict(self, main_group: str) -> dict[str, Any]:
        """The whole summary; `main_group` is the steered group for controls and the confusion matrix."""
        controls = self._controls(main_group)
        return {
            "classifier": {"auc": self.judge.classifier.auc, "recall": self.judge.classifier.recall},
            "unsteered": {domain: _intervals(figures) for domain, figures in self._unsteered.items()},
            "conditions": self._rows,
            "groups": self._groups(),
            "main_group": main_group,
            "confusion": self._confusion(main_group),
            "controls": controls,
            "complaints": [line for control in controls for line in control["complaints"]],
            "formulas": {
                "equal_damage": self._equal_damage(),
                "equal_success": [self._equal_success(target) for target in EQUAL_SUCCESS],
            },
        }

    # ---- over domains ----

    def _members(self, group: str) -> dict[str, FigureTable]:
        """Each domain's figures in a group."""
        return {row["domain"]: self._figures[f"{row['name']}|{group}"] for row in self._rows if row["group"] == group}

    def _of_group(self, group: str, name: str) -> Floats:
        """A figure's mean over domains for each opening [O]."""
        return _mean([figures[name] for figures in self._members(group).values()])

    def _groups(self) -> list[dict[str, Any]]:
        found = []
        for group in dict.fromkeys(row["group"] for row in self._rows):
            rows = [row for row in self._rows if row["group"] == group]
            figures = {name: self._of_group(group, name) for name in FIGURES}
            usual = {name: _mean([self._unsteered[row["domain"]][name] for row in rows]) for name in FIGURES}
            shared = set.intersection(*(set(row["on_texts"]) for row in rows))
            first = {name: rows[0][name] for name in ("kind", "formula", "scale", "cut", "budget")}
            found.append(
                {
                    "group": group,
                    **first,
                    "strengths": {row["domain"]: row["strength"] for row in rows},
                    "figures": _intervals(figures),
                    "differences": _intervals({name: figures[name] - usual[name] for name in FIGURES}),
                    "on_texts": {name: float(np.mean([row["on_texts"][name] for row in rows])) for name in shared},
                }
            )
        return found

    def _confusion(self, group: str) -> dict[str, Any]:
        labels = self.judge.classifier.labels
        rows = {"unsteered": self._most_likely["unsteered"]}
        rows |= {d: self._most_likely[f"{d}|{group}"] for d in self.domains if f"{d}|{group}" in self._most_likely}
        values = [[shares[label] for label in labels] for shares in rows.values()]
        return {"vectors": list(rows), "classified": labels, "share": values}

    # ---- controls ----

    def _controls(self, group: str) -> list[dict[str, Any]]:
        """For each domain: does its vector do more than the shuffled one, and do other domains' vectors do nothing?"""
        true = self._members(group)
        shuffled = self._members(control_groups(group)["shuffled"])
        found = []
        for domain, figures in true.items():
            complaints = []
            own = figures["success"] - self._unsteered[domain]["success"]
            record: dict[str, Any] = {"domain": domain, "true": _interval(own)}
            if domain in shuffled:
                other = shuffled[domain]["success"] - self._unsteered[domain]["success"]
                record["shuffled"], gap = _interval(other), bootstrap(own - other)
                if gap is None or gap.low <= 0:
                    complaints.append(f"{domain}: the vector with shuffled experts does as much as the true one")
                elif np.nanmean(other) > np.nanmean(own) / 2:
                    complaints.append(
                        f"{domain}: the vector with shuffled experts does over half of what the true one does"
                    )
            foreign = [
                rates[domain] for key, rates in self._foreign.items() if domain in rates and key.endswith(f"|{group}")
            ]
            if foreign:
                raised = _mean(foreign) - self._unsteered[domain]["success"]
                record["foreign"] = _interval(raised)
                if np.nanmean(raised) > np.nanmean(own) / 4 and np.nanmean(raised) > 0.02:
                    complaints.append(f"{domain}: other domains' vectors raise it too")
            record["complaints"] = complaints
            found.append(record)
        return found

    # ---- the formulas against each other ----

    def _budget_groups(self) -> dict[tuple[str, str, float], dict[str, str]]:
        """(scale, cut, budget) -> formula -> group, for strengths that follow a budget."""
        found: dict[tuple[str, str, float], dict[str, str]] = {}
        for row in self._rows:
            if row["kind"] == "steered" and row["budget"] is not None:
                found.setdefault((row["scale"], row["cut"], row["budget"]), {})[row["formula"]] = row["group"]
        return found

    def _equal_damage(self) -> list[dict[str, Any]]:
        """Paired differences of success between formulas whose strengths spend the same budget."""
        found = []
        for (scale, cut, budget), groups in self._budget_groups().items():
            present = [formula for formula in FORMULAS if formula in groups]
            for worse, better in pairwise(present):
                difference = self._of_group(groups[better], MAIN) - self._of_group(groups[worse], MAIN)
                nats = self._of_group(groups[better], "nats") - self._of_group(groups[worse], "nats")
                found.append(
                    {
                        "scale": scale,
                        "cut": cut,
                        "budget": budget,
                        "better": better,
                        "worse": worse,
                        "success": _interval(difference),
                        "nats": _interval(nats),
                    }
                )
        return found

    def _equal_success(self, target: float) -> dict[str, Any]:
        """Each formula's damage (95th percentile of KL, mean over domains) at a rate of success."""
        curves: dict[tuple[str, str], dict[str, list[tuple[float, Floats]]]] = {}
        start = _mean([figures[MAIN] for figures in self._unsteered.values()])
        for (scale, cut, _), groups in sorted(self._budget_groups().items()):
            for formula, group in groups.items():
                points = curves.setdefault((scale, cut), {}).setdefault(formula, [(0.0, start)])
                rows = [row for row in self._rows if row["group"] == group]
                points.append(
                    (float(np.mean([row["on_texts"]["kl_p95"] for row in rows])), self._of_group(group, MAIN))
                )
        return {
            "success": target,
            "damage": [
                {"scale": scale, "cut": cut, "formula": formula, "kl_p95": _damage_at(points, target)}
                for (scale, cut), formulas in curves.items()
                for formula, points in formulas.items()
            ],
        }


def control_groups(main: str) -> dict[str, str]:
    """The groups to show beside a steered group, including itself, by kind."""
    level = main.removeprefix("steered-")
    return {"shuffled": f"shuffled-{level}", "prompted": "prompted", "steered": main, "both": f"both-{level}"}


def _damage_at(points: Sequence[tuple[float, Floats]], target: float) -> dict[str, float] | None:
    """The damage at which success first reaches a rate, with its interval; None if it does not."""
    damage = np.array([at for at, _ in points])
    success = np.stack([values for _, values in points])  # [points, O]
    found = _first_reach(damage, success.mean(1), target)
    if found is None:
        return None
    random = np.random.default_rng(0)
    openings = success.shape[1]
    draws = [
        _first_reach(damage, success[:, random.integers(openings, size=openings)].mean(1), target)
        for _ in range(RESAMPLES)
    ]
    reached = [draw if draw is not None else float("inf") for draw in draws]
    low, high = np.quantile(reached, [0.025, 0.975], method="nearest")
    return Interval(found, float(low), float(high), openings).as_dict()


def _first_reach(damage: Floats, success: Floats, target: float) -> float | None:
    for number in range(1, len(damage)):
        below, above = success[number - 1], success[number]
        if below < target <= above:
            part = (target - below) / (above - below)
            return float(damage[number - 1] + part * (damage[number] - damage[number - 1]))
    return None


def _mean(tables: Sequence[Floats]) -> Floats:
    """[O], mean over domains, without NaN; NaN if nothing is left."""
    stacked = np.stack(tables)
    known = ~np.isnan(stacked)
    return np.where(known.any(0), np.where(known, stacked, 0.0).sum(0) / np.maximum(known.sum(0), 1), np.nan)


def _interval(values: Floats) -> dict[str, Any] | None:
    found = bootstrap(values)
    return found.as_dict() if found else None


def _intervals(table: Mapping[str, Floats]) -> dict[str, Any]:
    return {name: _interval(values) for name, values in table.items()}
