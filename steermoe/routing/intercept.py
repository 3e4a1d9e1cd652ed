"""Edit a router's logits where they are computed: in its forward, before softmax or sigmoid, bias, groups and top-k."""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from steermoe.errors import SteeringError
from steermoe.routing.architectures import ROUTER_CLASS
from steermoe.routing.marks import MarkedGate
from steermoe.routing.routers import Router, _logits_weight, module_that_routes
from steermoe.routing.wrapping import Hook, wrap_method


class LogitsEditor(Protocol):
    """What `intercept` calls each time a router runs.

    One that also has `edit_in_place`, which does what `edit` does and may return the same tensor, gets that called
    where nothing else needs the logits as they were.
    """

    def active(self) -> bool:
        """Whether to edit this call; if not, the router runs exactly as it would without us."""

    def edit(self, logits: Tensor) -> Tensor:
        """New logits [..., W] for these, of the same shape and any float type."""

    def runs(self) -> int:
        """How often the router's own code runs in this call: once for each number of experts that tokens get."""

    def observe(self, output: Any) -> None:
        """Receive what the router returned from an edited call."""


WEIGHT_POSITION: dict[Any, int] = {
    F.linear: 1,
    torch.matmul: 1,
    torch.mm: 1,
    torch.addmm: 2,
    torch.Tensor.matmul: 1,
    torch.Tensor.__matmul__: 1,
    torch.Tensor.mm: 1,
}


class _CatchLogits(TorchFunctionMode):
    """Applies `edit` to the output of the one linear map whose weight has the shape of the router's.

    Args:
        shape: of the weight.
        edit: what is done with the logits.
        hits: gets an entry for each time: the weight if `F.linear(x, weight)` made them, else None.
    """

    def __init__(self, shape: tuple[int, int], edit: Callable[[Tensor], Tensor], hits: list[Any]) -> None:
        super().__init__()
        self.shape = shape
        self.edit = edit
        self.hits = hits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        position = WEIGHT_POSITION.get(func)
        if position is None:
            return out
        weight = args[position] if len(args) > position else (kwargs or {})["weight"]
        transposed = func is not F.linear and tuple(weight.shape) == self.shape[::-1]
        if tuple(weight.shape) == self.shape or transposed:
            self.hits.append(weight if func is F.linear and len(args) > 1 else None)
            return self.edit(out)
        return out


def intercept(model: nn.Module, router: Router, editor: LogitsEditor) -> Callable[[], None]:
    """Let an editor change a router's logits from now on.

    Returns:
        a function that undoes it; it may be called at any time and more than once.

    Raises (while the model runs):
        SteeringError: the router ran, but its logits did not come from exactly one linear map with its weight.
    """
    owner, shape = _logits_weight(router.module)
    if owner is not router.module and type(owner) is not nn.Linear:  # a quantised gate: F.linear never runs
        return _intercept_child(router, owner, editor)
    host = module_that_routes(model, router)
    returns_logits = hasattr(host, "out_features") and ROUTER_CLASS.search(type(host).__name__) is None
    marked = MarkedGate(owner, editor.edit, getattr(editor, "edit_in_place", editor.edit))

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not editor.active():
                return original(*args, **kwargs)
            if returns_logits:  # a gate that is itself a linear layer, perhaps quantised or wrapped
                output: Any = editor.edit(original(*args, **kwargs))
            else:
                output, times, wanted = None, 0, editor.runs()
                if marked.can_run():
                    output, times = marked.run(original, args, kwargs)
                if times != wanted:
                    hits: list[Any] = []
                    with _CatchLogits(shape, editor.edit, hits):
                        output = original(*args, **kwargs)
                    marked.learn(hits)
                    times = len(hits)
                if times != wanted:
                    raise SteeringError(
                        f"router '{router.name}' made its logits {times} times in one call, expected "
                        f"{_times(wanted)}: this architecture is not steered correctly; please report it"
                    )
            editor.observe(output)
            return output

        return forward

    return wrap_method(host, "forward", around)


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _intercept_child(router: Router, child: nn.Module, editor: LogitsEditor) -> Callable[[], None]:
    edited: list[int] = []

    def on_child(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not editor.active():
            return None
        edited.append(1)
        return editor.edit(output)

    def on_router(module: nn.Module, args: Any, output: Any) -> None:
        if not editor.active():
            return
        if len(edited) != editor.runs():
            times = _times(editor.runs())
            raise SteeringError(f"router '{router.name}' called its gate {len(edited)} times, expected {times}")
        editor.observe(output)

    def before_router(module: nn.Module, args: Any) -> None:
        edited.clear()  # also after a call that failed halfway

    stack = ExitStack()
    stack.callback(router.module.register_forward_pre_hook(Hook(before_router)).remove)
    stack.callback(child.register_forward_hook(Hook(on_child)).remove)
    stack.callback(router.module.register_forward_hook(Hook(on_router)).remove)
    return stack.close
