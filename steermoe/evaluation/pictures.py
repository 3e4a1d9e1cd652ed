"""Pictures of an evaluation: success against damage, sweep of strengths, domains, confusion. Needs the extra `plot`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from steermoe.errors import count_of
from steermoe.evaluation.summary import MAIN, control_groups
from steermoe.figures import figure_class, save

COLOURS = {"additive": "#cc6677", "max_scaled": "#ddaa33", "zero_max_scaled": "#4477aa"}
MARKS = {"own": "o", "relative": "o", "absolute": "^"}
NAMES = {"additive": "additive (3)", "max_scaled": "max-scaled (4)", "zero_max_scaled": "zero-max-scaled (5)"}
KINDS = {
    "unsteered": ("unsteered", "#bbbbbb"),
    "shuffled": ("experts shuffled", "#cc6677"),
    "prompted": ("asked in words", "#ddcc77"),
    "steered": ("steered", "#4477aa"),
    "both": ("asked and steered", "#117733"),
}

SummaryDict = Mapping[str, Any]


def draw_all(summary: SummaryDict, folder: Path) -> list[Path]:
    """Draw everything that the summary has figures for as PNG files; returns their paths.

    Raises:
        SteerMoEError: matplotlib is missing, or a file can't be written.
    """
    drawn = []
    pictures: dict[str, Callable[[Any, SummaryDict], bool]] = {
        "pareto": _pareto,
        "sweep": _sweep,
        "domains": _domains,
        "confusion": _confusion,
    }
    for name, draw in pictures.items():
        figure = figure_class()(figsize=(10.5, 5), layout="constrained")
        if draw(figure, summary):
            save(figure, folder / f"{name}.png")
            drawn.append(folder / f"{name}.png")
    return drawn


def _steered_groups(summary: SummaryDict) -> list[dict[str, Any]]:
    return [group for group in summary["groups"] if group["kind"] == "steered" and "kl_p95" in group["on_texts"]]


def _curves(groups: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """(scale, cut, formula) -> its groups."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for group in groups:
        found.setdefault((group["scale"], group["cut"], group["formula"]), []).append(group)
    return found


def _unsteered_success(summary: SummaryDict) -> float:
    rates = [figures[MAIN]["mean"] for figures in summary["unsteered"].values()]
    return float(sum(rates) / len(rates))


def _pareto(figure: Any, summary: SummaryDict) -> bool:
    """Success over damage; every formula's curve begins at the unsteered model."""
    groups = _steered_groups(summary)
    if not groups:
        return False
    axes = figure.subplots(1, 2, sharey=True)
    start = _unsteered_success(summary)
    unsteered = [figures["nats"]["mean"] for figures in summary["unsteered"].values() if figures["nats"]]
    begins = {"kl_p95": 0.0, "nats": sum(unsteered) / len(unsteered) if unsteered else None}
    labels = {
        "kl_p95": "95th percentile of KL(steered || unsteered), nats per token",
        "nats": "nats per token of the stories under the unsteered model",
    }
    for axis, (name, label) in zip(axes, labels.items(), strict=True):
        for (scale, cut, formula), members in sorted(_curves(groups).items()):
            points = [(_damage(group, name), group["figures"][MAIN]) for group in members]
            known = sorted(((x, y) for x, y in points if x is not None and y), key=lambda point: point[0])
            if not known:
                continue
            xs, ys = [x for x, _ in known], [y["mean"] for _, y in known]
            errors = [[y["mean"] - y["low"] for _, y in known], [y["high"] - y["mean"] for _, y in known]]
            style = _style(scale, cut, formula)
            if begins[name] is not None:
                axis.plot([begins[name], *xs], [start, *ys], alpha=0.5, **(style | {"marker": "", "label": None}))
            axis.errorbar(xs, ys, errors, capsize=3, **(style | {"linestyle": ""}))
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("sound texts about the domain")
    axes[0].set_ylim(0, 1)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"Success against damage, {_what(summary)}")
    return True


def _style(scale: str, cut: str, formula: str) -> dict[str, Any]:
    parts = [NAMES[formula], *([cut] if cut != "own" else []), *(["paper's scale"] if scale == "paper" else [])]
    return {
        "label": ", ".join(parts),
        "color": COLOURS[formula],
        "marker": MARKS[cut],
        "linestyle": "--" if cut == "absolute" else "-",
        "markerfacecolor": "white" if scale == "paper" else COLOURS[formula],
    }


