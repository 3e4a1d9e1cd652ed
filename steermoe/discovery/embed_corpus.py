"""Embed a corpus into a folder, shard by shard; an interrupted run resumes."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

import torch

from steermoe.discovery.embedder import EmbeddingOptions, RoutingSource, TextEmbedder, TextProgress
from steermoe.discovery.embedder_hf import Embedder, _stop_after_last_router, _without_head
from steermoe.discovery.store import EmbeddingMeta, EmbeddingStore, Text
from steermoe.errors import CorpusError
from steermoe.models.loading import LoadedModel
from steermoe.routing.recording import record_routing

SHARD_TEXTS = 256
"""Texts per shard: the most that a kill can lose, and the most in memory at once."""


@contextmanager
def embedder(loaded: RoutingSource, options: EmbeddingOptions | None = None) -> Iterator[TextEmbedder]:
    """A `TextEmbedder`. While it is open, use the model for nothing else; attached steering has no effect on it."""
    options = options or EmbeddingOptions()
    if not isinstance(loaded, LoadedModel):
        from steermoe.discovery.embedder_llamacpp import GGUFEmbedder

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


def meta_of(loaded: RoutingSource, options: EmbeddingOptions) -> EmbeddingMeta:
    """The metadata of a folder of this model's embeddings."""
    shape = loaded.shape
    return EmbeddingMeta(
        model=loaded.name,
        architecture=shape.architecture,
        layers=shape.layers,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
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
    progress: TextProgress | None = None,
) -> tuple[EmbeddingStore, list[str]]:
    """Embed a corpus into a folder, shard by shard; shards that an earlier run finished are not computed again.

    Args:
        loaded: the model with its tokenizer.
        corpus: read once, in order; only one shard of it is in memory.
        folder: see `EmbeddingStore`.
        options: how texts become embeddings.
        progress: called with the texts and tokens done since the last call.

    Returns:
        the complete store, and the ids of this run's texts that were left out because they have no tokens.

    Raises:
        CorpusError: an empty corpus, a corpus or options other than those the folder was begun with, or a folder that
            can't be written to.
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
            f"'{folder}' contains more texts than the corpus: it was begun with another; name another folder"
        )
    store.finish(total)
    return store, skipped


def _check_same(store: EmbeddingStore, number: int, shard: Sequence[Text]) -> int:
    """The number of texts in a finished shard, if they are those of the corpus."""
    kept = store.shard_ids(number)
    given = [(text.id, len(text.text)) for text in shard]
    if not set(kept) <= set(given):
        raise CorpusError(
            f"'{store.folder}' was begun with another corpus (texts {number * SHARD_TEXTS + 1} and on differ): "
            "name another folder, or remove it to start again"
        )
    return len(kept)
