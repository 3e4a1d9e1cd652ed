"""Vectors of topics on demand: what a command names with --topic is written, calibrated, and kept for the next time.

They are kept beside the vectors of the packaged domains (see `provision`), each with the texts that it was built from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from steermoe.discovery.packaged import Language, language_of
from steermoe.discovery.topic import (
    CREATED_BY,
    TEXTS_SUFFIX,
    build_topics,
    count_texts,
    drop_work,
    kept_name,
    write_texts,
)
from steermoe.discovery.writing import Writing, check_topic
from steermoe.errors import CompatibilityError, VectorError, VectorNotFound
from steermoe.evaluation.provision import SILENT, Watcher, alone_in, calibrate_kept, kept_folder
from steermoe.vectors.file import SUFFIX, read_vector, write_vector

if TYPE_CHECKING:
    from steermoe.discovery.embedder import RoutingSource
    from steermoe.routing.shape import RoutingShape
    from steermoe.vectors.vector import SteeringVector


@dataclass(frozen=True)
class TopicWish:
    """Which topics a command needs.

    Attributes:
        topics: in words.
        language: of the requests; by default that of each topic.
        writing: how the texts are written.
    """

    topics: Sequence[str]
    language: Language | None = None
    writing: Writing = field(default_factory=Writing)

    def path(self, shape: "RoutingShape", topic: str) -> Path:
        """Where the vector of a topic is kept."""
        return kept_folder(shape, self.language or language_of(topic)) / f"{kept_name(topic)}{SUFFIX}"


def lacking_topics(shape: "RoutingShape", wish: TopicWish) -> list[str]:
    """The topics whose vectors have to be built or calibrated first."""
    return [topic for topic in _topics(wish) if not _is_ready(_read(shape, wish, topic))]


def check_topics_there(shape: "RoutingShape", wish: TopicWish) -> None:
    """Raise if a vector would have to be built.

    Raises:
        VectorNotFound: it would, with the fix.
    """
    for topic in _topics(wish):
        if _read(shape, wish, topic) is None:
            raise VectorNotFound(
                f"{shape.name} has no vector of the topic '{topic}': without --no-build the model writes "
                f"{wish.writing.texts} texts about it now, from which one is built"
            )


def topic_files(shape: "RoutingShape", wish: TopicWish) -> dict[str, Path]:
    """The files of the topics' vectors, by the names of the vectors."""
    return {kept_name(topic): wish.path(shape, topic) for topic in _topics(wish)}


def provide_topics(source: "RoutingSource", wish: TopicWish, watcher: Watcher = SILENT) -> dict[str, Path]:
    """Make sure that a model has vectors of topics: build and calibrate what it lacks, and keep it.

    An interruption loses nothing but the few texts that are being written: the next call resumes. Two calls at once
    take turns.

    Args:
        source: the model, with no steering attached.
        wish: which topics.
        watcher: reports what is done.

    Returns:
        as `topic_files`.

    Raises:
        VectorError: the model writes nothing of use, or the folder can't be written. SteeringError: even the smallest
            strength costs too much, or none does anything.
    """
    shape = source.shape
    lacking = lacking_topics(shape, wish)
    for topic in _topics(wish):
        if topic not in lacking:
            _tell_number(wish, topic, wish.path(shape, topic), watcher)
    for topic in lacking:
        path = wish.path(shape, topic)
        with alone_in(path.parent, watcher):
            found = _read(shape, wish, topic)
            if _is_ready(found):
                continue
            try:
                _announce(shape, wish, topic, path, watcher, is_built=found is not None)
                if found is None:
                    _build(source, wish, topic, path, watcher)
                calibrate_kept(source, path, wish.language or language_of(topic), watcher=watcher)
            except KeyboardInterrupt:
                watcher.note("steermoe: what was written is kept; the same command resumes")
                raise
    return topic_files(shape, wish)


def _topics(wish: TopicWish) -> list[str]:
    return list(dict.fromkeys(map(check_topic, wish.topics)))


def _read(shape: "RoutingShape", wish: TopicWish, topic: str) -> "SteeringVector | None":
    """The vector of a topic; None if there is none, or if its file is damaged: then it is built again."""
    try:
        vector = read_vector(wish.path(shape, topic))
        vector.check_fits(shape)
    except (CompatibilityError, VectorError, VectorNotFound):
        return None
    return vector if vector.info.created_by == CREATED_BY else None


def _is_ready(vector: "SteeringVector | None") -> bool:
    return vector is not None and vector.info.strength is not None


def _tell_number(wish: TopicWish, topic: str, path: Path, watcher: Watcher) -> None:
    """Say so if a number of texts is asked for, and the vector that is there was built from another one."""
    asked = wish.writing.texts
    try:
        number = len(path.with_name(f"{path.name.removesuffix(SUFFIX)}{TEXTS_SUFFIX}").read_bytes().splitlines())
    except OSError:
        return
    if asked not in (number, Writing().texts):
        watcher.note(
            f"steermoe: the vector of '{topic}' is there already, from {number} texts, not {asked}: remove '{path}' to "
            "build it again"
        )


def _announce(
    shape: "RoutingShape", wish: TopicWish, topic: str, path: Path, watcher: Watcher, *, is_built: bool
) -> None:
    """Two lines: what is missing and what is done about it; where it is kept."""
    number = wish.writing.texts
    watcher.note(
        f"steermoe: '{topic}': measuring how strong its vector may be on {shape.name}"
        if is_built
        else f"steermoe: {shape.name} has no vector of '{topic}': it writes {number} texts about it and {number} about "
        f"other things, of up to {wish.writing.new_tokens} tokens, then the vector is calibrated"
    )
    watcher.note(
        f"steermoe: kept as '{path}'; after Ctrl-C the same command resumes"
        + ("" if is_built else "; --no-build refuses instead")
    )


def _build(source: "RoutingSource", wish: TopicWish, topic: str, path: Path, watcher: Watcher) -> None:
    """Write the vector of a topic, its texts beside it."""
    with watcher.counting("Writing", "texts", count_texts([topic], wish.writing, wish.language)) as progress:
        made = build_topics(
            source,
            {kept_name(topic): topic},
            wish.writing,
            wish.language,
            progress=progress,
            on_remark=lambda remark: watcher.note(f"steermoe: {remark}"),
        )
    for one in made:
        write_texts(one, path)
        write_vector(one.vector, path)
    drop_work(source, made, wish.writing)
