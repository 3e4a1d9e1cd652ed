"""Mix several vectors of one model into one."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from steermoe.errors import CompatibilityError, VectorError
from steermoe.routing.shape import RouterShape, RoutingShape
from steermoe.vectors.file import read_header, read_vector
from steermoe.vectors.vector import SteeringVector, VectorInfo

Parts = Sequence[tuple[SteeringVector, float]]
"""Vectors with their weights."""


def mix(parts: Parts, domain: str | None = None) -> SteeringVector:
    """Steer toward several domains at once: the weighted sum of their expert vectors.

    If all parts have a strength, the mixture's is their weighted mean divided by the largest weight, so that the
    strongest part steers as it would alone. A single part of weight 0.5 is steered half as strongly.

    Args:
        parts: vectors of one model with their weights; weights are used as they are, not normalised.
        domain: name of the mixture; by default the parts' names, like "sport+food".

    Raises:
        VectorError: no parts, or weights that are all 0 or not finite.
        CompatibilityError: parts built for different models.
    """
    if not parts:
        raise VectorError("a mixture needs at least one vector")
    first = parts[0][0]
    name = domain or "+".join(vector.domain for vector, _ in parts)
    if len(parts) == 1 and parts[0][1] == 1:
        return first if name == first.domain else replace(first, domain=name)
    _check_weights(parts)
    _check_one_model(parts)
    with np.errstate(over="ignore", invalid="ignore"):  # the new vector refuses what is infinite
        experts = first.expert_array * parts[0][1]
        for vector, weight in parts[1:]:
            experts = experts + weight * vector.expert_array
    sources = tuple(one for vector, _ in parts for one in vector.sources or (vector,))
    return SteeringVector(name, None, first.layers, weights=experts, info=_info_of(parts), sources=sources)


def _check_weights(parts: Parts) -> None:
    if not 0 < sum(abs(weight) for _, weight in parts) < float("inf"):
        weights = ", ".join(f"{vector.domain}={weight:g}" for vector, weight in parts)
        raise VectorError(f"the weights of the mixture {weights} must be finite and not all 0")


def _check_one_model(parts: Parts) -> None:
    first = parts[0][0]
    shape = _shape_of(first)
    for vector, _ in parts[1:]:
        if vector.num_experts != first.num_experts:
            raise CompatibilityError(
                f"vector '{vector.domain}' has {vector.num_experts} experts per layer, '{first.domain}' has "
                f"{first.num_experts}: only vectors of one model can be mixed"
            )
        vector.check_fits(shape)


def _info_of(parts: Parts) -> VectorInfo:
    """What is known about the mixture: what all parts share, and what follows from each."""
    first, licences = parts[0][0].info, {vector.info.licence for vector, _ in parts}
    return VectorInfo(
        title=" + ".join(f"{weight:g} {vector.domain}" for vector, weight in parts),
        keywords=tuple(word for vector, weight in parts if weight > 0 for word in vector.info.keywords),
        model="+".join(dict.fromkeys(vector.info.model for vector, _ in parts if vector.info.model)),
        architecture=first.architecture,
        fingerprint=first.fingerprint if len({vector.info.fingerprint for vector, _ in parts}) == 1 else "",
        top_k=first.top_k,
        formula=first.formula,
        scale=first.scale,
        strength=_strength_of(parts),
        texts=_sum_known([vector.info.texts for vector, _ in parts]),
        tokens=_sum_known([vector.info.tokens for vector, _ in parts]),
        licence=first.licence if len(licences) == 1 else "",
        parts=tuple(f"{vector.domain}={weight:g}" for vector, weight in parts),
    )


def _strength_of(parts: Parts) -> float | None:
    """None if any part has none."""
    known = [vector.info.strength for vector, _ in parts if vector.info.strength is not None]
    if len(known) < len(parts):
        return None
    weights = [abs(weight) for _, weight in parts]
    largest = max(weights) if len(parts) > 1 else 1.0
    return sum(weight * strength for weight, strength in zip(weights, known, strict=True)) / sum(weights) / largest


def mix_files(parts: Sequence[tuple[Path, float]], domain: str) -> SteeringVector:
    """As `mix`, of vector files with their weights; the mixture keeps their hashes.

    Raises:
        VectorError: a file can't be read. Otherwise as `mix`.
    """
    read = [(read_vector(path), weight) for path, weight in parts]
    vector = mix(read, domain)
    provenance = tuple(
        f"{part.domain}={weight:g} sha256:{read_header(path).tensors_sha256[:12]}"
        for (path, _), (part, weight) in zip(parts, read, strict=True)
    )
    return replace(vector, info=replace(vector.info, parts=provenance, created_by="steermoe vectors mix"))


def _shape_of(vector: SteeringVector) -> RoutingShape:
    """The shape of the model that a vector was built for, as far as the vector knows it."""
    experts, top_k = vector.num_experts, vector.info.top_k or 1
    return RoutingShape(
        f"the model of '{vector.domain}'",
        (vector.info.architecture,) if vector.info.architecture else (),
        tuple(RouterShape(layer, experts, experts, top_k) for layer in vector.layers),
    )


def _sum_known(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
