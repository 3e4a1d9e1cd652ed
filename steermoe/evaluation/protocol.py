"""What an evaluation runs: its settings, and the conditions under which stories are generated and texts are read."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from steermoe.engines.request import Sampling
from steermoe.errors import SteeringError, quoted
from steermoe.evaluation.calibration import DEFAULT_BUDGET
from steermoe.formulas import FORMULAS, SCALES, Formula, Scale
from steermoe.steering.limits import MOST_STRENGTH
from steermoe.steering.plans import DEFAULT_FORMULA, DEFAULT_SCALE, SteeringPlan, plan_for
from steermoe.vectors.vector import SteeringVector

Cut = Literal["own", "absolute", "relative"]
"""How a vector is thresholded: as its file says, at threshold/N as in the paper, or at threshold x baseline."""
CUTS: tuple[Cut, ...] = ("own", "absolute", "relative")

Kind = Literal["unsteered", "steered", "shuffled", "prompted", "both", "negative", "random", "popular"]
"""`shuffled`: the same vector with its experts shuffled in each layer. `prompted`: the prompt asks for the domain in
words, nothing is steered. `both`: prompted and steered. (Another domain's vector needs no runs of its own.) `negative`:
steered away, by the same strength below 0. `random`: random weights on random experts, in each layer as many and of the
same norm. `popular`: the vector's weights on the experts that neutral texts use most."""

MOST_STORIES = 1_000_000
"""Of each condition."""
ASKING = "The following story is about {domain}.\n\n{opening}"


@dataclass(frozen=True)
class EvaluationSettings:
    """What all conditions share. Two evaluations are comparable if these are equal.

    Attributes:
        openings: the beginnings to continue.
        seeds: continuations of each opening; every condition uses the same seeds.
        max_new_tokens, temperature, top_p, min_p: of the sampling.
        forced_texts: the number of texts of each domain, and of neutral ones, to read with and without steering.
        batch_size: stories in one batch; a setting because it affects floating-point results.

    Raises:
        GenerationError: a value outside its range. SteeringError: texts too short to be steered.
    """

    openings: tuple[str, ...]
    seeds: int = 3
    max_new_tokens: int = 48
    temperature: float = 0.7
    forced_texts: int = 24
    batch_size: int = 150
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        self.sampling(seed=0)
        if not 1 <= self.seeds * len(self.openings) <= MOST_STORIES:
            raise SteeringError(
                f"{self.seeds} seeds of {len(self.openings)} openings are too many, or none: ask for 1 to "
                f"{MOST_STORIES} stories of each condition"
            )
        if self.max_new_tokens < 2:
            raise SteeringError(
                f"max_new_tokens {self.max_new_tokens} is too few to steer: the model does not read the last token; "
                "generate 2 or more"
            )

    def sampling(self, seed: int) -> Sampling:
        """How the tokens of a story are drawn."""
        return Sampling(
            self.max_new_tokens, temperature=self.temperature, top_p=self.top_p, min_p=self.min_p, seed=seed
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON. What came later is left out at its default, so that folders begun before it can be resumed."""
        values = asdict(self) | {"openings": list(self.openings)}
        return {name: value for name, value in values.items() if (name, value) not in (("top_p", 1), ("min_p", 0))}


@dataclass(frozen=True)
class Condition:
    """One way of generating stories.

    Attributes:
        cut: how the vector is thresholded.
        budget: the damage budget in nats that the strength was found for; None if it was given.
        is_own: the strength is the vector's own, as `generate` uses it.
        draw: the number of a random vector.
    """

    kind: Kind
    domain: str = ""
    formula: Formula = DEFAULT_FORMULA
    scale: Scale = DEFAULT_SCALE
    cut: Cut = "own"
    strength: float = 0.0
    budget: float | None = None
    is_own: bool = False
    draw: int = 0

    @property
    def steers(self) -> bool:
        return self.kind not in ("unsteered", "prompted")

    @property
    def group(self) -> str:
        """What conditions of different domains have in common: everything but the domain and the vector's strength."""
        if not self.steers:
            return self.kind
        level = f"strength-{self.strength:g}" if self.budget is None else f"budget-{self.budget:g}"
        level = "own-strength" if self.is_own else level
        return f"{self.kind}-{self.formula}-{self.scale}-{self.cut}-{level}"

    @property
    def name(self) -> str:
        """The name of its file. It leaves out the budget: the same strength gives the same stories."""
        if self.kind == "unsteered":
            return self.kind
        how = f"-{self.formula}-{self.scale}-{self.cut}-{self.strength:g}" if self.steers else ""
        return f"{self.domain}-{self.kind}{how}" + (f"-draw-{self.draw}" if self.kind == "random" else "")

    def prompt(self, opening: str) -> str:
        return ASKING.format(domain=self.domain, opening=opening) if self.kind in ("prompted", "both") else opening

    def plan(self, vector: SteeringVector | None, usual: Callable[[], Tensor] | None = None) -> SteeringPlan | None:
        """The plan to steer with, or None; `usual` measures how often neutral texts use each expert [L, N]."""
        if not self.steers or vector is None:
            return None
        used = cut_vector(vector, self.cut)
        if self.kind == "shuffled":
            used = shuffled(used)
        elif self.kind == "random":
            used = random_like(used, self.draw)
        elif self.kind == "popular":
            assert usual is not None
            used = popular(used, usual())
        return SteeringPlan(used, self.strength, self.formula, self.scale)

    def as_dict(self) -> dict[str, Any]:
        fields = asdict(self)
        del fields["draw"]  # only of conditions that are not listed
        return {"name": self.name, "group": self.group, **fields}


def cut_vector(vector: SteeringVector, cut: Cut) -> SteeringVector:
    """The vector with another threshold, if it has frequencies.

    Raises:
        VectorError: it has none, or no baseline for a relative threshold.
    """
    return vector if cut == "own" else vector.with_threshold(vector.threshold, relative=cut == "relative")


def shuffled(vector: SteeringVector, seed: int = 0) -> SteeringVector:
    """A control: the same weights on other experts, shuffled within each layer so that, if possible, all of them move.

    It reproduces any effect of moving logits as such, regardless of which experts they belong to.
    """
    generator = torch.Generator().manual_seed(seed)
    experts = vector.experts.clone()
    for row in experts:
        used = row.nonzero().flatten().tolist()
        others = [expert for expert in range(len(row)) if expert not in used]
        places = torch.randperm(len(others), generator=generator).tolist()
        target = [others[place] for place in places[: len(used)]]
        target += used[: len(used) - len(target)]  # more than half are used, so some must swap among themselves
        values = row[used].clone()
        row[used] = 0.0
        row[target] = values
    return _control(vector, experts, "experts shuffled")


def random_like(vector: SteeringVector, seed: int) -> SteeringVector:
    """A control: in each layer as many experts, drawn from all, with random weights of the same Euclidean norm."""
    generator = torch.Generator().manual_seed(seed)
    experts = torch.zeros_like(vector.experts)
    for row, true in zip(experts, vector.experts, strict=True):
        used = torch.randperm(len(row), generator=generator)[: int(true.count_nonzero())]
        drawn = torch.rand(len(used), generator=generator) + 1e-6
        row[used] = drawn * true.norm() / drawn.norm() if len(used) else drawn
    return _control(vector, experts, f"random experts, draw {seed}")


def popular(vector: SteeringVector, usual: Tensor) -> SteeringVector:
    """A control: the same weights, the largest first, on the experts of each layer that are used most [L, N]."""
    experts = torch.zeros_like(vector.experts)
    for row, true, often in zip(experts, vector.experts, usual, strict=True):
        used = true[true != 0].sort(descending=True).values
        row[often[: len(row)].argsort(descending=True)[: len(used)]] = used
    return _control(vector, experts, "popular experts")


def _control(vector: SteeringVector, experts: Tensor, what: str) -> SteeringVector:
    info = replace(vector.info, keywords=(), title=f"{vector.domain}, {what}")
    return SteeringVector(vector.domain, None, vector.layers, weights=experts, info=info)


def own_condition(vector: SteeringVector) -> Condition:
    """How `steermoe generate` steers with this vector by default."""
    plan = plan_for(vector)
    return Condition("steered", vector.domain, plan.formula, plan.scale, strength=plan.strength, is_own=True)


@dataclass(frozen=True)
class Design:
    """Which conditions an evaluation compares: all combinations, for every domain.

    Attributes:
        formulas, scales: None takes each vector's own.
        cuts: thresholds.
        strengths: fixed strengths.
        budgets: also the largest strengths within these budgets, in nats. Without strengths and budgets: each vector's
            own strength, or a budget of 1 nat if formulas or thresholds are compared, since strengths then differ in
            meaning.
        controls: compare the first condition of each domain with shuffled experts and with a prompt in words.
        more_controls: and with steering away, random vectors and popular experts (`controls.more_controls`); and the
            classifier with other judges (`agreement.agreement`).
        second_judge: the folder of a sentence model that judges too, by nearest neighbour.
    """

    formulas: tuple[Formula, ...] | None = None
    scales: tuple[Scale, ...] | None = None
    cuts: tuple[Cut, ...] = ("own",)
    strengths: tuple[float, ...] = ()
    budgets: tuple[float, ...] = ()
    controls: bool = True
    more_controls: bool = False
    second_judge: Path | None = None

    @property
    def compares(self) -> bool:
        return self.formulas is not None or self.scales is not None or self.cuts != ("own",)

    def steered(self, vector: SteeringVector) -> list[Condition]:
        """The steered conditions of a domain, the most important first; those with a budget have no strength yet."""
        own = own_condition(vector)
        budgets = self.budgets or ((DEFAULT_BUDGET,) if self.compares and not self.strengths else ())
        if not budgets and not self.strengths:
            return [own]
        levels = [replace(own, budget=budget, is_own=False) for budget in sorted(budgets, reverse=True)]
        levels += [replace(own, strength=strength, is_own=False) for strength in sorted(self.strengths, reverse=True)]
        scales = _first(own.scale, self.scales)
        found = [
            replace(level, formula=formula, scale=scale, cut=cut)
            for scale in scales
            for level in levels
            for cut in self.cuts
            for formula in _first(own.formula, self.formulas)
            if not (formula == "additive" and scale != scales[0])  # it has no scale
        ]
        return list(dict.fromkeys(found))


def _first(own: Any, given: Sequence[Any] | None) -> list[Any]:
    """The given values, the vector's own first; only its own if none are given."""
    return sorted(given, key=lambda value: value != own) if given else [own]


def controls_for(steered: Condition) -> Iterator[Condition]:
    """The conditions to compare a steered one with."""
    yield replace(steered, kind="shuffled")
    yield Condition("prompted", steered.domain)
    yield replace(steered, kind="both")


def parse_list(text: str, known: Sequence[str], what: str) -> list[Any]:
    """Names joined by commas, or "all".

    Raises:
        SteeringError: a name that is not known.
    """
    names = list(known) if text == "all" else [part.strip() for part in text.split(",") if part.strip()]
    if not names or (wrong := [name for name in names if name not in known]):
        shown = f"'{wrong[0]}'" if names else "empty"
        raise SteeringError(f"{what} {shown} is unknown: use {', '.join(known)}, joined by commas, or all")
    return list(dict.fromkeys(names))


def parse_formulas(text: str) -> list[Formula]:
    return parse_list(text, FORMULAS, "formula")


def parse_scales(text: str) -> list[Scale]:
    return parse_list(text, SCALES, "scale")


def parse_numbers(text: str, what: str) -> list[float]:
    """Numbers joined by commas, each above 0.

    Raises:
        SteeringError: something else.
    """
    try:
        numbers = [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise SteeringError(f"{what} '{quoted(text)}': write numbers joined by commas, such as 1,2,4") from error
    if not numbers or not all(0 < number <= MOST_STRENGTH for number in numbers):
        raise SteeringError(
            f"{what} '{quoted(text)}': expected numbers above 0, at most {MOST_STRENGTH:g}, joined by commas, such as "
            "1,2,4"
        )
    return sorted(set(numbers))
