"""Bootstrap intervals. Openings are resampled, not texts: the continuations of one opening are not independent.

Shapes: O openings.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval, over `openings` openings."""

    mean: float
    low: float
    high: float
    openings: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def bootstrap(values: NDArray[np.float64], seed: int = 0) -> Interval | None:
    """The mean of one value per opening [O] with a percentile interval; NaN is left out; None if nothing is left.

    For a paired comparison pass the differences, with the same openings and seeds on both sides.
    """
    known = np.asarray(values, dtype=float)
    known = known[~np.isnan(known)]
    if not len(known):
        return None
    draws = np.random.default_rng(seed).integers(len(known), size=(RESAMPLES, len(known)))
    low, high = np.quantile(known[draws].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(known.mean()), float(low), float(high), len(known))


def share_worse(differences: NDArray[np.float64]) -> float | None:
    """Share of openings [O] with a negative difference: those that moved the wrong way. None if there are none."""
    known = np.asarray(differences, dtype=float)
    known = known[~np.isnan(known)]
    return float((known < 0).mean()) if len(known) else None
