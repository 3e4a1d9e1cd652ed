"""Steering vectors: what a domain's routing looks like, and the expert vector E that steers toward it. Knows no files.

Shapes: L MoE layers of the model (dense layers don't count), N experts per layer. Imports torch only when tensors are
asked for: a vector that was read from a file steers llama.cpp as numpy's arrays.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, overload

from steermoe.errors import CompatibilityError, VectorError, shown
from steermoe.formulas import FORMULAS, SCALES, Formula, Scale
from steermoe.routing.shape import RoutingShape

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

DEFAULT_THRESHOLD = 3.0
ROW_SUM_TOLERANCE = 1e-3
MAX_LAYERS, MAX_EXPERTS = 2**16, 2**16
"""Far more than any model has; larger numbers in a file are damage, and would cost memory."""
MAX_COUNT = 2**63 - 1


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return value is None or (type(value) is int and 0 < value <= MAX_COUNT)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the range of floats
        return False


def _is_range(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_number, value)) and value[0] <= value[1]


_EXPECTED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    *(
        (name, _is_text, "text")
        for name in (
            "title",
            "model",
            "architecture",
            "fingerprint",
            "corpus_sha256",
            "created_by",
            "licence",
            "source",
        )
    ),
    *(
        (name, lambda value: isinstance(value, tuple) and all(map(_is_text, value)), "a tuple of texts")
        for name in ("keywords", "parts")
    ),
    *((name, _is_count, "a whole number over 0") for name in ("top_k", "texts", "tokens")),
    ("formula", lambda value: value is None or value in FORMULAS, " or ".join(FORMULAS)),
    ("scale", lambda value: value is None or value in SCALES, " or ".join(SCALES)),
    *((name, lambda value: value is None or _is_number(value), "a finite number") for name in ("strength", "damage")),
    ("safe_range", lambda value: value is None or _is_range(value), "two finite numbers, the smaller first"),
)


@dataclass(frozen=True)
class VectorInfo:
    """What is known about a vector besides its numbers. All of it is optional and stored in the file.

    Raises:
        VectorError: a value of the wrong kind, such as a strength that is not a finite number.
    """

    title: str = ""
    keywords: tuple[str, ...] = ()
    model: str = ""
    """Name or id of the model that it was built for."""
    architecture: str = ""
    """That model's `model_type`."""
    fingerprint: str = ""
    """Of that model's routers (`RoutingShape.fingerprint`), which says whose the vector is."""
    top_k: int | None = None
    formula: Formula | None = None
    scale: Scale | None = None
    strength: float | None = None
    """The strength to steer with by default, found by measurement, or of the paper whose rule it follows."""
    safe_range: tuple[float, float] | None = None
    damage: float | None = None
    """95th percentile of KL(steered || unsteered) in nats, measured at the upper end of the safe range."""
    texts: int | None = None
    tokens: int | None = None
    corpus_sha256: str = ""
    created_by: str = ""
    licence: str = ""
    parts: tuple[str, ...] = ()
    """Of a mixture: each part as "name=weight", with the start of its hash if it came from a file."""
    source: str = ""
    """Where it was pulled from, with the commit: hub:USER/REPO/DOMAIN@COMMIT."""

    @classmethod
    def of(cls, shape: RoutingShape) -> "VectorInfo":
        """What a vector for a model says about that model."""
        top_k = {router.top_k for router in shape.routers}
        return cls(
            model=shape.name,
            architecture=shape.architecture,
            fingerprint=shape.fingerprint,
            top_k=top_k.pop() if len(top_k) == 1 else None,
        )

    def __post_init__(self) -> None:
        for name, is_right, expected in _EXPECTED:
            if not is_right(getattr(self, name)):
                raise VectorError(f"a vector's {name} is {shown(getattr(self, name))}, expected {expected}")


class Matrix:
    """A field of a vector that is given as a tensor or as an array of numpy, float32 then, and read as a tensor.

    Args:
        required: whether it has no default; otherwise that is None.
    """

    def __init__(self, *, required: bool = False) -> None:
        self._required = required

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, vector: None, owner: type) -> None: ...
    @overload
    def __get__(self, vector: "SteeringVector", owner: type) -> "Tensor | None": ...
    def __get__(self, vector: "SteeringVector | None", owner: type) -> "Tensor | None":
        if vector is None:  # a dataclass asks for the default so
            if self._required:
                raise AttributeError(self._name)
            return None
        vector.__dict__[self._name] = found = _as_tensor(vector.__dict__[self._name])
        return found

    def __set__(self, vector: "SteeringVector", value: "Tensor | NDArray[np.float32] | None") -> None:
        vector.__dict__[self._name] = value


def _as_tensor(matrix: Any) -> Any:
    """The same numbers in the same memory."""
    if matrix is None or hasattr(matrix, "numpy"):
        return matrix
    import torch

    return torch.from_numpy(matrix)


