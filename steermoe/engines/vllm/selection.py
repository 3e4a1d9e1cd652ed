"""Make the choice of a vLLM router keep to lists of experts to force and to ban, after the router has made its own.

Its choice may go against the logits: correction biases are added to its scores, groups are left out, scores tie. So for
tokens with lists the choice is made again, as vLLM makes it, from scores where `lift` has put the lists first. Where a
model has a routing function of its own, that function's choice is caught, as in the hf engine (`chosen_by`), if a trial
shows that this works. Knows routers only by their attributes and does not import vLLM.

Shapes: T tokens, N experts, k experts chosen per token, G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steermoe.routing.selection import Lists, chosen_by, lift
from steermoe.routing.shape import RouterShape

TRIAL_TOKENS = 64
"""How many tokens a routing function is tried on."""


@dataclass(frozen=True, eq=False)
class Choice:
    """How a router chooses.

    Attributes:
        scoring: "softmax", "sigmoid" or "sqrtsoftplus".
        renormalizes: whether the weights of the chosen experts have a fixed sum.
        biases: [N], added to the scores before the choice; None for none.
        groups: G; 1 for none.
        groups_used: how many groups a token may choose from.
        factor: what the weights are multiplied by, where the router's own do not tell.
    """

    scoring: str
    renormalizes: bool
    biases: Tensor | None = None
    groups: int = 1
    groups_used: int = 1
    factor: float = 1.0

    @classmethod
    def of(cls, router: Any) -> "Choice | None":
        """How one of vLLM's routers chooses; None if it does by a function of its model."""
        if getattr(router, "custom_routing_function", None) is not None:
            return None
        experts, groups = router.global_num_experts, getattr(router, "num_expert_group", None) or 1
        if not getattr(router, "use_grouped_topk", True) or groups >= experts or experts % groups:
            groups = 1
        return cls(
            getattr(router, "scoring_func", "softmax"),
            bool(getattr(router, "renormalize", True)),
            getattr(router, "e_score_correction_bias", None),
            groups,
            getattr(router, "topk_group", None) or groups,
            float(getattr(router, "routed_scaling_factor", None) or 1.0),
        )

    def scores(self, logits: Tensor) -> Tensor:
        """The scores [T, N] of logits, float32."""
        if self.scoring == "softmax":
            return logits.float().softmax(-1)
        if self.scoring == "sigmoid":
            return logits.float().sigmoid()
        return torch.nn.functional.softplus(logits.float()).sqrt()

    def again(self, logits: Tensor, lists: Lists, weights: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and the experts [T, k] with which tokens that have lists keep to them.

        Args:
            logits: edited, [T, N].
            lists: the tokens' lists.
            weights: the weights of its own choice, which tell what weights are multiplied by; NaN where it is all of
                banned experts, whose scores are 0.
            experts: the router's own choice.
        """
        scores = self.scores(logits)
        by = scores if self.biases is None else scores + self.biases.float()
        if self.groups > 1 and self.groups_used < self.groups:
            by = self._without_groups(by, lists, experts.shape[1])
        chosen = lift(by, lists).topk(experts.shape[1], -1).indices
        own = scores.gather(-1, chosen)
        before_T1 = scores.gather(-1, experts.long().clamp(min=0)).sum(-1, keepdim=True)
        sum_T1 = weights.sum(-1, keepdim=True)
        factor_T1 = sum_T1 if self.renormalizes else sum_T1 / before_T1
        factor_T1 = factor_T1.where((before_T1 > 1e-6) & factor_T1.isfinite(), self.factor)
        if self.renormalizes:
            own = own / own.sum(-1, keepdim=True).clamp(min=1e-20)
        own = own * factor_T1
        has_lists_T1 = (lists.forced | lists.banned).any(-1, keepdim=True)
        return (
            torch.where(has_lists_T1, own.to(weights.dtype), weights),
            torch.where(has_lists_T1, chosen.to(experts.dtype), experts),
        )

    def _without_groups(self, by: Tensor, lists: Lists, top_k: int) -> Tensor:
        """Leave out all but the best groups, save for forced experts, and where bans leave less than k experts."""
        grouped_TGN = by.view(len(by), self.groups, -1)
        best_TG = grouped_TGN.amax(-1) if self.biases is None else grouped_TGN.topk(2, -1).values.sum(-1)
        used_TG = torch.zeros_like(best_TG, dtype=torch.bool)
        used_TG = used_TG.scatter(1, best_TG.topk(self.groups_used, -1).indices, True)
        used_TN = used_TG[..., None].expand_as(grouped_TGN).reshape(by.shape)
        too_few_T1 = (used_TN & ~lists.banned).sum(-1, keepdim=True) < top_k
        return by.masked_fill(~(used_TN | lists.forced | too_few_T1), float("-inf"))


def keeps_to_lists(
    compute: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], router: RouterShape, hidden: Tensor
) -> bool:
    """Whether a routing function can be made to keep to lists: a trial on random logits that are all against them.

    Args:
        compute: turns hidden states and logits [T, W] into weights and experts [T, k].
        router: its shape.
        hidden: hidden states of `TRIAL_TOKENS` tokens.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(TRIAL_TOKENS, router.width, generator=generator).to(hidden)
    rank_TN = logits[:, : router.num_experts].argsort(-1).argsort(-1)
    lists = Lists(rank_TN < min(2, router.top_k), rank_TN >= router.top_k)
    try:
        (_, experts), was_caught = chosen_by(lists, router.top_k, lambda: compute(hidden, logits))
    except Exception:  # the code of any model: it takes other arguments, or its assertions fail
        return False
    taken, places, wrong, _ = counted(lists, experts).tolist()
    return was_caught and taken == places and wrong == 0


def counted(lists: Lists, experts: Tensor) -> Tensor:
    """Places of forced experts [T, N] that they took in the choice [T, k], all of them, and the same of banned, [4]."""
    chosen, is_chosen = experts.long().clamp(min=0), experts >= 0  # -1 for padding
    taken = [(marks.gather(1, chosen) & is_chosen).sum() for marks in lists]
    return torch.stack([taken[0], lists.forced.sum(), taken[1], lists.banned.sum()])
