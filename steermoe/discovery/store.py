"""Routing embeddings on disk: a folder of shards that numpy and pandas can read without steermoe. Knows no models.

    EMB/meta.json               model, shape and options
    EMB/embeddings-00000.npy    F [B, L, N] float32 of the shard's B texts
    EMB/hidden-00000.npy        mean hidden states [B, H] float32, if they were requested
    EMB/texts-00000.jsonl       one line per text: id, label, tokens, text

A shard's `texts` file is renamed into place last: a shard that has it is complete, one that lacks it is made again.

Shapes: B texts, L MoE layers, N experts per layer, H hidden size.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steermoe.errors import CorpusError
from steermoe.files import atomic_path

META = "meta.json"
FORMAT_VERSION = 1

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Text:
    """One text of a corpus.

    Attributes:
        id: unique in the corpus, such as "sport/a.txt" or "stories.jsonl:17".
        label: its known domain or source; "" if unknown.
    """

    id: str
    text: str
    label: str = ""


@dataclass(frozen=True)
class EmbeddingMeta:
    """The metadata of a folder of embeddings.

    Attributes:
        model: the model's name. architecture: its `model_type`.
        layers: the decoder layer of each of the L rows.
        features: "counts" of choices (the paper), or mean router "probabilities".
        tokens: "all" tokens of a text, or its "last" only.
        hidden: whether mean hidden states are stored too.
        max_tokens: tokens read of each text.
        complete: whether the whole corpus was read.
        texts: number of texts, once complete.
    """

    model: str
    architecture: str
    layers: tuple[int, ...]
    num_experts: int
    top_k: int
    features: str = "counts"
    tokens: str = "all"
    hidden: bool = False
    max_tokens: int = 512
    complete: bool = False
    texts: int = 0


@dataclass(frozen=True, eq=False)
class EmbeddedTexts:
    """Texts with their routing embeddings, in the corpus's order.

    Attributes:
        frequency: F [B, L, N] float32, each row summing to 1.
        tokens: [B], tokens read of each text.
        hidden: mean hidden states [B, H], or None.
    """

    meta: EmbeddingMeta
    texts: Sequence[Text]
    tokens: NDArray[np.int64]
    frequency: Floats
    hidden: Floats | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def labels(self) -> list[str]:
        return [text.label for text in self.texts]

    def features(self) -> Floats:
        """[B, L*N], or [B, L*N + H] with hidden states.

        Both parts are scaled to the same mean norm, so that neither dominates ("Your Mixture-of-Experts LLM Is Secretly
        an Embedding Model", 2410.10814, concatenates them too).
        """
        routing = self.frequency.reshape(len(self.frequency), -1)
        if self.hidden is None:
            return routing
        return np.concatenate([_unit_mean_norm(routing), _unit_mean_norm(self.hidden)], axis=1)


def _unit_mean_norm(matrix: Floats) -> Floats:
    centred = matrix - matrix.mean(0)
    return centred / max(float(np.linalg.norm(centred, axis=1).mean()), 1e-12)


class EmbeddingStore:
    """A folder of embeddings, complete or still being written.

    Args:
        folder: created by `create`, opened by `open`.
    """

    def __init__(self, folder: Path, meta: EmbeddingMeta) -> None:
        self.folder = folder
        self.meta = meta

    @classmethod
    def open(cls, folder: Path | str) -> "EmbeddingStore":
        """An existing folder.

        Raises:
            CorpusError: it has no embeddings, embeddings of another version, or damaged metadata.
        """
        path = Path(folder) / META
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            version = data.pop("format_version")
            if version != FORMAT_VERSION:
                raise CorpusError(f"'{path}' has format version {version}, this steermoe reads {FORMAT_VERSION}")
            data["layers"] = tuple(data["layers"])
            return cls(Path(folder), EmbeddingMeta(**data))
        except OSError as error:
            raise CorpusError(
                f"'{folder}' contains no embeddings ({META}: {error.strerror}): make them with `steermoe embed`"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorpusError(
                f"'{path}' is damaged ({error!r}): remove the folder and run `steermoe embed` again"
            ) from error

    @classmethod
    def create(cls, folder: Path | str, meta: EmbeddingMeta) -> "EmbeddingStore":
        """A folder for new embeddings; one that was begun with the same model and options is resumed.

        Raises:
            CorpusError: the folder has embeddings made with other options, or can't be written.
        """
        store = cls(Path(folder), meta)
        if is_store(folder):
            begun = cls.open(folder).meta
            for field in fields(EmbeddingMeta):
                was, now = getattr(begun, field.name), getattr(meta, field.name)
                if field.name not in ("complete", "texts") and was != now:
                    raise CorpusError(
                        f"'{folder}' contains embeddings made with {field.name} {was}, not {now}: name another folder"
                    )
            store.meta = begun
            return store
        try:
            store.folder.mkdir(parents=True, exist_ok=True)
            store._write_meta(meta)
        except OSError as error:
            raise CorpusError(f"can't write '{folder}': {error.strerror}; name another folder") from error
        return store

    def _write_meta(self, meta: EmbeddingMeta) -> None:
        content = json.dumps({"format_version": FORMAT_VERSION, **asdict(meta)}, indent=1)
        with atomic_path(self.folder / META) as partial:
            partial.write_text(content + "\n", encoding="utf-8")
        self.meta = meta

    def finish(self, texts: int) -> None:
        """Record that the whole corpus was read."""
        data = {**asdict(self.meta), "complete": True, "texts": texts}
        self._write_meta(EmbeddingMeta(**data))

    # ---- shards ----

    def has_shard(self, number: int) -> bool:
        return self._path("texts", number, "jsonl").is_file()

    def shard_ids(self, number: int) -> list[tuple[str, int]]:
        """Id and length of each text of a complete shard, to check that the corpus is still the same."""
        return [(text.id, len(text.text)) for text, _ in self._records(number)]

    def write_shard(
        self, number: int, texts: Sequence[Text], tokens: Sequence[int], frequency: Floats, hidden: Floats | None
    ) -> None:
        """Write a shard whole or not at all.

        Raises:
            CorpusError: the disk is full or the folder can't be written to.
        """
        lines = (
            json.dumps(
                {"id": text.id, "label": text.label, "tokens": int(count), "text": text.text}, ensure_ascii=False
            )
            for text, count in zip(texts, tokens, strict=True)
        )
        try:
            for kind, matrix in (("embeddings", frequency), ("hidden", hidden)):
                if matrix is not None:
                    with atomic_path(self._path(kind, number, "npy")) as partial, partial.open("wb") as file:
                        np.save(file, matrix)
            with atomic_path(self._path("texts", number, "jsonl")) as partial:
                partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        except OSError as error:
            raise CorpusError(
                f"can't write to '{self.folder}': {error.strerror}; finished shards stay, run again to resume"
            ) from error

    def shards(self) -> int:
        """The number of complete shards before the first gap."""
        number = 0
        while self.has_shard(number):
            number += 1
        return number

    def load(self) -> EmbeddedTexts:
        """All texts with their embeddings, in memory.

        Raises:
            CorpusError: there are none yet, or a shard's files don't agree.
        """
        numbers = range(self.shards())
        if not numbers:
            raise CorpusError(f"'{self.folder}' contains no embeddings yet: run `steermoe embed` again to resume")
        records = [record for number in numbers for record in self._records(number)]
        frequency = np.concatenate([self._matrix("embeddings", number) for number in numbers])
        hidden = np.concatenate([self._matrix("hidden", number) for number in numbers]) if self.meta.hidden else None
        if len(records) != len(frequency):
            raise CorpusError(
                f"'{self.folder}' has {len(records)} texts and {len(frequency)} embeddings: it was changed by hand or "
                "copied in part; remove it and run `steermoe embed` again"
            )
        tokens = np.array([count for _, count in records], dtype=np.int64)
        return EmbeddedTexts(self.meta, [text for text, _ in records], tokens, frequency, hidden)

    def _matrix(self, kind: str, number: int) -> Floats:
        path = self._path(kind, number, "npy")
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise CorpusError(
                f"can't read '{path}' ({error}): remove the folder and run `steermoe embed` again"
            ) from error

    def _records(self, number: int) -> Iterator[tuple[Text, int]]:
        path = self._path("texts", number, "jsonl")
        try:
            with path.open(encoding="utf-8") as file:
                for line in file:
                    data: dict[str, Any] = json.loads(line)
                    yield Text(data["id"], data["text"], data["label"]), data["tokens"]
        except (OSError, ValueError, KeyError) as error:
            raise CorpusError(
                f"can't read '{path}' ({error!r}): remove the folder and run `steermoe embed` again"
            ) from error

    def _path(self, kind: str, number: int, ending: str) -> Path:
        return self.folder / f"{kind}-{number:05d}.{ending}"


def is_store(folder: Path | str) -> bool:
    """Whether a folder contains embeddings."""
    return (Path(folder) / META).is_file() and not (Path(folder) / "config.json").is_file()
