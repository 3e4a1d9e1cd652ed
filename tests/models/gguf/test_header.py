"""Reading the header of a GGUF file; damaged, dense, foreign and hostile files."""

import struct
import time

import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from steermoe.engines.auto import with_hint
from steermoe.errors import CompatibilityError, ModelError, UnsupportedModel
from steermoe.models.gguf import header
from steermoe.models.gguf.header import is_moe, read_gguf, read_header
from tests.support import tiny_ggufs


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    return tiny_ggufs.write(tiny_ggufs.build("mixtral"), tmp_path_factory.mktemp("gguf"))


def test_header_as_the_gguf_package_reads_it(gguf):
    metadata, shapes = read_header(gguf)
    reader = GGUFReader(gguf)
    assert shapes == {tensor.name: tuple(int(size) for size in tensor.shape) for tensor in reader.tensors}
    for name, value in metadata.items():
        assert reader.fields[name].contents() == value
    assert "tokenizer.ggml.tokens" in metadata


def test_long_lists_are_skipped(gguf, monkeypatch):
    monkeypatch.setattr("steermoe.models.gguf.header.MAX_KEPT", 3)
    metadata, shapes = read_header(gguf)
    assert metadata["tokenizer.ggml.tokens"] is None
    assert metadata["llama.expert_count"] == 8
    assert len(shapes) == len(GGUFReader(gguf).tensors)


def written(path, **settings):
    """A file with a few small tensors."""
    import numpy as np

    tensors = settings.pop("tensors", ["blk.0.ffn_gate_inp.weight"])
    writer = GGUFWriter(path, settings.pop("arch", "llama"))
    for name, value in settings.items():
        getattr(writer, f"add_{name}")(value)
    for name in tensors:
        writer.add_tensor(name, np.zeros((4, 3), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_dense_files(tmp_path):
    path = written(tmp_path / "dense.gguf", block_count=1, tensors=["blk.0.ffn_up.weight"])
    with pytest.raises(UnsupportedModel, match=r"dense.gguf' \(llama\) has no router to steer"):
        read_gguf(path)
    assert not is_moe(path)


def test_router_biases_groups_and_drafting_layers(tmp_path):
    names = [f"blk.{layer}.ffn_gate_inp.weight" for layer in (1, 2, 3)]
    path = written(
        tmp_path / "x.gguf",
        arch="glm4moe",
        block_count=4,
        nextn_predict_layers=1,
        expert_used_count=2,
        expert_group_count=2,
        tensors=[*names, "blk.2.ffn_gate_inp.bias"],
    )
    found = read_gguf(path)
    assert found.layers == (1, 2)  # the last one only drafts
    assert [(router.num_experts, router.top_k) for router in found.routers] == [(4, 2)] * 2
    assert found.node == "ffn_moe_logits_biased"
    assert not found.chooses_by_logits
    assert found.model_types == ("glm4moe",)


def test_hash_routers_are_left_out(tmp_path):
    names = ["blk.0.ffn_gate_inp.weight", "blk.0.ffn_gate_tid2eid.weight", "blk.1.ffn_gate_inp.weight"]
    assert read_gguf(written(tmp_path / "x.gguf", arch="deepseek4", block_count=2, tensors=names)).layers == (1,)


def test_vectors_of_the_same_model_in_transformers_fit(gguf, make_vector):
    shape = read_gguf(gguf).shape
    fits = make_vector(layers=range(2))
    fits.check_fits(shape)
    with pytest.raises(CompatibilityError, match=r"has 3x8 experts, tiny-mixtral-f32 has 2x8"):
        make_vector().check_fits(shape)
    foreign = make_vector(layers=range(2), info=fits.info.__class__(architecture="olmoe"))
    with pytest.raises(CompatibilityError, match="is for olmoe models, tiny-mixtral-f32 is mixtral"):
        foreign.check_fits(shape)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"nonsense, not a model",
        lambda data: data[:4] + struct.pack("<I", 99) + data[8:],
        lambda data: data[:700],
        lambda data: data[:24] + struct.pack("<Q", 1 << 60) + data[32:],
        lambda data: data[:8] + struct.pack("<QQ", 1 << 40, 1 << 40) + data[24:],
    ],
    ids=["empty", "text", "version", "cut off", "endless text", "endless counts"],
)
def test_damaged_files(gguf, tmp_path, damage):
    path = tmp_path / "bad.gguf"
    path.write_bytes(damage(gguf.read_bytes()))
    with pytest.raises(ModelError, match=r"bad.gguf' is not a GGUF file or is cut off"):
        read_gguf(path)
    assert not is_moe(path)


