"""Hang hooks and wrapped methods on one instance, so that other libraries' wrappers survive, and copying does too.

A copy of a module (`copy.deepcopy`, `pickle`, `torch.save`) takes its attributes along, ours too. Ours turn into what
was there before: a copy belongs to itself, and runs its own weights without us.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Around = Callable[[Callable[..., Any]], Callable[..., Any]]


class WrappedMethod:
    """A method of one instance with something around it, until it is undone.

    Args:
        owner: the instance.
        name: the method's name.
        around: gives the function that is called instead of the method.
    """

    def __init__(self, owner: Any, name: str, around: Around) -> None:
        slot = f"_old_{name}" if f"_old_{name}" in vars(owner) else name
        original = getattr(owner, slot)
        functools.update_wrapper(self, original)  # first: it takes over the attributes of a wrapper below
        self._owner, self._name = owner, name
        self._had_own = slot in vars(owner)
        self._original: Callable[..., Any] = original
        self._wrapped = around(original)
        self._removed = False
        setattr(owner, slot, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._original(*args, **kwargs) if self._removed else self._wrapped(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return copy.deepcopy(self._original, memo)  # bound to the copy of its owner

    def __reduce__(self) -> tuple[Any, ...]:
        return _as_it_is, (self._original,)

    def undo(self) -> None:
        """Put back what was there, wherever other libraries have moved this wrapper since."""
        self._removed = True
        is_own, below = self._had_own, self._original
        while isinstance(below, WrappedMethod) and below._removed:  # undone while this one was on top of it
            is_own, below = below._had_own, below._original
        for place in (self._name, f"_old_{self._name}"):
            if vars(self._owner).get(place) is self:
                if place == self._name and not is_own:
                    delattr(self._owner, place)
                else:
                    setattr(self._owner, place, below)


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def wrap_method(owner: Any, name: str, around: Around) -> Callable[[], None]:
    """Replace a method on one instance; returns a function that undoes it.

    Other libraries do the same. Accelerate keeps the forward that it found as `_old_forward`, calls it from its own,
    and restores it when it is removed; so ours goes beneath it, and undoing looks in both places. Under any other
    wrapper ours stays in place and only passes calls through.
    """
    return WrappedMethod(owner, name, around).undo


class Hook:
    """A function that a module calls before or after its forward; nothing in copies of the module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return nothing

    def __reduce__(self) -> tuple[Any, ...]:
        return _as_it_is, (nothing,)


class EagerHook(Hook):
    """A hook that torch.compile leaves alone."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


def nothing(*args: Any, **kwargs: Any) -> None:
    """What is left of a hook in a copy of its module."""


def is_untouched(module: nn.Module) -> bool:
    """Whether calling a module runs the forward of its class and nothing else."""
    own = vars(module).get("forward")
    is_own = getattr(own, "__func__", None) is type(module).forward and getattr(own, "__self__", None) is module
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return (own is None or is_own) and all(hook is nothing for hook in hooks)
