"""Vectors on demand: what a model lacks is built from the packaged texts, calibrated, and kept for the next time.

A folder holds one model's vectors from texts of one language: its name is the model's, then the beginning of the
fingerprint of its routers. All packaged domains are built together, since the baseline needs them all; a domain is
calibrated when it is asked for.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from steermoe.discovery.packaged import CREATED_BY, NAMES, NEUTRAL, Language, is_packaged, packaged_texts
from steermoe.errors import CompatibilityError, UnsupportedModel, VectorError, VectorNotFound
from steermoe.evaluation.calibration import DEFAULT_BUDGET, Damage, Forcing, calibrate_vector
from steermoe.files import atomic_path, lock, why_not_written
from steermoe.models.default.spec import DOMAINS
from steermoe.routing.shape import RoutingShape
from steermoe.vectors.file import SUFFIX, read_header, read_vector, write_vector
from steermoe.vectors.library import find_vector, fitting, read_fitting

if TYPE_CHECKING:
    from steermoe.discovery.embedder import RoutingSource
    from steermoe.steering.plans import SteeringPlan
    from steermoe.vectors.vector import SteeringVector

FIRST_STRENGTH, TOLERANCE = 2.0, 0.08
"""Where a calibration on demand begins, and how precise it is: half the measurements of `steermoe calibrate`."""
CALIBRATION_TEXTS, CALIBRATION_TOKENS = 12, 80
"""Neutral texts, and tokens read of each: a third of what `steermoe calibrate` reads."""
EXPECTED_MEASUREMENTS = 10
WORK_OF_A_TOKEN = 1.6
"""What a token costs in a calibration, if one costs 1 in an embedding: all layers, the head, and the divergence."""
LANGUAGES: tuple[Language, ...] = ("en", "both", "ru")


class Watcher(Protocol):
    """What reports long work; `steermoe.cli.terminal.console` does so on stderr."""

    def note(self, text: str, style: str = "", /) -> None:
        """One line."""

    def counting(self, what: str, things: str, total: int, /) -> AbstractContextManager[Callable[[int, int], None]]:
        """A progress bar; the function is called with the things and the tokens done since its last call."""

    def working(self, what: str, /) -> AbstractContextManager[Callable[[str], None]]:
        """Something that moves, with a text that the function changes."""


class _Silent:
    def note(self, text: str, style: str = "", /) -> None:
        pass

    def counting(self, what: str, things: str, total: int, /) -> AbstractContextManager[Callable[[int, int], None]]:
        return nullcontext(lambda done, tokens: None)

    def working(self, what: str, /) -> AbstractContextManager[Callable[[str], None]]:
        return nullcontext(lambda text: None)


SILENT: Watcher = _Silent()


@dataclass(frozen=True)
class Wish:
    """Which vectors a command needs, and where it looks for them.

    Attributes:
        domains: their names; those that are not packaged, and files, are left to whoever reads them.
        language: of the texts that a missing vector is built from.
        folder: a folder of vectors to search first.
        any_model: a vector of another model of the same shape will do.
        calibrated: what is built must have a strength.
    """

    domains: Sequence[str]
    language: Language = "en"
    folder: Path | None = None
    any_model: bool = False
    calibrated: bool = True


# ---- where they are ----


def kept_folder(shape: RoutingShape, language: Language = "en") -> Path:
    """The folder of a model's vectors that were built on demand.

    Raises:
        VectorError: the user has no home folder.
    """
    from platformdirs import user_data_path

    name = re.sub(r"[^\w.-]", "-", re.split(r"[/\\]", shape.name)[-1])[:80] or "model"
    parts = [name, *filter(None, [shape.fingerprint]), *([] if language == "en" else [language])]
    with suppress(RuntimeError):
        folder = user_data_path("steermoe")
        if folder.parts[0] != "~":
            return folder / "steering_vectors" / "-".join(parts)
    raise VectorError("there is no home folder to keep vectors in: set HOME, or XDG_DATA_HOME to a folder")


def asked_for(shape: RoutingShape, wish: Wish) -> list[str]:
    """The packaged domains of a wish of which the model has no vector but, perhaps, one that was built on demand."""
    return [name for name in dict.fromkeys(wish.domains) if is_packaged(name) and not _has_own(shape, name, wish)]


def _has_own(shape: RoutingShape, domain: str, wish: Wish) -> bool:
    """Whether there is a vector that somebody made, which is taken whatever language its texts have.

    One that was built on demand for other weights of this name is none: a retrained model gets its own. So is one that
    was built on demand for the same weights under another name, such as a GGUF file, and has no strength.
    """
    on_demand: set[Path] = set()
    kept_in: Path | None = None
    with suppress(VectorError):  # no home folder
        on_demand = {kept_folder(shape, language).resolve() for language in LANGUAGES}
        kept_in = kept_folder(shape).parent.resolve()
    try:
        files = [path for path in find_vector(domain, folder=wish.folder) if path.parent.resolve() not in on_demand]
        found = fitting(files, shape, foreign=wish.any_model)[0] if files else None
    except (CompatibilityError, VectorNotFound):
        return False
    if found is None or not found.is_taken:
        return False
    is_kept = found.path.resolve().parent.parent == kept_in
    if is_kept and wish.calibrated and found.header is not None and found.header.info.strength is None:
        return False
    is_made = found.header is None or found.header.info.created_by != CREATED_BY
    return is_made or wish.any_model or found.whose != "changed"


def lacking(shape: RoutingShape, wish: Wish) -> list[str]:
    """The packaged domains of a wish that have to be built or calibrated first."""
    return [domain for domain in asked_for(shape, wish) if not _is_ready(_path(shape, wish, domain), shape, wish)]


def missing(shape: RoutingShape, wish: Wish) -> list[str]:
    """The packaged domains of a wish that have to be built first."""
    return [domain for domain in asked_for(shape, wish) if _read(_path(shape, wish, domain), shape) is None]


def _path(shape: RoutingShape, wish: Wish, domain: str) -> Path:
    return kept_folder(shape, wish.language) / f"{domain}{SUFFIX}"


def _is_ready(path: Path, shape: RoutingShape, wish: Wish) -> bool:
    found = _read(path, shape)
    return found is not None and (not wish.calibrated or found.info.strength is not None)


def _read(path: Path, shape: RoutingShape) -> "SteeringVector | None":
    """A vector that was built on demand; None if there is none, or if its file is damaged: then it is built again."""
    try:
        vector = read_vector(path)
        vector.check_fits(shape)
    except (CompatibilityError, VectorError, VectorNotFound):
        return None
    return vector


def known_file(shape: RoutingShape, wish: Wish) -> dict[str, Path]:
    """The files of what was built on demand, by domain: no vector of another folder or language is to be taken."""
    paths = {domain: _path(shape, wish, domain) for domain in asked_for(shape, wish)}
    return {domain: path for domain, path in paths.items() if path.is_file()}


def check_there(shape: RoutingShape, wish: Wish) -> None:
    """Raise if a vector would have to be built.

    Raises:
        VectorNotFound, CompatibilityError: the error of looking for it, with the fix.
    """
    for domain in missing(shape, wish):
        try:
            read_fitting(find_vector(domain, folder=wish.folder), shape, any_model=wish.any_model)
        except (CompatibilityError, VectorNotFound) as error:
            raise type(error)(f"{error}; without --no-build it is built now") from error


# ---- making them ----


def provide(source: "RoutingSource", wish: Wish, watcher: Watcher = SILENT) -> dict[str, Path]:
    """Make sure that a model has vectors: build and calibrate what it lacks of the packaged domains, and keep it.

    An interruption loses nothing: embeddings and measurements are written as they come, and the next call resumes.
    Two calls at once take turns.

    Args:
        source: the model, with no steering attached.
        wish: which vectors are needed.
        watcher: reports what is done, and how long it will take.

    Returns:
        the files of the domains that were built on demand, now or earlier.

    Raises:
        VectorError: the model treats all domains alike, or the folder can't be written. SteeringError: even the
            smallest strength costs too much, or none does anything.
    """
    shape = source.shape
    if not lacking(shape, wish):
        return known_file(shape, wish)
    folder = kept_folder(shape, wish.language)
    with alone_in(folder, watcher):
        to_build, to_calibrate = missing(shape, wish), lacking(shape, wish) if wish.calibrated else []
        try:
            _announce(source, wish, to_build, to_calibrate, watcher)
            if to_build:
                _build(source, wish, folder, watcher)
            for domain in to_calibrate:
                calibrate_kept(source, folder / f"{domain}{SUFFIX}", wish.language, watcher=watcher)
        except KeyboardInterrupt:
            watcher.note("steermoe: what was computed is kept; the same command resumes")
            raise
    return known_file(shape, wish)


@contextmanager
def alone_in(folder: Path, watcher: Watcher = SILENT) -> Iterator[None]:
    """Create a folder of vectors and let no other process build in it; waits for one that does.

    Raises:
        VectorError: it can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise VectorError(
            f"can't write to '{folder}': {why_not_written(error)}; set XDG_DATA_HOME to a folder that can be written to"
        ) from error
    try:
        if lock(handle) is False:
            watcher.note(f"steermoe: another steermoe builds vectors in '{folder}': waiting for it")
            lock(handle, wait=True)
        yield
    finally:
        os.close(handle)


