"""See what each router chooses for every token of a call, and what it would choose there without steering.

In a steered call the router's own code runs twice: first on its own logits, then on the edited ones. Its output of the
first time is only looked at.

Shapes: T tokens as routers see them (rows after rows), L routers, K experts chosen per token (the most of any router).
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from steermoe.errors import TraceError
from steermoe.routing.routers import Router, chosen_experts, find_routers, language_model, module_that_routes
from steermoe.routing.wrapping import wrap_method
from steermoe.steering.editing import Editor
from steermoe.steering.handle import handles_of

NONE = -1
"""The expert of a router that did not run, and of places beyond a router's top-k."""

Choices = NDArray[np.int32]
"""[T, L, K]."""


class RoutingTracer:
    """Looks on while `is_on`, from outside of any steering: attach it after the handle, and close it before that.

    Args:
        model: the model, steered or not.

    Raises:
        UnsupportedModel: it has no routers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.is_on = False
        model = language_model(model)
        self._routers = find_routers(model)
        handles = handles_of([self._routers[0].module])
        self._editors: list[Editor] = list(handles[0].editors) if handles else []
        self._now: dict[int, Tensor] = {}
        self._plain: dict[int, Any] = {}
        with ExitStack() as undo:
            for number, router in enumerate(self._routers):
                host = module_that_routes(model, router)
                undo.callback(wrap_method(host, "forward", self._around(number, router)))
            self._undo = undo.pop_all()

    def close(self) -> None:
        """Take it off. Does nothing the second time."""
        self._undo.close()

    def take(self) -> tuple[Choices, Choices]:
        """The experts that were chosen since the last call of this, and those that would have been without steering.

        Raises:
            TraceError: routers saw different numbers of tokens, so that rows can't be separated.
        """
        now, plain = self._now, self._plain
        self._now, self._plain = {}, {}
        unsteered = {n: _own_choice(self._routers[n], output) for n, output in plain.items()}
        width = max((one.shape[1] for one in (*now.values(), *unsteered.values())), default=0)
        chosen = self._stacked(now, width)
        return chosen, self._stacked({**now, **unsteered}, width) if plain else chosen

    def _around(self, number: int, router: Router) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def around(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if not self.is_on:
                    return original(*args, **kwargs)
                editor = self._editors[number] if self._editors else None
                if editor is not None and editor.step is not None:
                    step, editor.step = editor.step, None
                    try:
                        self._plain[number] = original(*args, **kwargs)  # read later, outside of what keeps to lists
                    finally:
                        editor.step = step
                output = original(*args, **kwargs)
                self._now[number] = chosen_experts(router, output)
                return output

            return forward

        return around

    def _stacked(self, chosen: dict[int, Tensor], least: int) -> Choices:
        counts = {len(one) for one in chosen.values()}
        if len(counts) > 1:
            raise TraceError(
                f"routers saw {' and '.join(map(str, sorted(counts)))} tokens in one call: this model can't be traced"
            )
        tokens, top_k = max(counts, default=0), max(least, *(router.top_k for router in self._routers))
        found = np.full((tokens, len(self._routers), top_k), NONE, dtype=np.int32)
        alike: dict[tuple[torch.device, int], list[int]] = {}
        for number, one in chosen.items():
            alike.setdefault((one.device, one.shape[1]), []).append(number)
        for (_, width), numbers in alike.items():  # one transfer from each device
            together = torch.stack([chosen[number] for number in numbers], 1)
            found[:, numbers, :width] = together.cpu().numpy()
        return found


def _own_choice(router: Router, output: Any) -> Tensor:
    """What a router chose with its own number of experts, whatever the number in the steered call after."""
    return chosen_experts(router, output, router.top_k)