def _mean_strength(group: Mapping[str, Any]) -> float:
    return float(sum(group["strengths"].values()) / len(group["strengths"]))


def _damage(group: Mapping[str, Any], name: str) -> float | None:
    if name == "kl_p95":
        return float(group["on_texts"]["kl_p95"])
    return float(group["figures"][name]["mean"]) if group["figures"][name] else None


def _sweep(figure: Any, summary: SummaryDict) -> bool:
    """Success and damage by strength, one line per formula; mean over domains, at the mean of their strengths."""
    curves = {key: groups for key, groups in _curves(_steered_groups(summary)).items() if len(groups) > 1}
    if not curves:
        return False
    above, below = figure.subplots(1, 2, sharex=True)
    for (scale, cut, formula), groups in sorted(curves.items()):
        groups = sorted(groups, key=_mean_strength)
        xs = [_mean_strength(group) for group in groups]
        style = _style(scale, cut, formula)
        above.plot(xs, [group["figures"][MAIN]["mean"] for group in groups], **style)
        below.plot(xs, [group["on_texts"]["kl_p95"] for group in groups], **style)
    above.set_ylabel("sound texts about the domain")
    above.set_ylim(0, 1)
    below.set_ylabel("95th percentile of KL, nats per token")
    for axis in (above, below):
        axis.set_xlabel("strength c, mean over domains")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    above.legend(fontsize=8)
    figure.suptitle(f"Sweep of strengths, {_what(summary)}")
    return True


def _domains(figure: Any, summary: SummaryDict) -> bool:
    """Success of each domain, steered and under each control, with intervals."""
    main = summary["main_group"]
    rows = {
        "unsteered": {domain: figures[MAIN] for domain, figures in summary["unsteered"].items()},
        **{
            kind: {row["domain"]: row["figures"][MAIN] for row in summary["conditions"] if row["group"] == group}
            for kind, group in control_groups(main).items()
        },
    }
    rows = {kind: by_domain for kind, by_domain in rows.items() if by_domain}
    domains = list(summary["unsteered"])
    axis = figure.subplots()
    width = 0.8 / len(rows)
    for number, (kind, by_domain) in enumerate(rows.items()):
        found = [(place, by_domain[domain]) for place, domain in enumerate(domains) if by_domain.get(domain)]
        label, colour = KINDS[kind]
        axis.bar(
            [place + (number - (len(rows) - 1) / 2) * width for place, _ in found],
            [value["mean"] for _, value in found],
            width,
            yerr=[
                [value["mean"] - value["low"] for _, value in found],
                [value["high"] - value["mean"] for _, value in found],
            ],
            capsize=2,
            color=colour,
            label=label,
            error_kw={"linewidth": 0.8},
        )
    axis.set_xticks(range(len(domains)), domains)
    axis.set_ylim(0, 1.05)
    axis.set_ylabel("sound texts about the domain")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8, ncols=len(rows), loc="upper center", bbox_to_anchor=(0.5, -0.06))
    figure.suptitle(f"Domains and controls with 95% intervals, {_what(summary)}")
    return True


def _confusion(figure: Any, summary: SummaryDict) -> bool:
    """Which domain the texts of each vector are about."""
    confusion = summary["confusion"]
    figure.set_size_inches(8, 6.5)
    axis = figure.subplots()
    axis.imshow(confusion["share"], cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, shares in enumerate(confusion["share"]):
        for column, share in enumerate(shares):
            if share >= 0.005:
                axis.text(
                    column, row, f"{share:.0%}", ha="center", va="center", color="white" if share > 0.6 else "black"
                )
    axis.set_xticks(range(len(confusion["classified"])), confusion["classified"], rotation=30, ha="right")
    axis.set_yticks(range(len(confusion["vectors"])), confusion["vectors"])
    axis.set_xlabel("domain that the classifier finds most likely")
    axis.set_ylabel("vector steered with")
    figure.suptitle(f"Texts by vector and domain, {_what(summary)}")
    return True


def _what(summary: SummaryDict) -> str:
    settings = summary["settings"]
    return (
        f"{summary['model']}, {count_of(len(settings['openings']), 'opening')} x {count_of(settings['seeds'], 'seed')}"
    )
