"""What a user writes about steering: options, a JSON line, a server field or a model name. Looks nothing up.

`SteeringSpec` has one field per setting, and each field describes itself completely: the command-line options, the JSON
reader and the table in the docs follow from it. Imports no torch, so that the options can be built from it.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from steermoe.errors import SteeringError, escaped, quoted, shown
from steermoe.formulas import Formula, Scale
from steermoe.routing.positions import Positions
from steermoe.steering.limits import MOST_STRENGTH, check_count, check_listed, check_tags, whole

if TYPE_CHECKING:
    from steermoe.steering.plans import LayerExpert, Schedule

NO_DOMAIN = "none"
"""The domain that leaves a text unsteered."""
MOST_DOMAINS = 32
"""How many domains a spec in JSON may mix: a server reads all of their files for one request."""
MOST_DIGITS = 4000
"""Digits of a whole number in JSON; Python itself reads no more than 4,300."""
EXAMPLE = '{"domain": "sport"}'
# ---- the notations of single values ----


def parse_domain(text: str) -> tuple[str, float]:
    """`sport` or `sport=0.7`, a domain or vector file with its weight in a mixture."""
    name, sign, weight = text.rpartition("=")
    if not sign:
        return text, 1.0
    try:
        number = float(weight)
    except ValueError as error:
        raise SteeringError(
            f"domain '{quoted(text)}': '{quoted(weight)}' is not a weight; write a number, such as sport=0.7"
        ) from error
    if not name or not abs(number) < float("inf"):
        raise SteeringError(f"domain '{quoted(text)}': write a domain and a finite weight, such as sport=0.7")
    if number and not 1 / MOST_STRENGTH <= abs(number) <= MOST_STRENGTH:
        raise SteeringError(
            f"domain '{quoted(text)}': the weight {number:g} is out of range: expected {1 / MOST_STRENGTH:g} to "
            f"{MOST_STRENGTH:g}, or the same below 0, such as sport=0.7"
        )
    return name, number


def parse_layers(text: str) -> tuple[int, int]:
    """`10-20` or `12`, decoder layers counted from 0, both ends included."""
    if match := re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", text):
        first = whole(match[1], "layer")
        return first, whole(match[2], "layer") if match[2] else first
    raise SteeringError(f"layers '{quoted(text)}' is not a range: write first-last, such as 10-20")


def parse_expert(text: str) -> "LayerExpert":
    """`12:5`, expert 5 of decoder layer 12."""
    if match := re.fullmatch(r"([0-9]+):([0-9]+)", text):
        return whole(match[1], "layer"), whole(match[2], "expert")
    raise SteeringError(f"expert '{quoted(text)}': write layer:expert, such as 12:5")


def parse_schedule(text: str) -> "Schedule":
    """As `Schedule.parse`."""
    from steermoe.steering.plans import Schedule

    return Schedule.parse(text)


def _layers(text: str | None) -> tuple[int, int] | None:
    return None if text is None else parse_layers(text)


def _experts(texts: tuple[str, ...]) -> tuple["LayerExpert", ...]:
    return tuple(map(parse_expert, texts))


# ---- from JSON: each takes a value of the right type, and raises ValueError if it is still wrong ----


def _domain_of_json(value: str | dict[str, Any] | list[Any]) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        if not all(type(weight) in (int, float) and abs(weight) < float("inf") for weight in value.values()):
            raise ValueError
        value = [f"{name}={weight!r}" for name, weight in value.items()]
    parts = _texts([value] if isinstance(value, str) else value)
    if (mixed := sum(part.count("+") + 1 for part in parts)) > MOST_DOMAINS:
        raise SteeringError(f"{mixed} domains are too many to mix: name at most {MOST_DOMAINS}")
    return () if value == "" else parts


def _layers_of_json(value: str | int | list[Any]) -> str:
    if isinstance(value, list):
        first, last = value
        if type(first) is not int or type(last) is not int:
            raise ValueError
        return f"{first}-{last}"
    return str(value)


def _experts_of_json(value: list[Any]) -> tuple[str, ...]:
    check_listed(value)
    return _texts([f"{one[0]}:{one[1]}" if _is_pair(one) else one for one in value])


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(number) in (int, str) for number in value)


def _texts(values: list[Any]) -> tuple[str, ...]:
    if not all(isinstance(value, str) for value in values):
        raise ValueError
    return tuple(values)


# ---- the spec ----

Kind = tuple[tuple[type, ...], str]
TEXT: Kind = ((str,), "text")
NUMBER: Kind = ((int, float), "a number")


def about(
    help: str,
    *,
    example: Any,
    kind: Kind = TEXT,
    read: Callable[[Any], Any] = lambda value: value,
    plan: Callable[[Any], Any] = lambda value: value,
    unset: str = "",
    flags: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Everything known about a field of `SteeringSpec`, as its metadata.

    Args:
        help: one line, for `--help` and the docs; the docs leave out what follows "Default:".
        example: a value in JSON, for the docs and the tests; not the default.
        kind: the accepted JSON types, and their description for messages; stored as "kinds" and "wanted".
        read: turns a JSON value of such a type into the field's value.
        plan: turns the field's value into that of the `SteeringPlan` field with the same name.
        unset: the default in words, if it is None or empty.
        flags: the option's flags, if they are not just its name.
    """
    kinds, wanted = kind
    return {
        "help": help,
        "example": example,
        "kinds": kinds,
        "wanted": wanted,
        "read": read,
        "plan": plan,
        "unset": unset,
        "flags": flags,
    }


