"""One checkpoint has one fingerprint: loaded, in its files, sharded, as a GGUF file, in int8, in vLLM's hands."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from steermoe.models.description import describe, shape_of_config
from steermoe.models.gguf.export import export_gguf
from steermoe.models.gguf.header import read_gguf
from steermoe.models.loading import LoadedModel, load
from steermoe.models.quantization import quantize_model
from steermoe.models.stored import stored_fingerprint
from steermoe.routing.routers import find_routers, gates_of, shape_of
from tests.support import tiny_ggufs
from tests.support import tiny_models as tiny

FAMILIES = ["mixtral", "gpt_oss", "deepseek_v3", "granitemoeshared", "qwen3_moe"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Mixtral, whose checkpoints name their tensors otherwise than its modules are named."""
    folder = tmp_path_factory.mktemp("stored") / "base"
    model = tiny.build("mixtral")
    model.save_pretrained(folder)
    return SimpleNamespace(
        folder=folder, model=model, gates=gates_of(find_routers(model)), fingerprint=shape_of(model).fingerprint
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_files_agree_with_the_loaded_model(family, tmp_path):
    model = tiny.build(family)
    gates = gates_of(find_routers(model))
    expected = shape_of(model).fingerprint
    model.bfloat16().save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert stored_fingerprint(tmp_path / "one", gates) == expected
    assert stored_fingerprint(tmp_path / "shards", gates) == expected


def test_the_names_in_the_files_are_others(checkpoint):
    names = load_file(checkpoint.folder / "model.safetensors")
    assert not {gate.name for gate in checkpoint.gates} & set(names)
    assert stored_fingerprint(checkpoint.folder, checkpoint.gates) == checkpoint.fingerprint


@pytest.mark.parametrize("quantization", ["f32", "bf16", "q8_0"])
def test_a_gguf_file_has_that_of_the_model_it_was_made_of(quantization, tmp_path):
    loaded = tiny_ggufs.build("mixtral")
    path = export_gguf(loaded, tmp_path / "renamed.gguf", quantization)
    assert read_gguf(path).shape.fingerprint == loaded.shape.fingerprint != ""
    assert stored_fingerprint(path, ()) == loaded.shape.fingerprint


def test_quantised_gates_of_a_gguf_file_are_unknown(tmp_path, monkeypatch):
    loaded = tiny_ggufs.build("mixtral")
    monkeypatch.setattr("steermoe.models.gguf.export.ROUTER", "no such tensor")
    path = export_gguf(loaded, tmp_path / "x.gguf", "q8_0")
    assert read_gguf(path).fingerprint == ""
    assert LoadedModel("x", loaded.model, loaded.tokenizer, str(path)).shape.fingerprint == ""


def test_int8_keeps_it(checkpoint):
    model = tiny.build("mixtral")
    quantize_model(model)
    assert shape_of(model).fingerprint == checkpoint.fingerprint


def test_the_description_and_vllm_know_it_without_weights(checkpoint):
    config = SimpleNamespace(hf_config=checkpoint.model.config, model=str(checkpoint.folder), trust_remote_code=False)
    assert describe(checkpoint.folder).shape.fingerprint == checkpoint.fingerprint
    assert shape_of_config(config).fingerprint == checkpoint.fingerprint


def test_a_float16_copy_asks_the_files(tiny_checkpoint, tiny_model):
    half = load(tiny_checkpoint, dtype="float16")
    assert shape_of(half.model).fingerprint != tiny_model.shape.fingerprint  # float32 does not fit into float16
    assert half.shape.fingerprint == tiny_model.shape.fingerprint != ""


def without_gates(tensors):
    return {name: tensor for name, tensor in tensors.items() if "gate.weight" not in name}


def with_a_second_gate(tensors):
    gates = {
        name.replace("gate.weight", "router.weight"): t + 1 for name, t in tensors.items() if "gate.weight" in name
    }
    return {**tensors, **gates}


def with_other_gates(tensors):
    return {name: t.to(torch.float8_e4m3fn) if "gate.weight" in name else t for name, t in tensors.items()}


def of_layers_that_draft(tensors):
    return {**tensors, **{f"mtp.{n}": t + 1 for n, t in tensors.items() if "gate.weight" in n}}


@pytest.mark.parametrize(
    ("change", "is_known"),
    [(without_gates, False), (with_a_second_gate, False), (with_other_gates, False), (of_layers_that_draft, True)],
)
def test_what_could_be_two_gates_is_none(checkpoint, tmp_path, change, is_known):
    save_file(change(load_file(checkpoint.folder / "model.safetensors")), tmp_path / "model.safetensors")
    assert stored_fingerprint(tmp_path, checkpoint.gates) == (checkpoint.fingerprint if is_known else "")


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"\xff" * 8, b"\x02" + b"\x00" * 7 + b"[]", b"\x05\x00"])
def test_damaged_files_are_unknown(checkpoint, tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert stored_fingerprint(tmp_path, checkpoint.gates) == ""


def test_files_that_are_cut_off_missing_or_of_another_kind_are_unknown(checkpoint, tmp_path):
    content = (checkpoint.folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 9])
    assert stored_fingerprint(tmp_path, checkpoint.gates) == ""
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    assert stored_fingerprint(tmp_path, checkpoint.gates) == ""
    index = {"weight_map": {"model.layers.0.block_sparse_moe.gate.weight": "../../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert stored_fingerprint(tmp_path, checkpoint.gates) == ""
    assert stored_fingerprint("no-such-org/no-such-model", checkpoint.gates) == ""
    assert stored_fingerprint(tmp_path / "none", checkpoint.gates) == ""
    assert stored_fingerprint(tmp_path / "none.gguf", checkpoint.gates) == ""
