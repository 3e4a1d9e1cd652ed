"""Mix several vectors of one model into one."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from steermoe.errors import CompatibilityError, VectorError
from steermoe.routing.shape import RouterShape, RoutingShape
from steermoe.vectors.file import read_header, read_vector
from steermoe.vectors.vector import SteeringVector, VectorInfo


def mix(parts: Sequence[tuple[SteeringVector, float]], domain: str | None = None) -> SteeringVector:
    """Steer toward several domains at once: the weighted sum of their expert vectors.

    Its strength, if all parts have one, is their weighted mean over the largest weight, so that the strongest part
    steers as it would alone. A single part of weight 0.5 is steered half as strongly.

    Args:
        parts: vectors of one model with their weights; weights are used as they are, not normalised.
        domain: name of the mixture; by default such as "sport+food".

    Raises:
        VectorError: no parts, or weights that are all 0 or not finite.
        CompatibilityError: parts built for different models.
    """
    if not parts:
        raise VectorError("a mixture needs at least one vector")
    first = parts[0][0]
    name = domain or "+".join(vector.domain for vector, _ in parts)
    if len(parts) == 1 and parts[0][1] == 1:
        return replace(first, domain=name)
    total = sum(abs(weight) for _, weight in parts)
    if not 0 < total < float("inf"):
        weights = ", ".join(f"{vector.domain}={weight:g}" for vector, weight in parts)
        raise VectorError(f"the weights of the mixture {weights} must be finite and not all 0")
    shape = _shape_of(first)
    for vector, _ in parts[1:]:
        vector.check_fits(shape)
        if vector.num_experts != first.num_experts:
            raise CompatibilityError(
                f"vector '{vector.domain}' has {vector.num_experts} experts a layer, '{first.domain}' has "
                f"{first.num_experts}: only vectors of one model can be mixed"
            )
    strengths = [vector.info.strength for vector, _ in parts]
    known = [strength for strength in strengths if strength is not None]
    largest = max(abs(weight) for _, weight in parts) if len(parts) > 1 else 1.0
    info = VectorInfo(
        title=" + ".join(f"{weight:g} {vector.domain}" for vector, weight in parts),
        keywords=tuple(word for vector, weight in parts if weight > 0 for word in vector.info.keywords),
        model=first.info.model,
        architecture=first.info.architecture,
        top_k=first.info.top_k,
        formula=first.info.formula,
        scale=first.info.scale,
        strength=sum(abs(w) * s for (_, w), s in zip(parts, known, strict=True)) / total / largest
        if None not in strengths
        else None,
        texts=_sum_known([vector.info.texts for vector, _ in parts]),
        tokens=_sum_known([vector.info.tokens for vector, _ in parts]),
        licence=first.info.licence if len({vector.info.licence for vector, _ in parts}) == 1 else "",
        parts=tuple(f"{vector.domain}={weight:g}" for vector, weight in parts),
    )
    experts = first.experts * parts[0][1]
    for vector, weight in parts[1:]:
        experts = experts + weight * vector.experts
    return SteeringVector(name, None, first.layers, weights=experts, info=info)


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
    """As much of the model that a vector is of as the vector itself tells."""
    experts, top_k = vector.num_experts, vector.info.top_k or 1
    return RoutingShape(
        f"the model of '{vector.domain}'",
        (vector.info.architecture,) if vector.info.architecture else (),
        tuple(RouterShape(layer, experts, experts, top_k) for layer in vector.layers),
    )


def _sum_known(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
