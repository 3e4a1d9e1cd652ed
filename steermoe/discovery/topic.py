"""Vectors of topics in words: the contrast between texts that the model writes about a topic and about other things.

The texts are kept beside the vector, one JSON line each, and the vector's header says where it comes from.
"""

import hashlib
import json
import re
import shutil
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from steermoe.discovery.embedder import RoutingSource, TextProgress
from steermoe.discovery.keywords import cluster_keywords
from steermoe.discovery.labelled import vector_info
from steermoe.discovery.packaged import Language, language_of
from steermoe.discovery.packaged_vectors import cut_to_steer
from steermoe.discovery.writing import (
    Style,
    Writing,
    Written,
    asks_about,
    check_topic,
    style_of,
    usable,
    work_folder,
    write,
)
from steermoe.errors import SteerMoEError, VectorError
from steermoe.files import atomic_path, why_not_written
from steermoe.models.default.spec import DOMAINS
from steermoe.vectors.file import MAX_NAME_BYTES, NAME_KINDS, check_domain_name, normal_name
from steermoe.vectors.vector import SteeringVector

CREATED_BY = "steermoe, from texts that the model wrote about a topic"
TEXTS_SUFFIX = ".texts.jsonl"
SMOOTHING = 0.1
"""The part of the baseline that is the same for all experts: in a few dozen texts many experts are never chosen."""
NUM_KEYWORDS = 10
MOST_NAME = 60


@dataclass(frozen=True, eq=False)
class TopicVector:
    """A topic's vector, without a strength, and the texts about it, also those of no use."""

    topic: str
    vector: SteeringVector
    texts: Sequence[Written]


def domain_of(topic: str) -> str:
    """The name of a topic's vector: its letters and digits in lower case, joined with hyphens.

    Raises:
        VectorError: it is no topic, or has no letter that a name can have.
    """
    text = unicodedata.normalize("NFKC", check_topic(topic)).lower()
    kept = (char if unicodedata.category(char) in NAME_KINDS else "-" for char in text)
    slug = re.sub("-+", "-", "".join(kept)).strip("-")
    while len(slug) > MOST_NAME or len(slug.encode()) > MAX_NAME_BYTES:
        slug = slug.rpartition("-")[0] or slug[: min(MOST_NAME, len(slug) - 1)]
    if normal_name(slug) is None:
        raise VectorError(f"no name can be made of the topic '{topic}': give one with --name, such as --name pirates")
    return slug


def kept_name(topic: str) -> str:
    """As `domain_of`, but no two topics share it, and none has the name of a packaged domain."""
    words, name = check_topic(topic).lower(), "topic"
    with suppress(VectorError):
        name = domain_of(topic)
        if name not in DOMAINS and name == re.sub("[ -]+", "-", words):
            return name
    return f"{name}-{hashlib.sha256(words.encode()).hexdigest()[:6]}"


def build_topics(
    source: RoutingSource,
    topics: Mapping[str, str],
    writing: Writing | None = None,
    language: Language | None = None,
    *,
    style: Style | None = None,
    progress: TextProgress | None = None,
    on_remark: Callable[[str], None] = lambda remark: None,
) -> list[TopicVector]:
    """A vector of each topic: the mean routing of its texts, where it exceeds that of texts about other things.

    Texts are kept in the user's cache as they come: after a Ctrl-C or a kill, the next call resumes. Those about other
    things stay there for the next topic; `drop_work` removes the others once the vectors are written.

    Args:
        source: the model that writes, with no steering attached.
        topics: domain -> its topic in words.
        writing: how many texts are written, and how.
        language: of the requests; by default that of each topic.
        style: how the model is brought to write; by default by its chat template, if it has one.
        progress: called with texts and tokens done.
        on_remark: called with what is unusual about texts or a vector.

    Raises:
        VectorError: the model wrote nothing of use, or its routers treat the topic like all else. SteerMoEError: the
            cache can't be written.
    """
    writing, style = writing or Writing(), style or style_of(source)
    model = source.shape.name
    topics = {check_domain_name(domain): check_topic(topic) for domain, topic in topics.items()}
    others: dict[Language, list[Written]] = {}
    made = []
    for domain, topic in topics.items():
        spoken = language or language_of(topic)
        if spoken not in others:
            written = write(source, asks_about(None, writing, style, spoken), writing, progress)
            others[spoken], remark = usable(written, "other things", model)
            _remark(on_remark, remark)
        written = write(source, asks_about(topic, writing, style, spoken), writing, progress)
        own, remark = usable(written, f"'{topic}'", model)
        _remark(on_remark, remark)
        vector, remark = _vector(source, domain, topic, own, others[spoken])
        _remark(on_remark, f"{domain}: {remark}" if remark else "")
        made.append(TopicVector(topic, vector, written))
    return made


def count_texts(topics: Sequence[str], writing: Writing, language: Language | None = None) -> int:
    """How many texts `build_topics` writes or reads."""
    others = {language or language_of(topic) for topic in topics}
    return writing.texts * (len(topics) + len(others))


def _remark(on_remark: Callable[[str], None], remark: str) -> None:
    if remark:
        on_remark(remark)


def _vector(
    source: RoutingSource, domain: str, topic: str, own: Sequence[Written], others: Sequence[Written]
) -> tuple[SteeringVector, str]:
    """The vector of a topic's texts against those about other things, cut where it steers, and a remark or ""."""
    texts = [one.text for one in own]
    info = replace(
        vector_info(source, texts, torch.tensor([one.tokens for one in own]), CREATED_BY),
        title=f"{topic}, from {len(own)} texts that {source.shape.name} wrote about it",
        keywords=_keywords(texts, [one.text for one in others]),
    )
    vector = SteeringVector(
        domain, _mean(own), source.shape.layers, baseline=baseline_of(others), relative=True, info=info
    )
    return cut_to_steer(vector, 0.0)


def _mean(written: Sequence[Written]) -> Tensor:
    return torch.stack([one.frequency for one in written if one.frequency is not None]).mean(0)


def baseline_of(others: Sequence[Written]) -> Tensor:
    """The mean routing of texts about other things [L, N], smoothed; rows sum to 1."""
    mean = _mean(others)
    return (1 - SMOOTHING) * mean + SMOOTHING / mean.shape[1]


def _keywords(own: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    """The words that set the texts apart; none without scikit-learn, which only they need."""
    with suppress(SteerMoEError):
        labels = [0] * len(own) + [1] * len(others)
        return tuple(one.word for one in cluster_keywords([*own, *others], labels, NUM_KEYWORDS)[0])
    return ()


def write_texts(made: TopicVector, path: Path) -> Path:
    """Write a topic's texts beside its vector, whole or not at all; returns their file.

    Args:
        made: the topic with its texts.
        path: of the vector.

    Raises:
        VectorError: the folder can't be written to.
    """
    target = path.with_name(f"{made.vector.domain}{TEXTS_SUFFIX}")
    lines = [json.dumps(one.as_dict(), ensure_ascii=False) for one in made.texts]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as partial:
            partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise VectorError(f"can't write '{target}': {why_not_written(error)}; name another folder") from error
    return target


def drop_work(source: RoutingSource, made: Sequence[TopicVector], writing: Writing | None = None) -> None:
    """Remove what the cache holds of topics whose vectors are written."""
    for one in made:
        with suppress(OSError):
            shutil.rmtree(work_folder(source, [text.ask for text in one.texts], writing or Writing()))
