"""The tables of an evaluation in Markdown, for a report or a README, made from the summary alone."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from steermoe.errors import count_of
from steermoe.evaluation.summary import MAIN, control_groups

SummaryDict = Mapping[str, Any]
NAMES = {"additive": "(3) additive", "max_scaled": "(4) max-scaled", "zero_max_scaled": "(5) zero-max-scaled"}
MORE_TITLES = (
    "domain",
    "lift",
    "steered away",
    "best of the random ones",
    "popular",
    "raised",
    "by random vectors",
    "by popular experts",
)
AGREEMENT_TITLES = ("judge", "texts", "same topic", "kappa")


def markdown(summary: SummaryDict) -> str:
    """All tables under headings."""
    parts = [
        ("Domains and controls", _domains(summary)),
        ("Conditions, mean over domains", _groups(summary)),
        ("Which domain the texts are about", _confusion(summary)),
        ("The classifier, on the first 30 words of held-out texts", _classifier(summary)),
    ]
    if summary["formulas"]["equal_damage"]:
        parts += [
            ("Formulas at equal damage budget", _equal_damage(summary)),
            ("Formulas at equal success", _equal_success(summary)),
        ]
    if summary.get("more_controls"):
        parts.append(
            ("Lift of the domain's own texts, and success, by control", _table(MORE_TITLES, more_rows(summary)))
        )
    if summary.get("agreement"):
        parts.append(
            ("Agreement of the classifier with other judges", _table(AGREEMENT_TITLES, agreement_rows(summary)))
        )
    settings = summary["settings"]
    drawn = "".join(f", {name.replace('_', '-')} {settings[name]:g}" for name in ("top_p", "min_p") if name in settings)
    head = (
        f"{summary['model']}: {count_of(len(settings['openings']), 'opening')} x {count_of(settings['seeds'], 'seed')} "
        f"x {count_of(len(summary['unsteered']), 'domain')}, {settings['max_new_tokens']} tokens each, temperature "
        f"{settings['temperature']:g}{drawn}. Intervals: 95%, paired bootstrap over openings. Largest logit difference "
        f"at strength 0: {summary['strength_0']:g}."
    )
    complaints = [f"- CONTROL FAILED: {line}" for line in summary["complaints"]] or ["All controls came out."]
    return "\n".join([head, "", *complaints, *(f"\n### {title}\n\n{table}" for title, table in parts)]) + "\n"


def more_rows(summary: SummaryDict) -> list[list[str]]:
    """Rows for `MORE_TITLES`: lift in nats per token, and by how much success is raised; none without more controls."""
    return [
        [
            one["domain"],
            *(f"{one[name]['lift']:+.2f}" for name in ("true", "negative")),
            f"{max(one['random']['lift']):+.2f}",
            f"{one['popular']['lift']:+.2f}",
            *(rate(one[name]["raised"], "+.0%") for name in ("true", "random", "popular")),
        ]
        for one in summary.get("more_controls", [])
    ]


def agreement_rows(summary: SummaryDict) -> list[list[str]]:
    """Rows for `AGREEMENT_TITLES`: each judge, over all texts and over those in which it names a topic."""
    rows = []
    for name, found in summary.get("agreement", {}).items():
        for what, one in ((name, found), (f"{name}, where it names a domain", found["named"])):
            same = "" if one["same"] is None else f"{one['same']:.0%}"
            rows.append([what, str(one["texts"]), same, rate(one["kappa"], ".2f")])
    return rows


def _domains(summary: SummaryDict) -> str:
    main = summary["main_group"]
    groups = control_groups(main)
    columns = {"steered": main, "shuffled": groups["shuffled"], "asked in words": "prompted", "both": groups["both"]}
    rows = {(row["domain"], row["group"]): row for row in summary["conditions"]}
    table = []
    for domain, usual in summary["unsteered"].items():
        if (domain, main) not in rows:
            continue  # its vector uses another formula than the first one
        cells = [rate(usual[MAIN])]
        cells += [
            rate(rows[domain, group]["figures"][MAIN]) if (domain, group) in rows else "" for group in columns.values()
        ]
        steered = rows[domain, main]
        foreign = next((c.get("foreign") for c in summary["controls"] if c["domain"] == domain), None)
        cells += [
            _points(foreign),
            f"{steered['worse']:.0%}",
            f"{steered['strength']:g}",
            f"{steered['on_texts']['kl_p95']:.2f}",
        ]
        table.append([domain, *cells])
    titles = ["domain", "unsteered", *columns, "raised by other vectors", "openings gone the wrong way", "c", "KL p95"]
    return _table(titles, table)


def _groups(summary: SummaryDict) -> str:
    rows = []
    for group in summary["groups"]:
        figures, texts = group["figures"], group["on_texts"]
        rows.append(
            [
                _what(group),
                rate(figures[MAIN]),
                *(_number(figures[name], digits) for name, digits in (
                    ("probability", 2), ("words_per_1000", 0), ("nats", 2), ("distinct_2", 2), ("repeated_4", 3),
                    ("vector_share", 2),
                )),
                f"{figures['damaged']['mean']:.1%}",
                *(f"{texts[name]:.2f}" if name in texts else "" for name in ("kl_p95", "kl_mean", "lift", "jaccard")),
            ]
        )  # fmt: skip
    titles = [
        "condition", "sound success", "probability", "words/1000", "nats", "distinct-2", "repeated 4-grams",
        "slots to the vector's experts", "damaged", "KL p95", "KL mean", "lift", "top-k Jaccard",
    ]  # fmt: skip
    return _table(titles, rows)


def _what(group: Mapping[str, Any]) -> str:
    if group["kind"] == "prompted":
        return "asked in words"
    name = {"both": "asked and steered", "shuffled": "experts shuffled", "steered": ""}[group["kind"]]
    parts = [name, NAMES[group["formula"]], group["cut"] if group["cut"] != "own" else ""]
    parts += ["paper's scale" if group["scale"] == "paper" else ""]
    parts += [f"{group['budget']:g} nats" if group["budget"] is not None else ""]
    return ", ".join(part for part in parts if part)


def _confusion(summary: SummaryDict) -> str:
    confusion = summary["confusion"]
    rows = [
        [vector, *(f"{share:.0%}" for share in shares)]
        for vector, shares in zip(confusion["vectors"], confusion["share"], strict=True)
    ]
    return _table(["steered with", *confusion["classified"]], rows)


def _classifier(summary: SummaryDict) -> str:
    found = summary["classifier"]
    return _table(
        ["", *found["auc"]],
        [
            ["area under ROC", *(f"{value:.3f}" for value in found["auc"].values())],
            ["recall", *(f"{value:.0%}" for value in found["recall"].values())],
        ],
    )


def _equal_damage(summary: SummaryDict) -> str:
    rows = [
        [
            _setting(pair),
            f"{pair['budget']:g}",
            f"{NAMES[pair['better']]} less {NAMES[pair['worse']]}",
            _points(pair["success"]),
            rate(pair["nats"], "+.2f"),
        ]
        for pair in summary["formulas"]["equal_damage"]
    ]
    return _table(["threshold, scale", "budget", "pair", "difference in sound success", "difference in nats"], rows)


def _equal_success(summary: SummaryDict) -> str:
    rows = []
    for at in summary["formulas"]["equal_success"]:
        for one in at["damage"]:
            found = one["kl_p95"]
            shown = "not reached" if found is None else f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
            rows.append([f"{at['success']:.0%}", _setting(one), NAMES[one["formula"]], shown])
    return _table(["sound success", "threshold, scale", "formula", "KL p95, nats"], rows)


def _setting(row: Mapping[str, Any]) -> str:
    return f"{row['cut']}, {row['scale']}"


def rate(interval: Mapping[str, float] | None, form: str = ".0%") -> str:
    """A share with its interval, such as 72% [68%, 76%]; "" if there is none."""
    if interval is None:
        return ""
    return f"{interval['mean']:{form}} [{interval['low']:{form}}, {interval['high']:{form}}]"


def _points(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return ""
    return f"{100 * interval['mean']:+.0f} points [{100 * interval['low']:+.0f}, {100 * interval['high']:+.0f}]"


def _number(interval: Mapping[str, float] | None, digits: int) -> str:
    return "" if interval is None else f"{interval['mean']:.{digits}f}"


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
