"""Find vectors on the search path and load the one that fits a model. torch is imported only to read matrices."""

import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from steermoe.errors import CompatibilityError, VectorError, VectorNotFound, shown
from steermoe.vectors import hub
from steermoe.vectors.file import SUFFIX, VectorHeader, check_domain_name, normal_name, read_header, read_vector
from steermoe.vectors.vector import SteeringVector, check_fits

if TYPE_CHECKING:
    from torch import nn

    from steermoe.routing.shape import RoutingShape

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[1]
WORKING = Path("steering_vectors")
"""The folder in the working folder that is searched before the package's own vectors."""


@dataclass(frozen=True)
class VectorFile:
    """A vector file that was found: its path, its domain, and its folder, which is named after a model."""

    path: Path
    domain: str
    group: str


def search_path(folder: Path | str | None = None) -> list[Path]:
    """Folders that are searched for vectors, first to last, whether they exist or not.

    `folder` if given, $STEERMOE_VECTORS, ./steering_vectors, the user's data folder, the package's own vectors.
    """
    from platformdirs import user_data_path

    folders = [Path(folder)] if folder is not None else []
    if os.environ.get("STEERMOE_VECTORS"):
        folders += [Path(part) for part in os.environ["STEERMOE_VECTORS"].split(os.pathsep) if part]
    folders.append(WORKING)
    with contextlib.suppress(RuntimeError):  # without a home folder there is no data folder
        folders.append(user_data_path("steermoe") / "steering_vectors")
    folders.append(packaged_vectors())
    return list(dict.fromkeys(path.resolve() for path in folders))


def packaged_vectors() -> Path:
    """The vectors shipped with the package: inside it when installed, beside it in a checkout."""
    inside = PACKAGE / "steering_vectors"
    return inside if inside.is_dir() else PACKAGE.parent / "steering_vectors"


def check_folder(folder: Path | str | None) -> None:
    """Raise VectorNotFound if a folder of vectors is named, and is none."""
    if folder is not None and not Path(folder).is_dir():
        raise VectorNotFound(
            f"there is no folder of vectors '{folder}': name one, or leave it out; a vector file is named as a domain"
        )


def find_vectors(folder: Path | str | None = None) -> list[VectorFile]:
    """All vector files, in the order of the search path.

    Files whose names are not allowed as a domain, such as hidden ones, are left out.

    Raises:
        VectorNotFound: `folder` is no folder, so that other vectors would be found than those it was to hold.
    """
    check_folder(folder)
    found = []
    for place in search_path(folder):
        for path in sorted(place.glob(f"*{SUFFIX}")) + sorted(place.glob(f"*/*{SUFFIX}")):
            domain = normal_name(path.name.removesuffix(SUFFIX))
            if domain is not None:
                found.append(VectorFile(path, domain, "" if path.parent == place else path.parent.name))
    return found


def find_vector(name: str | Path, *, folder: Path | str | None = None, group: str | None = None) -> list[Path]:
    """The files that a name can mean, first to last: a vector file's path itself, or a domain's files.

    A place on the Hub, hub:USER/REPO/DOMAIN, means the file there, which is downloaded.

    Raises:
        VectorNotFound: no such file. HubError: the Hub does not have it, or gives no answer.
    """
    if is_path(name):
        return [Path(name)]
    if hub.is_place(name):
        return [hub.find(str(name))]
    domain = check_domain_name(str(name))
    files = [file for file in find_vectors(folder) if group in (None, file.group)]
    if found := [file.path for file in files if file.domain == domain]:
        return found
    known = sorted({file.domain for file in files})
    where = f" for {group}" if group else ""
    raise VectorNotFound(
        f"no vector '{domain}'{where}; there are {', '.join(known) or 'none'} (searched: "
        f"{', '.join(str(path) for path in search_path(folder))}); build one with `steermoe vectors build`"
    )


def first_file(name: str | Path, *, folder: Path | str | None = None, group: str | None = None) -> Path:
    """The first file that a name can mean, where no model decides; arguments and errors as of `find_vector`."""
    path, *others = find_vector(name, folder=folder, group=group)
    _report_shadowing(path, others)
    return path


def is_path(name: str | Path) -> bool:
    """Whether a name is the path of a vector file, which is taken whatever model it was built for, if it fits.

    A place on the Hub is none: like a domain, it is taken for the model that it was built for.
    """
    return Path(name).suffix == SUFFIX and not hub.is_place(name)


