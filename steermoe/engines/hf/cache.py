"""A cache of keys and values whose rows come and go: it has spare room on both sides, so that no step copies it.

All rows end at the same column, and shorter ones begin further right, so that the distance between two columns is the
distance between two tokens in every row. Columns left of a row's beginning belong to no row and have to be masked.

Shapes: R rows that there is room for, B rows in use, H heads, C columns that there is room for, W columns in use, S
columns of new states, D size of a head (may differ between keys and values).
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.cache_utils import DynamicSlidingWindowLayer as SlidingLayer

from steermoe.models.loading import input_device

DummyLayer: Any = getattr(cache_utils, "DummyLayer", type("NoDummyLayer", (), {}))
"""The class of layers that keep nothing; transformers before 5.20 does not have it."""

SPARE_COLUMNS = 64
"""The least spare columns that a layer adds whenever it has to move."""


class RowLayer(CacheLayerMixin):
    """The keys and values of one attention layer.

    Args:
        window: how many tokens a sliding layer sees, the current one included; None for all.
    """

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.window = window
        self.is_sliding = window is not None
        self.rows = 0
        self.width = 0
        """Columns of the whole batch, including those that a sliding layer has forgotten."""
        self._end = 0

    # ---- what transformers calls ----

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("rows are placed before anything is added")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add columns [B, H, S, D] for all rows and return what they may see."""
        before = self._kept(self.width)
        here = self.claim(key_states.shape[-2])
        assert self.keys is not None
        assert self.values is not None
        self.keys[: self.rows, :, here], self.values[: self.rows, :, here] = key_states, value_states
        seen = slice(here.start - before, here.stop)
        return self.keys[: self.rows, :, seen], self.values[: self.rows, :, seen]

    def claim(self, columns: int) -> slice:
        """Where the caller is to write this many new columns."""
        assert self.keys is not None
        if self._end + columns > self.keys.shape[-2]:
            spare = columns + max(SPARE_COLUMNS, self.width // 4)
            self._move(len(self.keys), self._kept(self.width), 0, spare)
        here = slice(self._end, self._end + columns)
        self._end += columns
        self.width += columns
        return here

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        kept = self._kept(self.width)
        return kept + query_length, self.width - kept

    def get_seq_length(self) -> int:
        return self.width

    def get_max_length(self) -> int:
        return -1

    # ---- rows that come and go ----

    def place(self, first: int, source: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """Put rows of a computed prompt behind the others, aligned at the end.

        Args:
            first: the first new row.
            source: rows of `keys` and `values` to take, one for each new row.
            keys: [*, H, S, D].
            values: [*, H, S, D].
        """
        columns, self.rows = keys.shape[-2], first + len(source)
        room = 0 if self.keys is None else len(self.keys)
        if self.keys is None or self.values is None:
            self.keys, self.values = (states.new_zeros(0, *states.shape[1:]) for states in (keys, values))
            self._end = columns
        kept = self._kept(self.width)
        if self.rows > room or columns > self._end:
            self._move(max(self.rows, room), kept, max(0, columns - kept), SPARE_COLUMNS)
        here = slice(self._end - columns, self._end)
        index = torch.tensor(source).to(keys.device, non_blocking=True)
        self.keys[first : self.rows, :, here] = keys[index]
        self.values[first : self.rows, :, here] = values[index]

    def drop(self, row: int) -> None:
        """Give up a row; the last one takes its place."""
        self.rows -= 1
        if row != self.rows and self.keys is not None and self.values is not None:
            here = slice(self._end - self._kept(self.width), self._end)
            self.keys[row, :, here] = self.keys[self.rows, :, here]
            self.values[row, :, here] = self.values[self.rows, :, here]

    def _kept(self, width: int) -> int:
        """How many of the last `width` columns the next token sees."""
        return width if self.window is None else min(width, self.window - 1)

    def _move(self, rows: int, kept: int, before: int, after: int) -> None:
        """Move into tensors of `rows` rows, with room before and after the columns that are kept."""
        moved = []
        for states in (self.keys, self.values):
            assert states is not None
            _, heads, _, size = states.shape
            new = states.new_zeros(rows, heads, before + kept + after, size)  # what is masked must be finite too
            new[: len(states), :, before : before + kept] = states[:, :, self._end - kept : self._end]
            moved.append(new)
        self.keys, self.values = moved
        self._end = before + kept


class RowCache(Cache):
    """The cache of a whole model, whose rows come and go.

    Args:
        template: an empty cache of the model's own kind.
    """

    def __init__(self, template: Cache) -> None:
        super().__init__(layers=[_like(layer) for layer in template.layers])

    def place(self, first: int, source: Sequence[int], computed: Cache, width: int) -> None:
        """As `RowLayer.place`, in every layer; `width` is how many columns the widest row has from now on."""
        for layer, other in zip(self._row_layers(), _with_states(computed), strict=True):
            layer.place(first, source, other.keys, other.values)
        self.set_width(width)

    def drop(self, row: int) -> None:
        for layer in self._row_layers():
            layer.drop(row)

    def set_width(self, width: int) -> None:
        """Set how many columns the widest row has; those further left belong to rows that are gone."""
        for layer in self._row_layers():
            layer.width = width

    def claim(self) -> tuple[int, list[Tensor]]:
        """A new column for the caller to write: its number, and the keys and values [B, H, C, D] of each layer in turn.

        Only if no layer forgets columns, so that the number is the same in all layers.
        """
        states: list[Tensor] = []
        column = 0
        for layer in self._row_layers():
            column = layer.claim(1).start
            assert layer.keys is not None
            assert layer.values is not None
            states += [layer.keys[: layer.rows], layer.values[: layer.rows]]
        return column, states

    def _row_layers(self) -> list[RowLayer]:
        return [layer for layer in self.layers if isinstance(layer, RowLayer)]


def _like(layer: Any) -> Any:
    if isinstance(layer, SlidingLayer):
        return RowLayer(layer.sliding_window)
    return RowLayer(None) if isinstance(layer, DynamicLayer) else DummyLayer()


def _with_states(cache: Cache) -> list[Any]:
    return [layer for layer in cache.layers if not isinstance(layer, DummyLayer)]


def empty_cache(model: PreTrainedModel, forgets: bool = True) -> DynamicCache:
    """The empty cache that `generate` would begin with.

    Args:
        model: the model.
        forgets: whether sliding layers forget what they no longer see; if not, all layers keep all columns.
    """
    config: Any = model.config
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    if not forgets:
        cache.layers = [DynamicLayer() if isinstance(layer, SlidingLayer) else layer for layer in cache.layers]
    return cache


def has_own_generate(model: PreTrainedModel) -> bool:
    """Whether code that came with a checkpoint replaces `generate`, as LongCat-Flash-Lite's does: its cache also keeps
    the last tokens.

    What such a cache holds, and what padding means to it, is not known here.
    """
    own = getattr(type(model), "generate", None)
    return own is not None and not own.__module__.startswith("transformers.")


def rows_can_change(model: PreTrainedModel) -> bool:
    """Whether the model's cache is only keys and values per token, so that rows may begin at different times.

    It is not if layers are recurrent or convolutional, index their keys, or belong to an encoder-decoder, nor if the
    model's own `generate` may begin with a cache of its own.
    """
    config: Any = model.config
    accepted = inspect.signature(model.forward).parameters
    if config.is_encoder_decoder or not {"position_ids", "attention_mask", "past_key_values"} <= accepted.keys():
        return False
    if has_own_generate(model):
        return False
    if not model._supports_default_dynamic_cache():
        return False
    layers = empty_cache(model).layers
    known = (DynamicLayer, SlidingLayer, DummyLayer)
    return any(type(layer) is not DummyLayer for layer in layers) and all(type(layer) in known for layer in layers)


@torch.inference_mode()
def bytes_of_a_token(model: Any) -> int:
    """Bytes that a token takes in the cache, measured, for any kind of cache; 0 if there is none."""
    cache = None if model.config.is_encoder_decoder else empty_cache(model)
    given: dict[str, Any] = {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=input_device(model))}
    if cache is None:
        given["decoder_input_ids"] = given["input_ids"]  # it caches unasked; its encoder may refuse to be asked
    else:
        given |= {"past_key_values": cache, "use_cache": True}
    output = model(**given)
    return _bytes_in(getattr(output, "past_key_values", None))


def _bytes_in(thing: Any) -> int:
    if isinstance(thing, torch.Tensor):
        return (
            thing.numel() * thing.element_size() if thing.dim() else 0
        )  # a layer's counter of tokens has no token's size
    if isinstance(thing, list | tuple):
        return sum(map(_bytes_in, thing))
    if isinstance(thing, dict):
        return sum(map(_bytes_in, thing.values()))
    return _bytes_in(vars(thing)) if type(thing).__module__.startswith("transformers") else 0