def test_missing_files(tmp_path):
    with pytest.raises(ModelError, match="no GGUF file"):
        read_gguf(tmp_path / "no.gguf")


# ---- hostile headers ----

UINT8, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 0, 4, 5, 6, 7, 8, 9, 10
ROUTER = "blk.0.ffn_gate_inp.weight"


def text(value: str | bytes) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content)) + content


def setting(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def uint32(key: str, value: int) -> bytes:
    return setting(key, UINT32, struct.pack("<I", value))


def listed(inner: int, *values: bytes) -> bytes:
    return struct.pack("<IQ", inner, len(values)) + b"".join(values)


def tensor(name: str, *shape: int, kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def raw(path, settings=(), tensors=(tensor(ROUTER, 3, 4),), data: int = 48, counts=None):
    """A file of any header; what is not given is a model with one router of 3 x 4."""
    usual = {
        "general.architecture": setting("general.architecture", STRING, text("mixtral")),
        "mixtral.block_count": uint32("mixtral.block_count", 1),
    }
    given = {each[8 : 8 + struct.unpack_from("<Q", each)[0]].decode(): each for each in settings}
    pairs = list({**usual, **given}.values())
    content = b"GGUF" + struct.pack("<IQQ", 3, *(counts or (len(tensors), len(pairs))))
    content += b"".join(pairs) + b"".join(tensors)
    content += b"\0" * (-len(content) % 32) + b"\0" * data
    path.write_bytes(content)
    return path


def test_the_usual_raw_file_is_right(tmp_path):
    assert read_gguf(raw(tmp_path / "x.gguf")).routers[0].num_experts == 4


M = "mixtral."
EMPTY = listed(UINT32)
TWO = setting(M + "block_count", STRING, text("two"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([TWO], "block_count is 'two', expected a whole number, 0 or more"),
        ([setting(M + "block_count", FLOAT32, struct.pack("<f", 2.0))], "block_count is 2.0, expected"),
        ([setting(M + "block_count", BOOL, b"\1")], "block_count is True, expected"),
        ([setting(M + "block_count", INT32, struct.pack("<i", -1))], "block_count is -1, expected"),
        ([setting(M + "block_count", UINT64, b"\xff" * 8)], "block_count is 18446744073709551615, expected"),
        ([setting(M + "block_count", ARRAY, EMPTY)], r"block_count is \[\], expected"),
        ([setting(M + "expert_used_count", ARRAY, EMPTY)], r"expert_used_count is \[\], expected"),
        ([setting(M + "expert_used_count", ARRAY, listed(STRING, text("2")))], r"expert_used_count is \['2'\]"),
        ([uint32(M + "expert_used_count", 0)], "expert_used_count is 0, expected 1 to 4"),
        ([uint32(M + "expert_used_count", 5)], "expert_used_count is 5, expected 1 to 4"),
        ([setting(M + "attention.head_count", ARRAY, EMPTY)], r"attention.head_count is \[\], expected"),
        ([setting(M + "attention.head_count_kv", ARRAY, EMPTY)], r"attention.head_count_kv is \[\], expected"),
        ([setting(M + "attention.key_length", STRING, text("x"))], "attention.key_length is 'x', expected"),
        ([setting(M + "embedding_length", STRING, text("x"))], "embedding_length is 'x', expected"),
        (
            [setting(M + "context_length", STRING, text("\x1b[31mlong"))],
            r"context_length is '\\x1b\[31mlong', expected",
        ),
        ([setting(M + "expert_group_count", STRING, text("x"))], "expert_group_count is 'x', expected"),
        ([setting(M + "nextn_predict_layers", ARRAY, EMPTY)], "nextn_predict_layers is"),
        ([uint32("general.architecture", 7)], "general.architecture is 7, expected a name"),
        ([setting("general.architecture", STRING, text("a\nb"))], r"general.architecture is 'a\\nb', expected a name"),
        ([setting("steermoe.model_type", STRING, text("[/x]"))], r"steermoe.model_type is '\[/x\]', expected a name"),
    ],
)
def test_settings_that_can_not_be(tmp_path, settings, message):
    path = raw(tmp_path / "bad.gguf", settings)
    with pytest.raises(ModelError, match=rf"bad.gguf': its {message}.*: the file is damaged, get it again") as error:
        read_gguf(path)
    assert str(error.value).isprintable()
    assert not is_moe(path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([tensor(ROUTER)], r"router in layer 0 has the shape \[\], expected"),
        ([tensor(ROUTER, 4)], r"has the shape \[4\], expected"),
        ([tensor(ROUTER, 3, 4, 2)], r"has the shape \[3, 4, 2\], expected"),
        ([tensor(ROUTER, 0, 0)], r"has the shape \[0, 0\], expected"),
        ([tensor(ROUTER, 0, 2**63)], r"has the shape \[0, 9223372036854775808\], expected"),
    ],
)
def test_routers_that_can_not_be(tmp_path, tensors, message):
    with pytest.raises(ModelError, match=message):
        read_gguf(raw(tmp_path / "bad.gguf", tensors=tensors, data=96))


def test_a_router_in_a_layer_that_no_model_has(tmp_path):
    path = raw(
        tmp_path / "bad.gguf",
        [setting(M + "block_count", UINT32, struct.pack("<I", 2**31))],
        [tensor("blk.100000000.ffn_gate_inp.weight", 3, 4)],
    )
    with pytest.raises(ModelError, match="router in layer 100000000, expected layers below 65536"):
        read_gguf(path)


def test_fewer_counts_of_experts_than_layers(tmp_path):
    path = raw(
        tmp_path / "bad.gguf",
        [uint32(M + "block_count", 2), setting(M + "expert_used_count", ARRAY, listed(UINT32, b"\1\0\0\0"))],
        [tensor("blk.1.ffn_gate_inp.weight", 3, 4)],
    )
    with pytest.raises(ModelError, match="expert_used_count has 1 numbers, expected one for each layer up to 1"):
        read_gguf(path)


def nested(depth: int) -> bytes:
    return b"".join(struct.pack("<IQ", ARRAY, 1) for _ in range(depth)) + listed(UINT8, b"\0")


@pytest.mark.parametrize(
    ("settings", "counts", "message"),
    [
        ([setting("x", ARRAY, nested(900))], None, "list of lists"),
        ([setting("x", ARRAY, listed(ARRAY, *[listed(UINT8)] * 1_700_000))], None, "list of lists"),
        ([setting("x", 13, b"")], None, "unknown kind 13"),
        ([], (0, 2**63), "claims 0 tensors and 9223372036854775808 settings"),
        ([], (2**40, 1), "claims 1099511627776 tensors"),
        ([setting("x", ARRAY, struct.pack("<IQ", STRING, 2**63))], None, "goes past the end"),
        ([setting("x", ARRAY, struct.pack("<IQ", UINT64, 2000))], None, "goes past the end"),
        ([setting("x", ARRAY, listed(STRING, *[text("")] * 2**22, text("")))], None, "more than 4194304 texts"),
        ([uint32("general.alignment", 0)], None, "general.alignment is 0"),
        ([setting("general.alignment", STRING, text("x"))], None, "general.alignment is 'x'"),
    ],
    ids=[
        "nested",
        "short lists",
        "kind",
        "settings",
        "tensors",
        "long list",
        "cut list",
        "texts",
        "no alignment",
        "alignment",
    ],
)
def test_claims_are_bounded_in_time(tmp_path, settings, counts, message):
    path = raw(tmp_path / "bad.gguf", settings, counts=counts)
    start = time.process_time()
    with pytest.raises(ModelError, match=rf"bad.gguf' is not a GGUF file or is cut off.*{message}") as error:
        read_gguf(path)
    assert str(error.value).isprintable()
    assert time.process_time() - start < 5


@pytest.mark.parametrize("counts", [(0, 2**63), (0, header.MAX_KEYS), (header.MAX_TENSORS, 0)])
def test_a_sparse_file_of_zeros(tmp_path, counts):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts))
    with path.open("r+b") as file:
        file.truncate(2**32)
    start = time.process_time()
    with pytest.raises(ModelError, match=r"bad.gguf' is not a GGUF file or is cut off"):
        read_gguf(path)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("limit", ["MAX_TOTAL_VALUES", "MAX_TOTAL_BYTES"])
