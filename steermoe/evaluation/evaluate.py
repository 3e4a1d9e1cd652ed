"""Run an evaluation: generate each condition's stories, read texts with and without steering, store all in a folder."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor

from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.request import Completion, Request
from steermoe.errors import CorpusError
from steermoe.evaluation.calibration import Calibration, calibrate
from steermoe.evaluation.comparison import vector_share
from steermoe.evaluation.controls import complaints_of, more_controls
from steermoe.evaluation.judge import Judge
from steermoe.evaluation.protocol import Condition, Design, EvaluationSettings, controls_for
from steermoe.evaluation.results import ResultFolder, StoryRecord
from steermoe.evaluation.summary import EvaluationSummary
from steermoe.evaluation.teacher_forcing import TeacherForcing, continuation_nats
from steermoe.evaluation.texts import NEUTRAL, Labelled
from steermoe.models.loading import LoadedModel
from steermoe.steering.plans import SteeringPlan
from steermoe.vectors.vector import SteeringVector

COARSE = 0.05
"""Relative precision of strengths that follow a budget."""

StoryProgress = Callable[[int, int], None]
"""Called with the stories and tokens generated since the last call."""


class Evaluation:
    """Runs conditions on a model; what its folder already contains is not run again.

    Args:
        loaded: the model, with no steering attached.
        vectors: by domain.
        texts: labelled texts to read with and without steering.
        settings: what all conditions share.
        folder: where results are stored.
        progress: called as stories are generated.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        vectors: Mapping[str, SteeringVector],
        texts: Labelled,
        settings: EvaluationSettings,
        folder: ResultFolder,
        progress: StoryProgress = lambda stories, tokens: None,
    ) -> None:
        self.vectors = dict(vectors)
        self.settings = settings
        self.folder = folder
        self._loaded = loaded
        self._texts = texts
        self._progress = progress
        self._engine = HFEngine(loaded, compiled=False)
        self._of_domain: tuple[str, TeacherForcing] | None = None

    def stories(self, condition: Condition) -> list[StoryRecord]:
        """The condition's stories: for each seed, the openings in order."""
        return self.folder.stories(condition.name, lambda: self._generate(condition))

    def damage(self, condition: Condition) -> dict[str, float]:
        """`TextFigures` of the condition on neutral texts."""
        name = f"{condition.name}.{NEUTRAL}"
        return self.folder.on_texts(name, lambda: self._read(self._neutral, condition))

    def lift(self, condition: Condition) -> float:
        """Nats per token by which steering makes the domain's own texts more likely than it makes neutral ones."""
        own = self.folder.on_texts(
            f"{condition.name}.domain", lambda: self._read(self._texts_of(condition.domain), condition)
        )
        neutral = self.damage(condition)
        return (own["nats_unsteered"] - own["nats"]) - (neutral["nats_unsteered"] - neutral["nats"])

    def within(self, condition: Condition, budget: float) -> tuple[Condition, Calibration]:
        """The condition at the largest strength whose damage stays within the budget (`calibration.calibrate`)."""
        found = calibrate(lambda strength: self.damage(replace(condition, strength=strength))["kl_p95"], budget, COARSE)
        return replace(condition, strength=found.strength, budget=budget), found

    @property
    def model(self) -> str:
        return self._loaded.name

    def strength_0(self) -> float:
        """The largest difference of any logit between a vector at strength 0 and no steering: 0 if bit-identical."""
        vector = next(iter(self.vectors.values()))
        return self._neutral.largest_difference(SteeringPlan(vector, 0.0))

    @cached_property
    def _neutral(self) -> TeacherForcing:
        return self._teacher_forcing(NEUTRAL)

    def _texts_of(self, domain: str) -> TeacherForcing:
        """Kept for one domain at a time, because its logits take memory."""
        if self._of_domain is None or self._of_domain[0] != domain:
            self._of_domain = None
            self._of_domain = domain, self._teacher_forcing(domain)
        return self._of_domain[1]

    def _teacher_forcing(self, label: str) -> TeacherForcing:
        texts = self._texts.of(label)[: self.settings.forced_texts]
        if not texts:
            raise CorpusError(f"there are no texts labelled '{label}' to measure on: give some with --heldout")
        return TeacherForcing(self._loaded, texts)

    def _read(self, texts: TeacherForcing, condition: Condition) -> dict[str, float]:
        plan = self._plan(condition)
        assert plan is not None
        return texts.compare(plan).as_dict()

    def _plan(self, condition: Condition) -> SteeringPlan | None:
        vector = self.vectors.get(condition.domain)
        return condition.plan(vector, lambda: self._neutral.popularity(0 if vector is None else vector.num_experts))

    def _generate(self, condition: Condition) -> list[StoryRecord]:
        settings = self.settings
        plan = self._plan(condition)
        numbers = [(opening, seed) for seed in range(settings.seeds) for opening in range(len(settings.openings))]
        requests = [
            Request(
                condition.prompt(settings.openings[opening]),
                plan,
                settings.sampling(seed * len(settings.openings) + opening),
            )
            for opening, seed in numbers
        ]
        done: list[Completion] = []
        for first in range(0, len(requests), settings.batch_size):
            part = self._engine.generate(requests[first : first + settings.batch_size], record=True)
            self._progress(len(part), sum(one.new_tokens for one in part))
            done += part
        plain = [  # judged as if the prompt had not asked for the domain
            replace(one, request=Request(settings.openings[opening]))
            for one, (opening, _) in zip(done, numbers, strict=True)
        ]
        nats = continuation_nats(self._loaded, plain)
        return [
            StoryRecord(
                opening,
                seed,
                one.text,
                one.token_ids,
                one.finish_reason,
                nats[number],
                self._shares(one.frequency),
                None if one.frequency is None else evenness(one.frequency),
            )
            for number, (one, (opening, seed)) in enumerate(zip(done, numbers, strict=True))
        ]

    def _shares(self, frequency: Tensor | None) -> dict[str, float]:
        if frequency is None:
            return {}
        return {domain: vector_share(frequency, vector) for domain, vector in self.vectors.items()}