Whose = Literal["own", "named", "changed", "foreign"]
"""Whose a vector is, seen from a model of its shape: built for these weights; for a model of this name, with a
fingerprint that is unknown on either side; for other weights of this name; for another model."""
RANKS: dict[Whose, int] = {"own": 0, "named": 0, "changed": 1, "foreign": 2}
"""Which vectors are taken first; of one rank, the first on the search path."""


def whose(vector: "VectorHeader | SteeringVector", shape: "RoutingShape") -> Whose:
    """Whose a vector is, seen from a model.

    Models of one shape, such as a base model and its fine-tunes, route differently: each has its own vectors. The
    fingerprints of their routers tell them apart, whatever they are called; where one is unknown, their names do.

    Raises:
        CompatibilityError: it does not fit the model, or was built for another one with fewer experts.
    """
    check_fits(vector, shape)
    prints = vector.info.fingerprint, shape.fingerprint
    are_known = all(prints)
    if are_known and prints[0] == prints[1]:
        return "own"
    is_named = shape.is_named(vector.info.model)
    if is_named and not are_known:
        return "named"
    check_fits(vector, shape, all_columns=True)
    return "changed" if is_named else "foreign"


@dataclass(frozen=True)
class Found:
    """A vector file that fits a model, and whose it is; the header is None in a damaged file, which says so when read.

    Attributes:
        is_taken: whether steering with that model takes it.
    """

    path: Path
    header: VectorHeader | None
    whose: Whose
    is_taken: bool


def fitting(paths: Sequence[Path], shape: "RoutingShape", *, foreign: bool = False) -> list[Found]:
    """Which of several files of a domain fit a model, the first of them being the one that is taken, if any is.

    Arguments and errors as of `read_fitting`, but that all were built for other models is none. Reads headers only.
    """
    found: list[Found] = []
    misfits = []
    for path in paths:
        header = None
        try:
            header = read_header(path)
            found.append(Found(path, header, whose(header, shape), False))
        except CompatibilityError as error:
            misfits.append(error)
        except VectorError:
            found.append(Found(path, None, "named", False))
    if not found:
        raise misfits[0]
    found.sort(key=lambda one: RANKS[one.whose])
    if foreign or found[0].whose != "foreign":
        found[0] = replace(found[0], is_taken=True)
    return found


def fitting_by_domain(files: Sequence[VectorFile], shape: "RoutingShape") -> dict[str, list[Found]]:
    """As `fitting`, of the files of each domain; what can't be read and domains of which none fits are left out."""
    by_domain: dict[str, list[Found]] = {}
    for domain in dict.fromkeys(file.domain for file in files):
        with contextlib.suppress(CompatibilityError):
            found = fitting([file.path for file in files if file.domain == domain], shape)
            by_domain |= {domain: known} if (known := [each for each in found if each.header is not None]) else {}
    return by_domain


def read_fitting(
    paths: Sequence[Path], shape: "RoutingShape", *, path: bool = False, any_model: bool = False
) -> tuple[Path, SteeringVector]:
    """The vector for a model among several files: its own, else one for other weights of its name.

    What is not the model's own is said once in the log.

    Args:
        paths: the files, in the order in which they are searched.
        shape: the model's.
        path: the user named the file itself, so it may be another model's.
        any_model: if there is none, take the first that was built for another model of this shape.

    Raises:
        CompatibilityError: none fits; the error of the first one. Or all that fit were built for other models.
        VectorError: the file is damaged.
    """
    (taken, *_) = fitting(paths, shape, foreign=path or any_model)
    if not taken.is_taken:
        assert taken.header is not None
        raise CompatibilityError(_foreign(taken.header, shape))
    vector = read_vector(taken.path)
    if taken.whose in ("own", "named"):
        _report_shadowing(taken.path, [other for other in paths if other != taken.path], shape)
    elif not path or taken.whose == "changed":
        _report_stranger(vector, taken, shape)
    return taken.path, vector


def _foreign(vector: VectorHeader, shape: "RoutingShape") -> str:
    """The message that a model has no vector of its own; it names no path, since servers send it to clients."""
    return (
        f"vector '{vector.domain}' was built for {vector.info.model or 'another model'}, and {shape.name} has none of "
        "its own: build one with `steermoe vectors build`, or use it all the same with --any-model (in Python "
        "any_model=True), or name the file (`steermoe vectors list` shows it)"
    )


