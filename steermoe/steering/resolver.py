"""Turns a `SteeringSpec` into a plan for one model: finds its vectors, mixes them, and checks that they fit.

Knows the model's shape, but no engine.
"""

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

from steermoe.errors import CompatibilityError, SteeringError, VectorError, VectorNotFound, escaped, quoted
from steermoe.routing.shape import RoutingShape
from steermoe.steering.plans import DEFAULT_FORMULA, DEFAULT_SCALE, Schedule, SteeringPlan, plan_for
from steermoe.steering.spec import NO_DOMAIN, SteeringSpec, parse_domain
from steermoe.steering.tables import check_plan
from steermoe.steering.tags import ModelTags
from steermoe.vectors.file import SUFFIX, check_domain_name, read_header, read_vector
from steermoe.vectors.hub import is_place
from steermoe.vectors.library import check_folder, find_vector, find_vectors, is_path, read_fitting, whose
from steermoe.vectors.mixing import mix
from steermoe.vectors.vector import SteeringVector

KEPT_VECTORS, KEPT_PLANS = 64, 1024
MOST_NAME = 4096
"""Characters of a domain or a path."""
MOST_SUM = 1e30
"""Above any expert vector of a mixture; 3e38 would be the end of float32."""

log = logging.getLogger(__name__)


def check_spec(
    spec: SteeringSpec, vectors: Path | None = None, can_be_made: Callable[[str], bool] = lambda domain: False
) -> None:
    """Raise what is wrong with a spec for any model, before a model is loaded for it.

    Args:
        spec: what to check; of its vectors only the header of a file that is named by its path is read.
        vectors: a folder of vectors to search first.
        can_be_made: whether a domain needs no vector yet.

    Raises:
        SteerMoEError: a field that can't be read, a number out of range, a domain that has no vector, or a file that is
            none.
    """
    _check_fields(spec)
    if spec.domain != (NO_DOMAIN,):
        for name, _ in map(parse_domain, _parts(spec.domain)):
            if can_be_made(name):
                check_folder(vectors)
                continue
            (path, *_) = find_vector(name, folder=vectors)
            if is_path(name):
                read_header(path)


def names_of(spec: SteeringSpec) -> list[str]:
    """The domains and vector files that a spec names, without their weights.

    Raises:
        SteerMoEError: a domain that can't be read.
    """
    return [] if spec.domain == (NO_DOMAIN,) else [name for name, _ in map(parse_domain, _parts(spec.domain))]


def _check_fields(spec: SteeringSpec) -> None:
    """Raise SteeringError for fields that are wrong in any plan, also if the spec asks for no steering."""
    fields = spec.plan_fields()
    if not fields["force"] and not fields["ban"]:
        fields["ban"] = ((0, 0),)  # a plan without a vector needs something to do
    plan_for(None, **fields)


def _parts(domain: tuple[str, ...], *, names_only: bool = False) -> list[str]:
    """Each domain or vector file separately, with its weight; a path may contain the + of a mixture."""
    parts: list[str] = []
    for text in domain:
        path = text if text.endswith(SUFFIX) else text.rpartition("=")[0]
        parts += [text] if not names_only and path.endswith(SUFFIX) and _is_file(path) else text.split("+")
    return parts


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # such as a name that is too long
        return False