def test_what_is_kept_is_bounded(tmp_path, monkeypatch, limit):
    lists = [setting(f"k{number}", ARRAY, listed(STRING, text("x"), text("y"))) for number in range(9)]
    path = raw(tmp_path / "x.gguf", lists)
    read_gguf(path)
    monkeypatch.setattr(header, limit, 17)
    with pytest.raises(ModelError, match="more than 17"):
        read_gguf(path)


def test_long_texts_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(header, "MAX_TEXT", 40)
    path = raw(tmp_path / "x.gguf", [setting("tokenizer.chat_template", STRING, text("x" * 41))])
    assert read_header(path)[0]["tokenizer.chat_template"] is None


def test_names_twice(tmp_path):
    path = raw(tmp_path / "x.gguf", tensors=[tensor(ROUTER, 3, 4), tensor(ROUTER, 3, 4)])
    with pytest.raises(ModelError, match=r"name 'blk.0.ffn_gate_inp.weight' is empty, too long or there twice"):
        read_gguf(path)


@pytest.mark.parametrize("missing", [1, 48])
def test_a_file_whose_tensors_are_cut_off(tmp_path, gguf, missing):
    whole = tmp_path / "whole.gguf"
    whole.write_bytes(gguf.read_bytes()[:-32])  # up to 31 bytes at the end are not used
    for path in (raw(tmp_path / "raw.gguf"), whole):
        path.write_bytes(path.read_bytes()[:-missing])
        with pytest.raises(ModelError, match=r"is cut off \(it has \d+ bytes, its tensors need \d+\): get it again"):
            read_gguf(path)
        hint = with_hint(ModelError("transformers can't load it"), path)
        assert "is cut off" in str(hint)
        assert "llama.cpp can run it" not in str(hint)


