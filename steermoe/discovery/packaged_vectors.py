"""A vector of every packaged domain, for any model: one pass over the packaged texts, which an interruption can't undo.

Shapes: B texts, L MoE layers, N experts per layer.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from steermoe.discovery.cutting import cut
from steermoe.discovery.embed_corpus import embed_corpus, meta_of
from steermoe.discovery.embedder import EmbeddingOptions, RoutingSource, TextProgress
from steermoe.discovery.labelled import routing_embeddings, vector_info
from steermoe.discovery.packaged import CREATED_BY, NAMES, NEUTRAL, Language, packaged_texts
from steermoe.discovery.stable import keep_stable
from steermoe.discovery.store import EmbeddedTexts, Text
from steermoe.errors import VectorError
from steermoe.files import cache_folder
from steermoe.models.default.stories import domain_words
from steermoe.vectors.vector import SteeringVector

MAX_TOKENS = 256
"""Tokens read of each text: all have fewer words, but a tokenizer may not know their language."""
LOWER_THRESHOLDS = (2.5, 2.0, 1.5, 1.25, 1.1, 1.0)
"""Tried in this order if no expert sets a domain apart; at 1, all above the baseline remain."""
WEAK = 1.5
"""Below this threshold a vector can do little."""
TRIED_TEXTS = 4


def build_packaged(
    source: RoutingSource,
    language: Language = "en",
    *,
    stable: bool = False,
    progress: TextProgress | None = None,
    on_remark: Callable[[str], None] = lambda remark: None,
) -> list[SteeringVector]:
    """A vector of each packaged domain, with the mean of all domains and of neutral texts as baseline; no strengths.

    Embeddings are written to the user's cache as they come and removed at the end: after a Ctrl-C or a kill, the next
    call resumes where this one stopped (a kill costs at most `embed_corpus.FLUSH_SECONDS`).

    Args:
        source: the model that the vectors are for.
        language: of the texts.
        stable: only with the experts that hold when the texts are resampled (`stable.keep_stable`).
        progress: called with texts and tokens done.
        on_remark: called with what is unusual about a vector.

    Raises:
        VectorError: the model's routers treat all domains alike. CorpusError: the cache can't be written, or another
            run writes to it.
    """
    texts = _as_corpus(packaged_texts(language))
    folder = _embeddings_folder(source, texts)
    store, _ = embed_corpus(source, texts, folder, _options(), progress=progress)
    made = vectors_of(source, store.load(), language, on_remark, stable=stable)
    with suppress(OSError):
        shutil.rmtree(folder)
    return made


def vectors_of(
    source: RoutingSource,
    embedded: EmbeddedTexts,
    language: Language = "en",
    on_remark: Callable[[str], None] = lambda remark: None,
    *,
    stable: bool = False,
) -> list[SteeringVector]:
    """A vector of each domain in embedded texts that are labelled with domains; `neutral` is only in the baseline.

    Raises:
        VectorError: routers that treat all domains alike, or with `stable` no expert that holds.
    """
    labels = embedded.labels
    frequency_BLN = torch.from_numpy(embedded.frequency)
    rows = {domain: [i for i, label in enumerate(labels) if label == domain] for domain in dict.fromkeys(labels)}
    embeddings = {domain: frequency_BLN[own] for domain, own in rows.items()}
    means = {domain: frequency.mean(0) for domain, frequency in embeddings.items()}
    baseline_LN = torch.stack(list(means.values())).mean(0)
    made = []
    for domain in (domain for domain in means if domain != NEUTRAL):
        own = [embedded.texts[i].text for i in rows[domain]]
        info = replace(
            vector_info(source, own, torch.from_numpy(embedded.tokens[rows[domain]]), CREATED_BY),
            title=f"{domain}, from {len(own)} {NAMES[language]} texts",
            keywords=() if language == "ru" else tuple(domain_words(domain)),
            licence="Apache-2.0",
        )
        vector = SteeringVector(
            domain, means[domain], source.shape.layers, baseline=baseline_LN, relative=True, info=info
        )
        found, remark = cut_to_steer(vector, 1 / len(means))
        made.append(keep_stable(found, embeddings) if stable else found)
        if remark:
            on_remark(f"{domain}: {remark}")
    return made


def cut_to_steer(vector: SteeringVector, share: float) -> tuple[SteeringVector, str]:
    """The vector at a threshold at which it steers, and a remark if it may steer little."""
    found, remark = cut(vector, share, adapt=True)
    if found is not None and found.relative:
        return found, remark
    for threshold in LOWER_THRESHOLDS:
        lower = replace(vector, threshold=threshold)
        reached = int(lower.experts.any(-1).sum())
        if 2 * reached >= vector.num_layers or (threshold == LOWER_THRESHOLDS[-1] and reached):
            weak = (
                f"the model routes its texts much like others (cut at {threshold:g} x the baseline): the vector may do "
                "little"
            )
            return lower, weak if threshold < WEAK else ""
    raise VectorError(
        f"{vector.info.model}'s routers treat texts of '{vector.domain}' like all others: it can't be steered there"
    )


@dataclass(frozen=True)
class Pace:
    """How fast a model reads texts on this machine.

    Attributes:
        seconds: per token. tokens: of a text, on average.
    """

    seconds: float
    tokens: float


def pace(source: RoutingSource, language: Language) -> Pace:
    """Read a few texts, for an estimate."""
    texts = [own[0][:2000] for own in packaged_texts(language).values()][:TRIED_TEXTS]
    started = time.perf_counter()
    _, tokens = routing_embeddings(source, texts, max_tokens=MAX_TOKENS)
    total = int(tokens.sum())
    return Pace((time.perf_counter() - started) / total, total / len(texts))


def count_texts(language: Language) -> int:
    """How many texts `build_packaged` reads."""
    return sum(map(len, packaged_texts(language).values()))


def _as_corpus(texts: dict[str, list[str]]) -> list[Text]:
    return [
        Text(f"{domain}-{number}", text, domain) for domain, own in texts.items() for number, text in enumerate(own)
    ]


def _options() -> EmbeddingOptions:
    return EmbeddingOptions(max_tokens=MAX_TOKENS)


def _embeddings_folder(source: RoutingSource, texts: Iterable[Text]) -> Path:
    """Where a model's embeddings of these texts are kept meanwhile: another model, dtype or text, another folder."""
    content = [str(meta_of(source, _options())), *(text.text for text in texts)]
    digest = hashlib.sha256("\n".join(content).encode()).hexdigest()[:16]
    return cache_folder() / "packaged_texts" / digest