def _announce(
    source: "RoutingSource", wish: Wish, to_build: list[str], to_calibrate: list[str], watcher: Watcher
) -> None:
    """Two lines: what is missing and how long it takes; where it is kept."""
    if not to_build and not to_calibrate:
        return
    from steermoe.discovery.packaged_vectors import count_texts, pace

    with watcher.working("Estimating ..."):
        measured = pace(source, wish.language)
    number = count_texts(wish.language)
    texts = f"{number} {NAMES[wish.language]} texts"
    building = _duration(number * measured.tokens * measured.seconds)
    tokens = (
        CALIBRATION_TEXTS * min(measured.tokens, CALIBRATION_TOKENS) * (1 + EXPECTED_MEASUREMENTS * len(to_calibrate))
    )
    calibrating = _duration(tokens * measured.seconds * WORK_OF_A_TOKEN)
    name = source.shape.name
    if to_build:
        rest = f", then calibrating {_listed(to_calibrate)} (about {calibrating})" if to_calibrate else ""
        watcher.note(
            f"steermoe: {name} has no vector of {_listed(to_build)}: building those of {len(DOMAINS)} domains from "
            f"{texts} (about {building}){rest}"
        )
    else:
        watcher.note(f"steermoe: {_listed(to_calibrate)} of {name}: measuring how strong it may be ({calibrating})")
    watcher.note(
        f"steermoe: kept in '{kept_folder(source.shape, wish.language)}'; after Ctrl-C the same command resumes"
        + ("; --no-build refuses instead" if to_build else "")
    )