OWN = "the vector's own"
EXPERTS: dict[str, Any] = {
    "example": ["12:5"],
    "kind": ((list,), 'a list such as ["12:5"]'),
    "read": _experts_of_json,
    "plan": _experts,
    "unset": "none",
}


@dataclass(frozen=True)
class SteeringSpec:
    """Steering as the user asked for it, before anything is looked up; texts are as the options take them.

    To add a field, add it here and, under the same name, in `SteeringPlan`, where it takes effect.

    Attributes:
        domain: domains and vector files with their weights, such as ("sport=0.7", "food=0.3") or the same as one text
            "sport=0.7+food=0.3"; empty if none is given, ("none",) to steer nothing.
        strength, formula, scale: None for the values that the vector was calibrated with.
    """

    domain: tuple[str, ...] = field(
        default=(),
        metadata=about(
            "Domain or vector file to steer toward; repeat as name=weight to mix.",
            example={"sport": 0.7, "food": 0.3},
            kind=((str, dict, list), "a name, or an object of names and weights"),
            read=_domain_of_json,
            unset="none",
            flags=("--domain", "-d"),
        ),
    )
    strength: float | None = field(
        default=None,
        metadata=about(
            "Strength c of the formulas; negative steers away. Default: the vector's own.",
            example=5,
            kind=NUMBER,
            unset=OWN,
        ),
    )
    formula: Formula | None = field(
        default=None,
        metadata=about("Formula that changes the logits. Default: the vector's own.", example="additive", unset=OWN),
    )
    scale: Scale | None = field(
        default=None,
        metadata=about(
            "Factor of the max-scaled formulas, |max z| or max z. Default: the vector's own.",
            example="paper",
            unset=OWN,
        ),
    )
    positions: Positions = field(default="generated", metadata=about("Tokens to steer.", example="all"))
    schedule: str = field(
        default="constant",
        metadata=about(
            "Strength over the generated tokens: constant, decay:N, window:A-B, first:N or after:N.",
            example="decay:40",
            plan=parse_schedule,
        ),
    )
    layers: str | None = field(
        default=None,
        metadata=about(
            "Decoder layers to steer, for example 15-29. Default: all.",
            example=[15, 29],
            kind=((str, int, list), "text such as 15-29"),
            read=_layers_of_json,
            plan=_layers,
            unset="all",
        ),
    )
    force: tuple[str, ...] = field(
        default=(),
        metadata=about("Expert that every steered token uses, as layer:expert; repeat for several.", **EXPERTS),
    )
    ban: tuple[str, ...] = field(
        default=(), metadata=about("Expert that no steered token uses, as layer:expert; repeat for several.", **EXPERTS)
    )
    think_tags: tuple[str, str] | None = field(
        default=None,
        metadata=about(
            "Texts before and after what the model thinks. Default: its own.",
            example=["<think>", "</think>"],
            kind=((list,), 'two texts, such as ["<think>", "</think>"]'),
            read=check_tags,
            unset="the model's own",
        ),
    )

    active_experts: int | None = field(
        default=None,
        metadata=about(
            "How many experts each steered token gets. Default: as many as the model gives it.",
            example=4,
            kind=((int,), "a whole number such as 4"),
            read=check_count,
            unset="the model's own",
        ),
    )

    def __post_init__(self) -> None:
        for one in fields(self):  # None leaves the default
            if getattr(self, one.name) is None:
                object.__setattr__(self, one.name, one.default)
        for name in ("domain", "force", "ban"):  # options come as lists
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))

    @property
    def is_unsteered(self) -> bool:
        """Whether it asks for nothing, or for no steering."""
        return self.domain == (NO_DOMAIN,) or not (self.domain or self.force or self.ban or self.active_experts)

    def plan_fields(self) -> dict[str, Any]:
        """The fields of `SteeringPlan` that follow from it: all but the vector.

        Raises:
            SteeringError: a text that can't be read.
        """
        return {one.name: one.metadata["plan"](getattr(self, one.name)) for one in FIELDS if one.name != "domain"}


