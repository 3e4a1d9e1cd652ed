"""What a user writes about steering: options, a JSON line, a server's field or a model's name; and how it is read."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steermoe.errors import SteeringError
from steermoe.routing.shape import RoutingShape
from steermoe.steering.plans import LayerExpert, SteeringPlan, plan_for
from steermoe.vectors.file import SUFFIX
from steermoe.vectors.library import load_vector
from steermoe.vectors.mixing import mix

FIELDS = ("domain", "strength", "formula", "scale", "positions", "schedule", "layers", "force", "ban")


MOST_DOMAINS = 32


def read_spec(spec: Any) -> dict[str, Any]:
    """The fields of a spec, JSON text or an object, as `make_plan` takes them; "domain" as a list.

    Raises:
        SteeringError: not such an object.
    """
    if isinstance(spec, str):
        try:
            spec = json.loads(spec)
        except (ValueError, RecursionError) as error:
            raise SteeringError(f'{_short(spec)} is not JSON ({error}): write such as {{"domain": "sport"}}') from error
    if not isinstance(spec, Mapping):
        raise SteeringError(f'{_short(spec)} is no object: write such as {{"domain": "sport"}}')
    if unknown := sorted(set(map(str, spec)) - set(FIELDS)):
        raise SteeringError(f"a steering has no {', '.join(unknown)}: it has {', '.join(FIELDS)}")
    fields: dict[str, Any] = {"domain": _domains(spec.get("domain"))}
    if spec.get("strength") is not None:
        fields["strength"] = _number("strength", spec["strength"])
    for name in ("formula", "scale", "positions", "schedule"):
        if spec.get(name) is not None:
            fields[name] = _text(name, spec[name])
    if spec.get("layers") is not None:
        fields["layers"] = _layers(spec["layers"])
    for name in ("force", "ban"):
        if spec.get(name) is not None:
            fields[name] = _experts(name, spec[name])
    if not fields["domain"] and not fields.get("force") and not fields.get("ban"):
        raise SteeringError('it names no domain, and no experts to force or ban: write such as {"domain": "sport"}')
    return fields


def _domains(value: Any) -> list[str]:
    if value is None or value == "":
        return []
    if isinstance(value, str):
        parts = [value] if value.endswith(SUFFIX) else value.split("+")
    elif isinstance(value, Mapping):
        parts = [f"{name}={_number(f'weight of {name}', weight):g}" for name, weight in value.items()]
    elif isinstance(value, list):
        parts = [_text("domain", part) for part in value]
    else:
        raise SteeringError(f'domain {_short(value)} is no name: write "sport", or {{"sport": 0.7, "food": 0.3}}')
    if len(parts) > MOST_DOMAINS:
        raise SteeringError(f"{len(parts)} domains are too many to mix: name {MOST_DOMAINS} at most")
    return parts


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SteeringError(f"{name} {_short(value)} must be a finite number, such as 4")
    return float(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise SteeringError(f"{name} {_short(value)} must be text")
    return value


def _layers(value: Any) -> str:
    if isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value):
        return f"{value[0]}-{value[1]}"
    return _text("layers", str(value) if type(value) is int else value)


def _experts(name: str, value: Any) -> list[str]:
    if not isinstance(value, list):
        raise SteeringError(f'{name} {_short(value)} must be a list, such as ["12:5"]')
    pairs = [f"{one[0]}:{one[1]}" if isinstance(one, list) and len(one) == 2 else one for one in value]
    return [_text(name, one) for one in pairs]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def parse_domain(text: str) -> tuple[str, float]:
    """`sport` or `sport=0.7`, a domain or vector file with its weight in a mixture."""
    name, sign, weight = text.rpartition("=")
    if not sign:
        return text, 1.0
    try:
        number = float(weight)
    except ValueError as error:
        raise SteeringError(f"domain '{text}': '{weight}' is no weight; write such as sport=0.7") from error
    if not name or not abs(number) < float("inf"):
        raise SteeringError(f"domain '{text}': write a domain and a finite weight, such as sport=0.7")
    return name, number


def parse_layers(text: str) -> tuple[int, int]:
    """`10-20` or `12`, decoder layers counted from 0, both ends included."""
    if match := re.fullmatch(r"(\d+)(?:-(\d+))?", text):
        return int(match[1]), int(match[2] or match[1])
    raise SteeringError(f"layers '{text}' is no range: write first-last, such as 10-20")


def parse_expert(text: str) -> LayerExpert:
    """`12:5`, expert 5 of decoder layer 12."""
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        return int(match[1]), int(match[2])
    raise SteeringError(f"expert '{text}': write layer:expert, such as 12:5")


def make_plan(
    shape: RoutingShape,
    domains: list[str],
    *,
    strength: float | None = None,
    layers: str | None = None,
    force: list[str] | None = None,
    ban: list[str] | None = None,
    vectors: Path | None = None,
    **fields: Any,
) -> SteeringPlan | None:
    """The plan for a mixture of domains, or None if nothing is asked for.

    Args:
        shape: of the model to steer, which the vectors must fit.
        domains: as `parse_domain` reads them.
        strength: by default what the vectors were calibrated to.
        layers: as `parse_layers` reads them.
        force: experts as `parse_expert` reads them.
        ban: likewise.
        vectors: a folder to search first.
        fields: further fields of `SteeringPlan`; None leaves the default.

    Raises:
        SteerMoEError: anything in it that can't be read, found, or fitted to the model.
    """
    forced, banned = tuple(map(parse_expert, force or ())), tuple(map(parse_expert, ban or ()))
    if not domains and not forced and not banned:
        return None
    parts = [(load_vector(name, shape, folder=vectors), weight) for name, weight in map(parse_domain, domains)]
    given = {name: value for name, value in fields.items() if value is not None}
    return plan_for(
        mix(parts) if parts else None,
        strength,
        layers=None if layers is None else parse_layers(layers),
        force=forced,
        ban=banned,
        **given,
    )


NO_DOMAIN = "none"
"""The name that leaves a story unsteered."""


@dataclass(frozen=True)
class Steering:
    """A steering as it is asked for, not yet looked up.

    Attributes:
        domain: "none", a domain or vector file, or a mixture such as "sport=0.7+food=0.3"; "" where nothing is said.
        strength, formula, scale: None for what the vector was calibrated with.
    """

    domain: str = ""
    strength: float | None = None
    formula: str | None = None
    scale: str | None = None
    positions: str = "generated"
    schedule: str = "constant"
    layers: str | None = None
    force: tuple[str, ...] = ()
    ban: tuple[str, ...] = ()
