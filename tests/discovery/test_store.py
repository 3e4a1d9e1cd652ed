"""Folders of embeddings without a model: hashes, damage of every kind, the earlier format, and what is refused."""

import contextlib
import json
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe.discovery import store as store_module
from steermoe.discovery.store import EmbeddingMeta, EmbeddingStore, Text, is_store
from steermoe.errors import CorpusError

LAYERS, EXPERTS, HIDDEN = 2, 4, 3
META = EmbeddingMeta("tiny", "mixtral", (0, 1), EXPERTS, 2, hidden=True, fingerprint="hf 0", dtype="float32")


def shard_of(number: int, count: int):
    random = np.random.default_rng(number)
    texts = [Text(f"t{number}-{n}", f"text {n}\nof 'shard' {number}", "label") for n in range(count)]
    frequency = random.dirichlet(np.ones(EXPERTS), (count, LAYERS)).astype(np.float32)
    return texts, [3 + n for n in range(count)], frequency, random.normal(size=(count, HIDDEN)).astype(np.float32)


def make(folder: Path, *, version: int = 2) -> EmbeddingStore:
    """Two shards of 3 and 2 texts; with version 1 as earlier releases wrote them."""
    if version == 1:
        folder.mkdir()
        meta = {"model": "tiny", "architecture": "mixtral", "layers": [0, 1], "num_experts": EXPERTS, "top_k": 2}
        meta |= {"features": "counts", "tokens": "all", "hidden": True, "max_tokens": 512, "complete": False}
        (folder / "meta.json").write_text(json.dumps({"format_version": 1, **meta, "texts": 0}))
        store = EmbeddingStore.open(folder)
    else:
        store = EmbeddingStore.create(folder, META)
    for number, count in enumerate((3, 2)):
        store.write_shard(number, *shard_of(number, count))
    store.finish(5)
    return store


def numbers_of(folder: Path) -> tuple:
    loaded = EmbeddingStore.open(folder).load()
    matrices = loaded.frequency, loaded.tokens, loaded.hidden
    return loaded.meta, list(loaded.texts), *((m.dtype, m.shape, m.tobytes()) for m in matrices)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The files of a folder, and its numbers."""
    folder = tmp_path_factory.mktemp("store") / "emb"
    make(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}, numbers_of(folder)


def rewrite(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.name not in files:
            path.unlink()
    for name, content in files.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            path.write_bytes(content)


@pytest.fixture(scope="module")
def damaged_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged") / "emb"


@st.composite
def damages(draw, names: list[str]):
    """A change of the files: of bits, of a piece, of a file's end, of its presence, or an exchange of two files."""
    name, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
    kind = draw(st.sampled_from(["bit", "piece", "end", "lost", "exchange", "copy", "shards"]))
    place, piece = draw(st.integers(0, 10**6)), draw(st.binary(max_size=9))
    return kind, name, other, place, piece


def damage(files: dict[str, bytes], change) -> dict[str, bytes]:
    kind, name, other, place, piece = change
    files = dict(files)
    content = files[name]
    place %= len(content) + 1
    if kind == "bit" and place < len(content):
        files[name] = content[:place] + bytes([content[place] ^ (1 << len(piece) % 8)]) + content[place + 1 :]
    elif kind == "piece":
        files[name] = content[:place] + piece + content[place + len(piece) * (place % 2) :]
    elif kind == "end":
        files[name] = content[:place]
    elif kind == "lost":
        del files[name]
    elif kind == "exchange":
        files[name], files[other] = files[other], files[name]
    elif kind == "copy":
        files[name] = files[other]
    elif kind == "shards":  # consistent files of two shards, exchanged whole
        swapped = {file.replace("00000", "x").replace("00001", "00000").replace("x", "00001"): file for file in files}
        files = {new: files[old] for new, old in swapped.items()}
    return files


NAMES = ["meta.json", *(f"{kind}-0000{n}.{end}" for n in (0, 1) for kind, end in
         (("shard", "json"), ("embeddings", "npy"), ("hidden", "npy"), ("texts", "jsonl")))]  # fmt: skip


@pytest.mark.fuzz
@given(change=damages(NAMES))
def test_damage_is_an_error_or_changes_nothing(sound, damaged_folder, change):
    files, numbers = sound
    rewrite(damaged_folder, damage(files, change))
    with contextlib.suppress(CorpusError):
        assert numbers_of(damaged_folder) == numbers


def test_every_bit_of_the_numbers_is_covered(sound, damaged_folder):
    files, _ = sound
    for name in ("embeddings-00001.npy", "hidden-00000.npy", "texts-00000.jsonl"):
        for place in range(0, len(files[name]), 7):
            rewrite(damaged_folder, damage(files, ("bit", name, name, place, b"abc")))
            with pytest.raises(CorpusError, match=r"has changed since it was written"):
                numbers_of(damaged_folder)


def test_the_files_are_those_of_the_docstring(sound):
    assert sorted(sound[0]) == sorted(NAMES)


@pytest.mark.parametrize("name", ["shard-00001.json", "shard-00000.json", "meta.json"])
def test_a_lost_file_is_an_error(sound, damaged_folder, name):
    files, _ = sound
    rewrite(damaged_folder, {file: content for file, content in files.items() if file != name})
    assert is_store(damaged_folder)
    with pytest.raises(CorpusError, match=r"shard|meta\.json"):
        numbers_of(damaged_folder)


# ---- what earlier versions wrote ----


