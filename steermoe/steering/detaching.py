"""Take off whatever this package has attached to a model, where the handle that could is lost."""

from typing import Any

from torch import nn

from steermoe.routing.routers import language_model
from steermoe.routing.tracker import turn_of
from steermoe.routing.wrapping import Hook, WrappedMethod, nothing
from steermoe.steering.handle import handles_of

HOOKS = ("_forward_pre_hooks", "_forward_hooks")
MARKS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
"""What torch notes about hooks, by their numbers."""


def detach(model: nn.Module) -> bool:
    """Take steering and recording off a model: that of `steer`, `attach` and `record_routing`, however it is wrapped.

    The model is then what it was before, to the bit; hooks and wrappers of other libraries stay. Waits while another
    thread generates.

    Args:
        model: the model, or anything around it, such as PEFT's or torch.compile's.

    Returns:
        whether there was anything.
    """
    inner = language_model(model)
    with turn_of(inner):
        modules = list(dict.fromkeys([*model.modules(), *inner.modules()]))
        handles = handles_of(modules)
        for handle in handles:
            handle.remove()
        # a list: all are taken off, not only those before the first
        found = [_clear(module) for module in modules]
    return bool(handles) or any(found)


def _clear(module: nn.Module) -> bool:
    """Take our hooks and wrapped methods off one module; whether any of them did something."""
    did = False
    for name in HOOKS:
        hooks: Any = getattr(module, name)
        for number, hook in list(hooks.items()):
            if isinstance(hook, Hook) or hook is nothing:
                did |= hook is not nothing  # that is left in a copy of a watched model
                del hooks[number]
                for marks in MARKS:
                    getattr(module, marks).pop(number, None)
    for method in list(vars(module).values()):
        if isinstance(method, WrappedMethod):
            method.undo()
            did = True
    return did
