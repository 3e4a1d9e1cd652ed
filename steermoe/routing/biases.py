"""The biases of a router: on its logits, or only on the scores that it chooses by.

What is added to the first is formula (3) wherever it was added. The second decide which experts are chosen; the weights
of the chosen ones come from scores without them.

Shapes: W columns of a router's logits.
"""

import copy
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steermoe.routing.architectures import LAYER_NUMBER
from steermoe.routing.intercept import _CatchLogits
from steermoe.routing.routers import Router, _logits_weight, _parent, _place

Kind = Literal["logits", "choice"]
"""What a bias is added to."""
CHOICE_BIAS = re.compile(r"(^|[._])(e_score_correction_bias|expert_bias|balancing_biases)$")
"""Names of what routers, or the blocks around them, add to scores before the choice."""
TRIED_TOKENS = 3


@dataclass(frozen=True)
class Bias:
    """A tensor that a router adds.

    Attributes:
        name: in the model.
        size: how many numbers it has: W, or as many as there are experts to choose from.
    """

    name: str
    size: int

    @property
    def layer(self) -> int | None:
        """The number in its name; not always that of the decoder layer, see `Router`."""
        match = LAYER_NUMBER.search(self.name)
        return int(match[1]) if match else None


def bias_of(model: nn.Module, router: Router, kind: Kind) -> Bias | None:
    """The bias of a router; None if it has none of that kind. The model may be on the meta device."""
    return _logit_bias(router) if kind == "logits" else _choice_bias(model, router)


def _choice_bias(model: nn.Module, router: Router) -> Bias | None:
    inside = [(_place(router.name), router.module), (_parent(router.name), model.get_submodule(_parent(router.name)))]
    for prefix, module in inside:
        found = [
            Bias(f"{prefix}.{name}", tensor.numel())
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
            if CHOICE_BIAS.search(name) and tensor.numel() in (router.width, router.num_experts)
        ]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def _logit_bias(router: Router) -> Bias | None:
    owner, (width, _) = _logits_weight(router.module)
    bias = getattr(owner, "bias", None)
    if not isinstance(bias, Tensor) or bias.shape != (width,) or not _is_added(router.module, width):
        return None
    inner = next(name for name, module in router.module.named_modules() if module is owner)
    return Bias(".".join(filter(None, (_place(router.name), inner, "bias"))), width)


def _is_added(module: nn.Module, width: int) -> bool:
    """Whether a router's logits, where steering changes them, are larger by its bias; seen by running a copy of it.

    A bias alone proves nothing: LongCat's routers have one that they leave out.
    """
    try:
        tried = copy.deepcopy(module).to_empty(device="cpu").float().eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in (*tried.parameters(), *tried.buffers()):
                weight.copy_(torch.randn(weight.shape, generator=generator))
            owner: Any = _logits_weight(tried)[0]
            hidden_TH = torch.randn(1, TRIED_TOKENS, owner.weight.shape[1], generator=generator)
            with_bias_TW = _logits(tried, hidden_TH)
            added_W = owner.bias.clone()
            owner.bias.zero_()
            without_TW = _logits(tried, hidden_TH)
    except Exception:  # it needs more than hidden states: then nothing is known
        return False
    return with_bias_TW.shape[-1] == width and torch.allclose(with_bias_TW, without_TW + added_W, rtol=1e-4, atol=1e-4)


def _logits(module: nn.Module, hidden_TH: Tensor) -> Tensor:
    """What steering would change.

    Raises:
        ValueError: the router made its logits another number of times than once.
    """
    seen: list[Tensor] = []

    def keep(logits: Tensor) -> Tensor:
        seen.append(logits.float())
        return logits

    with _CatchLogits(_logits_weight(module)[1], keep, []):
        module(hidden_TH)
    (logits,) = seen
    return logits


def changed(values: Tensor, push: Tensor) -> Tensor:
    """A bias [any shape of `size` numbers] with c E [N] added to its first columns, in the bias's own type."""
    added = torch.zeros(math.prod(values.shape), dtype=torch.float64)
    added[: len(push)] = push.double().cpu()
    return (values.double().cpu() + added.view(values.shape)).to(values.dtype)
