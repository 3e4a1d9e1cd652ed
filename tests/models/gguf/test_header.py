"""Reading the header of a GGUF file; damaged, dense and foreign files."""

import struct

import pytest
from gguf import GGUFReader, GGUFWriter

from steermoe.errors import CompatibilityError, ModelError, UnsupportedModel
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
    with pytest.raises(ModelError, match="can't read"):
        read_gguf(tmp_path / "no.gguf")