def _as_float(matrix: Any) -> Any:
    """In float32, as arrays are already."""
    return matrix.float() if hasattr(matrix, "float") else matrix


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """The routing of one domain's texts and the expert vector that follows from it.

    Its matrices are given as tensors or as arrays of numpy, float32 then, and read as tensors.

    Attributes:
        domain: its name.
        frequency: mean routing embedding F [L, N] of the domain's texts, rows summing to 1; None if only E is known.
        layers: the decoder layer that each of the L rows belongs to.
        threshold: E keeps what exceeds `threshold` times the uniform frequency 1/N (the paper: 3).
        baseline: mean F [L, N] of a whole corpus, to distinguish generally popular experts from the domain's own.
        relative: if true, E keeps what exceeds `threshold` times the baseline instead.
        weights: E itself [L, N], if it does not follow from the frequency: a mixture or an imported matrix.
        info: provenance and calibration.
        sources: of a mixture that was made in this process, the vectors that were mixed; no file keeps them.

    Raises:
        VectorError: shapes that don't agree, NaN or infinity, negative frequencies, rows that don't sum to 1.
    """

    domain: str
    frequency: Matrix = Matrix(required=True)
    layers: tuple[int, ...]  # type: ignore[misc]  # the field before has no default, only a descriptor
    threshold: float = DEFAULT_THRESHOLD
    baseline: Matrix = Matrix()
    relative: bool = False
    weights: Matrix = Matrix()
    info: VectorInfo = field(default_factory=VectorInfo)
    sources: tuple["SteeringVector", ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self._given("frequency") is None and self._given("weights") is None:
            raise VectorError(f"vector '{self.domain}' has neither frequencies nor weights: give one of them")
        if self.relative and self._given("baseline") is None:
            raise VectorError(f"vector '{self.domain}' is relative but has no baseline: store the corpus baseline too")
        if not 0 <= self.threshold < float("inf"):
            raise VectorError(f"vector '{self.domain}': threshold {self.threshold} must be a finite number, 0 or more")
        given = {name: self._given(name) for name in ("frequency", "baseline", "weights")}
        for name, matrix in given.items():
            if matrix is not None:
                _check_matrix(self.domain, name, matrix, len(self.layers))
        shapes = {tuple(matrix.shape) for matrix in given.values() if matrix is not None}
        if len(shapes) > 1:
            raise VectorError(f"vector '{self.domain}': its matrices have different shapes {sorted(shapes)}")
        increase = list(self.layers) == sorted(set(self.layers))
        if not self.layers or not increase or self.layers[0] < 0 or self.layers[-1] >= MAX_LAYERS:
            raise VectorError(
                f"vector '{self.domain}': layers {shown(self.layers)} must be one or more, increasing, from 0 on, "
                f"below {MAX_LAYERS}"
            )

    @cached_property
    def experts(self) -> "Tensor":
        """The expert vector E [L, N], float32: the frequencies above the threshold, else 0 (or `weights` as given)."""
        return _as_tensor(self._experts)

    @cached_property
    def expert_array(self) -> "NDArray[np.float32]":
        """The same as an array, for which torch is not imported if the vector was read from a file."""
        found: Any = self._experts
        return found.detach().cpu().numpy() if hasattr(found, "numpy") else found

    @cached_property
    def _experts(self) -> Any:
        """A tensor or an array, as the matrices are."""
        frequency, baseline, weights = map(_as_float, map(self._given, ("frequency", "baseline", "weights")))
        if weights is not None:
            return weights
        import numpy as np

        usual = baseline if self.relative else 1 / self.num_experts
        with np.errstate(all="ignore"):  # a large threshold may be infinite in float32
            return frequency * (frequency > self.threshold * usual)

    def _given(self, name: str) -> Any:
        """A matrix as it was given or last read: a tensor, an array, or None."""
        return self.__dict__[name]

    @property
    def _shape(self) -> tuple[int, int]:
        weights = self._given("weights")
        rows, columns = (self._given("frequency") if weights is None else weights).shape
        return rows, columns

    @property
    def num_layers(self) -> int:
        return self._shape[0]

    @property
    def num_experts(self) -> int:
        return self._shape[1]

    @property
    def largest(self) -> float:
        """The largest number of E, without its sign."""
        return float(abs(self.expert_array).max())

    def chosen(self) -> dict[int, dict[int, float]]:
        """The experts in E: decoder layer -> expert -> weight, without zeros."""
        return {
            layer: {expert: weight for expert, weight in enumerate(row) if weight}
            for layer, row in zip(self.layers, self.experts.tolist(), strict=True)
        }

    def with_threshold(self, threshold: float, relative: bool = False) -> "SteeringVector":
        """The same frequencies with another threshold."""
        if self.frequency is None:
            raise VectorError(f"vector '{self.domain}' has no frequencies to threshold: it is a mixture or an import")
        return replace(self, threshold=threshold, relative=relative, weights=None)

    def check_fits(self, shape: RoutingShape) -> None:
        """As the function `check_fits`."""
        check_fits(self, shape)

    # ---- the Hub ----
    # As ModelHubMixin has them, which fits no frozen dataclass (it sets an attribute of each instance) and costs all
    # commands 0.2 s. They import by name, since vectors know no files.

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "",
        private: bool | None = None,
        token: str | None = None,
        base_model: str = "",
        licence: str = "",
    ) -> str:
        """Put the vector into a pack on the Hub, with a card and a map; what the pack has already stays.

        Args:
            repo_id: USER/REPO, which is created if it is not there.
            commit_message: what the commit says.
            private: whether a new repository is private; None for what the account has by default.
            token: instead of the one that was saved by `hf auth login`.
            base_model: the model's id on the Hub. Default: its name, if that is one.
            licence: of the vector. Default: the one that it names.

        Returns:
            the address of the commit.

        Raises:
            HubError: the Hub refuses it, or gives no answer. VectorError: a vector that can't be shared so.
            SteerMoEError: matplotlib, which draws the map, is missing.
        """
        pushing = import_module("steermoe.vectors.pushing")
        wanted = pushing.Push(commit_message, private, token, base_model, licence)
        return str(pushing.push([self], repo_id, wanted).url)

    @classmethod
    def from_pretrained(
        cls, repo_id: str, domain: str | None = None, *, revision: str | None = None, token: str | None = None
    ) -> "SteeringVector":
        """Load a vector from a pack on the Hub, or from its copy in the cache if the Hub can't be reached.

        Args:
            repo_id: USER/REPO, or the whole place hub:USER/REPO/DOMAIN@REVISION.
            domain: which vector; None if the pack has only one.
            revision: a branch, a tag or a commit. Default: the latest.
            token: instead of the one that was saved by `hf auth login`.

        Returns:
            the vector; its `info.source` says which commit it is of.

        Raises:
            VectorNotFound: the pack has no such vector, or several. VectorError: a file that is wrong.
            HubError: no such repository or revision, or it can't be reached and is not in the cache.
        """
        loaded: SteeringVector = import_module("steermoe.vectors.hub").load(repo_id, domain, revision or "", token)
        return loaded


