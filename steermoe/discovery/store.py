"""Routing embeddings on disk: a folder of shards that numpy and pandas can read without steermoe. Knows no models.

    EMB/meta.json               model, shape and options: everything that decides the numbers
    EMB/embeddings-00000.npy    F [B, L, N] float32 of the shard's B texts
    EMB/hidden-00000.npy        mean hidden states [B, H] float32, if they were requested
    EMB/texts-00000.jsonl       one line per text: id, label, tokens, text
    EMB/shard-00000.json        SHA-256 of the shard's files; written last
    EMB/unfinished.npz          embeddings of the shard that is being made

Folders of format version 1 have no `shard` files and fewer facts in `meta.json`. They are read and resumed as they are.

Shapes: B texts, L MoE layers, N experts per layer, H hidden size.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steermoe.discovery.shards import REPAIR, Floats, Shard, identity, read_shard, sha256, shard_path, write_shard
from steermoe.discovery.shards import Text as Text
from steermoe.errors import CorpusError
from steermoe.files import atomic_path

META = "meta.json"
FORMAT_VERSION = 3


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
        dtype: of the weights; "" if unknown.
        fingerprint: the engine, and a hash of the weights and the tokenizer; "" if unknown.
        text_field, label_field: where text and label come from; "" if unknown or by default.
        shards: number of shards, once complete. shards_sha256: hash of their records.
        routers: fingerprint of the routers, for the vectors; "" if unknown.
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
    dtype: str = ""
    fingerprint: str = ""
    text_field: str = ""
    label_field: str = ""
    shards: int = 0
    shards_sha256: str = ""
    routers: str = ""


PROGRESS = ("complete", "texts", "shards", "shards_sha256")
"""Fields that say how far the work is; all others decide the numbers."""
SINCE = {
    **dict.fromkeys(("fingerprint", "dtype", "text_field", "label_field", "shards", "shards_sha256"), 2),
    "routers": 3,
}
"""The format version of which some fields are; folders of earlier ones lack them."""
CALLED = {"fingerprint": "engine, weights and tokenizer"}
"""What messages call fields whose names explain little."""


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

        The square roots of the routing's shares, and hidden states, are scaled to the same mean norm, so that neither
        dominates ("Your Mixture-of-Experts LLM Is Secretly an Embedding Model", 2410.10814, concatenates them too).
        """
        routing = self.frequency.reshape(len(self.frequency), -1)
        if self.hidden is None:
            return routing
        return np.concatenate([_unit_mean_norm(np.sqrt(routing)), _unit_mean_norm(self.hidden)], axis=1)


def _unit_mean_norm(matrix: Floats) -> Floats:
    centred = matrix - matrix.mean(0)
    return centred / max(float(np.linalg.norm(centred, axis=1).mean()), 1e-12)


