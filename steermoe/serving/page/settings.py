"""What a visitor of the page has chosen: the same from sliders, from a link and from a preset. Knows no page.

A topic's amount is its weight in the mixture. The strength is a multiple of what the topics' vectors were calibrated
with: 1 is as strong as was measured to be safe, whatever the vectors are.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any
from urllib.parse import parse_qsl, urlencode

from steermoe.engines.request import Sampling
from steermoe.errors import SteeringError, SteerMoEError, shown
from steermoe.formulas import FORMULAS, SCALES
from steermoe.routing.positions import POSITIONS
from steermoe.steering.spec import SteeringSpec

MOST_AMOUNT = 2.0
"""The greatest amount of a topic, and the greatest multiple of the calibrated strength."""
MOST_TOKENS = 1000
MOST_PROMPT = 20_000
"""Characters of a prompt."""
MOST_FIELDS = 100
"""Settings of a link."""
OWN = "automatic"
"""Stands for the vector's own formula."""
DIGITS = 4


@dataclass(frozen=True)
class Settings:
    """Everything that decides the two texts.

    Attributes:
        prompt: the beginning of the text, or a user's message.
        is_chat: the prompt is a message, which the model answers.
        amounts: topic -> its weight, -MOST_AMOUNT to MOST_AMOUNT; a topic that is left out has 0.
        strength: multiple of the calibrated strength, -MOST_AMOUNT to MOST_AMOUNT.
        formula, scale: None for the vector's own.
        positions, schedule, layers: as in `SteeringSpec`; layers "" for all.
        tokens: the most new tokens, 1 to MOST_TOKENS.
        temperature: 0 takes the likeliest token.
        min_p: as in `Sampling`.
        seed: of both texts.

    Raises:
        SteerMoEError: a value outside its range.
    """

    prompt: str
    is_chat: bool = False
    amounts: Mapping[str, float] = field(default_factory=dict)
    strength: float = 1.0
    formula: str | None = None
    scale: str | None = None
    positions: str = "generated"
    schedule: str = "constant"
    layers: str = ""
    tokens: int = 120
    temperature: float = 0.7
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompt.strip() or len(self.prompt) > MOST_PROMPT:
            raise SteeringError(f"the prompt has {len(self.prompt)} characters, expected 1 to {MOST_PROMPT}, not blank")
        for name, value in (("strength", self.strength), *self.amounts.items()):
            if not abs(value) <= MOST_AMOUNT:
                raise SteeringError(f"{name} is {value:g}, expected -{MOST_AMOUNT:g} to {MOST_AMOUNT:g}")
        for name, allowed in (("formula", (None, *FORMULAS)), ("scale", (None, *SCALES)), ("positions", POSITIONS)):
            if getattr(self, name) not in allowed:
                known = ", ".join(filter(None, allowed))
                raise SteeringError(f"{name} is {shown(getattr(self, name))}, expected one of {known}")
        if not 1 <= self.tokens <= MOST_TOKENS:
            raise SteeringError(f"tokens is {self.tokens}, expected 1 to {MOST_TOKENS}")
        self.sampling()

    @property
    def weights(self) -> dict[str, float]:
        """The topics that are used, with their weights."""
        return {name: amount for name, amount in self.amounts.items() if amount}

    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        drawn: dict[str, Any] = {"temperature": self.temperature} if self.temperature else {"do_sample": False}
        return Sampling(max_new_tokens=self.tokens, min_p=self.min_p, seed=self.seed, **drawn)

    def spec(self, own_strength: Callable[[str], float]) -> SteeringSpec:
        """The steering that is asked for.

        Args:
            own_strength: the strength that a topic's vector was calibrated with. That of a mixture is their mean, so
                that a topic's slider does the same whatever the others are at.
        """
        weights = self.weights
        if not weights or not self.strength:
            return SteeringSpec()
        total = sum(map(abs, weights.values()))
        own = sum(abs(weight) * own_strength(name) for name, weight in weights.items()) / total
        return SteeringSpec(
            domain=tuple(f"{name}={_number(weight)}" for name, weight in weights.items()),
            strength=float(_number(self.strength * own)),
            formula=self.formula,  # type: ignore[arg-type]
            scale=self.scale,  # type: ignore[arg-type]
            positions=self.positions,  # type: ignore[arg-type]
            schedule=self.schedule.strip() or "constant",
            layers=self.layers.strip() or None,
        )

    # ---- links ----

    def query(self) -> str:
        """The settings as the query of a link: what differs from the defaults."""
        pairs = [("prompt", self.prompt)]
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name not in ("prompt", "amounts") and value != one.default:
                pairs.append((one.name.removeprefix("is_"), _number(value) if isinstance(value, float) else str(value)))
        pairs += [("topic", f"{name}={_number(amount)}") for name, amount in self.weights.items()]
        return urlencode(pairs)

    def updated(self, query: str) -> "Settings":
        """These settings with what a link's query says.

        Raises:
            SteerMoEError: it names what is no setting, or a value that can't be read.
        """
        changes: dict[str, Any] = {}
        amounts: dict[str, float] = {}
        kinds = {one.name.removeprefix("is_"): one for one in fields(self) if one.name != "amounts"}
        try:
            pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=MOST_FIELDS)
        except ValueError as error:
            raise SteerMoEError(f"it has more than {MOST_FIELDS} settings: shorten it") from error
        for name, text in pairs:
            if name == "topic":
                topic, _, amount = text.rpartition("=")
                amounts[topic] = _read(f"topic {topic}", float, amount)
            elif name in kinds:
                one = kinds[name]
                changes[one.name] = _read(name, type(one.default) if name != "prompt" else str, text)
        return replace(self, **changes, amounts=amounts or self.amounts)


def from_values(values: Iterable[Any], names: Iterable[str], amounts: Iterable[Any]) -> Settings:
    """The settings that the widgets show: values in the order of the fields, without the amounts.

    Raises:
        SteerMoEError: as of `Settings`.
    """
    given = dict(zip((one.name for one in fields(Settings) if one.name != "amounts"), values, strict=True))
    for name in ("formula", "scale"):
        given[name] = None if given[name] == OWN else given[name]
    for name in ("tokens", "seed"):
        given[name] = _read(name, int, str(given[name] if given[name] is not None else ""))
    for name in ("temperature", "min_p"):
        given[name] = float(given[name] or 0)
    given["prompt"], given["strength"] = str(given["prompt"] or ""), float(given["strength"] or 0)
    chosen = {name: float(amount or 0) for name, amount in zip(names, amounts, strict=False)}
    return Settings(**given, amounts=chosen)


def _read(name: str, kind: type, text: str) -> Any:
    try:
        if kind is bool:
            return {"True": True, "False": False}[text]
        if kind is int and text.isdecimal():
            return int(text)
        return int(float(text)) if kind is int else text if kind in (str, type(None)) else kind(text)
    except (ValueError, KeyError, OverflowError) as error:
        raise SteerMoEError(f"{name} is {shown(text)}, expected a value such as the page's own") from error


def _number(value: float) -> str:
    return f"{value:.{DIGITS}g}"
