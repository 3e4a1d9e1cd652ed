"""Record which experts a model chooses: one count per text, layer and expert, without padding.

Shapes: B texts, L MoE layers, N experts per layer, S columns of a forward call, k experts chosen per token.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steermoe.errors import SteeringError
from steermoe.routing.intercept import intercept
from steermoe.routing.positions import RECORDED, Recorded, select
from steermoe.routing.routers import (
    Router,
    _text_config,
    chosen_experts,
    find_routers,
    language_model,
    module_that_routes,
    scoring,
)
from steermoe.routing.tracker import Stack, Tracker, Window
from steermoe.routing.wrapping import Hook

PENDING_LIMIT = 1 << 22
"""Numbers that a record leaves on a device before it takes them; a decode step stays far below."""


class RoutingRecord:
    """What was chosen so far. Rows are the rows of the batch; calls with the same rows, such as decoding steps, add up.

    Attributes:
        counts: [B, L, N] int64, how often each expert was chosen; None before the first call.
        tokens: [B] int64, tokens counted.
        probability_sums: [B, L, N] float64, the router's probability of each expert summed over tokens, if requested;
            a sigmoid router's scores are first divided by their sum over the experts.
        layers: the decoder layer of each of the L rows.
    """

    def __init__(self, routers: list[Router], positions: Recorded) -> None:
        self.layers = tuple(router.layer for router in routers)
        self.counts: Tensor | None = None
        self.tokens: Tensor | None = None
        self.probability_sums: Tensor | None = None
        self._only: Tensor | None = None
        self._routers = routers
        self._positions = positions
        self._wanted: dict[Stack, Tensor] = {}
        self._pending: list[tuple[Callable[[Tensor], None], Tensor]] = []

    def frequency(self) -> Tensor:
        """Routing embeddings F [B, L, N], float32: each layer's counts divided by their sum (Shchukin 2024).

        Raises:
            SteeringError: nothing was recorded, or a text has no tokens.
        """
        if self.counts is None:
            raise SteeringError("no tokens were recorded: run the model inside the block")
        if empty := [row for row in range(len(self.counts)) if not self.has_all_layers(row)]:
            raise SteeringError(
                f"no tokens were recorded for text {empty[0]}: give it real tokens at positions '{self._positions}'"
            )
        return (self.counts / self.counts.sum(-1, keepdim=True)).float()

    def frequency_of(self, text: int) -> Tensor | None:
        """Routing embedding F [L, N] of one text, or None if no token of it was recorded."""
        if self.counts is None or not self.has_all_layers(text):
            return None
        return (self.counts[text] / self.counts[text].sum(-1, keepdim=True)).float()

    def has_all_layers(self, text: int) -> bool:
        """Whether every layer chose an expert for a text."""
        return self.counts is not None and bool((self.counts[text].sum(-1) > 0).all())

    def mean_probability(self) -> Tensor:
        """Mean router probabilities P [B, L, N], float32, each row summing to 1.

        Raises:
            SteeringError: they were not requested, or nothing was recorded.
        """
        if self.probability_sums is None:
            raise SteeringError("no probabilities were recorded: run inside record_routing(..., probabilities=True)")
        self.frequency()  # raises the same errors for texts without tokens
        return (self.probability_sums / self.probability_sums.sum(-1, keepdim=True)).float()

    def restrict(self, wanted: Tensor | None) -> None:
        """Count only some tokens of the following calls: a bool mask [B, S]; None counts all again."""
        self._only = wanted

    def reset(self) -> None:
        """Forget what was counted, for the next batch."""
        self.counts = self.tokens = self.probability_sums = None
        self._pending = []

    def _before_forward(self, window: Window) -> None:
        wanted_BS = select(self._positions, window.generated_index()).expand(window.rows, -1)
        if window.counted is not None:
            wanted_BS = wanted_BS & window.counted.cpu()
        if self._only is not None:
            wanted_BS = wanted_BS & self._only
        if self.counts is None or self.tokens is None:
            experts = max(router.num_experts for router in self._routers)
            self.counts = torch.zeros(window.rows, len(self._routers), experts, dtype=torch.int64)
            self.tokens = torch.zeros(window.rows, dtype=torch.int64)
        if len(self.counts) != window.rows:
            raise SteeringError(
                f"{len(self.counts)} texts were recorded so far, this call has {window.rows} rows: "
                "call reset() between batches of different sizes"
            )
        self.tokens += wanted_BS.sum(-1)
        self._wanted[window.stack] = wanted_BS

    def _after_forward(self, window: Window) -> None:
        self._wanted.pop(window.stack, None)
        self._take()

    def _later(self, add: Callable[[Tensor], None], values: Tensor) -> None:
        """Have values added once they are on the CPU: now, or together with those of other layers."""
        if values.device.type == "cpu":
            add(values)
            return
        self._pending.append((add, values))
        if len(self._pending) * values.numel() > PENDING_LIMIT:
            self._take()

    def _take(self) -> None:
        """Add what is pending; waits once for each device and shape."""
        pending, self._pending = self._pending, []
        groups: dict[Any, list[tuple[Callable[[Tensor], None], Tensor]]] = {}
        for add, values in pending:
            groups.setdefault((values.device, values.dtype, values.shape), []).append((add, values))
        for group in groups.values():
            together = torch.stack([values for _, values in group]).cpu()
            for (add, _), values in zip(group, together, strict=True):
                add(values)

    def _observe(self, number: int, router: Router, output: Any) -> None:
        wanted_BS = self._wanted.get(router.stack)
        if wanted_BS is None or not wanted_BS.any():
            return
        chosen_Tk = chosen_experts(router, output)
        rows, columns = wanted_BS.shape
        if len(chosen_Tk) != rows * columns:
            raise SteeringError(
                f"router '{router.name}' saw {len(chosen_Tk)} tokens where the batch has {rows * columns}: "
                "the texts of a batch can't be separated in this model; record them one by one"
            )
        self._later(partial(self._add_choices, number, router, wanted_BS), chosen_Tk)

    def _add_choices(self, number: int, router: Router, wanted_BS: Tensor, chosen_Tk: Tensor) -> None:
        assert self.counts is not None
        rows, chosen_Tk = len(wanted_BS), chosen_Tk.long()
        inside_Tk = wanted_BS.reshape(-1, 1) & (chosen_Tk < router.num_experts)  # some routers may choose no expert
        chosen_Tk = chosen_Tk.clamp(max=router.num_experts - 1)
        self.counts[:, number].scatter_add_(1, chosen_Tk.view(rows, -1), inside_Tk.view(rows, -1).long())

    def _observe_logits(self, number: int, router: Router, kind: str, logits: Tensor) -> None:
        wanted_BS = self._wanted[router.stack]
        logits_TN = logits.detach().flatten(0, -2)[:, : router.num_experts].float()
        if len(logits_TN) != wanted_BS.numel():
            raise SteeringError(
                f"router '{router.name}' saw {len(logits_TN)} tokens where the batch has {wanted_BS.numel()}: "
                "the texts of a batch can't be separated in this model; record them one by one"
            )
        scores_TN = _scores(logits_TN, kind)
        scores_TN = scores_TN / scores_TN.sum(-1, keepdim=True)
        self._later(partial(self._add_scores, number, router, wanted_BS), scores_TN)

    def _add_scores(self, number: int, router: Router, wanted_BS: Tensor, scores_TN: Tensor) -> None:
        scores_TN = scores_TN.double()
        sums_BN = torch.einsum("bsn,bs->bn", scores_TN.view(*wanted_BS.shape, -1), wanted_BS.double())
        assert self.counts is not None
        if self.probability_sums is None:
            self.probability_sums = torch.zeros(self.counts.shape, dtype=torch.float64)
        self.probability_sums[:, number, : router.num_experts] += sums_BN


def _scores(logits: Tensor, kind: str) -> Tensor:
    """The scores of logits [T, N] for a kind that `scoring` returned; softmax if it is unknown."""
    if kind == "sigmoid":
        return logits.sigmoid()
    if kind == "sqrtsoftplus":
        return nn.functional.softplus(logits).sqrt()
    return logits.softmax(-1)


class _LogitsWatcher:
    """Reads the logits that a router uses and leaves them as they are."""

    def __init__(self, record: RoutingRecord, number: int, router: Router, kind: str) -> None:
        self._record, self._number, self._router, self._kind = record, number, router, kind

    def active(self) -> bool:
        wanted = self._record._wanted.get(self._router.stack)
        return wanted is not None and bool(wanted.any())

    def edit(self, logits: Tensor) -> Tensor:
        self._record._observe_logits(self._number, self._router, self._kind, logits)
        return logits

    def runs(self) -> int:
        return 1

    def observe(self, output: Any) -> None:
        """The choices are counted by a hook, with probabilities or without."""


@contextmanager
def record_routing(
    model: nn.Module, positions: Recorded = "all", *, probabilities: bool = False
) -> Iterator[RoutingRecord]:
    """Record a model's routing inside a `with` block. If the model is steered, the record shows the effect.

    Args:
        model: any model with routers.
        positions: which tokens to count: `all`, the `prompt`, or what is `generated`.
        probabilities: also sum the routers' probabilities of all experts, before top-k and any bias. They include
            steering that is attached inside the block; steering attached before it shows only in the counts.

    Raises:
        UnsupportedModel: the model has no routers. SteeringError: unknown positions.
    """
    if positions not in RECORDED:
        raise SteeringError(f"positions '{positions}' is unknown: use {', '.join(RECORDED)}")
    model = language_model(model)
    routers = find_routers(model)
    record = RoutingRecord(routers, positions)
    with ExitStack() as undo:
        undo.callback(Tracker(model, record._before_forward, record._after_forward).close)
        config = _text_config(model)
        for number, router in enumerate(routers):
            if probabilities:
                undo.callback(
                    intercept(model, router, _LogitsWatcher(record, number, router, scoring(router.module, config)))
                )
            host = module_that_routes(model, router)
            undo.callback(host.register_forward_hook(Hook(partial(_on_router, record, number, router))).remove)
        yield record


def _on_router(record: RoutingRecord, number: int, router: Router, module: nn.Module, args: Any, output: Any) -> None:
    record._observe(number, router, output)


@contextmanager
def watch_choices(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the experts that each router call chooses, [T, k] each, in call order."""
    chosen: list[Tensor] = []

    def keep(router: Any, module: Any, args: Any, output: Any) -> None:
        chosen.append(chosen_experts(router, output).long().cpu())

    with ExitStack() as undo:
        for router in find_routers(model):
            hook = module_that_routes(model, router).register_forward_hook(partial(keep, router))
            undo.callback(hook.remove)
        yield chosen