class EmbeddingStore:
    """A folder of embeddings, complete or still being written.

    Args:
        folder: created by `create`, opened by `open`.
        version: of its format: 1 has no hashes, 2 no fingerprint of the routers.
    """

    def __init__(self, folder: Path, meta: EmbeddingMeta, version: int = FORMAT_VERSION) -> None:
        self.folder = folder
        self.meta = meta
        self.version = version

    @classmethod
    def open(cls, folder: Path | str) -> "EmbeddingStore":
        """An existing folder.

        Raises:
            CorpusError: it has no embeddings, embeddings of another version, or damaged metadata.
        """
        path = Path(folder) / META
        try:
            data = json.loads(path.read_bytes())
            version = data.pop("format_version")
            if type(version) is int and version > FORMAT_VERSION:
                raise CorpusError(
                    f"'{path}' has format version {version}, this steermoe reads 1 to {FORMAT_VERSION}: "
                    "upgrade steermoe"
                )
            return cls(Path(folder), _parse_meta(data, version), version)
        except OSError as error:
            fix = "make them with `steermoe embed`"
            if is_store(folder):
                fix = "remove the folder and run `steermoe embed` again"
            raise CorpusError(f"'{folder}' contains no embeddings ({META}: {error.strerror}): {fix}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CorpusError(
                f"'{path}' is damaged ({error!r:.200}): remove the folder and run `steermoe embed` again"
            ) from error

    @classmethod
    def create(cls, folder: Path | str, meta: EmbeddingMeta) -> "EmbeddingStore":
        """A folder for new embeddings; one that was begun with the same model and options is resumed.

        Raises:
            CorpusError: the folder has embeddings made with other options, or can't be written.
        """
        store = cls(Path(folder), meta)
        if is_store(folder):
            begun = cls.open(folder)
            begun._check_same_options(meta)
            return begun
        try:
            store.folder.mkdir(parents=True, exist_ok=True)
            store._write_meta(meta)
        except OSError as error:
            raise CorpusError(f"can't write '{folder}': {error.strerror or error}; name another folder") from error
        return store

    def _check_same_options(self, meta: EmbeddingMeta) -> None:
        for field in fields(EmbeddingMeta):
            was, now = getattr(self.meta, field.name), getattr(meta, field.name)
            is_known = self.version >= SINCE.get(field.name, 1)
            if is_known and field.name not in PROGRESS and was != now:
                name = CALLED.get(field.name, field.name)
                raise CorpusError(
                    f"'{self.folder}' contains embeddings made with {name} {was or 'none'}, not {now or 'none'}: "
                    "name another folder"
                )

    def _write_meta(self, meta: EmbeddingMeta) -> None:
        content: dict[str, Any] = {"format_version": self.version, **asdict(meta)}
        content = {name: value for name, value in content.items() if self.version >= SINCE.get(name, 1)}
        if self.version > 1:
            content["sha256"] = _hash_of(content)
        with atomic_path(self.folder / META) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        self.meta = meta

    def begin(self) -> None:
        """Record that texts are still missing."""
        self._change(complete=False, texts=0, shards=0, shards_sha256="")

    def finish(self, texts: int) -> None:
        """Record that the whole corpus was read."""
        numbers = range(self.shards())
        hashes = self._hash_of_records(numbers) if self.version > 1 else ""
        self._change(complete=True, texts=texts, shards=len(numbers) if self.version > 1 else 0, shards_sha256=hashes)

    def _change(self, **progress: Any) -> None:
        meta = replace(self.meta, **progress)
        if meta == self.meta:
            return
        try:
            self._write_meta(meta)
        except OSError as error:
            raise CorpusError(
                f"can't write to '{self.folder}': {error.strerror or error}; finished shards stay, run again to resume"
            ) from error

    def _hash_of_records(self, numbers: range) -> str:
        try:
            records = [shard_path(self.folder, "shard", number).read_bytes() for number in numbers]
        except OSError as error:
            raise CorpusError(f"can't read '{error.filename}' ({error.strerror}): {REPAIR}") from error
        return sha256("".join(map(sha256, records)).encode())

    # ---- shards ----

    def has_shard(self, number: int) -> bool:
        """Whether a shard was written; it may be damaged since."""
        return shard_path(self.folder, "shard" if self.version > 1 else "texts", number).is_file()

    def write_shard(
        self, number: int, texts: Sequence[Text], tokens: Sequence[int], frequency: Floats, hidden: Floats | None
    ) -> None:
        """Write a shard whole or not at all.

        Raises:
            CorpusError: the disk is full or the folder can't be written to.
        """
        self.write(number, Shard(texts, tokens, frequency, hidden))

    def write(self, number: int, shard: Shard) -> None:
        """As `write_shard`."""
        write_shard(self.folder, number, shard, recorded=self.version > 1)

    def read(self, number: int) -> Shard:
        """Read a shard.

        Raises:
            CorpusError: it is missing or damaged, or belongs to another model.
        """
        shard = read_shard(self.folder, number, recorded=self.version > 1, hidden=self.meta.hidden)
        expected = len(self.meta.layers), self.meta.num_experts
        if shard.frequency.shape[1:] != expected:
            path = shard_path(self.folder, "embeddings", number)
            raise CorpusError(f"'{path}' has rows of shape {shard.frequency.shape[1:]}, expected {expected}: {REPAIR}")
        return shard

    def shards(self) -> int:
        """The number of complete shards before the first gap."""
        number = 0
        while self.has_shard(number):
            number += 1
        return number

    def known(self) -> "Known":
        """What the folder holds; its damaged shards count as missing.

        Raises:
            CorpusError: a file can't be read, for example because that is not permitted.
        """
        texts: dict[str, str] = {}
        sound, damaged, count = [], [], 0
        seen: Counter[str] = Counter()
        for number in self._numbers():
            try:
                shard = self.read(number)
            except CorpusError as error:
                if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
                    raise
                damaged.append(number)
                continue
            sound.append(number)
            count += len(shard.texts)
            names = [*identities(shard.texts, seen), *shard.left_out]
            texts |= {name[:ID_DIGITS]: name[ID_DIGITS:] for name in names}
        return Known(texts, count, sound, damaged)

    def remove(self, number: int) -> None:
        """Remove the files of a shard, the one that makes it complete first."""
        for kind in ("shard", "texts", "embeddings", "hidden"):
            shard_path(self.folder, kind, number).unlink(missing_ok=True)

    def close_gaps(self) -> None:
        """Number the shards from 0 on, in their order."""
        for place, number in enumerate(self._numbers()):
            if place != number:
                self.write(place, self.read(number))
                self.remove(number)

    def _numbers(self) -> list[int]:
        """The numbers of all shards, also behind a gap."""
        kind = "shard" if self.version > 1 else "texts"
        found = (re.fullmatch(rf"{kind}-(\d{{5,9}})\.jsonl?", path.name, re.ASCII) for path in self.folder.iterdir())
        return sorted(int(name[1]) for name in found if name)

    def load(self) -> EmbeddedTexts:
        """All texts with their embeddings, in memory. Texts that came to the corpus later are the last.

        Raises:
            CorpusError: there are none yet, or a file is missing, damaged or exchanged.
        """
        numbers, there = range(self.shards()), self._numbers()
        if there and there[-1] >= len(numbers):
            raise CorpusError(f"'{self.folder}' lacks shard {len(numbers)}: {REPAIR}")
        if not numbers and not self.meta.texts:
            raise CorpusError(f"'{self.folder}' contains no embeddings yet: run `steermoe embed` again to resume")
        if self.meta.complete and self.version > 1:
            if len(numbers) != self.meta.shards:
                raise CorpusError(f"'{self.folder}' has {len(numbers)} of {self.meta.shards} shards: {REPAIR}")
            if self._hash_of_records(numbers) != self.meta.shards_sha256:
                raise CorpusError(f"'{self.folder}' has shards that were exchanged or changed: {REPAIR}")
        shards = [self.read(number) for number in numbers]
        texts = [text for shard in shards for text in shard.texts]
        if self.meta.complete and len(texts) != self.meta.texts:
            raise CorpusError(f"'{self.folder}' has {len(texts)} of {self.meta.texts} texts: {REPAIR}")
        tokens = np.array([count for shard in shards for count in shard.tokens], dtype=np.int64)
        hidden = [shard.hidden for shard in shards if shard.hidden is not None and len(shard.hidden)]
        matrices = [shard.frequency for shard in shards]
        del shards
        return EmbeddedTexts(self.meta, texts, tokens, _joined(matrices), _joined(hidden) if hidden else None)


