"""Wrap a method of one instance so that other libraries' wrappers survive, in any order of wrapping and undoing."""

import functools
import weakref
from collections.abc import Callable
from typing import Any

_REMOVED: "weakref.WeakKeyDictionary[Any, tuple[bool, Any]]" = weakref.WeakKeyDictionary()
"""Our wrappers that were undone, each with what it wrapped: whether the instance had its own method, and the method."""


def wrap_method(
    owner: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Callable[[], None]:
    """Replace a method on one instance; returns a function that undoes it.

    Other libraries do the same. Accelerate keeps the forward that it found as `_old_forward`, calls it from its own,
    and restores it when it is removed; so ours goes beneath it, and undoing looks in both places. Under any other
    wrapper ours stays in place and only passes calls through.
    """
    slot = f"_old_{name}" if f"_old_{name}" in vars(owner) else name
    had_own = slot in vars(owner)
    original = getattr(owner, slot)
    wrapped = around(original)
    removed = False

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs) if removed else wrapped(*args, **kwargs)

    setattr(owner, slot, method)

    def undo() -> None:
        nonlocal removed
        removed = True
        _REMOVED[method] = had_own, original
        is_own, below = had_own, original
        while below in _REMOVED:  # one of ours, undone while this one was on top of it
            is_own, below = _REMOVED[below]
        for place in (name, f"_old_{name}"):
            if vars(owner).get(place) is method:
                if place == name and not is_own:
                    delattr(owner, place)
                else:
                    setattr(owner, place, below)

    return undo
