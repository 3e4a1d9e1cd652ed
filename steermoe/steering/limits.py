"""What the numbers of a plan may be. Imports no torch."""

from collections.abc import Sequence
from typing import Any

from steermoe.errors import SteeringError, quoted, shown

MOST_EXPERTS = 1 << 14
"""How many experts a plan may force, or ban."""
MOST_STRENGTH = 1e6
"""The largest strength, and the largest weight of a domain.

No router's logits times this leave float32, and far less of it decides every choice of experts.
"""
LARGEST = 2**31 - 1
"""The largest token, layer or expert that a plan may name."""
MOST_TAG = 100
"""How many characters a think tag may have."""


def whole(digits: str, what: str) -> int:
    """The number that digits write.

    Raises:
        SteeringError: it is above `LARGEST`.
    """
    own = digits.lstrip("0") or "0"
    if len(own) > len(str(LARGEST)) or int(own) > LARGEST:
        raise SteeringError(f"{what} {quoted(own)} is too large: expected 0 to {LARGEST}")
    return int(own)


def check_listed(experts: Sequence[Any]) -> None:
    """Raise SteeringError if a list of experts to force or ban is too long."""
    if len(experts) > MOST_EXPERTS:
        raise SteeringError(f"{len(experts)} experts are too many to force or ban: list at most {MOST_EXPERTS}")


def check_count(number: Any) -> int:
    """The number of experts that a token gets.

    Raises:
        SteeringError: it is no whole number from 1 on.
    """
    if type(number) is not int or not 0 < number <= LARGEST:
        raise SteeringError(f"active experts {shown(number)}: expected a whole number from 1 on, such as 4")
    return number


def check_tags(tags: Any) -> tuple[str, str]:
    """The texts of two think tags.

    Raises:
        SteeringError: they are not two different texts, or too long.
    """
    is_pair = isinstance(tags, list | tuple) and len(tags) == 2 and all(isinstance(tag, str) for tag in tags)
    if not is_pair or not all(tag.strip() and len(tag) <= MOST_TAG for tag in tags) or tags[0] == tags[1]:
        raise SteeringError(
            f"think tags {shown(tags)}: expected two different texts of at most {MOST_TAG} characters, such as <think> "
            "and </think>"
        )
    return tags[0], tags[1]
