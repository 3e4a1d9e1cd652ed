"""Calls that steering can't follow, and refuses: layers that run again for the gradients, texts packed into one row."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from steermoe.errors import SteeringError
from steermoe.steering.editing import Editor
from steermoe.steering.plans import SteeringPlan

CHECKPOINTED = (
    "gradient checkpointing runs layers again after the call, where steering can't follow, so that gradients would be "
    "wrong: call model.gradient_checkpointing_disable(), or model.eval()"
)
PACKED = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
"""Methods of transformers that pack the tokens of all texts into one row."""


def refuse_checkpointing(model: nn.Module) -> None:
    """Raise if layers will run again for the gradients.

    Raises:
        SteeringError: gradient checkpointing is on.
    """
    for module in model.modules():
        is_on = module.training and getattr(module, "gradient_checkpointing", False)
        if is_on or type(module).__name__ == "CheckpointWrapper":  # torch's, around the layers of a sharded model
            raise SteeringError(CHECKPOINTED)


class OnceEditor(Editor):
    """An editor that refuses calls which will run again, when the model's own call is over, whoever arranged for it.

    Attributes:
        trains: whether the current forward call of the model computes gradients.
    """

    trains = False

    def active(self) -> bool:
        if self.step is None:
            return False
        if self.trains and not torch.compiler.is_compiling() and _will_run_again():
            raise SteeringError(CHECKPOINTED)
        return True


def _will_run_again() -> bool:
    """Whether torch's checkpointing, of either kind, is around this part of a call that computes gradients."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return not torch.is_grad_enabled() or (hooks is not None and "_checkpoint_hook" in hooks[0].__qualname__)


def refuse_packing(
    plans: Callable[[], tuple[SteeringPlan | None, ...]],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What to wrap around a method of `PACKED`: it raises SteeringError, unless all tokens are steered alike.

    Args:
        plans: gives the plans at the time of the call.
    """

    def around(method: Callable[..., Any]) -> Callable[..., Any]:
        def packed(*args: Any, **kwargs: Any) -> Any:
            if not all(plan is None or not plan.does_something for plan in plans()) and not _is_alike(plans()):
                raise SteeringError(
                    f"{method.__name__} packs the tokens of all texts into one row, where nothing separates texts, or "
                    "prompts from generated tokens: use generate or `steermoe batch`, or steer all texts alike with "
                    "positions='all' and a constant schedule"
                )
            return method(*args, **kwargs)

        return packed

    return around


def _is_alike(plans: tuple[SteeringPlan | None, ...]) -> bool:
    """Whether all tokens follow one plan, wherever they are."""
    first = plans[0]
    return len(set(plans)) == 1 and first is not None and first.positions == "all" and first.schedule.kind == "constant"
