"""What routers choose from the logits that a compiled step returns: their own code once more, outside of the step.

Shapes: R routers, B rows, W columns of their logits, k experts chosen per token, T tokens as routers see them, H the
hidden size.
"""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from steermoe.errors import TraceError, reason
from steermoe.routing.intercept import WEIGHT_POSITION
from steermoe.routing.routers import Router, _logits_weight, chosen_experts, find_routers

MOST_NUMBERS = 1 << 12
"""Tensors of routers that are compared number by number; larger ones count as different."""
PLAIN = (bool, int, float, str, type(None))


class OwnChoices:
    """The choices of a model's routers. Those that differ in their gates' weights alone choose together, in one call.

    Args:
        model: the model, which is not run.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._routers = find_routers(model)
        self._given = [_read_beside(model, router) for router in self._routers]
        self._alike = list(_alike(self._routers, self._given))
        self._is_flat: bool | None = None

    @torch.inference_mode()
    def of(self, logits_RBW: Tensor) -> Tensor:
        """The experts that are chosen from logits, [R, B, k].

        Raises:
            TraceError: a router's code needs more than its logits.
        """
        rows = logits_RBW.shape[1]
        found: dict[int, Tensor] = {}
        for numbers in self._alike:
            together = logits_RBW if len(numbers) == len(logits_RBW) else logits_RBW[numbers]
            chosen = self._chosen(numbers[0], together.flatten(0, 1))
            found |= dict(zip(numbers, chosen.split(rows), strict=True))
        return torch.stack([found[number] for number in range(len(self._routers))])

    def _chosen(self, number: int, logits_TW: Tensor) -> Tensor:
        if self._is_flat is None:
            self._is_flat = self._takes_flat(number, logits_TW)
        return self._run(number, logits_TW, self._is_flat)

    def _takes_flat(self, number: int, logits_TW: Tensor) -> bool:
        """Whether a router reads [T, H] rather than [1, T, H]."""
        try:
            self._run(number, logits_TW, is_flat=True)
        except TraceError:
            return False
        return True

    def _run(self, number: int, logits_TW: Tensor, is_flat: bool) -> Tensor:
        """What a router chooses, [T, k], when its gate computes these logits; its hidden states are zeros."""
        router = self._routers[number]
        module: Any = router.module
        _, shape = _logits_weight(module)
        hidden = torch.zeros(len(logits_TW), shape[1], dtype=self._model.dtype)
        given = _GivenLogits(shape, logits_TW)
        try:
            if hasattr(module, "out_features"):  # a gate that is itself a linear layer
                return chosen_experts(router, logits_TW)
            with given:
                output = module(hidden if is_flat else hidden[None], **self._given[number])
            found = chosen_experts(router, output)
        except Exception as error:  # a router's code raises anything when it lacks what it reads
            name = type(module).__name__
            raise TraceError(f"{name} does not choose by its logits alone: {reason(error)}") from error
        if given.hits != 1 or len(found) != len(logits_TW):
            raise TraceError(f"{type(module).__name__} made its logits {given.hits} times in one call, expected once")
        return found


class _GivenLogits(TorchFunctionMode):
    """Gives these logits for the linear map whose weight has the shape of the router's, which is not computed."""

    def __init__(self, shape: tuple[int, int], logits_TW: Tensor) -> None:
        super().__init__()
        self._shape, self._logits_TW = shape, logits_TW
        self.hits = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        position = WEIGHT_POSITION.get(func)
        if position is not None:
            weight = args[position] if len(args) > position else kwargs["weight"]
            if tuple(weight.shape) == self._shape or (
                func is not F.linear and tuple(weight.shape) == self._shape[::-1]
            ):
                self.hits += 1
                return self._logits_TW.view(*args[position - 1].shape[:-1], -1)
        return func(*args, **kwargs)


def _read_beside(model: PreTrainedModel, router: Router) -> dict[str, Any]:
    """What a router must be given beside hidden states, such as its biases, from its block: of the same name there."""
    others = list(inspect.signature(router.module.forward).parameters.values())[1:]
    block = model.get_submodule(router.name.rpartition(".")[0])
    wanted = [one.name for one in others if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    return {name: getattr(block, name) for name in wanted if hasattr(block, name)}


def _alike(routers: Sequence[Router], given: Sequence[dict[str, Any]]) -> Iterator[list[int]]:
    """The numbers of routers that differ in their gates' weights alone, together."""
    groups: dict[Any, list[int]] = {}
    for number, router in enumerate(routers):
        gate, _ = _logits_weight(router.module)
        beside = tuple(_value(one) for one in given[number].values())
        groups.setdefault((_nature(router.module, gate), beside, router.top_k), []).append(number)
    yield from groups.values()


def _nature(module: Any, gate: Any) -> tuple[Any, ...]:
    """What decides a router's choice, apart from its gate's weight; equal only if it surely is the same."""
    values = vars(module).items()
    own = [(name, _value(one)) for name, one in values if not name.startswith("_")]
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    others = [(name, _value(tensor)) for name, tensor in tensors if module is not gate or name != "weight"]
    inner = [(name, _nature(child, gate)) for name, child in module.named_children() if child is not gate]
    return type(module), tuple(sorted(own)), tuple(others), tuple(inner)


def _value(one: Any) -> Any:
    """What equals that of another if both surely are the same."""
    if isinstance(one, Tensor) and one.numel() <= MOST_NUMBERS:
        return tuple(one.flatten().tolist())
    return one if isinstance(one, PLAIN) else id(one)
