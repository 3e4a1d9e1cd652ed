"""Make a router choose every forced expert and no banned one, whatever it does between its logits and its choice.

Logits alone can't promise that. Routers add correction biases to their scores, leave out whole groups of experts, and
their sigmoids saturate. So the choice itself is caught: where a router takes the largest scores, forced experts come
first and banned ones last. The weights of the chosen experts stay the router's own.

Shapes: T tokens, N experts of a router, k experts chosen per token.
"""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from steermoe.errors import SteeringError
from steermoe.routing.architectures import ROUTER_CLASS
from steermoe.routing.routers import Router, module_that_routes
from steermoe.routing.wrapping import wrap_method

LOWEST = -3e38
"""What stands for the -inf of experts in groups that were left out, so that banned ones come after them."""
CHOOSES = re.compile(r"topk\(|argmax\(|\.max\(|sort\(|mixer\(")
"""Code of a router that chooses its experts itself, rather than leave that to its block."""


class Lists(NamedTuple):
    """Experts to force and to ban, bool, [T, N], or [1, N] for all tokens."""

    forced: Tensor
    banned: Tensor


class ListsEditor(Protocol):
    """What `keep_lists` asks each time a router runs."""

    def has_lists(self) -> bool:
        """Whether some token of this call forces or bans an expert of this router."""

    def lists(self, device: torch.device) -> Lists:
        """The experts of this call."""


def lift(scores: Tensor, lists: Lists) -> Tensor:
    """What to choose by instead of scores [..., N]: above all others where forced, below all others where banned."""
    forced, banned = (_laid_over(scores, marks) for marks in lists)
    wide = scores.float() if scores.dtype == torch.float16 else scores
    return wide.clamp(min=LOWEST).masked_fill(banned, float("-inf")).masked_fill(forced, float("inf"))


def keep_lists(model: nn.Module, router: Router, editor: ListsEditor) -> Callable[[], None]:
    """Make a router's choice keep to the editor's lists from now on; calls without lists run as before.

    Returns:
        a function that undoes it; it may be called at any time and more than once.

    Raises (while the model runs):
        SteeringError: the router chose its experts in an unknown way.
    """
    host = module_that_routes(model, router)
    if host is not router.module:  # MXFP4 blocks take the largest logits: those that `formulas.force` raised
        return lambda: None
    if not _chooses(host):
        host = model.get_submodule(router.name.rpartition(".")[0])

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not editor.has_lists():
                return original(*args, **kwargs)
            choices: list[int] = []
            with _CatchChoice(editor, lambda: _count_now(router), choices):
                output = original(*args, **kwargs)
            if not choices:
                raise SteeringError(
                    f"router '{router.name}' ({type(router.module).__name__}) chooses its experts in a way that "
                    "steermoe does not know, so none can be forced or banned in it: leave its layer out of these lists"
                )
            return _with_room(router, output, editor) if hasattr(router.module, "expert_capacity") else output

        return forward

    return wrap_method(host, "forward", around)


def chosen_by(lists: Lists, top_k: int, choose: Callable[[], Any]) -> tuple[Any, bool]:
    """What a function returns that chooses experts by torch's operations, made to keep to lists; and if it did so.

    Args:
        lists: one row per token that it chooses for, or one for all.
        top_k: how many experts it chooses.
        choose: the function; it is called once.
    """
    choices: list[int] = []
    with _CatchChoice(_Given(lists), lambda: top_k, choices):
        found = choose()
    return found, bool(choices)


def _count_now(router: Router) -> int:
    """How many experts a router chooses in the call that runs, which may be another number than usual."""
    number = vars(router.module).get("top_k")
    return number if isinstance(number, int) else router.top_k


class _Given:
    """An editor whose lists are known."""

    def __init__(self, lists: Lists) -> None:
        self._lists = lists

    def has_lists(self) -> bool:
        return True

    def lists(self, device: torch.device) -> Lists:
        return self._lists


def _chooses(module: nn.Module) -> bool:
    """Whether a router takes the largest scores itself, as far as its code can be read."""
    if hasattr(module, "out_features") and ROUTER_CLASS.search(type(module).__name__) is None:
        return False
    own = [kind for kind in type(module).__mro__ if not kind.__module__.startswith("torch.") and kind is not object]
    try:
        return any(CHOOSES.search(inspect.getsource(kind)) for kind in own)
    except (OSError, TypeError):
        return True