def _report_stranger(vector: SteeringVector, taken: Found, shape: "RoutingShape") -> None:
    """Log once for each model that a vector was built for other weights."""
    if (key := (taken.path, shape.name, shape.fingerprint)) in _strangers:
        return
    _strangers.add(key)
    if taken.whose == "changed":
        logger.warning(
            "vector '%s' was built for a model of the same name whose routers are others (%s, here %s): it may steer "
            "less; build one with `steermoe vectors build`",
            vector.domain,
            vector.info.fingerprint,
            shape.fingerprint,
        )
    else:
        logger.warning(
            "vector '%s' was built for another model, %s: it may steer %s less",
            vector.domain,
            shown(vector.info.model),
            shown(shape.name),
        )


_strangers: set[tuple[Path, str, str]] = set()
"""Vectors of other models that were named, with the models that they are used for."""
_reported: set[Path] = set()
"""Files of the working folder that were named."""


def _report_shadowing(path: Path, others: Sequence[Path], shape: "RoutingShape | None" = None) -> None:
    """Log once that a vector of the working folder is taken instead of one that comes with the package."""
    here, packaged = WORKING.resolve(), packaged_vectors().resolve()
    if path in _reported or here == packaged or not path.is_relative_to(here):
        return
    for other in others:
        if not other.is_relative_to(packaged):
            continue
        try:
            if shape is not None:
                check_fits(read_header(other), shape)
        except (CompatibilityError, VectorError):
            continue
        _reported.add(path)
        logger.warning(
            "using %s of the working folder, not the vector of that name that comes with steermoe",
            repr(str(path)),
        )
        return


def vectors_for(
    shape: "RoutingShape", names: Sequence[str] = (), *, folder: Path | str | None = None, any_model: bool = False
) -> dict[str, SteeringVector]:
    """The vectors named, or all on the search path that are a model's own; by domain. A path may name a foreign one.

    `any_model` as for `load_vector`.

    Raises:
        VectorNotFound: one that is named, or any. VectorError: a domain twice. CompatibilityError: a named one does not
            fit.
    """
    if names:
        named = [load_vector(name, shape, folder=folder, any_model=any_model) for name in names]
        if len({vector.domain for vector in named}) < len(named):
            raise VectorError(f"a domain is named twice ({', '.join(names)}): name each once")
        return {vector.domain: vector for vector in named}
    found: dict[str, SteeringVector] = {}
    files: dict[str, list[Path]] = {}
    for file in find_vectors(folder):
        files.setdefault(file.domain, []).append(file.path)
    for domain, paths in files.items():
        with contextlib.suppress(CompatibilityError):
            found[domain] = read_fitting(paths, shape, any_model=any_model)[1]
    if not found:
        raise VectorNotFound(f"no vector fits {shape.name}: name one with --domain, or a folder with --vectors")
    return found


def places_for(domains: Sequence[str], folder: Path, *, overwrite: bool = False) -> dict[str, Path]:
    """Where in a folder each domain's vector is written.

    Raises:
        VectorError: it can't be written there, which is better known before long work.
    """
    if folder.suffix == SUFFIX:
        raise VectorError(f"--output '{folder}' is a file's name: give a folder, each domain gets a file in it")
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise VectorError(f"can't write to '{folder}': '{there}' is no folder that can be written to; name another")
    paths = {domain: folder / f"{domain}{SUFFIX}" for domain in domains}
    if taken := [path for path in paths.values() if path.exists() and not overwrite]:
        raise VectorError(
            f"'{taken[0]}' is there already: pass --force to overwrite it, or --output for another folder"
        )
    return paths


def load_vector(
    name: str | Path,
    model: "nn.Module | RoutingShape | None" = None,
    *,
    folder: Path | str | None = None,
    group: str | None = None,
    any_model: bool = False,
) -> SteeringVector:
    """Load a domain's vector.

    Args:
        name: a domain, or the path of a vector file.
        model: the model to steer, or its shape; of several files of the domain, the first is taken that fits it and
            was built for it: for its weights, or where those are unknown for its name. A path is taken if it fits.
        folder: searched before all others.
        group: only look in this model's folder, such as "smollm2-moe".
        any_model: if the model has no vector of its own, take that of another model of the same shape.

    Raises:
        VectorNotFound: no such file. CompatibilityError: only files for other models. VectorError: a damaged file.
    """
    if model is None:
        return read_vector(first_file(name, folder=folder, group=group))
    from steermoe.routing.routers import shape_of

    paths = find_vector(name, folder=folder, group=group)
    return read_fitting(paths, shape_of(model), path=is_path(name), any_model=any_model)[1]
