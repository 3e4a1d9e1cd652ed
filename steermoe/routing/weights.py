"""The weights of a model by name, wherever they are: in it, or offloaded to memory or disk by accelerate."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The name and the numbers of each parameter, also of those that are offloaded to memory or disk.

    The order is that of `named_parameters`. What has no numbers anywhere is left on the meta device.
    """
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            yield f"{prefix}.{name}" if prefix else name, numbers_of(module, name, parameter)


def numbers_of(module: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """The numbers of a module's parameter; the parameter itself, on the meta device, if they are nowhere."""
    values = parameter.detach()
    if parameter.device.type == "meta":
        maps = (getattr(hook, "weights_map", None) for hook in hooks_of(module))
        values = next((weights[name] for weights in maps if weights is not None), values)
    return values


def hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """The hooks by which accelerate moves a module's weights."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))
