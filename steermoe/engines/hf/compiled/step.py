"""A decode step of a model as a function of tensors alone, which torch can export and compile ahead of time.

Shapes: B rows, C columns of the cache, V tokens of the vocabulary, R routers, N experts, W columns of routers' logits,
k experts chosen per token.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from steermoe.engines.hf.cache import DummyLayer, empty_cache
from steermoe.errors import UnsupportedModel
from steermoe.routing.intercept import intercept
from steermoe.routing.routers import Router, chosen_experts, find_routers
from steermoe.routing.selection import Lists, keep_lists
from steermoe.steering.editing_graph import edit
from steermoe.steering.narrowing import narrowed

EXPERTS = "batched_mm"
"""The transformers implementation whose shapes do not depend on the chosen experts."""


class _Layer(CacheLayerMixin):
    """Existing keys and values [B, H, C, D], of which a step writes one column."""

    is_compileable = True
    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self._column = keys, values, column
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("keys and values are given at construction")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self._column, key_states)
        self.values.index_copy_(2, self._column, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> Any:
        return self._column

    def get_max_length(self) -> int:
        return self.keys.shape[2]


@dataclass
class _Call:
    """What routers take and return in the current call.

    Attributes:
        edits: the tensors of its edits.
        logits: as the routers compute them, before the edits.
        chosen: the chosen experts.
    """

    edits: Sequence[Tensor] = ()
    logits: dict[int, Tensor] = field(default_factory=dict)
    chosen: dict[int, Tensor] = field(default_factory=dict)


class _GraphEditor:
    """Puts the edits of one router into the graph and records what it chose."""

    def __init__(self, call: _Call, number: int, router: Router) -> None:
        self._call, self._number, self._router = call, number, router

    def active(self) -> bool:
        return True

    def edit(self, logits: Tensor) -> Tensor:
        flat = self._call.logits[self._number] = logits.flatten(0, -2)
        experts = self._router.num_experts
        eps = torch.finfo(logits.dtype).eps
        steered = narrowed(edit(flat[:, :experts].float(), self._number, self._call.edits, eps), logits.dtype)
        if experts < flat.shape[1]:
            steered = torch.cat([steered, flat[:, experts:]], -1)
        return steered.view(logits.shape)

    def has_lists(self) -> bool:
        return True  # some rows of some call may have them

    def lists(self, device: torch.device) -> Lists:
        _, _, forced, banned, *_ = self._call.edits
        return Lists(forced[self._number], banned[self._number])

    def runs(self) -> int:
        return 1

    def observe(self, output: Any) -> None:
        self._call.chosen[self._number] = chosen_experts(self._router, output)


class DecodeStep(nn.Module):
    """The next logits of every row, from its last token.

    Raises:
        UnsupportedModel: the model's routers differ in size, or its cache is more than keys and values.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.routers = find_routers(model)
        if len({(router.num_experts, router.width, router.top_k) for router in self.routers}) > 1:
            raise UnsupportedModel(f"{type(model).__name__} has routers of different sizes: its step isn't compiled")
        self._has_states = [type(layer) is not DummyLayer for layer in empty_cache(model).layers]
        self._call = _Call()

    def forward(
        self,
        tokens_B1: Tensor,
        positions_B1: Tensor,
        mask_BC: Tensor,
        column_1: Tensor,
        states: list[Tensor],
        edits: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write the tokens' keys and values, and compute the next logits.

        Args:
            tokens_B1: each row's last token.
            positions_B1: how many tokens precede it in its row.
            mask_BC: which columns of the cache belong to the row, the new one included.
            column_1: the column to write.
            states: keys and values of every layer that has any, [B, H, C, D] each, changed in place.
            edits: as `Edits.tensors`.

        Returns:
            logits [B, V] float32, the chosen experts [R, B, k], and the routers' logits before the edits [R, B, W].
        """
        self._call.edits, self._call.logits, self._call.chosen = edits, {}, {}
        logits_BV = self.next_logits(tokens_B1, positions_B1, mask_BC, column_1, states)
        numbers, call = range(len(self.routers)), self._call
        chosen, logits = (torch.stack([of[number] for number in numbers]) for of in (call.chosen, call.logits))
        return logits_BV, chosen, logits

    def next_logits(
        self, tokens_B1: Tensor, positions_B1: Tensor, mask_BC: Tensor, column_1: Tensor, states: list[Tensor]
    ) -> Tensor:
        """As `forward`, but the logits alone, which unless it is `traceable` are those without steering."""
        pairs = iter(zip(states[::2], states[1::2], strict=True))
        cache = Cache(layers=[_Layer(*next(pairs), column_1) if has else DummyLayer() for has in self._has_states])
        output = self.model(
            input_ids=tokens_B1,
            position_ids=positions_B1,
            attention_mask=mask_BC,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits[:, -1].float()

    @contextmanager
    def traceable(self, experts: str = EXPERTS) -> Iterator[None]:
        """Put the edits into the model's routers and give its experts fixed shapes; undone at the end.

        Args:
            experts: the transformers implementation of the experts.
        """
        config: Any = self.model.config
        with ExitStack() as undo:
            for number, router in enumerate(self.routers):
                editor = _GraphEditor(self._call, number, router)
                undo.callback(intercept(self.model, router, editor))
                undo.callback(keep_lists(self.model, router, editor))
            undo.callback(self.model.set_experts_implementation, config._experts_implementation)
            self.model.set_experts_implementation(experts)
            yield
