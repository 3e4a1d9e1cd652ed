"""Routing embeddings of a corpus: only what the routers need is computed, in batches of texts of similar length.

A text's embedding does not depend on the batch: padding stands on the right, is masked out of attention and is not
counted. Nothing after the last router is run, unless hidden states are asked for.

Shapes: B texts, S columns of a batch, L MoE layers, N experts a layer, H hidden size.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from steermoe.discovery.store import EmbeddingMeta, EmbeddingStore, Text
from steermoe.errors import CorpusError
from steermoe.models import LoadedModel
from steermoe.recording import RoutingRecord, record_routing
from steermoe.routers import find_routers, module_that_routes
from steermoe.tracking import language_model

if TYPE_CHECKING:
    from steermoe.engines.llamacpp.engine import LlamaCppEngine

RoutingSource: TypeAlias = "LoadedModel | LlamaCppEngine"
"""What routing can be recorded of: a model of transformers, or a GGUF file in llama.cpp."""

Features = Literal["counts", "probabilities"]
Tokens = Literal["all", "last"]

SHARD_TEXTS = 256
"""Texts a shard: what a kill can lose, and what is in memory at most."""

Progress = Callable[[int, int], None]
"""Called with the texts and tokens done since the last call; 0 tokens where an earlier run did them."""


@dataclass(frozen=True)
class EmbeddingOptions:
    """How texts become embeddings.

    Attributes:
        features: "counts", how often each expert was chosen (Shchukin 2024), or mean router "probabilities".
        tokens: "all" of a text, or only its "last", as for a prompt that has been read.
        hidden: also keep the mean of the last layer's hidden states over the same tokens (2410.10814).
        max_tokens: tokens read of each text.
        batch_tokens: tokens a forward pass, padding included; a single longer text goes alone.
        both: with counts, give the probabilities too (in `Embedded.probability`; they are not kept on disk).
    """

    features: Features = "counts"
    tokens: Tokens = "all"
    hidden: bool = False
    max_tokens: int = 512
    batch_tokens: int = 2048
    both: bool = False

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch_tokens"):
            if getattr(self, name) < 1:
                raise CorpusError(f"{name} is {getattr(self, name)}, expected 1 or more")


@dataclass(frozen=True, eq=False)
class Embedded:
    """Embeddings of some texts, in their order; a text without tokens has 0 tokens and meaningless rows.

    Attributes:
        frequency: F or P [B, L, N] float32, rows summing to 1.
        tokens: [B] int64, tokens read.
        hidden: mean hidden states [B, H] float32, or None.
        probability: P [B, L, N] beside F, where both were asked for, or None.
    """

    frequency: Tensor
    tokens: Tensor
    hidden: Tensor | None = None
    probability: Tensor | None = None


class TextEmbedder(Protocol):
    """What embeds texts: `Embedder`, or `GGUFEmbedder` in llama.cpp."""

    @property
    def shape(self) -> tuple[int, int]:
        """L, N."""

    def texts(self, texts: Sequence[str], progress: Progress | None = None) -> Embedded:
        """Embed texts, in their order."""


class _LastRouterSeen(Exception):
    """Ends a forward pass early; never leaves this file."""


class Embedder:
    """Embeds texts with one model; open it in a `with` block.

        with embedder(loaded, EmbeddingOptions()) as embed:
            embedded = embed.texts(["A goal!", "The pan is hot."])

    Args:
        loaded: the model with its tokenizer. options: see there.
    """

    def __init__(self, loaded: LoadedModel, options: EmbeddingOptions, record: RoutingRecord) -> None:
        self._inner: Any = _without_head(loaded.model)
        self._tokenizer = loaded.tokenizer
        self._device = loaded.model.device
        self._options = options
        self._record = record
        routers = find_routers(self._inner)
        self.shape = len(routers), max(router.num_experts for router in routers)
        accepted = inspect.signature(self._inner.forward).parameters
        self._extra: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
        self._is_encoder_decoder = bool(getattr(self._inner.config, "is_encoder_decoder", False))

    def texts(self, texts: Sequence[str], progress: Progress | None = None) -> Embedded:
        """Embed texts, those of similar length together; the order of the result is theirs."""
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
        """Record one batch; its mean hidden states [B, H], if they are wanted."""
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


@contextmanager
def embedder(loaded: RoutingSource, options: EmbeddingOptions | None = None) -> Iterator[TextEmbedder]:
    """A `TextEmbedder`. While it is open the model can't be used otherwise; steering attached to it has no part."""
    options = options or EmbeddingOptions()
    if not isinstance(loaded, LoadedModel):
        from steermoe.discovery.gguf_embedding import GGUFEmbedder

        yield GGUFEmbedder(loaded, options)
        return
    inner = _without_head(loaded.model)
    with ExitStack() as undo:
        undo.enter_context(torch.inference_mode())
        wants_probabilities = options.both or options.features == "probabilities"
        record = undo.enter_context(record_routing(inner, probabilities=wants_probabilities))
        if not options.hidden:
            _stop_after_last_router(inner, undo)
        yield Embedder(loaded, options, record)


