"""Baked into a GGUF file: which bytes change, which tensors are added, and that undoing it gives the file back."""

import json
import struct

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from steermoe.errors import ModelError
from steermoe.models.baking.found import baked_into
from steermoe.models.baking.record import Steering
from steermoe.models.gguf import bake as baking
from steermoe.models.gguf.bake import KEY, GGUFFile, undo
from steermoe.models.gguf.header import read_gguf, read_header
from tests.support import tiny_ggufs

STEERING = {kind: Steering(kind, "sport", 2.0, "0" * 64) for kind in ("logits", "choice")}


def pushes(source):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(router.num_experts, generator=generator) for router in source.shape.routers]


def contents(path):
    """The bytes of each tensor by name, as the gguf package reads them."""
    return {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(path).tensors}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return {
        family: tiny_ggufs.write(tiny_ggufs.build(family), folder)
        for family in ("gpt_oss", "deepseek_v2", "deepseek_v3", "mixtral")
    }


@pytest.mark.parametrize(
    ("family", "kind", "is_added"),
    [("gpt_oss", "logits", False), ("deepseek_v3", "choice", False), ("deepseek_v2", "choice", True)],
)
def test_bake_and_undo(files, tmp_path, family, kind, is_added):
    source = GGUFFile(files[family])
    added = pushes(source)
    done = source.bake(STEERING[kind], added, tmp_path / "out.gguf")
    before, after = contents(files[family]), contents(tmp_path / "out.gguf")
    names = [baking.NAMES[kind].format(router.layer) for router in source.shape.routers]
    assert set(after) - set(before) == (set(names) if is_added else set())
    assert {name for name in before if before[name] != after[name]} == (set() if is_added else set(names))
    for name, push in zip(names, added, strict=True):
        was = np.frombuffer(before.get(name, bytes(4 * len(push))), np.float32)
        np.testing.assert_allclose(np.frombuffer(after[name], np.float32), was + push.numpy(), atol=1e-6)
    assert (done.tensors, done.dtype) == (len(names), "F32")
    baked = read_gguf(tmp_path / "out.gguf")
    assert baked.fingerprint == read_gguf(files[family]).fingerprint != ""
    assert baked.chooses_by_logits == (kind == "logits")
    assert json.loads(read_header(tmp_path / "out.gguf")[0][KEY])["kind"] == kind

    assert undo(tmp_path / "out.gguf", tmp_path / "back.gguf").tensors == len(names)
    assert (tmp_path / "back.gguf").read_bytes() == files[family].read_bytes()
    with pytest.raises(ModelError, match="is baked already"):
        GGUFFile(tmp_path / "out.gguf").bake(STEERING[kind], added, tmp_path / "twice.gguf")


def test_only_changed_routers_count(files, tmp_path):
    source = GGUFFile(files["gpt_oss"])
    first, *others = pushes(source)
    done = source.bake(STEERING["logits"], [first, *map(torch.zeros_like, others)], tmp_path / "out.gguf")
    assert others
    assert done.tensors == 1
    assert baked_into(tmp_path / "out.gguf") == {
        "formula": "additive",
        "domain": "sport",
        "strength": 2.0,
        "layers": None,
    }
    undo(tmp_path / "out.gguf", tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == files["gpt_oss"].read_bytes()
    assert baked_into(tmp_path / "back.gguf") is None


def test_where_nothing_can_be_baked(files):
    with pytest.raises(ModelError, match=r"llama\.cpp adds no bias to its routers' logits, .*; steer it while it runs"):
        GGUFFile(files["mixtral"]).check("logits")
    with pytest.raises(ModelError, match=r"llama\.cpp adds no bias in its routers"):
        GGUFFile(files["mixtral"]).check("choice")
    with pytest.raises(ModelError, match="--choice-only moves which experts are chosen, not their weights"):
        GGUFFile(files["deepseek_v2"]).check("logits")
    with pytest.raises(ModelError, match=r"can be baked exactly, by formula .*: leave --choice-only out"):
        GGUFFile(files["gpt_oss"]).check("choice")


def test_another_place(files, tmp_path):
    source = GGUFFile(files["gpt_oss"])
    (tmp_path / "there.gguf").write_text("x")
    for name, message in (("there.gguf", "already exists"), ("no/out.gguf", "can't write"), ("out", "does not end in")):
        with pytest.raises(ModelError, match=message):
            source.bake(STEERING["logits"], pushes(source), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"]


def test_an_interruption_leaves_nothing(files, tmp_path, monkeypatch):
    def end(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(baking, "_copy", end)
    source = GGUFFile(files["gpt_oss"])
    with pytest.raises(KeyboardInterrupt):
        source.bake(STEERING["logits"], pushes(source), tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []


def test_what_undo_refuses(files, tmp_path):
    with pytest.raises(ModelError, match=r"has no setting steermoe\.bake: nothing was baked into it"):
        undo(files["gpt_oss"], tmp_path / "back.gguf")
    source = GGUFFile(files["deepseek_v2"])
    source.bake(STEERING["choice"], pushes(source), tmp_path / "out.gguf")
    whole = (tmp_path / "out.gguf").read_bytes()
    assert whole.count(b'"before": null') == len(source.shape.routers)
    for old, new, message in (
        (b'"before": null', b'"before": "  "', "is damaged"),
        (b'"format": 1', b'"format": 2', "another version of steermoe"),
        (b"blk.0.exp_probs_b.bias\x01", b"blk.7.exp_probs_b.bias\x01", "was rewritten after it was baked"),
    ):
        assert old in whole
        (tmp_path / "out.gguf").write_bytes(whole.replace(old, new))
        with pytest.raises(ModelError, match=message):
            undo(tmp_path / "out.gguf", tmp_path / "back.gguf")
    assert not (tmp_path / "back.gguf").exists()


def test_one_of_several_parts(files, tmp_path):
    whole = files["gpt_oss"].read_bytes()
    pairs = struct.unpack_from("<Q", whole, 16)[0]
    name = b"split.count"
    setting = struct.pack("<Q", len(name)) + name + struct.pack("<IH", 2, 3)
    setting += (
        struct.pack("<Q", 1)
        + b"x"
        + struct.pack("<IQ", 8, -(len(setting) + 21) % 32)
        + bytes(-(len(setting) + 21) % 32)
    )
    (tmp_path / "part.gguf").write_bytes(whole[:16] + struct.pack("<Q", pairs + 2) + setting + whole[24:])
    with pytest.raises(ModelError, match="is one of 3 parts: make one file of them with `llama-gguf-split --merge`"):
        GGUFFile(tmp_path / "part.gguf")