class PlanResolver:
    """Turns specs into plans for one model; equal specs share one plan, and equal mixtures one vector.

    Args:
        shape: what vectors must fit.
        vectors: a folder of vectors to search first.
        watch: for each spec, search again and reread files that changed, as a server must. Otherwise what was read
            once stays, as in a batch, whose stories are keyed by it.
        any_model: also take vectors that were built for another model of the same shape.
        names_only: refuse file paths, and name no folders in messages, as for remote clients.
        given: files of some domains, which are taken instead of searching for these.

    Attributes:
        tags: the model's, where whoever packs plans needs them; at first none.
    """

    def __init__(
        self,
        shape: RoutingShape,
        vectors: Path | None = None,
        *,
        watch: bool = False,
        names_only: bool = False,
        any_model: bool = False,
        given: Mapping[str, Path] | None = None,
    ) -> None:
        self.shape = shape
        self.tags = ModelTags()
        self._given = dict(given or {})
        self._folder, self._any_model = vectors, any_model
        self._watch, self._names_only = watch, names_only
        self._plan = lru_cache(KEPT_PLANS)(self._make)
        self._vector = lru_cache(KEPT_VECTORS)(self._find_vector)
        self._check = lru_cache(KEPT_PLANS)(partial(check_plan, shape))
        self._fits = lru_cache(KEPT_PLANS)(self._read_fits)

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
        strength = min(abs(plan.strength), 1.0)
        alike = replace(plan, strength=strength, formula=DEFAULT_FORMULA, scale=DEFAULT_SCALE, schedule=Schedule())
        self._check(replace(alike, positions="generated", think_tags=None))

    def domains(self) -> list[str]:
        """The domains on the search path whose vectors fit the model; a file that can't be read is left out."""
        found = set()
        for file in find_vectors(self._folder):
            if file.domain not in found and self._fits(file.path, _stamp(file.path)):
                found.add(file.domain)
        return sorted(found)

    def _read_fits(self, path: Path, stamp: Hashable) -> bool:
        """Whether a file holds a vector that fits; says once in the log why it can't be read."""
        try:
            is_foreign = whose(read_vector(path), self.shape) == "foreign"
        except CompatibilityError:
            return False
        except VectorError as error:
            log.warning("steermoe leaves out a vector file: %s", escaped(str(error)))
            return False
        return self._any_model or not is_foreign

    def _make(self, spec: SteeringSpec, stamps: Hashable) -> SteeringPlan | None:
        if spec.is_unsteered:
            _check_fields(spec)
            return None
        plan = plan_for(self._vector(spec.domain, stamps) if spec.domain else None, **spec.plan_fields())
        self.check(plan)
        return plan

    def _find_vector(self, domain: tuple[str, ...], stamps: Hashable) -> SteeringVector:
        """A vector or mixture; `stamps` only distinguish states of its files."""
        weights = [parse_domain(part) for part in _parts(domain, names_only=self._names_only)]
        parts = [(self._read(name), weight) for name, weight in weights]
        if not sum(abs(weight) * vector.largest for vector, weight in parts) < MOST_SUM:
            raise SteeringError(
                f"domain '{quoted('+'.join(domain))}': the weights times those in the vectors are too large: lower them"
            )
        return mix(parts)

    def _read(self, name: str) -> SteeringVector:
        paths = self._find(name)
        try:
            return read_fitting(paths, self.shape, path=is_path(name), any_model=self._any_model)[1]
        except VectorError as error:
            if not self._names_only:
                raise
            log.warning("steermoe can't read vector '%s': %s", name, escaped(str(error)))
            raise VectorError(f"the file of vector '{name}' can't be read: the server's log says why") from None

    def _find(self, name: str) -> list[Path]:
        if len(name) > MOST_NAME:
            raise VectorNotFound(f"no vector '{quoted(name)}': a name has at most {MOST_NAME} characters")
        if any(ord(char) < 32 or 127 <= ord(char) < 160 for char in name):
            raise VectorError(f"domain name '{quoted(name)}' is not allowed: it holds control characters")
        if name in self._given:
            return [self._given[name]]
        if not self._names_only:
            return find_vector(name, folder=self._folder)
        if is_place(name):
            raise VectorError(
                f"'{quoted(name)}' is a place on the Hub: requests name domains; pull it on the server with `steermoe "
                "vectors pull`"
            )
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
        for part in _parts(domain, names_only=self._names_only):
            name, _ = parse_domain(part)
            for path in self._find(name):
                stamps.append((str(path), _stamp(path)))
        return tuple(stamps)


def _stamp(path: Path) -> Hashable:
    """A value that changes when a file does; None if there is none, and reading it will raise what is wrong."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None
    return status.st_mtime_ns, status.st_size
