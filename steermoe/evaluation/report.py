"""Evaluate into a folder, and write the results for readers: `evaluation.json`, CSV, Markdown, pictures."""

import csv
import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steermoe.evaluation.agreement import SentenceModel, agreement, by_nearest, by_words
from steermoe.evaluation.classifier import DomainClassifier
from steermoe.evaluation.evaluate import Evaluation, Notify, evaluate
from steermoe.evaluation.judge import FIGURES, Judge
from steermoe.evaluation.markdown import markdown, rate
from steermoe.evaluation.measured import HASH_DIGITS
from steermoe.evaluation.pictures import draw_all
from steermoe.evaluation.protocol import Design, EvaluationSettings
from steermoe.evaluation.results import SUMMARY, ResultFolder, StoryRecord
from steermoe.evaluation.summary import MAIN
from steermoe.evaluation.texts import Labelled, domain_list
from steermoe.files import csv_cell
from steermoe.models.loading import LoadedModel
from steermoe.vectors.file import tensors_sha256
from steermoe.vectors.vector import SteeringVector

CSV, TABLES = "conditions.csv", "summary.md"
TITLES = (
    "domain",
    "condition",
    "strength",
    "sound success",
    "unsteered",
    "difference",
    "wrong way",
    "KL p95",
    "words/1000",
)


def evaluate_into(
    folder: Path,
    loaded: LoadedModel,
    vectors: Mapping[str, SteeringVector],
    texts: Labelled,
    settings: EvaluationSettings,
    design: Design,
    *,
    notify: Notify = lambda step: None,
) -> dict[str, Any]:
    """Evaluate vectors; what the folder already contains is not run again.

    Args:
        folder: for the results.
        loaded: the model.
        vectors: by domain.
        texts: labelled texts from which no vector was built, and the word lists.
        settings: what all conditions share.
        design: what to compare.
        notify: called with a short description of each step.

    Returns:
        the summary, as in `evaluation.json`.

    Raises:
        SteerMoEError: the folder was begun with other settings or can't be written; scikit-learn or matplotlib is
            missing. SteeringError: a plan that does not fit.
    """
    classifier = DomainClassifier(texts)
    second = None if design.second_judge is None else SentenceModel(design.second_judge)
    results = ResultFolder(folder, comparable(loaded, vectors, settings))
    started, counted = time.monotonic(), [0, 0]

    def progress(stories: int, tokens: int) -> None:
        counted[0] += stories
        counted[1] += tokens
        rate = counted[1] / (time.monotonic() - started)
        notify(f"{counted[0]:,} stories so far, {rate:,.0f} tokens/s over all")

    keywords = {domain: vector.info.keywords for domain, vector in vectors.items()}
    lists = {domain: domain_list(domain, own, texts.word_lists) for domain, own in keywords.items()}

    def judge(unsteered: list[StoryRecord]) -> Judge:
        return Judge(classifier, lists, keywords, unsteered, len(settings.openings), settings.seeds)

    evaluation = Evaluation(loaded, vectors, texts, settings, results, progress)
    summary = evaluate(evaluation, design, judge, notify)
    if design.more_controls:
        notify("asking other judges")
        summary["agreement"] = _agreement(summary, results, classifier, texts, second)
    summary["words"] = {domain: len(listed) for domain, listed in lists.items()}
    summary["seconds"] = round(time.monotonic() - started, 1)
    results.write_json(SUMMARY, summary)
    results.write_text(CSV, _csv(summary))
    results.write_text(TABLES, markdown(summary))
    draw_all(summary, folder)
    return summary


def _agreement(
    summary: Mapping[str, Any],
    results: ResultFolder,
    classifier: DomainClassifier,
    texts: Labelled,
    second: SentenceModel | None,
) -> dict[str, Any]:
    """Of the classifier with other judges, over the stories of the main group and the unsteered ones."""
    judges = {"words": by_words({domain: domain_list(domain, (), texts.word_lists) for domain in texts.labels})}
    judges |= {} if second is None else {"nearest text": by_nearest(texts, second)}
    named = [row["name"] for row in summary["conditions"] if row["group"] == summary["main_group"]]
    stories = [story for name in ("unsteered", *named) for story in results.stories(name, list)]
    return agreement(classifier, judges, stories)


def comparable(
    loaded: LoadedModel, vectors: Mapping[str, SteeringVector], settings: EvaluationSettings
) -> dict[str, Any]:
    """Everything that must be the same for results to be comparable."""
    return {
        "model": loaded.name,
        "dtype": str(loaded.model.dtype),
        **settings.as_dict(),
        "vectors": {
            domain: tensors_sha256({"experts": vector.experts.contiguous()})[:HASH_DIGITS]
            for domain, vector in vectors.items()
        },
    }


def table_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Rows for `TITLES`: each condition, and the mean of each group if there are several domains."""
    rows = [_row(row, row["domain"], summary["unsteered"][row["domain"]]) for row in summary["conditions"]]
    if len(summary["unsteered"]) > 1:
        rows += [_row(group, "all", None) for group in summary["groups"]]
    return rows


def _row(row: Mapping[str, Any], domain: str, unsteered: Mapping[str, Any] | None) -> list[str]:
    how = [row["kind"]]
    if row["kind"] not in ("prompted", "unsteered"):
        how += [row["formula"], *([row["cut"]] if row["cut"] != "own" else [])]
        how += ["paper's scale"] if row["scale"] == "paper" else []
        how += [f"{row['budget']:g} nats"] if row["budget"] is not None else []
    strength = f"{row['strength']:g}" if row.get("strength") else ""
    usual = rate(unsteered[MAIN]) if unsteered else ""
    worse = row.get("worse")
    damage, words = row["on_texts"].get("kl_p95"), row["figures"]["words_per_1000"]
    return [
        domain,
        ", ".join(how),
        strength,
        rate(row["figures"][MAIN]),
        usual,
        rate(row["differences"][MAIN], "+.0%"),
        "" if worse is None else f"{worse:.0%}",
        "" if damage is None else f"{damage:.2f}",
        "" if words is None else f"{words['mean']:.0f}",
    ]


def _csv(summary: Mapping[str, Any]) -> str:
    """One line per condition: what it is, each figure with its interval, what was measured on texts."""
    on_texts = sorted({name for row in summary["conditions"] for name in row["on_texts"]})
    what = ("domain", "kind", "formula", "scale", "cut", "budget", "strength", "worse")
    parts = ("mean", "low", "high")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*what, *(f"{name}_{part}" for name in FIGURES for part in parts), *on_texts])
    for row in summary["conditions"]:
        figures = [(row["figures"][name] or {}).get(part, "") for name in FIGURES for part in parts]
        writer.writerow(
            [*(csv_cell(row[name]) for name in what), *figures, *(row["on_texts"].get(n, "") for n in on_texts)]
        )
    return buffer.getvalue()
