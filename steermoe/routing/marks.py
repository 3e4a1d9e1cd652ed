"""Catch a router's logits at little cost: while it runs, a mark stands in for the weight of its gate.

A function mode, as in `intercept`, sees every operation of a router. On a CPU that costs as much as the router's own
operations. torch passes a call to a mark only if the mark is among its arguments, so this costs next to nothing. It
serves routers whose logits come from `F.linear(x, self.weight)`, which most are; a first call under a mode shows that.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mark:
    """Stands for a module's weight as an argument and as an object with the weight's attributes.

    Args:
        weight: the weight, or the mark that another interception of the same router, around this one, put there.
        edit: what is done with the logits; it may change them in place.

    Attributes:
        hits: how often a linear map with the weight has been caught.
    """

    def __init__(self, weight: Any, edit: Callable[[Tensor], Tensor]) -> None:
        self._weight, self._edit = weight, edit
        self.hits = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mark = args[1] if func is F.linear and len(args) > 1 else None
        if isinstance(mark, Mark):
            mark.hits += 1
            return mark._edit(func(args[0], mark._weight, *args[2:], **(kwargs or {})))
        args = tuple(arg._weight if isinstance(arg, Mark) else arg for arg in args)
        kwargs = {name: arg._weight if isinstance(arg, Mark) else arg for name, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)

    @property
    def parameter(self) -> Any:
        """The weight itself."""
        return self._weight.parameter if isinstance(self._weight, Mark) else self._weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self._weight, name)


class MarkedGate:
    """Runs a router with a mark in the place of its gate's weight, once it is known that this catches its logits.

    Args:
        owner: the module whose weight computes the logits.
        edit: what is done with the logits, which it leaves as they are.
        edit_in_place: the same, but it may change them; called where nothing around this interception has seen them.
    """

    def __init__(
        self, owner: nn.Module, edit: Callable[[Tensor], Tensor], edit_in_place: Callable[[Tensor], Tensor]
    ) -> None:
        self._owner, self._edit, self._edit_in_place = owner, edit, edit_in_place
        self._is_known = False

    def learn(self, weights: Sequence[Any]) -> None:
        """Take note of a call that ran under a mode.

        Args:
            weights: the second argument of each linear map that made logits; None if `F.linear` did not make them.
        """
        if not torch.compiler.is_compiling():
            own = self._owner._parameters.get("weight")
            found = [weight.parameter if isinstance(weight, Mark) else weight for weight in weights]
            self._is_known = own is not None and bool(found) and all(weight is own for weight in found)

    def can_run(self) -> bool:
        """Whether the next call may be made here: outside of graphs, and without gradients, which edits in place break.

        Nor inside a function mode, perhaps that of another interception, which must come first with its edit.
        torch.compile sees no attribute that changes later: it asks for the first condition alone.
        """
        return (
            not torch.compiler.is_compiling()
            and self._is_known
            and not torch.is_grad_enabled()
            and not torch._C._is_torch_function_mode_enabled()
            and type(self._owner._parameters.get("weight")) is nn.Parameter
        )

    def run(self, router: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, int]:
        """What the router returns, and how often its logits were caught."""
        attributes = vars(self._owner)
        before = attributes.get("weight")
        if before is None:
            mark = Mark(self._owner._parameters["weight"], self._edit_in_place)
        else:
            mark = Mark(before, self._edit)
        attributes["weight"] = mark  # found before the parameter, which stays where it is
        try:
            return router(*args, **kwargs), mark.hits
        finally:
            if before is None:
                attributes.pop("weight", None)
            else:
                attributes["weight"] = before
