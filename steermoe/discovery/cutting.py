"""Where a cluster's mean routing is cut to become its vector: by a threshold that still steers most of the layers.

Shapes: L MoE layers, N experts per layer.
"""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from steermoe.vectors.vector import SteeringVector

LEAST_RATIO = 1.5
"""An expert sets a cluster apart if its share exceeds both 1/N and the baseline this many times."""
LOWER_THRESHOLDS = (2.5, 2.0, LEAST_RATIO)
"""Tried in this order; at the last one every expert that sets the cluster apart is in the vector."""
THIN, ENOUGH = 0.5, 0.8
"""A cut is lowered if the vector reaches fewer than the first share of the layers that set the cluster apart, until it
reaches the second.
"""


def cut(vector: SteeringVector, share: float, *, adapt: bool) -> tuple[SteeringVector | None, str]:
    """The vector with a threshold at which it steers, None if there is none; and a remark on the cut, or "".

    If nothing exceeds the baseline, the cut is at 1/N. With `adapt` it is lowered if the vector is thin: a few experts
    in a few layers can't steer a model whose routing differs in all of them.

    Args:
        vector: with frequencies and a baseline, cut at the threshold that was asked for, or at the default one.
        share: of all texts, the vector's own. They are part of the baseline, so F is at most 1 / share times as large;
            0 if they are not.
        adapt: lower the threshold of a thin vector.
    """
    found, remark = _at_threshold(vector, share)
    apart = _sets_apart(vector)
    layers = int(apart.any(-1).sum())
    before = 0 if found is None else _reached(found, apart)
    if not adapt or before >= THIN * layers:
        return found, remark
    lowered = next(lower for lower in _lower(vector) if _reached(lower, apart) >= ENOUGH * layers)
    return lowered, (
        f"cut at {threshold_of(lowered)}, since {threshold_of(found or vector)} reaches {before} of {layers} layers "
        f"that set its texts apart; this reaches {_reached(lowered, apart)}"
    )


def thinness(vector: SteeringVector) -> str:
    """A warning if a vector with a baseline reaches too few of the layers that set its texts apart; else ""."""
    if vector.frequency is None or vector.baseline is None:
        return ""
    apart = _sets_apart(vector)
    reached, layers = _reached(vector, apart), int(apart.any(-1).sum())
    if reached >= THIN * layers:
        return ""
    return (
        f"it reaches {reached} of {layers} layers that set its texts apart, and may steer next to nothing: a "
        f"--threshold below {vector.threshold:g} reaches more"
    )


def threshold_of(vector: SteeringVector) -> str:
    """What an expert's share must exceed to be in the vector, such as "3 x the baseline" or "3 / 18"."""
    return f"{vector.threshold:g} x the baseline" if vector.relative else f"{vector.threshold:g} / {vector.num_experts}"


def _at_threshold(vector: SteeringVector, share: float) -> tuple[SteeringVector | None, str]:
    """The vector, cut at 1/N if nothing exceeds the baseline, None if nothing exceeds either; and the reason."""
    if vector.experts.any():
        return vector, ""
    fallback = vector.with_threshold(vector.threshold)
    absolute = threshold_of(fallback)
    if not vector.relative:
        return None, f"no vector: no expert's share exceeds {absolute}; a lower threshold keeps more"
    missed = f"no expert's share exceeds {threshold_of(vector)}"
    if share and 1 / share <= vector.threshold:
        missed += f" (with {share:.0%} of all texts it can't exceed {1 / share:.2g} x)"
    if fallback.experts.any():
        return fallback, f"{missed}; cut at {absolute} instead"
    return None, f"no vector: {missed}, nor {absolute}; a lower threshold keeps more"


def _lower(vector: SteeringVector) -> Iterator[SteeringVector]:
    return (replace(vector, threshold=threshold) for threshold in LOWER_THRESHOLDS)


def _sets_apart(vector: SteeringVector) -> Tensor:
    """Which experts distinguish the vector's texts from the corpus, [L, N]."""
    assert vector.frequency is not None
    assert vector.baseline is not None
    usual = vector.baseline.float().clamp(min=1 / vector.num_experts)
    return vector.frequency.float() > LEAST_RATIO * usual


def _reached(vector: SteeringVector, apart: Tensor) -> int:
    """In how many layers the vector holds an expert that sets its texts apart."""
    return int(((vector.experts > 0) & apart).any(-1).sum())
