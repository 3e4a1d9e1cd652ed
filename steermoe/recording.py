"""Record which experts a model chooses: counts a text, a layer and an expert, padding left out.

Shapes: B texts, L MoE layers, N experts a layer.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steermoe.errors import SteeringError
from steermoe.routers import Router, chosen_experts, find_routers
from steermoe.tracking import Positions, Tracker, Window


class RoutingRecord:
    """What was chosen so far. Rows are the rows of the batch; calls with the same rows, such as a generation's, add up.

    Attributes:
        counts: [B, L, N] int64, how often each expert was chosen; None before the first call.
        tokens: [B] int64, tokens counted.
        layers: the decoder layer of each of the L rows.
    """

    def __init__(self, routers: list[Router], positions: Positions) -> None:
        self.layers = tuple(router.layer for router in routers)
        self.counts: Tensor | None = None
        self.tokens: Tensor | None = None
        self._routers = routers
        self._positions = positions
        self._wanted: dict[str, Tensor | None] = {}

    def frequency(self) -> Tensor:
        """Routing embeddings F [B, L, N], float32: each row of a text divided by its sum (Shchukin 2024).

        Raises:
            SteeringError: nothing was recorded, or a text has no tokens.
        """
        if self.counts is None or (self.counts.sum(-1) == 0).any():
            raise SteeringError("no tokens were recorded for some text: run the model inside the block, on real tokens")
        return (self.counts / self.counts.sum(-1, keepdim=True)).float()

    def reset(self) -> None:
        """Forget what was counted, for the next batch."""
        self.counts = self.tokens = None

    def _before_forward(self, window: Window) -> None:
        index = window.generated_index()
        wanted = {"generated": index >= 0, "prompt": index < 0, "all": torch.ones_like(index, dtype=torch.bool)}
        wanted_BS = wanted[self._positions].expand(window.rows, -1)
        if window.mask is not None:
            wanted_BS = wanted_BS & window.mask.cpu()
        if self.counts is None or len(self.counts) != window.rows:
            experts = max(router.num_experts for router in self._routers)
            self.counts = torch.zeros(window.rows, len(self._routers), experts, dtype=torch.int64)
            self.tokens = torch.zeros(window.rows, dtype=torch.int64)
        assert self.tokens is not None
        self.tokens += wanted_BS.sum(-1)
        self._wanted["decoder"] = wanted_BS
        encoder_BS = torch.ones(window.rows, window.encoder_columns, dtype=torch.bool)
        if window.encoder_mask is not None:
            encoder_BS = window.encoder_mask.cpu()
        self._wanted["encoder"] = encoder_BS if self._positions != "generated" else torch.zeros_like(encoder_BS)

    def _observe(self, number: int, router: Router, output: Any) -> None:
        wanted_BS = self._wanted.get(router.stack)
        if wanted_BS is None or not wanted_BS.any():
            return
        chosen = chosen_experts(router, output).cpu()
        rows, columns = wanted_BS.shape
        if len(chosen) != rows * columns:
            raise SteeringError(
                f"router '{router.name}' saw {len(chosen)} tokens where the batch has {rows * columns}: "
                "texts can't be told apart in this model; record them one by one"
            )
        assert self.counts is not None
        inside = wanted_BS.flatten()[:, None] & (chosen < router.num_experts)
        target = self.counts[:, number]
        per_row = (chosen.clamp(max=router.num_experts - 1)).view(rows, -1)
        target.scatter_add_(1, per_row, inside.view(rows, -1).long())


@contextmanager
def record_routing(model: nn.Module, positions: Positions = "all") -> Iterator[RoutingRecord]:
    """Record a model's routing inside a `with` block; works together with steering, whose effect it then shows.

    Args:
        model: any model with routers.
        positions: which tokens to count: `all`, the `prompt`, or what is `generated`.

    Raises:
        UnsupportedModel: the model has no routers.
    """
    routers = find_routers(model)
    record = RoutingRecord(routers, positions)
    with ExitStack() as stack:
        stack.callback(Tracker(model, record._before_forward).close)
        for number, router in enumerate(routers):
            handle = router.module.register_forward_hook(
                lambda module, args, output, number=number, router=router: record._observe(number, router, output)
            )
            stack.callback(handle.remove)
        yield record
