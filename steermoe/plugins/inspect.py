"""Registers Inspect's model provider `steermoe/...`; imports it at the first model that asks for it."""

from inspect_ai.model import ModelAPI, modelapi


@modelapi(name="steermoe")
def steermoe() -> type[ModelAPI]:
    """A model of a running server: `inspect eval task.py --model steermoe/smollm2-moe -M domain=sport`."""
    from steermoe.plugins.inspect_provider import ServedModel

    return ServedModel
