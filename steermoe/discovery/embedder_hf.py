"""Embed texts with a transformers model: padded batches, forward passes that stop after the last router.

Shapes: B texts, S columns of a batch, H hidden size.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from steermoe.discovery.embedder import Embedded, EmbeddingOptions, TextProgress
from steermoe.models.loading import LoadedModel
from steermoe.routing.recording import RoutingRecord
from steermoe.routing.routers import find_routers, language_model, module_that_routes


class _LastRouterSeen(Exception):
    """Ends a forward pass early; never leaves this file."""


class Embedder:
    """Embeds texts with one model; open it in a `with` block.

        with embedder(loaded, EmbeddingOptions()) as embed:
            embedded = embed.texts(["A goal!", "The pan is hot."])

    Args:
        loaded: the model with its tokenizer. options: how texts become embeddings.
    """

    def __init__(self, loaded: LoadedModel, options: EmbeddingOptions, record: RoutingRecord) -> None:
        self._inner: Any = _without_head(loaded.model)
        self._tokenizer = loaded.tokenizer
        self._device = loaded.device
        self._options = options
        self._record = record
        routers = find_routers(self._inner)
        self.shape = len(routers), max(router.num_experts for router in routers)
        accepted = inspect.signature(self._inner.forward).parameters
        self._extra: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
        self._is_encoder_decoder = bool(getattr(self._inner.config, "is_encoder_decoder", False))

    def texts(self, texts: Sequence[str], progress: TextProgress | None = None) -> Embedded:
        """Embed texts in batches of similar length; the result is in their order."""
        token_ids = self._tokenize(texts)
        lengths = [len(ids) for ids in token_ids]
        order = sorted((i for i, length in enumerate(lengths) if length), key=lengths.__getitem__)
        frequency = torch.zeros(len(texts), *self.shape)
        hidden = torch.zeros(
            len(texts), self._inner.config.get_text_config().hidden_size if self._options.hidden else 0
        )
        probability = torch.zeros_like(frequency) if self._options.both else None
        for batch in batches(order, lengths, self._options.batch_tokens):
            states = self._forward([token_ids[i] for i in batch])
            uses_counts = self._options.features == "counts"
            frequency[batch] = self._record.frequency() if uses_counts else self._record.mean_probability()
            if probability is not None:
                probability[batch] = self._record.mean_probability()
            if states is not None:
                hidden[batch] = states
            if progress is not None:
                progress(len(batch), sum(lengths[i] for i in batch))
        return Embedded(frequency, torch.tensor(lengths), hidden if self._options.hidden else None, probability)

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), truncation=True, max_length=self._options.max_tokens)
        return encoded["input_ids"]

    def _forward(self, token_ids: list[list[int]]) -> Tensor | None:
        """Record one batch; returns its mean hidden states [B, H], if requested."""
        lengths = torch.tensor([len(ids) for ids in token_ids])
        width = int(lengths.max())
        pad = self._tokenizer.pad_token_id or 0
        inputs = torch.tensor([ids + [pad] * (width - len(ids)) for ids in token_ids])
        columns = torch.arange(width)
        is_real_BS = columns < lengths[:, None]
        wanted_BS = columns == lengths[:, None] - 1 if self._options.tokens == "last" else is_real_BS
        self._record.reset()
        self._record.restrict(wanted_BS)
        given = {"input_ids": inputs.to(self._device), "attention_mask": is_real_BS.long().to(self._device)}
        if self._is_encoder_decoder:
            given |= {"decoder_input_ids": given["input_ids"], "decoder_attention_mask": given["attention_mask"]}
        try:
            output = self._inner(**given, **self._extra)
        except _LastRouterSeen:
            return None
        if not self._options.hidden:
            return None
        last_BSH = output.last_hidden_state.float().cpu()
        mean_BH: Tensor = (last_BSH * wanted_BS[..., None]).sum(1) / wanted_BS.sum(1, keepdim=True)
        return mean_BH


def _without_head(model: nn.Module) -> nn.Module:
    """The model without its language-model head."""
    whole = language_model(model)
    inner: nn.Module = getattr(whole, "base_model", whole)
    return getattr(whole, "model", whole) if inner is whole else inner


def _stop_after_last_router(model: nn.Module, undo: ExitStack) -> None:
    """End each forward pass as soon as the last layer's router has chosen.

    Not if accelerate moves weights in and out around modules: a pass that ends early would leave them on the device.
    """
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return
    last = max(find_routers(model), key=lambda router: router.layer)
    host = module_that_routes(model, last)

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _LastRouterSeen

    undo.callback(host.register_forward_hook(stop).remove)


def batches(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Cut texts, ordered by length, into batches whose padded size stays within `batch_tokens`."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * lengths[i] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