@dataclass(frozen=True)
class Known:
    """What a folder of embeddings holds.

    Attributes:
        texts: for each text, also those without tokens, the two parts of its `identity`: id and content.
        count: number of texts with embeddings.
        sound, damaged: numbers of shards.
    """

    texts: dict[str, str]
    count: int
    sound: list[int]
    damaged: list[int]


ID_DIGITS = 32
"""The part of an `identity` that identifies the text; the rest is its content."""


def identities(texts: Sequence[Text], seen: "Counter[str]") -> Iterator[str]:
    """The identity of each text. `seen` counts the ids so far, since a corpus may repeat them."""
    for text in texts:
        yield identity(text, seen[text.id])
        seen[text.id] += 1


def _joined(matrices: list[Floats]) -> Floats:
    """Matrices one below the other, as `np.concatenate`; each is freed once it is copied, so that none is there twice.

    Args:
        matrices: emptied.
    """
    joined = np.empty((sum(map(len, matrices)), *matrices[0].shape[1:]), dtype=matrices[0].dtype)
    start = 0
    while matrices:
        matrix = matrices.pop(0)
        joined[start : start + len(matrix)] = matrix
        start += len(matrix)
    return joined


def is_store(folder: Path | str) -> bool:
    """Whether a folder contains embeddings, or what is left of them."""
    path = Path(folder)
    has_shard = all(shard_path(path, kind, 0).is_file() for kind in ("embeddings", "texts"))
    return has_shard or ((path / META).is_file() and not (path / "config.json").is_file())


def _hash_of(content: dict[str, Any]) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode())


def _parse_meta(data: dict[str, Any], version: Any) -> EmbeddingMeta:
    """The metadata, checked.

    Raises:
        ValueError, TypeError, KeyError: it is damaged.
    """
    if type(version) is not int or version < 1:
        raise ValueError(f"format version {version!r}")
    if version > 1 and data.pop("sha256") != _hash_of({"format_version": version, **data}):
        raise ValueError("its hash is wrong")
    known = {field.name: field.type for field in fields(EmbeddingMeta) if version >= SINCE.get(field.name, 1)}
    defaults = {field.name for field in fields(EmbeddingMeta) if field.default is not MISSING}
    if wrong := set(data) ^ set(known) if version > 1 else set(data) ^ (set(known) - (defaults - set(data))):
        raise KeyError(*sorted(wrong))
    if not isinstance(data["layers"], list) or not data["layers"] or not all(type(n) is int for n in data["layers"]):
        raise TypeError(f"layers are {data['layers']!r:.80}")
    for name, kind in known.items():
        if name in data and name != "layers" and type(data[name]) is not kind:
            raise TypeError(f"{name} is {data[name]!r:.80}")
    return EmbeddingMeta(**{**data, "layers": tuple(data["layers"])})
