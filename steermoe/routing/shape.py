"""What vectors and plans must fit: a model of torch, or the description of a model that another engine runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import nn

from steermoe.routing.routers import find_routers, language_model
from steermoe.vectors.vector import SteeringVector


class RouterShape(Protocol):
    """Where a router is and how many experts it has; as `routers.Router`, which is one."""

    @property
    def layer(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def top_k(self) -> int: ...


class Description(Protocol):
    """A model that is no module of torch here, such as that of a GGUF file."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def routers(self) -> Sequence[RouterShape]:
        """In the order of their layers."""

    def check_fits(self, vector: SteeringVector) -> None:
        """As `SteeringVector.check_fits`."""


Target = nn.Module | Description


def routers_of(target: Target) -> Sequence[RouterShape]:
    """All routers, in the order of their layers.

    Raises:
        UnsupportedModel: there are none, or none that is known.
    """
    return find_routers(language_model(target)) if isinstance(target, nn.Module) else target.routers


def name_of(target: Target) -> str:
    """What messages call it."""
    if not isinstance(target, nn.Module):
        return target.name
    return getattr(getattr(target, "config", None), "name_or_path", "") or type(target).__name__


def check_fits(target: Target, vector: SteeringVector) -> None:
    """As `SteeringVector.check_fits`, reading shape and names off the target."""
    if not isinstance(target, nn.Module):
        target.check_fits(vector)
        return
    routers = routers_of(target)
    layers, widths = [r.layer for r in routers], [r.num_experts for r in routers]
    architecture = getattr(getattr(target, "config", None), "model_type", "")
    vector.check_fits(layers, widths, Path(name_of(target)).name, architecture)