def _without_head(model: nn.Module) -> nn.Module:
    """The model without what turns hidden states into words."""
    whole = language_model(model)
    inner: nn.Module = getattr(whole, "base_model", whole)
    return getattr(whole, "model", whole) if inner is whole else inner


def _stop_after_last_router(model: nn.Module, undo: ExitStack) -> None:
    """End each forward pass as soon as the last layer's router has chosen.

    Not where accelerate moves weights in and out around modules: a forward pass that it can't end leaves them there.
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


def routers_of(loaded: RoutingSource) -> Sequence[Any]:
    """A model's routers, with `layer`, `num_experts` and `top_k` each."""
    return find_routers(_without_head(loaded.model)) if isinstance(loaded, LoadedModel) else loaded.target.routers


def architecture_of(loaded: RoutingSource) -> str:
    """The `model_type` of transformers."""
    return loaded.model.config.model_type if isinstance(loaded, LoadedModel) else loaded.target.model_type


def meta_of(loaded: RoutingSource, options: EmbeddingOptions) -> EmbeddingMeta:
    """What a folder of this model's embeddings says of itself."""
    routers = routers_of(loaded)
    return EmbeddingMeta(
        model=loaded.name,
        architecture=architecture_of(loaded),
        layers=tuple(router.layer for router in routers),
        num_experts=max(router.num_experts for router in routers),
        top_k=routers[0].top_k,
        features=options.features,
        tokens=options.tokens,
        hidden=options.hidden,
        max_tokens=options.max_tokens,
    )


def embed_corpus(
    loaded: RoutingSource,
    corpus: Iterable[Text],
    folder: Path | str,
    options: EmbeddingOptions | None = None,
    *,
    progress: Progress | None = None,
) -> tuple[EmbeddingStore, list[str]]:
    """Embed a corpus into a folder, shard by shard; what an earlier run has finished is not done again.

    Args:
        loaded: the model with its tokenizer.
        corpus: read once, in its order; only one shard of it is in memory.
        folder: see `EmbeddingStore`.
        options: how texts become embeddings.
        progress: called with the texts and tokens done since its last call.

    Returns:
        the complete store, and the ids of texts that were left out since they have no tokens (of this run's shards).

    Raises:
        CorpusError: an empty corpus, one that is not the one that the folder was begun with, embeddings made otherwise,
            or a folder that can't be written to.
    """
    options = options or EmbeddingOptions()
    store = EmbeddingStore.create(folder, meta_of(loaded, options))
    skipped: list[str] = []
    total, number, texts = 0, -1, iter(corpus)
    with embedder(loaded, options) as embed:
        for number, shard in enumerate(iter(lambda: list(islice(texts, SHARD_TEXTS)), [])):
            if store.has_shard(number):
                total += _check_same(store, number, shard)
                if progress is not None:
                    progress(len(shard), 0)
                continue
            embedded = embed.texts([text.text for text in shard], progress)
            keep = embedded.tokens > 0
            skipped += [text.id for text, kept in zip(shard, keep.tolist(), strict=True) if not kept]
            kept_texts = [text for text, kept in zip(shard, keep.tolist(), strict=True) if kept]
            hidden = embedded.hidden[keep].numpy() if embedded.hidden is not None else None
            store.write_shard(
                number, kept_texts, embedded.tokens[keep].tolist(), embedded.frequency[keep].numpy(), hidden
            )
            total += len(kept_texts)
    if store.has_shard(number + 1):
        raise CorpusError(
            f"'{folder}' holds more texts than the corpus: it was begun with another; name another folder"
        )
    store.finish(total)
    return store, skipped


def _check_same(store: EmbeddingStore, number: int, shard: Sequence[Text]) -> int:
    """How many texts a finished shard has, if they are those of the corpus."""
    kept = store.shard_ids(number)
    given = [(text.id, len(text.text)) for text in shard]
    if not set(kept) <= set(given):
        raise CorpusError(
            f"'{store.folder}' was begun with another corpus (texts {number * SHARD_TEXTS + 1} and on differ): "
            "name another folder, or remove it to begin anew"
        )
    return len(kept)