def _listed(domains: Sequence[str]) -> str:
    return ", ".join(f"'{domain}'" for domain in domains)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _build(source: "RoutingSource", wish: Wish, folder: Path, watcher: Watcher) -> None:
    """Write the vectors of all packaged domains; those that are there and in order stay as they are."""
    from steermoe.discovery.packaged_vectors import build_packaged, count_texts

    with watcher.counting("Building", "texts", count_texts(wish.language)) as progress:
        made = build_packaged(
            source, wish.language, progress=progress, on_remark=lambda remark: watcher.note(f"steermoe: {remark}")
        )
    for vector in made:
        path = folder / f"{vector.domain}{SUFFIX}"
        if _read(path, source.shape) is None:
            write_vector(vector, path)


def calibrate_kept(
    source: "RoutingSource",
    path: Path,
    language: Language = "en",
    *,
    budget: float = DEFAULT_BUDGET,
    watcher: Watcher = SILENT,
) -> None:
    """Calibrate a vector file; what was measured before an interruption is not measured again.

    If nothing can be measured on the model, a note says so and the vector stays without a strength.

    Raises:
        SteeringError: as of `calibrate_vector`.
    """
    vector = read_vector(path)
    texts = calibration_texts(language)
    measured = path.with_name(f".{vector.domain}.measured.json")
    identity = hashlib.sha256(
        "\n".join([read_header(path).tensors_sha256, source.shape.fingerprint, *texts]).encode()
    ).hexdigest()
    with watcher.working(f"Calibrating {vector.domain} ...") as show:
        forcing = _Remembering(measured, identity, lambda: forcing_of(source, texts), _shown(vector.domain, show))
        try:
            calibrated, _ = calibrate_vector(forcing, vector, budget, tolerance=TOLERANCE, first=FIRST_STRENGTH)
        except UnsupportedModel as error:
            watcher.note(f"steermoe: '{vector.domain}' is not calibrated, its strength is a guess: {error}")
            return
    write_vector(calibrated, path)
    with suppress(OSError):
        measured.unlink(missing_ok=True)


