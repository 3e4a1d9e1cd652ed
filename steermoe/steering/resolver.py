"""Turns a `SteeringSpec` into a plan for one model: finds its vectors, mixes them, and checks that they fit.

Knows the model's shape, but no engine.
"""

from collections.abc import Hashable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

from steermoe.errors import CompatibilityError, VectorError, VectorNotFound
from steermoe.routing.shape import RoutingShape
from steermoe.steering.banks import check_plan
from steermoe.steering.plans import DEFAULT_FORMULA, DEFAULT_SCALE, Schedule, SteeringPlan, plan_for
from steermoe.steering.spec import NO_DOMAIN, SteeringSpec, parse_domain
from steermoe.vectors.file import SUFFIX, check_domain_name
from steermoe.vectors.library import find_vector, find_vectors, is_path, read_fitting
from steermoe.vectors.mixing import mix
from steermoe.vectors.vector import SteeringVector

KEPT_VECTORS, KEPT_PLANS = 64, 1024


class PlanResolver:
    """Turns specs into plans for one model; equal specs share one plan, and equal mixtures one vector.

    Args:
        shape: what vectors must fit.
        vectors: a folder of vectors to search first.
        watch: for each spec, search again and reread files that changed, as a server must. Otherwise what was read
            once stays, as in a batch, whose stories are keyed by it.
        names_only: refuse file paths, and name no folders in messages, as for remote clients.
    """

    def __init__(
        self, shape: RoutingShape, vectors: Path | None = None, *, watch: bool = False, names_only: bool = False
    ) -> None:
        self.shape = shape
        self._folder = vectors
        self._watch, self._names_only = watch, names_only
        self._plan = lru_cache(KEPT_PLANS)(self._make)
        self._vector = lru_cache(KEPT_VECTORS)(self._find_vector)
        self._check = lru_cache(KEPT_PLANS)(partial(check_plan, shape))

    def plan(self, spec: SteeringSpec) -> SteeringPlan | None:
        """The plan; None if the spec asks for nothing, or for no steering.

        Raises:
            SteerMoEError: something in it can't be read or found, or does not fit the model.
        """
        return self._plan(spec, self._stamps(spec.domain))

    def check(self, plan: SteeringPlan) -> None:
        """Raise if a plan does not fit the model. Plans that differ only in what cannot matter are checked once.

        Raises:
            SteerMoEError: as `check_plan`.
        """
        strength = float(plan.strength != 0)
        alike = replace(plan, strength=strength, formula=DEFAULT_FORMULA, scale=DEFAULT_SCALE, schedule=Schedule())
        self._check(replace(alike, positions="generated"))

    def domains(self) -> list[str]:
        """The domains on the search path of which the model has a vector."""
        found = set()
        for file in find_vectors(self._folder):
            try:
                read_fitting([file.path], self.shape)
            except (CompatibilityError, VectorError):
                continue
            found.add(file.domain)
        return sorted(found)

    def _make(self, spec: SteeringSpec, stamps: Hashable) -> SteeringPlan | None:
        fields = spec.plan_fields()
        if spec.is_unsteered:
            return None
        plan = plan_for(self._vector(spec.domain, stamps) if spec.domain else None, **fields)
        self.check(plan)
        return plan

    def _find_vector(self, domain: tuple[str, ...], stamps: Hashable) -> SteeringVector:
        """A vector or mixture; `stamps` only distinguish states of its files."""
        parts = map(parse_domain, self._parts(domain))
        return mix([(self._read(name), weight) for name, weight in parts])

    def _read(self, name: str) -> SteeringVector:
        return read_fitting(self._find(name), self.shape, foreign=is_path(name))[1]

    def _parts(self, domain: tuple[str, ...]) -> list[str]:
        """Each domain or vector file separately, with its weight; a path may contain the + of a mixture."""
        parts: list[str] = []
        for text in domain:
            path = text if text.endswith(SUFFIX) else text.rpartition("=")[0]
            is_file = not self._names_only and path.endswith(SUFFIX) and Path(path).is_file()
            parts += [text] if is_file else text.split("+")
        return parts

    def _find(self, name: str) -> list[Path]:
        if not self._names_only:
            return find_vector(name, folder=self._folder)
        check_domain_name(name)
        try:
            return find_vector(name, folder=self._folder)
        except VectorNotFound:  # its message names the folders that were searched: not for remote clients
            known = ", ".join(self.domains()) or "none"
            raise VectorNotFound(f"no vector '{name}'; there are {known}") from None

    def _stamps(self, domain: tuple[str, ...]) -> Hashable:
        """A value that changes when a vector's files do; None if files are not watched or none is read."""
        if not self._watch or domain == (NO_DOMAIN,):
            return None
        stamps = []
        for part in self._parts(domain):
            name, _ = parse_domain(part)
            for path in self._find(name):
                try:
                    status = path.stat()
                except OSError:
                    continue  # reading it will raise what is wrong
                stamps.append((str(path), status.st_mtime_ns, status.st_size))
        return tuple(stamps)