def test_folders_of_earlier_versions_are_read(tmp_path, sound):
    store = make(tmp_path / "emb", version=1)
    assert store.version == 1
    assert not list((tmp_path / "emb").glob("shard-*"))
    meta = json.loads((tmp_path / "emb" / "meta.json").read_text())
    assert (meta["format_version"], meta["complete"], meta["texts"]) == (1, True, 5)
    assert not {"fingerprint", "sha256", "shards"} & set(meta)
    assert numbers_of(tmp_path / "emb")[1:] == sound[1][1:]
    EmbeddingStore.create(tmp_path / "emb", META)  # same options as far as they are known
    with pytest.raises(CorpusError, match="made with max_tokens 512, not 5"):
        EmbeddingStore.create(
            tmp_path / "emb", EmbeddingMeta("tiny", "mixtral", (0, 1), EXPERTS, 2, hidden=True, max_tokens=5)
        )


def test_a_folder_of_version_1_may_lack_what_has_a_default(tmp_path):
    store = make(tmp_path / "emb", version=1)
    path = tmp_path / "emb" / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({name: meta[name] for name in meta if name not in ("features", "tokens", "max_tokens")}))
    assert EmbeddingStore.open(tmp_path / "emb").meta == store.meta
    path.write_text(json.dumps({name: meta[name] for name in meta if name != "top_k"}))
    with pytest.raises(CorpusError, match="top_k"):
        EmbeddingStore.open(tmp_path / "emb")


def put(name: str, matrix) -> tuple[str, bytes]:
    import io

    buffer = io.BytesIO()
    np.save(buffer, matrix)
    return name, buffer.getvalue()


def row(**fields) -> bytes:
    return json.dumps({"id": "a", "label": "", "tokens": 3, "text": "x", **fields}).encode() + b"\n"


GOOD = np.full((2, LAYERS, EXPERTS), 0.25, np.float32)
HUGE_HEADER = b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 2, 4), }".ljust(117) + b"\n"  # noqa: E501 # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (*put("embeddings-00001.npy", GOOD * np.nan), "contain NaN or infinity"),
        (*put("embeddings-00001.npy", GOOD * 2), "a row sums to 2, expected 1"),
        (*put("embeddings-00001.npy", GOOD - np.float32([0.5, -0.5, 0, 0])), "negative numbers"),
        (*put("embeddings-00001.npy", GOOD.astype(np.float64)), "holds float64"),
        (*put("embeddings-00001.npy", GOOD[:1]), "2 texts and 1 embeddings"),
        (*put("embeddings-00001.npy", GOOD[:, :1]), r"rows of shape \(1, 4\), expected \(2, 4\)"),
        (*put("embeddings-00001.npy", GOOD[0]), "2 dimensions"),
        ("embeddings-00001.npy", b"", "is damaged"),
        ("embeddings-00001.npy", b"\x93NUMPY\x09\x00", "is damaged"),
        ("embeddings-00001.npy", HUGE_HEADER, "its header claims"),
        (*put("hidden-00001.npy", np.full((2, 3), np.inf, np.float32)), "hidden states contain NaN or infinity"),
        ("texts-00001.jsonl", row() + b"[]\n", "line 2 of .* is damaged"),
        ("texts-00001.jsonl", row() + b"[" * 100_000 + b"\n", "line 2 of .* is damaged"),
        ("texts-00001.jsonl", row() + row(text=3), "line 2 of .* is damaged"),
        ("texts-00001.jsonl", row() + row(tokens="3"), "line 2 of .* is damaged"),
        ("texts-00001.jsonl", row() + row(tokens=2**70), "line 2 of .* is damaged"),
        ("texts-00001.jsonl", row() + row()[:-2], "is cut short"),
        ("texts-00001.jsonl", row(), "1 texts and 2 embeddings"),
        ("texts-00001.jsonl", None, "has 3 of 5 texts"),
        ("texts-00000.jsonl", None, "lacks shard 0"),
    ],
)
def test_foreign_content_is_one_line(tmp_path, name, content, message):
    make(tmp_path / "emb", version=1)
    path = tmp_path / "emb" / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(CorpusError, match=message) as caught:
        EmbeddingStore.open(tmp_path / "emb").load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"layers": []}, {"layers": [0, "1"]}, {"num_experts": "4"}, {"complete": 1}, {"new": 1}, {"format_version": 0}],
    ids=str,
)
def test_damaged_metadata_is_one_line(tmp_path, change):
    make(tmp_path / "emb", version=1)
    path = tmp_path / "emb" / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CorpusError, match=r"meta\.json' is damaged"):
        EmbeddingStore.open(tmp_path / "emb")


@pytest.mark.parametrize("factor", [np.nan, 2])
def test_numbers_that_are_no_embeddings_are_not_stored(tmp_path, factor):
    store = EmbeddingStore.create(tmp_path / "emb", META)
    texts, tokens, frequency, hidden = shard_of(0, 2)
    with pytest.raises(CorpusError, match="can't store embeddings"):
        store.write_shard(0, texts, tokens, frequency * np.float32(factor), hidden)


def test_matrices_are_joined_without_a_second_copy_of_all():
    matrices = [
        np.random.default_rng(number).random((count, 2, 3), np.float32) for number, count in enumerate((3, 0, 5))
    ]
    expected = np.concatenate(matrices)
    kept = [weakref.ref(matrix) for matrix in matrices]
    joined = store_module._joined(matrices)
    assert np.array_equal(joined, expected)
    assert joined.dtype == np.float32
    assert [one() for one in kept] == [None, None, None]