def _shown(domain: str, show: Callable[[str], None]) -> Callable[[float, float], None]:
    return lambda strength, damage: show(f"Calibrating {domain}: strength {strength:g} costs {damage:.2f} nats ...")


def calibration_texts(language: Language) -> list[str]:
    """Neutral texts to measure damage on: in English those that no vector was built from, as `steermoe calibrate`."""
    from steermoe.evaluation.texts import neutral_texts

    if language == "en":
        return neutral_texts()[:CALIBRATION_TEXTS]
    russian = packaged_texts("ru")[NEUTRAL]
    if language == "ru":
        return russian[:CALIBRATION_TEXTS]
    half = CALIBRATION_TEXTS // 2
    return neutral_texts()[:half] + russian[:half]


def forcing_of(source: "RoutingSource", texts: Sequence[str]) -> Forcing:
    """What measures damage on texts, in the engine that runs the model."""
    from steermoe.models.loading import LoadedModel

    if isinstance(source, LoadedModel):
        from steermoe.evaluation.teacher_forcing import TeacherForcing

        return TeacherForcing(source, texts, max_tokens=CALIBRATION_TOKENS)
    from steermoe.evaluation.forcing_llamacpp import GGUFForcing

    return GGUFForcing(source, texts, max_tokens=CALIBRATION_TOKENS)


@dataclass(frozen=True)
class _Measured:
    kl_p95: float
    jaccard: float


class _Remembering:
    """Measures damage, and writes each measurement to a file at once; the texts are read only if one is missing."""

    def __init__(
        self,
        path: Path,
        identity: str,
        make: Callable[[], Forcing],
        on_measured: Callable[[float, float], None],
    ) -> None:
        self._path, self._identity, self._make, self._on_measured = path, identity, make, on_measured
        self._forcing: Forcing | None = None
        self._known = self._read()

    def compare(self, plan: "SteeringPlan") -> Damage:
        """As `calibration.Forcing.compare`, for plans that differ in strength only."""
        key = f"{plan.strength:g}"
        if key not in self._known:
            if self._forcing is None:
                self._forcing = self._make()
            figures = self._forcing.compare(plan)
            self._known[key] = _Measured(figures.kl_p95, figures.jaccard)
            self._write()
        self._on_measured(plan.strength, self._known[key].kl_p95)
        return self._known[key]

    def _read(self) -> dict[str, _Measured]:
        """What an earlier run measured; nothing if the file is missing, damaged or of another vector."""
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            if kept["of"] == self._identity:
                return {key: _Measured(*map(float, pair)) for key, pair in kept["measured"].items()}
        return {}

    def _write(self) -> None:
        """Keep the measurements; a full disk costs only them."""
        kept: Mapping[str, Any] = {
            "of": self._identity,
            "measured": {key: [one.kl_p95, one.jaccard] for key, one in self._known.items()},
        }
        with suppress(OSError), atomic_path(self._path) as partial:
            partial.write_text(json.dumps(kept), encoding="utf-8")
