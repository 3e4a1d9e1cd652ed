"""The model that vectors are for, described without its weights."""

from typing import TYPE_CHECKING

from steermoe.cli.terminal import console

if TYPE_CHECKING:
    from steermoe.models.description import ModelDescription


def describe_steerable(model: str, trust_remote_code: bool) -> "ModelDescription":
    """The description of a model that can be steered.

    Raises:
        ModelError: it can't be found. UnsupportedModel: no vector can fit it.
    """
    from steermoe.errors import UnsupportedModel
    from steermoe.models.description import describe

    with console.working(f"Inspecting {model} ..."):
        description = describe(model, trust_remote_code=trust_remote_code)
    if not description.steerable:
        raise UnsupportedModel(f"'{model}' can't be steered: {description.reason}")
    return description
