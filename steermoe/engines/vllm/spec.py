"""What a user of vLLM writes about steering, JSON or the name of a model, and the packed plan that comes of it.

Imports no vLLM.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from steermoe.engines.vllm.wire import pack, unpack
from steermoe.errors import CompatibilityError, SteeringError, VectorError, VectorNotFound
from steermoe.routing.shape import RoutingShape
from steermoe.steering.banks import check_plan
from steermoe.steering.plans import SteeringPlan
from steermoe.steering.spec import make_plan, parse_domain, read_spec
from steermoe.vectors.file import check_domain_name, read_vector
from steermoe.vectors.library import find_vector, find_vectors

KEPT = 1024


class SpecBook:
    """Reads specs for one model; what was read once is kept until its vector files change.

    Args:
        shape: what vectors must fit, or what finds it out when it is needed.
        vectors: a folder of vectors to search first.
        names_only: refuse paths of files, as a server must.
    """

    def __init__(
        self,
        shape: RoutingShape | Callable[[], RoutingShape],
        vectors: Path | None = None,
        *,
        names_only: bool = False,
    ) -> None:
        self._find_shape = shape
        self._vectors = vectors
        self._names_only = names_only
        self._kept: OrderedDict[Any, bytes | None] = OrderedDict()

    @cached_property
    def shape(self) -> RoutingShape:
        return self._find_shape if isinstance(self._find_shape, RoutingShape) else self._find_shape()

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
            check_plan(self.shape, unpack(data))
            self._keep(data, data)
        return data

    def plan(self, fields: Mapping[str, Any]) -> SteeringPlan | None:
        """The plan of what `read_spec` found."""
        options = {name: value for name, value in fields.items() if name != "domain"}
        plan = make_plan(self.shape, list(fields["domain"]), vectors=self._vectors, **options)
        if plan is not None:
            check_plan(self.shape, plan)
        return plan

    def domains(self) -> list[str]:
        """The domains on the search path whose vectors fit the model."""
        found = []
        for file in find_vectors(self._vectors):
            try:
                read_vector(file.path).check_fits(self.shape)
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
