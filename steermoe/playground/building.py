"""New vectors for the page: from a topic in words, or from texts that a visitor pasted. Built once, then kept.

The work is done on the engine's thread, between texts; a visitor sees its progress, and may stop it.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from steermoe.discovery.labelled import routing_embeddings, vector_info
from steermoe.discovery.packaged import NEUTRAL, language_of, packaged_texts
from steermoe.discovery.packaged_vectors import cut_to_steer
from steermoe.discovery.topic import SMOOTHING, kept_name
from steermoe.discovery.writing import Writing
from steermoe.errors import SteerMoEError, VectorError
from steermoe.evaluation.provision import Wish, calibrate_kept, kept_folder, lacking, provide
from steermoe.evaluation.topic_vectors import TopicWish, provide_topics
from steermoe.models.default.spec import DOMAINS
from steermoe.vectors.file import SUFFIX, check_domain_name, write_vector
from steermoe.vectors.vector import SteeringVector

if TYPE_CHECKING:
    from steermoe.discovery.embedder import RoutingSource
    from steermoe.serving.live import LiveEngine

CREATED_BY = "steermoe, from texts that were pasted into its page"
LEAST_TEXTS, MOST_TEXTS = 4, 500
MOST_PASTED = 1_000_000
"""Characters that may be pasted."""
OTHERS = 48
"""Texts about other things that pasted ones are compared with."""
TOKENS = 256
"""Tokens read of each text."""
EVERY = 0.25
"""Seconds between two looks at the progress."""


class Stopped(SteerMoEError):
    """A visitor stopped the work. What was written is kept: the next time it goes on."""


class Progress:
    """Tells what is being done, in one line; `Watcher` of the rooms that build. The engine's thread writes it.

    Attributes:
        line: what is being done now.
        is_stopped: set it to end the work at its next report.
    """

    def __init__(self) -> None:
        self.line = "Waiting for the texts that are being written ..."
        self.is_stopped = False

    def note(self, text: str, style: str = "", /) -> None:
        """As `Watcher.note`."""
        self._tell(text.removeprefix("steermoe: "))

    @contextmanager
    def counting(self, what: str, things: str, total: int, /) -> Iterator[Callable[[int, int], None]]:
        """As `Watcher.counting`."""
        done, began = 0, time.monotonic()

        def count(more: int, tokens: int) -> None:
            nonlocal done
            done += more
            left = (time.monotonic() - began) / max(done, 1) * (total - done)
            self._tell(
                f"{what}: {done} of {total} {things}" + (f", about {left:.0f} s left" if 0 < done < total else "")
            )

        self._tell(f"{what} ...")
        yield count

    @contextmanager
    def working(self, what: str, /) -> Iterator[Callable[[str], None]]:
        """As `Watcher.working`."""
        self._tell(what)
        yield self._tell

    def _tell(self, line: str) -> None:
        if self.is_stopped:
            raise Stopped("stopped: build it again to go on from here")
        self.line = line


class Building:
    """Builds vectors, one at a time.

    Args:
        live: the engine; it must be able to record routing.
        writing: how many texts the model writes about a topic; by default as `steermoe vectors build`.
    """

    def __init__(self, live: "LiveEngine", writing: Writing | None = None) -> None:
        self._live, self._writing = live, writing or Writing()
        engine: Any = live.engine
        self._source: RoutingSource = getattr(engine, "loaded", engine)

    def topic(self, topic: str, progress: Progress) -> "Future[str]":
        """Have the model write about a topic, and build a vector of it; the result is the vector's name.

        A packaged topic, such as sport, is built from its packaged texts if the model lacks it.

        Raises:
            SteerMoEError: it is no topic, or the queue is full. The future's: as of `provide_topics`.
        """
        name = kept_name(topic)
        domain = topic.strip().lower()

        def build() -> str:
            if domain in DOMAINS:
                wish = Wish((domain,))
                if lacking(self._source.shape, wish):
                    provide(self._source, wish, progress)
                return domain
            provide_topics(self._source, TopicWish((topic,), writing=self._writing), progress)
            return name

        return self._live.call(build)

    def pasted(self, name: str, pasted: str, progress: Progress) -> "Future[str]":
        """Build a vector from texts that are separated by empty lines; the result is its name.

        Raises:
            SteerMoEError: a name that is not allowed, too few texts, or a queue that is full.
        """
        texts = split_texts(pasted)
        domain = check_domain_name(name.strip().lower().replace(" ", "-"))
        if domain in DOMAINS:
            raise VectorError(f"'{domain}' is the name of a packaged topic: take another, such as my-{domain}")

        def build() -> str:
            build_pasted(self._source, domain, texts, progress)
            return domain

        return self._live.call(build)


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


def build_pasted(source: "RoutingSource", domain: str, texts: Sequence[str], progress: Progress) -> None:
    """Build, calibrate and keep the vector of a domain: what its texts use more than texts about other things.

    Args:
        source: the model, with no steering attached.
        domain: the vector's name.
        texts: at least a few; some dozens are better.
        progress: told what is done.

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
    path.parent.mkdir(parents=True, exist_ok=True)
    write_vector(vector, path)
    calibrate_kept(source, path, language, watcher=progress)


def watched(future: "Future[str]", progress: Progress) -> Iterator[str]:
    """The lines of progress, until the work is done; raises as the work does."""
    last = ""
    while True:
        try:
            future.result(EVERY)
            return
        except NotYet:
            if future.done():
                raise
            if progress.line != last:
                last = progress.line
                yield last