FIELDS: tuple[Field, ...] = fields(SteeringSpec)
NAMES = tuple(one.name for one in FIELDS)


# ---- JSON ----


def read_json(text: str) -> Any:
    """A value of JSON text, with numbers that Python can write again.

    Raises:
        ValueError, RecursionError: it is not JSON, or has a number that is not finite or has thousands of digits.
    """
    return json.loads(text, parse_int=_whole, parse_float=_finite, parse_constant=_no_constant)


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"{quoted(digits)} is too long a number")
    return int(digits)


def _finite(text: str) -> float:
    number = float(text)
    if abs(number) == float("inf"):
        raise ValueError(f"{quoted(text)} is not a finite number")
    return number


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")


def misfit(name: str, value: Any, kinds: tuple[type, ...], wanted: str) -> str:
    """What is wrong with the type of a JSON value; "" if nothing is."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        return f"field '{name}' is {shown(value)}, expected {wanted}"
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return f"field '{name}' is too large a number"
    return ""


def read_field(name: str, value: Any) -> Any:
    """A field's value, from JSON.

    Raises:
        SteeringError: the field does not accept the value.
    """
    metadata = SteeringSpec.__dataclass_fields__[name].metadata
    if wrong := misfit(name, value, metadata["kinds"], metadata["wanted"]):
        raise SteeringError(wrong)
    try:
        return metadata["read"](value)
    except ValueError as error:
        raise SteeringError(expected(name, value)) from error


def expected(name: str, value: Any) -> str:
    """The message that a field's value is not what was expected."""
    return f"field '{name}' is {shown(value)}, expected {SteeringSpec.__dataclass_fields__[name].metadata['wanted']}"


def read_spec(spec: Any) -> SteeringSpec:
    """A spec from JSON text or an object; null is the same as leaving the field out.

    Raises:
        SteeringError: it is not such an object, or asks for nothing.
    """
    if isinstance(spec, str):
        try:
            spec = read_json(spec)
        except (ValueError, RecursionError) as error:
            reason = escaped(str(error))
            raise SteeringError(
                f"'{quoted(spec)}' is not JSON ({reason}): write an object such as {EXAMPLE}"
            ) from error
    if not isinstance(spec, Mapping):
        raise SteeringError(f"{shown(spec)} is not a JSON object: write one such as {EXAMPLE}")
    if unknown := sorted(set(map(str, spec)) - set(NAMES)):
        raise SteeringError(f"steering has no field {quoted(', '.join(unknown))}: its fields are {', '.join(NAMES)}")
    read = SteeringSpec(**{name: read_field(name, value) for name, value in spec.items() if value is not None})
    if not (read.domain or read.force or read.ban or read.active_experts):
        raise SteeringError(
            f"it names no domain, no experts to force or ban and no active experts: write an object such as {EXAMPLE}"
        )
    return read