def _with_room(router: Router, output: Any, editor: ListsEditor) -> Any:
    """What a router with a capacity returned, without having dropped tokens from a forced expert that was full.

    Such routers (Switch Transformers) choose one expert, and first return that choice as marks [..., N], none where the
    token was dropped. Other tokens are dropped as before.

    Raises:
        SteeringError: its first output is something else.
    """
    marks = output[0] if isinstance(output, tuple) else None
    if router.top_k != 1 or marks is None or marks.is_floating_point() or marks.shape[-1] != router.num_experts:
        raise SteeringError(
            f"router '{router.name}' ({type(router.module).__name__}) drops tokens from experts that are full in a way "
            "that steermoe does not know, so none can be forced in it: leave its layer out of these lists"
        )
    forced = _laid_over(marks, editor.lists(marks.device).forced)
    return torch.where(forced.any(-1, keepdim=True), forced.to(marks.dtype), marks), *output[1:]


def _laid_over(scores: Tensor, marks: Tensor) -> Tensor:
    return marks if marks.shape[0] == 1 else marks.reshape(scores.shape)


class _Found(NamedTuple):
    """What torch.topk, torch.max and torch.sort return."""

    values: Tensor
    indices: Tensor


class _CatchChoice(TorchFunctionMode):
    """Applies `lift` to what a router takes its largest scores from.

    Args:
        editor: has the lists.
        top_k: how many experts the router chooses at the time.
        choices: gets an entry for each choice that was caught.
    """

    def __init__(self, editor: ListsEditor, top_k: Callable[[], int], choices: list[int]) -> None:
        super().__init__()
        self.editor, self.top_k, self.choices = editor, top_k, choices

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        change = _CHANGES.get(func)
        if change is None:
            return func(*args, **kwargs)
        scores = args[0] if args else kwargs.pop("input", None)
        if not isinstance(scores, Tensor) or not scores.is_floating_point() or scores.dim() < 2:
            return func(scores, *args[1:], **kwargs)
        lists = self.editor.lists(scores.device)
        tokens, experts = lists.forced.shape  # not len, which would fix the number of rows of a traced step
        if scores.shape[-1] != experts or (tokens > 1 and scores.numel() != tokens * experts):
            return func(scores, *args[1:], **kwargs)
        return change(self, func, scores, lists, args[1:], kwargs)

    def _largest(self, func: Any, scores: Tensor, lists: Lists, args: Any, kwargs: Any) -> Any:
        """For topk and sort: all places at once."""
        takes_k = func in (torch.topk, Tensor.topk)
        named = dict(zip(("k", "dim", "largest") if takes_k else ("dim", "descending"), args, strict=False)) | kwargs
        falls = named.get("largest", True) if takes_k else named.get("descending", False)
        if not falls or named.get("dim", -1) not in (-1, scores.dim() - 1):
            return func(scores, *args, **kwargs)
        self.choices.append(1)
        found = func(lift(scores, lists), *args, **kwargs)
        if isinstance(found, Tensor):  # argsort
            return found
        return _Found(scores.gather(-1, found[1]), found[1])

    def _first(self, func: Any, scores: Tensor, lists: Lists, args: Any, kwargs: Any) -> Any:
        """For max and argmax: one place, perhaps of several, whose earlier ones then are -inf."""
        named = dict(zip(("dim", "keepdim"), args, strict=False)) | kwargs
        dim = named.get("dim")
        if not isinstance(dim, int) or dim not in (-1, scores.dim() - 1):
            return func(scores, *args, **kwargs)
        self.choices.append(1)
        left = scores > float("-inf")
        forced, banned = (_laid_over(scores, marks) & left for marks in lists)
        found = func(lift(scores, Lists(forced, banned)), *args, **kwargs)
        if isinstance(found, Tensor):
            return found
        indices = found[1] if named.get("keepdim", False) else found[1].unsqueeze(-1)
        values = scores.gather(-1, indices)
        return _Found(values if named.get("keepdim", False) else values.squeeze(-1), found[1])

    def _leave_out(self, func: Any, scores: Tensor, lists: Lists, args: Any, kwargs: Any) -> Any:
        """For masked_fill before the choice: groups are left out, but not their forced experts.

        Where bans leave a token less than k experts in its groups, it may choose from all groups.
        """
        named = dict(zip(("mask", "value"), args, strict=False)) | kwargs
        mask = named["mask"]
        if self.choices or mask.shape != scores.shape:
            return func(scores, *args, **kwargs)
        forced, banned = (_laid_over(scores, marks) for marks in lists)
        too_few = (~mask & ~banned).sum(-1, keepdim=True) < self.top_k()
        kept = forced | (too_few & banned.any(-1, keepdim=True))
        return func(scores, mask & ~kept, named["value"])


_CHANGES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(
        (torch.topk, Tensor.topk, torch.sort, Tensor.sort, torch.argsort, Tensor.argsort), _CatchChoice._largest
    ),
    **dict.fromkeys((torch.max, Tensor.max, torch.argmax, Tensor.argmax), _CatchChoice._first),
    **dict.fromkeys((torch.masked_fill, Tensor.masked_fill), _CatchChoice._leave_out),
}
