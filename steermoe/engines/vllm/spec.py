"""What a user of vLLM writes about steering, JSON or the name of a model, and the packed plan that comes of it.

Imports no vLLM.
"""

import json
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steermoe.engines.vllm.wire import pack, unpack
from steermoe.errors import CompatibilityError, SteeringError, UnsupportedModel, VectorError, VectorNotFound
from steermoe.fitting import check_plan
from steermoe.library import SUFFIX, check_domain_name, find_vector, find_vectors, read_vector
from steermoe.plans import SteeringPlan, make_plan, parse_domain
from steermoe.targets import check_fits

FIELDS = ("domain", "strength", "formula", "scale", "positions", "schedule", "layers", "force", "ban")
MOST_DOMAINS = 32
KEPT = 1024


def skeleton_of(model_config: Any) -> nn.Module:
    """A model of vLLM as transformers builds it, without its weights: what vectors and plans are held against.

    Raises:
        UnsupportedModel: transformers can't build it.
    """
    from transformers import AutoModelForCausalLM

    config = model_config.hf_config
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=model_config.trust_remote_code)
    except Exception as error:  # a foreign configuration can make transformers raise anything
        raise UnsupportedModel(
            f"transformers can't build '{model_config.model}' ({' '.join(str(error).split())[:200]}): steermoe reads "
            "its routers from there"
        ) from error


class SpecBook:
    """Reads specs for one model; what was read once is kept until its vector files change.

    Args:
        model: the model that vectors must fit, or what makes it when it is needed.
        vectors: a folder of vectors to search first.
        names_only: refuse paths of files, as a server must.
    """

    def __init__(
        self, model: nn.Module | Callable[[], nn.Module], vectors: Path | None = None, *, names_only: bool = False
    ) -> None:
        self._made = model if isinstance(model, nn.Module) else None
        self._make = model
        self._vectors = vectors
        self._names_only = names_only
        self._kept: OrderedDict[Any, bytes | None] = OrderedDict()

    @property
    def model(self) -> nn.Module:
        if self._made is None:
            self._made = self._make()
        return self._made

    def packed(self, spec: Any) -> bytes | None:
        """The packed plan of a spec; None if it does nothing, as at strength 0.

        Raises:
            SteerMoEError: anything in it that can't be read, found, or fitted to the model.
        """
        fields = read_spec(spec)
        key = (json.dumps(fields, sort_keys=True), self._stamps(fields["domain"]))
        if key not in self._kept:
            plan = self.plan(fields)
            self._keep(key, pack(plan) if plan is not None and plan.does_something else None)
        self._kept.move_to_end(key)
        return self._kept[key]

    def checked(self, data: bytes) -> bytes:
        """A plan that was packed already, if it fits the model.

        Raises:
            SteerMoEError: it does not, or the bytes are no plan.
        """
        if data not in self._kept:
            check_plan(self.model, unpack(data))
            self._keep(data, data)
        return data

    def plan(self, fields: Mapping[str, Any]) -> SteeringPlan | None:
        """The plan of what `read_spec` found."""
        options = {name: value for name, value in fields.items() if name != "domain"}
        plan = make_plan(self.model, list(fields["domain"]), vectors=self._vectors, **options)
        if plan is not None:
            check_plan(self.model, plan)
        return plan

    def domains(self) -> list[str]:
        """The domains on the search path whose vectors fit the model."""
        found = []
        for file in find_vectors(self._vectors):
            try:
                check_fits(self.model, read_vector(file.path))
            except (CompatibilityError, VectorError):
                continue
            found.append(file.domain)
        return sorted(set(found))

    def _keep(self, key: Any, packed: bytes | None) -> None:
        self._kept[key] = packed
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def _find(self, name: str) -> list[Path]:
        if not self._names_only:
            return find_vector(name, folder=self._vectors)
        check_domain_name(name)
        try:
            return find_vector(name, folder=self._vectors)
        except VectorNotFound:  # which tells the folders that were searched: nothing for strangers
            known = ", ".join(self.domains()) or "none"
            raise VectorNotFound(f"no vector '{name}'; there are {known}") from None

    def _stamps(self, domains: list[str]) -> tuple[Any, ...]:
        """What tells whether a domain's files changed since they were read."""
        stamps = []
        for domain in domains:
            name, _ = parse_domain(domain)
            for path in self._find(name):
                try:
                    status = path.stat()
                except OSError:
                    continue  # reading it will say what is wrong
                stamps.append((str(path), status.st_mtime_ns, status.st_size))
        return tuple(stamps)


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


def spec_of_name(name: str, served: list[str]) -> tuple[str, dict[str, Any]] | None:
    """The served model and the spec of a name such as "smollm2-moe:sport=4,food=1"; None if it names no steering.

    A weight is what it is for `--domain`: its share in the mixture, or with one domain a multiple of its own strength.

    Raises:
        SteeringError: a served model with a colon and nothing behind it.
    """
    for base in sorted(served, key=len, reverse=True):
        if name.startswith(f"{base}:") and name not in served:
            domains = [part.strip() for part in name[len(base) + 1 :].split(",")]
            if not all(domains):
                raise SteeringError(f"model '{name}' names no domain behind its colon: write such as {base}:sport")
            return base, {"domain": domains}
    return None


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
