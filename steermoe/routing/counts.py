"""Change how many experts a router chooses for a token: its own code runs with another number.

Where tokens of one call get different numbers, the router runs once for each number, and every token takes the choice
of its own run. Places beyond a token's number repeat its first expert with weight 0, which adds nothing to its output.
So a token gets the experts and the weights that a model with this number would give it, normalised as the router does.

Shapes: T tokens of a call, k experts that a router chooses without us, K the most that a token of the call gets.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from steermoe.errors import SteeringError
from steermoe.routing.routers import NOTE, Router, count_owner
from steermoe.routing.wrapping import wrap_method


class CountEditor(Protocol):
    """What `set_counts` asks each time a router runs."""

    def counts(self) -> Tensor | int | None:
        """How many experts the tokens of this call get: a number for all, or one for each [T]; None for its own."""


def numbers_in(counts: Tensor | int | None) -> list[int]:
    """The different numbers of a call; empty for the router's own."""
    if counts is None:
        return []
    return [counts] if isinstance(counts, int) else counts.unique().tolist()


def set_counts(model: nn.Module, router: Router, editor: CountEditor) -> Callable[[], None]:
    """Make a router choose as many experts as the editor says from now on; calls without numbers run as before.

    Attach it before what looks at the router's output, so that this sees what the block gets. Whoever attaches it calls
    `clear_note` after each call of the model that had numbers.

    Returns:
        a function that undoes it; it may be called at any time and more than once.
    """
    owner = count_owner(model, router)
    if owner is None:  # plans with a number are refused
        return lambda: None
    module: Any = owner.module

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            counts = editor.counts()
            if counts is None:
                return original(*args, **kwargs)
            runs = {}
            for number in numbers_in(counts):
                with _number(module, owner.place, number):
                    runs[number] = original(*args, **kwargs)
            setattr(module, NOTE, counts)
            return next(iter(runs.values())) if len(runs) == 1 else _merged(router, runs, counts)

        return forward

    return wrap_method(module, "forward", around)


def clear_note(module: nn.Module) -> None:
    """Forget how many experts the tokens of a router's last call got."""
    if vars(module).get(NOTE) is not None:
        setattr(module, NOTE, None)


@contextmanager
def _number(module: nn.Module, place: tuple[str, ...], number: int) -> Iterator[None]:
    """While inside, the module reads this number; one in its configuration is changed in a copy of that."""
    first = place[0]
    before: Any = getattr(module, first)
    inside: Any = number
    if len(place) > 1:
        inside = copy.copy(before)
        setattr(inside, place[1], number)
    setattr(module, first, inside)
    try:
        yield
    finally:
        setattr(module, first, before)


def _merged(router: Router, runs: Mapping[int, Any], counts: Any) -> Any:
    """Each token's part of the run with its number.

    Raises:
        SteeringError: the router returns something else than rows of tokens.
    """
    widest = max(runs)
    outputs = [run if isinstance(run, tuple) else (run,) for run in runs.values()]
    merged: list[Any] = []
    for parts in zip(*outputs, strict=True):
        if all(part is None for part in parts):
            merged.append(None)
            continue
        if not all(isinstance(part, Tensor) and part.dim() >= 2 for part in parts):
            raise _unknown(router)
        padded = list(parts)
        if len({part.shape for part in parts}) > 1:
            padded = [
                _padded(part, widest) if part.shape[-1] == number else part
                for number, part in zip(runs, parts, strict=True)
            ]
        if len({part.shape for part in padded}) > 1 or padded[0].flatten(0, -2).shape[0] != len(counts):
            raise _unknown(router)
        own = counts.to(padded[0].device, non_blocking=True).view(*padded[0].shape[:-1], 1)
        found = padded[-1]
        for number, part in zip(runs, padded, strict=True):
            found = torch.where(own == number, part, found)
        merged.append(found)
    return tuple(merged) if isinstance(next(iter(runs.values())), tuple) else merged[0]


def _padded(part: Tensor, width: int) -> Tensor:
    """Experts or weights [..., N] with `width` places: the first expert again, with weight 0."""
    missing = width - part.shape[-1]
    if not missing:
        return part
    more = part[..., :1].expand(*part.shape[:-1], missing)
    return torch.cat([part, torch.zeros_like(more) if part.is_floating_point() else more], -1)


def _unknown(router: Router) -> SteeringError:
    return SteeringError(
        f"router '{router.name}' ({type(router.module).__name__}) returns its choice in a way that steermoe can't put "
        "together for texts with different numbers of active experts: generate them one after another"
    )
