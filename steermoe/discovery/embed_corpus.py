"""Embed a corpus into a folder, shard by shard; an interrupted run resumes, a corpus that grew is completed."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch

from steermoe.discovery.corpus import Corpus
from steermoe.discovery.embedder import EmbeddingOptions, RoutingSource, TextEmbedder, TextProgress
from steermoe.discovery.embedder_hf import Embedder, _stop_after_last_router, _without_head
from steermoe.discovery.shards import Shard, Unfinished, identity, locked
from steermoe.discovery.store import ID_DIGITS, EmbeddingMeta, EmbeddingStore, Text, identities
from steermoe.engines.memory import few_kernels, return_freed_memory
from steermoe.errors import CorpusError
from steermoe.models.loading import LoadedModel
from steermoe.routing.recording import record_routing

SHARD_TEXTS = 256
"""Texts per shard: the most in memory at once."""
TRIM_SHARDS = 8
"""Batches differ in size and leave gaps in the heap, which are given back after this number of shards."""
FLUSH_SECONDS = 20.0
"""How much work a kill can cost: embeddings of an unfinished shard are written as often."""
TOKENIZED = "The 1st quick (brown) fox,\n\n  über 日本語 Привет مرحبا def f(x): return x**2 <s> </s>"
"""A text whose tokens show which tokenizer a model has."""


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


def meta_of(loaded: RoutingSource, options: EmbeddingOptions, corpus: Iterable[Text] = ()) -> EmbeddingMeta:
    """The metadata of a folder of this model's embeddings of a corpus.

    The size of batches is not part of it: it changes no more than the rounding does.
    """
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
        fingerprint=_fingerprint(loaded),
        dtype=str(loaded.model.dtype).removeprefix("torch.") if isinstance(loaded, LoadedModel) else loaded.dtype,
        text_field=corpus.text_field if isinstance(corpus, Corpus) else "",
        label_field=(corpus.label_field or "") if isinstance(corpus, Corpus) else "",
        routers=shape.fingerprint,
    )


def _fingerprint(loaded: RoutingSource) -> str:
    """The engine, and the beginnings of hashes of the weights and of what the tokenizer does."""
    import hashlib

    if isinstance(loaded, LoadedModel):
        from steermoe.engines.hf.engine import HFEngine

        name, weights, tokens = "hf", HFEngine(loaded).fingerprint(), loaded.tokenizer(TOKENIZED)["input_ids"]
    else:
        name, weights, tokens = "llamacpp", loaded.fingerprint(), loaded.tokenizer.encode(TOKENIZED)
    return f"{name} {weights[:16]} {hashlib.sha256(repr(list(tokens)).encode()).hexdigest()[:16]}"


def embed_corpus(
    loaded: RoutingSource,
    corpus: Iterable[Text],
    folder: Path | str,
    options: EmbeddingOptions | None = None,
    *,
    progress: TextProgress | None = None,
) -> tuple[EmbeddingStore, list[str]]:
    """Embed a corpus into a folder, shard by shard; texts that an earlier run finished are not computed again.

    Args:
        loaded: the model with its tokenizer.
        corpus: read in order, and twice if the folder already has embeddings; only one shard of it is in memory (all of
            it if it can be read only once).
        folder: see `EmbeddingStore`. Texts that it lacks are added, those of damaged shards are embedded again.
        options: how texts become embeddings.
        progress: called with the texts and tokens done since the last call.

    Returns:
        the complete store, and the ids of this run's texts that were left out because they have no tokens.

    Raises:
        CorpusError: an empty corpus, a corpus that lacks or has changed a text of the folder, other options than those
            the folder was begun with, a folder that another run writes to, or one that can't be written to.
    """
    options = options or EmbeddingOptions()
    with few_kernels(), embedder(loaded, options) as embed, locked(Path(folder)):
        store = EmbeddingStore.create(folder, meta_of(loaded, options, corpus))
        known = store.known()
        if known.texts:
            corpus = corpus if isinstance(corpus, Sequence | Corpus) else list(corpus)
            _check_same(store, known.texts, corpus)
        if known.damaged:
            store.begin()
            for number in known.damaged:
                store.remove(number)
        taken = set(known.sound)
        free = (number for number in count() if number not in taken)
        writer = _Writer(store, embed, progress)
        for written, group in enumerate(_groups(_missing(corpus, known.texts, progress)), 1):
            store.begin()
            writer.write(next(free), group)
            if written % TRIM_SHARDS == 0:
                return_freed_memory()
        store.close_gaps()
        store.finish(known.count + writer.total)
    return store, writer.skipped


Named = tuple[str, Text]
"""A text with its `identity`."""


def _missing(corpus: Iterable[Text], known: dict[str, str], progress: TextProgress | None) -> Iterator[Named]:
    """The texts that the folder lacks."""
    seen: Counter[str] = Counter()
    for text in corpus:
        name = next(identities([text], seen)) if known else identity(text)
        if name[:ID_DIGITS] not in known:
            yield name, text
        elif progress is not None:
            progress(1, 0)


def _groups(texts: Iterator[Named]) -> Iterator[list[Named]]:
    return iter(lambda: list(islice(texts, SHARD_TEXTS)), [])


def _check_same(store: EmbeddingStore, known: dict[str, str], corpus: Iterable[Text]) -> None:
    """Compare the corpus with the texts in the folder: it may have more.

    Raises:
        CorpusError: a text has changed or is missing.
    """
    seen: Counter[str] = Counter()
    found = 0
    for text in corpus:
        (name,) = identities([text], seen)
        kept, given = known.get(name[:ID_DIGITS]), name[ID_DIGITS:]
        if kept is None:
            continue
        found += 1
        if kept != given:
            what = "text" if kept[:ID_DIGITS] != given[:ID_DIGITS] else "label"
            raise CorpusError(
                f"the {what} of '{text.id}' has changed since it was embedded in '{store.folder}': name another "
                "folder, or remove this one to start again"
            )
    if not found:
        raise CorpusError(
            f"'{store.folder}' was begun with another corpus (none of its texts is in this one): name another folder, "
            "or remove it to start again"
        )
    if found < len(known):
        raise CorpusError(
            f"'{store.folder}' contains more texts than the corpus ({len(known) - found} of {len(known)} are not in "
            "it): name another folder, or remove it to start again"
        )


class _Writer:
    """Embeds groups of texts and writes each as a shard, and every few seconds what there is of the next one."""

    def __init__(self, store: EmbeddingStore, embed: TextEmbedder, progress: TextProgress | None) -> None:
        self._store = store
        self._embed = embed
        self._progress: TextProgress = progress or (lambda texts, tokens: None)
        self._unfinished = Unfinished(store.folder)
        self._flushed = time.monotonic()
        self.total = 0
        self.skipped: list[str] = []

    def write(self, number: int, group: list[Named]) -> None:
        """Embed a group and write it as a shard."""
        try:
            self._embed_group(group)
        except BaseException:
            with suppress(CorpusError):
                self._unfinished.write()
            raise
        rows = [self._unfinished.rows.get(name) for name, _ in group]
        kept = [(text, row) for (_, text), row in zip(group, rows, strict=True) if row is not None]
        frequency = np.zeros((len(kept), *self._embed.shape), dtype=np.float32)
        for place, (_, row) in enumerate(kept):
            frequency[place] = row[1]
        hidden = [row[2] for _, row in kept if row[2] is not None]
        shard = Shard(
            [text for text, _ in kept],
            [row[0] for _, row in kept],
            frequency,
            np.stack(hidden) if hidden else np.zeros((0, 0), np.float32) if self._store.meta.hidden else None,
            [name for (name, _), row in zip(group, rows, strict=True) if row is None],
        )
        if kept or self._store.version > 1:
            self._store.write(number, shard)
        self._unfinished.drop()
        self.total += len(kept)
        self.skipped += [text.id for (_, text), row in zip(group, rows, strict=True) if row is None]

    def _embed_group(self, group: list[Named]) -> None:
        """Embed the texts that are not in `unfinished` yet.

        Batches are those of the whole group, so that an interruption does not change how numbers are rounded.
        """
        done = self._unfinished.rows
        there = {place for place, (name, _) in enumerate(group) if name in done}
        if there:
            self._progress(len(there), 0)
        for places, part in self._embed.parts([text.text for _, text in group], there):
            new = set(places) - there
            for row, place in enumerate(places):
                if place in new:
                    hidden = part.hidden[row].numpy() if part.hidden is not None else None
                    done[group[place][0]] = int(part.tokens[row]), part.frequency[row].numpy(), hidden
            self._progress(len(new), sum(done[group[place][0]][0] for place in new))
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._unfinished.write()
                self._flushed = time.monotonic()
