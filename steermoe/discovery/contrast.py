"""Compare the routing of two sets of texts, and turn the difference into a steering vector or into lists of experts.

SteerMoE (2509.09660) detects experts by their risk difference: the share of tokens that choose an expert in one set
minus that in the other. Mixture of Tunable Experts forces or bans single experts.

Shapes: B texts, L MoE layers, N experts per layer.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from steermoe.errors import VectorError
from steermoe.vectors.vector import SteeringVector, VectorInfo

MIN_DIFFERENCE = 0.1


class Expert(NamedTuple):
    """An expert with its risk difference: +0.31 means 31 more tokens in a hundred."""

    layer: int
    expert: int
    difference: float


def activation_rate(frequency: Tensor, tokens: Tensor, top_k: int) -> Tensor:
    """Share of a set's tokens that choose each expert, [L, N], 0 to 1: a layer sums to k.

    Args:
        frequency: F [B, L, N] of its texts.
        tokens: [B], the weight of each text.
        top_k: experts per token.
    """
    weights = tokens.float() / tokens.sum()
    return top_k * (frequency * weights[:, None, None]).sum(0)


def risk_difference(rate: Tensor, rate_against: Tensor) -> Tensor:
    """How much more often each expert is active, [L, N], -1 to 1 (2509.09660)."""
    return rate - rate_against


def strongest(difference: Tensor, layers: Sequence[int], count: int, *, least: bool = False) -> list[Expert]:
    """The experts with the largest positive differences over all layers, or with `least` the most negative ones.

    The former are for `--force`, the latter for `--ban`. Fewer than `count` if fewer have that sign.
    """
    signed = -difference if least else difference
    values, places = signed.flatten().sort(descending=True, stable=True)
    width = difference.shape[1]
    chosen = [
        (int(place), float(value)) for value, place in zip(values[:count], places[:count], strict=True) if value > 0
    ]
    return [Expert(layers[place // width], place % width, -value if least else value) for place, value in chosen]


def contrastive_vector(
    domain: str,
    difference: Tensor,
    layers: Sequence[int],
    *,
    min_difference: float = MIN_DIFFERENCE,
    info: VectorInfo | None = None,
) -> SteeringVector:
    """A vector whose E is the risk difference where it exceeds `min_difference`, else 0.

    It keeps only experts that are more active than in the other set; to steer away, use a negative strength or bans.

    Raises:
        VectorError: no difference is that large.
    """
    weights = difference.where(difference > min_difference, 0.0)
    if not weights.any():
        raise VectorError(
            f"'{domain}': no expert is active {min_difference:.1%} more often than in the other set, at most "
            f"{float(difference.max()):.1%}: the sets route alike; lower --min-difference or give other texts"
        )
    return SteeringVector(domain, None, tuple(layers), weights=weights, info=info or VectorInfo())
