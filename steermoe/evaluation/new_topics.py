"""Vectors of new topics, for a page or a server: from a topic in words, or from pasted texts. Built once, then kept."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from steermoe.discovery.labelled import routing_embeddings, vector_info
from steermoe.discovery.packaged import NEUTRAL, language_of, packaged_texts
from steermoe.discovery.packaged_vectors import cut_to_steer
from steermoe.discovery.topic import SMOOTHING, kept_name
from steermoe.discovery.writing import Writing
from steermoe.errors import VectorError
from steermoe.evaluation.provision import SILENT, Watcher, Wish, alone_in, calibrate_kept, kept_folder, lacking, provide
from steermoe.evaluation.topic_vectors import TopicWish, provide_topics
from steermoe.models.default.spec import DOMAINS
from steermoe.vectors.file import SUFFIX, check_domain_name, write_vector
from steermoe.vectors.vector import SteeringVector

if TYPE_CHECKING:
    from steermoe.discovery.embedder import RoutingSource

CREATED_BY = "steermoe, from pasted texts"
LEAST_TEXTS, MOST_TEXTS = 4, 500
MOST_PASTED = 1_000_000
"""Characters that may be pasted."""
OTHERS = 48
"""Texts about other things that pasted ones are compared with."""
TOKENS = 256
"""Tokens read of each text."""


class NewTopics:
    """Builds vectors of a model; each method returns a function that does so, to be called where the model is free.

    Args:
        source: the model, with no steering attached when the functions run.
        writing: how many texts the model writes about a topic; by default as `steermoe vectors build`.
    """

    def __init__(self, source: "RoutingSource", writing: Writing | None = None) -> None:
        self._source, self._writing = source, writing or Writing()

    def described(self, topic: str, progress: Watcher = SILENT) -> Callable[[], str]:
        """For a topic in words; the function returns the vector's name.

        A packaged topic, such as sport, is built from its packaged texts if the model lacks it.

        Raises:
            VectorError: it is no topic. The function's: as of `provide_topics`.
        """
        name, domain = kept_name(topic), topic.strip().lower()

        def build() -> str:
            if domain in DOMAINS:
                wish = Wish((domain,))
                if lacking(self._source.shape, wish):
                    provide(self._source, wish, progress)
                return domain
            provide_topics(self._source, TopicWish((topic,), writing=self._writing), progress)
            return name

        return build

    def pasted(self, name: str, pasted: str, progress: Watcher = SILENT) -> Callable[[], str]:
        """For texts that are separated by empty lines; the function returns the vector's name.

        Raises:
            VectorError: a name that is not allowed, or too few texts. The function's: as of `build_pasted`.
        """
        texts = split_texts(pasted)
        domain = check_domain_name(re.sub(r"\s+", "-", name.strip().lower()))
        if domain in DOMAINS:
            raise VectorError(f"'{domain}' is the name of a packaged topic: take another, such as my-{domain}")

        def build() -> str:
            build_pasted(self._source, domain, texts, progress)
            return domain

        return build


def split_texts(pasted: str) -> list[str]:
    """The texts of what was pasted: paragraphs, or lines if there are no empty ones.

    Raises:
        VectorError: fewer than LEAST_TEXTS, or more than MOST_TEXTS.
    """
    if len(pasted) > MOST_PASTED:
        raise VectorError(f"the texts have {len(pasted)} characters, expected at most {MOST_PASTED}: paste fewer")
    parts = [" ".join(part.split()) for part in re.split(r"\n\s*\n", pasted)]
    texts = [part for part in parts if part]
    if len(texts) < LEAST_TEXTS:
        texts = [" ".join(line.split()) for line in pasted.splitlines() if line.strip()]
    if not LEAST_TEXTS <= len(texts) <= MOST_TEXTS:
        raise VectorError(
            f"there are {len(texts)} texts, expected {LEAST_TEXTS} to {MOST_TEXTS}: paste one after another, with "
            "empty lines between them"
        )
    return texts


def build_pasted(source: "RoutingSource", domain: str, texts: Sequence[str], progress: Watcher = SILENT) -> None:
    """Build, calibrate and keep the vector of a domain: what its texts use more than texts about other things.

    Args:
        source: the model, with no steering attached.
        domain: the vector's name.
        texts: at least a few; some dozens are better.
        progress: shows what is done.

    Raises:
        VectorError: the model's routers treat the texts like all others, or a file can't be written.
    """
    language = language_of(" ".join(texts))
    others = packaged_texts(language)[NEUTRAL][:OTHERS]
    with progress.counting("Reading", "texts", len(texts) + len(others)) as count:
        own_BLN, tokens = routing_embeddings(source, texts, max_tokens=TOKENS, progress=count)
        other_BLN, _ = routing_embeddings(source, others, max_tokens=TOKENS, progress=count)
    mean = other_BLN.mean(0)
    baseline = (1 - SMOOTHING) * mean + SMOOTHING / mean.shape[1]
    info = replace(vector_info(source, texts, tokens, CREATED_BY), title=f"{domain}, from {len(texts)} pasted texts")
    vector = SteeringVector(domain, own_BLN.mean(0), source.shape.layers, baseline=baseline, relative=True, info=info)
    vector, remark = cut_to_steer(vector, 0.0)
    if remark:
        progress.note(remark)
    path = kept_folder(source.shape, language) / f"{domain}{SUFFIX}"
    with alone_in(path.parent, progress):
        write_vector(vector, path)
        calibrate_kept(source, path, language, watcher=progress)