def evenness(frequency: Tensor) -> float:
    """Entropy of a routing embedding F [L, N] over log N, mean over layers: 1 is even use, 0 a single expert."""
    entropy = -(frequency * frequency.clamp(min=1e-12).log()).sum(-1).mean()
    return float(entropy) / math.log(frequency.shape[1])


Notify = Callable[[str], None]
"""Called with a short description of each step."""


def evaluate(
    evaluation: Evaluation,
    design: Design,
    judge: Callable[[list[StoryRecord]], Judge],
    notify: Notify = lambda step: None,
) -> dict[str, Any]:
    """Run all conditions of a design, the most important first, and summarise them.

    Args:
        evaluation: the model, the vectors and the folder.
        design: what to compare.
        judge: makes the judge from the unsteered stories.
        notify: called with a short description of each step.

    Returns:
        what `EvaluationSummary.as_dict` returns, plus `strength_0`, the largest difference that strength 0 makes.
    """
    notify("unsteered stories")
    unsteered = evaluation.stories(Condition("unsteered"))
    domains = list(evaluation.vectors)
    summary = EvaluationSummary(judge(unsteered), unsteered, domains)
    plans = {domain: design.steered(vector) for domain, vector in evaluation.vectors.items()}
    done: list[Condition] = []
    first: dict[str, Condition] = {}
    for number in range(max(map(len, plans.values()))):
        for domain in domains:
            for wanted in plans[domain][number : number + 1]:
                notify(f"{domain}: {wanted.formula}, {wanted.cut} threshold")
                found = wanted if wanted.budget is None else evaluation.within(wanted, wanted.budget)[0]
                first.setdefault(domain, found)
                for condition in (found, *(controls_for(found) if design.controls and number == 0 else ())):
                    notify(f"{domain}: {condition.kind}, {condition.formula} {condition.strength:g}")
                    evaluation.stories(condition)
                    done.append(condition)
    notify("reading texts of each domain")
    for condition in sorted(done, key=lambda one: domains.index(one.domain)):  # a domain's texts are kept in memory
        is_read = condition.kind in ("steered", "shuffled")
        summary.add(
            condition,
            evaluation.stories(condition),
            evaluation.damage(condition) if is_read else None,
            evaluation.lift(condition) if is_read else None,
        )
    result = {
        "model": evaluation.model,
        "settings": evaluation.settings.as_dict(),
        "strength_0": evaluation.strength_0(),
        **summary.as_dict(done[0].group),
    }
    if design.more_controls:
        more = more_controls(evaluation, summary.judge, unsteered, first, notify)
        result |= {"more_controls": more, "complaints": [*result["complaints"], *complaints_of(more)]}
    return result