class Sized(Protocol):
    """What has to fit a model: a vector, or the header of its file."""

    @property
    def domain(self) -> str: ...
    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def info(self) -> VectorInfo: ...


def check_fits(vector: Sized, shape: RoutingShape, *, all_columns: bool = False) -> None:
    """Check that a vector fits a model's routers.

    Args:
        vector: the vector, or its header.
        shape: the model's.
        all_columns: it must have a column for each that a router can choose, those without an expert included.

    Raises:
        CompatibilityError: a different architecture, different layers, or another number of layers or experts.
    """
    model, widths = shape.name, sorted({router.num_experts for router in shape.routers})
    built_for = "another model" if shape.is_named(vector.info.model) else vector.info.model
    fix = f"it was built for {built_for}; build one for {model} with `steermoe vectors build`"
    own = f"{len(vector.layers)}x{vector.num_experts}"
    expected = f"{len(shape.routers)}x{' or '.join(map(str, widths))}"
    if len(vector.layers) != len(shape.routers) or not all(
        vector.num_experts in ((router.num_experts,) if all_columns else router.vector_widths)
        for router in shape.routers
    ):
        raise CompatibilityError(f"vector '{vector.domain}' has {own} experts, {model} has {expected}: {fix}")
    if shape.layers != vector.layers:
        raise CompatibilityError(
            f"vector '{vector.domain}' is for decoder layers {format_layers(vector.layers)}, "
            f"{model} has routers in {format_layers(shape.layers)}: {fix}"
        )
    if not shape.is_a(vector.info.architecture):
        raise CompatibilityError(
            f"vector '{vector.domain}' is for {vector.info.architecture} models, {model} is {shape.architecture}: {fix}"
        )


def _check_matrix(domain: str, name: str, matrix: "Tensor | NDArray[np.float32]", rows: int) -> None:
    if len(matrix.shape) != 2 or matrix.shape[0] != rows or matrix.shape[1] < 2:
        raise VectorError(
            f"vector '{domain}': {name} has shape {list(matrix.shape)}, expected {rows} layers x 2 or more experts"
        )
    given: Any = matrix
    if not bool((abs(given) < math.inf).all()):
        raise VectorError(f"vector '{domain}': {name} contains NaN or infinity; build the vector again")
    if name == "weights":
        return
    if bool((matrix < 0).any()):
        raise VectorError(f"vector '{domain}': {name} contains {matrix.min():.3g}, but frequencies are never negative")
    sums = given.float().sum(-1) if hasattr(given, "float") else given.sum(-1, dtype="float64")
    off = abs(sums - 1)
    if bool((off > ROW_SUM_TOLERANCE).any()):
        worst = int(off.argmax())
        raise VectorError(
            f"vector '{domain}': row {worst} of {name} sums to {sums[worst]:.4g}, "
            "expected 1; divide each row by its sum"
        )


def format_layers(layers: Sequence[int]) -> str:
    """Layers on one line: 3-27, or 0, 2, 4 and so on."""
    if list(layers) == list(range(layers[0], layers[0] + len(layers))):
        return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
    return ", ".join(map(str, layers))