def test_a_pipe_is_not_read(tmp_path):
    import os

    os.mkfifo(tmp_path / "x.gguf")
    with pytest.raises(ModelError, match="it is no regular file"):
        read_gguf(tmp_path / "x.gguf")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    words = setting("tokenizer.ggml.tokens", ARRAY, listed(STRING, *[text("ab")] * 5))
    return raw(path, [words, uint32(M + "expert_used_count", 2), uint32(M + "attention.head_count", 2)]).read_bytes()


HOSTILE = st.one_of(
    st.binary(max_size=8),
    st.sampled_from([0, 1, 8, 9, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]).map(lambda n: struct.pack("<Q", n)),
    st.sampled_from([0, 8, 9, 13, 2**31, 2**32 - 1]).map(lambda n: struct.pack("<I", n)),
)


@pytest.mark.fuzz
@given(edits=st.lists(st.tuples(st.floats(0, 1), HOSTILE), max_size=4), cut=st.floats(0.5, 1))
def test_a_damaged_header_is_described_or_an_error(tmp_path, small, edits, cut):
    content = small
    for share, other in edits:
        at = round(share * len(content))
        content = content[:at] + other + content[at + len(other) :]
    path = tmp_path / "x.gguf"
    path.write_bytes(content[: round(cut * len(content))])
    start = time.process_time()
    try:
        found = read_gguf(path)
    except ModelError as error:
        message = str(error)
        assert message.isprintable()
        assert len(message) < 600
    else:
        assert all(1 <= router.top_k <= router.num_experts <= 2**16 for router in found.routers)
        assert found.cache_numbers >= 0
    assert time.process_time() - start < 5
