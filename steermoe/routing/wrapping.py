"""Wrap a method of one instance so that other libraries' wrappers survive, in whatever order they come and go."""

import functools
import weakref
from collections.abc import Callable
from typing import Any

_REMOVED: "weakref.WeakKeyDictionary[Any, tuple[bool, Any]]" = weakref.WeakKeyDictionary()
"""Wrappers of ours that were undone, each with what it was set upon: whether the instance's own, and the method."""


def wrap_method(
    owner: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Callable[[], None]:
    """Replace a method on one instance; returns the undo.

    Other libraries do the same. Accelerate keeps the forward that it found as `_old_forward`, calls it from its own,
    and puts it back when it leaves; so ours goes beneath it, and is looked for in both places when it is removed. Under
    any other wrapper ours stays in place and only passes calls on.
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
        while below in _REMOVED:  # one of ours that was removed while this one lay over it
            is_own, below = _REMOVED[below]
        for place in (name, f"_old_{name}"):
            if vars(owner).get(place) is method:
                if place == name and not is_own:
                    delattr(owner, place)
                else:
                    setattr(owner, place, below)

    return undo
