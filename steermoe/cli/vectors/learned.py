"""The part of `steermoe vectors build` that learns vectors: `--rule learned`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steermoe.discovery.embedder import RoutingSource
    from steermoe.discovery.packaged import Language
    from steermoe.evaluation.learning import Learned
    from steermoe.models.loading import LoadedModel
    from steermoe.vectors.vector import SteeringVector


@dataclass(frozen=True)
class Options:
    """Those of `LearningSettings` that a user chooses: the budget in nats, and the number of steps."""

    budget: float
    steps: int


def from_texts(
    source: "RoutingSource",
    domains: Mapping[str, Sequence[str]],
    neutral: Sequence[str],
    options: Options,
    max_tokens: int,
) -> "Iterator[Learned]":
    """A learned vector of each domain; without neutral texts of the user's, damage is measured on the packaged ones."""
    from steermoe.cli.terminal import console
    from steermoe.discovery.packaged import NEUTRAL, packaged_texts
    from steermoe.evaluation.learning import check_learnable, starting_vectors

    loaded = check_learnable(source)
    others = list(neutral) or packaged_texts()[NEUTRAL]
    with console.counting("Embedding", "texts", sum(map(len, domains.values())) + len(others)) as progress:
        starts = starting_vectors(loaded, domains, others, max_tokens=max_tokens, progress=progress)
    yield from _learned(loaded, starts, domains, others, options)


def from_packaged(source: "RoutingSource", language: "Language", options: Options) -> "Iterator[Learned]":
    """A learned vector of each packaged domain."""
    from steermoe.cli.terminal import console
    from steermoe.discovery.packaged import NEUTRAL, packaged_texts
    from steermoe.discovery.packaged_vectors import build_packaged, count_texts
    from steermoe.evaluation.learning import check_learnable

    loaded = check_learnable(source)
    with console.counting("Building", "texts", count_texts(language)) as progress:
        starts = build_packaged(
            loaded, language, progress=progress, on_remark=lambda remark: console.note(f"steermoe: {remark}")
        )
    domains = packaged_texts(language)
    yield from _learned(loaded, starts, domains, domains[NEUTRAL], options)


def _learned(
    loaded: "LoadedModel",
    starts: "Sequence[SteeringVector]",
    domains: Mapping[str, Sequence[str]],
    neutral: Sequence[str],
    options: Options,
) -> "Iterator[Learned]":
    """Learn one vector after the other, and say what it gained."""
    from steermoe.cli.terminal import console
    from steermoe.evaluation.learning import LearningSettings, learn

    settings = replace(LearningSettings(), budget=options.budget, steps=options.steps)
    for start in starts:
        with console.counting(f"Learning {start.domain}", "steps", settings.steps) as progress:
            found = learn(loaded, start, domains[start.domain], neutral, settings, progress=progress)
        what = f"texts that were held back gain {found.gain:+.3f} nats per token, {found.gain_at_start:+.3f} before"
        kept = "" if found.helped else "; learning did not help, so the numbers are those from before"
        console.note(f"steermoe: {start.domain}: {what}{kept}")
        yield found
