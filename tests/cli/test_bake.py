"""`steermoe models bake`: what it writes and prints, and what it refuses in one line."""

import json

import pytest
import torch

from steermoe.models.baking.checkpoint import RECORD
from steermoe.routing.routers import shape_of
from steermoe.vectors.file import write_vector
from steermoe.vectors.vector import SteeringVector, VectorInfo
from tests.support import tiny_ggufs
from tests.support import tiny_models as tiny


def checkpoint(folder, family, **overrides):
    """A tiny model with a tokenizer, and a vector for it."""
    loaded = tiny_ggufs.build(family, **overrides)
    loaded.model.save_pretrained(folder / family)
    loaded.tokenizer.save_pretrained(folder / family)
    shape = shape_of(loaded.model)
    weights = torch.randn(len(shape.routers), shape.num_experts, generator=torch.Generator().manual_seed(1)).abs()
    info = VectorInfo(model=family, architecture=family, fingerprint=shape.fingerprint, top_k=tiny.TOP_K, strength=4.0)
    vector = SteeringVector("sport", None, shape.layers, weights=weights, info=info)
    write_vector(vector, folder / "steering_vectors" / family / "sport.safetensors")


@pytest.fixture
def oss(bare_search_path):
    checkpoint(bare_search_path, "gpt_oss")
    return bare_search_path


@pytest.fixture
def deepseek(bare_search_path):
    checkpoint(bare_search_path, "deepseek_v3", n_group=1, topk_group=1)
    return bare_search_path


def test_bake_and_undo(oss, run):
    done = run("models", "bake", "gpt_oss", "-d", "sport", "--strength", "3", "-o", "out")
    assert (done.code, done.out) == (0, "out\n")
    assert "sport, strength 3, all tokens, formula (3); biases of 2 routers in F32" in done.err
    again = run("models", "bake", "out", "--undo", "-o", "back")
    assert (again.code, again.out) == (0, "back\n")
    own = {path.name: path.read_bytes() for path in (oss / "gpt_oss").iterdir()}
    assert {path.name: path.read_bytes() for path in (oss / "back").iterdir()} == own


def test_json(oss, run):
    record = json.loads(
        run(
            "models", "bake", "gpt_oss", "-d", "sport=0.5", "--strength", "3", "--layers", "1", "-o", "out", "--json"
        ).out
    )
    assert record.pop("rounding") < 1e-6
    assert record == {
        "path": "out",
        "formula": "additive",
        "domain": "sport",
        "strength": 3.0,
        "layers": [1, 1],
        "positions": "all",
        "tensors": 1,
        "dtype": "F32",
        "left_out": [],
        "measured": None,
    }
    undone = run("models", "bake", "out", "--undo", "-o", "back", "--json")
    assert json.loads(undone.out) == {"path": "back", "restored": 1, "left_out": []}


def test_choice_only_is_measured_beside_formula_3(deepseek, run):
    options = ("deepseek_v3", "-d", "sport", "--strength", "0.5", "--choice-only")
    done = run("models", "bake", *options, "-o", "unmeasured")
    assert "choice only, which is not formula (3)" in done.err
    assert "what it does to texts is not known: --measure compares it with formula (3)" in done.err
    done = run("models", "bake", *options, "-o", "out", "--measure", "--json")
    assert done.code == 0, done.err
    figures = json.loads(done.out)["measured"]
    additive, choice = figures["additive"], figures["choice_only"]
    assert additive["tokens"] == choice["tokens"] > 1000
    assert additive["kl_mean"] != pytest.approx(choice["kl_mean"], rel=0.05)
    assert min(additive["kl_mean"], choice["kl_mean"]) > 0
    assert choice["vector_share"] == 1.0  # every expert is the vector's


def test_the_table(deepseek, run, monkeypatch):
    monkeypatch.setattr("steermoe.cli.bake.TEXTS", 3)
    options = ("--strength", "0.5", "--choice-only", "--measure", "-o", "out")
    done = run("models", "bake", "deepseek_v3", "-d", "sport", *options)
    lines = done.out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["", "formula (3)", "choice only", "out"]
    assert "KL from the unsteered model per token, in nats" in done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "nothing to bake: name a domain with --domain"),
        (("-d", "sport", "--measure"), "--measure belongs to --choice-only"),
        (("--undo", "-d", "sport"), "--domain does not go with --undo"),
        (("--undo", "--choice-only"), "--choice-only does not go with --undo"),
        (("--undo", "--measure"), "--measure does not go with --undo"),
        (("--undo", "--vectors", "there"), "--vectors does not go with --undo"),
        (("--undo", "--any-model"), "--any-model does not go with --undo"),
        (("--undo", "--trust-remote-code"), "--trust-remote-code does not go with --undo"),
        (("-d", "sport", "--schedule", "decay:9"), "No such option: --schedule"),
    ],
)
def test_wrong_usage(oss, run, options, message):
    done = run("models", "bake", "gpt_oss", *options, "-o", "out")
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-d", "sport"), "vector 'sport' is calibrated for formula max_scaled, baking uses additive: give --strength"),
        (("-d", "none", "--strength", "1"), "--domain none steers nothing, so there is nothing to bake"),
        (("-d", "sport", "--strength", "0"), "strength 0 steers nothing"),
        (("-d", "sport", "--strength", "nan"), "strength nan"),
        (("-d", "sport", "--strength", "1", "--layers", "7-9"), "layers 7-9 hold no router"),
        (("-d", "chess", "--strength", "1"), "no vector 'chess'"),
        (("-d", "sport", "--strength", "1", "--choice-only"), "can be baked exactly, by formula (3)"),
        (("--undo",), f"has no readable {RECORD}: nothing was baked into it"),
    ],
)
def test_what_is_refused(oss, run, options, message):
    done = run("models", "bake", "gpt_oss", *options, "-o", "out")
    assert (done.code, done.out) == (1, "")
    assert message in done.err
    assert len(done.err.splitlines()) == 1
    assert not (oss / "out").exists()


def test_a_folder_is_not_called_as_a_gguf_file(oss, run):
    done = run("models", "bake", "gpt_oss", "-d", "sport", "--strength", "1", "-o", "out.gguf")
    assert (done.code, done.out) == (1, "")
    assert done.err == (
        "steermoe: 'out.gguf' ends as a GGUF file, a checkpoint is written as a folder: name it otherwise\n"
    )
    assert not (oss / "out.gguf").exists()


def test_undo_of_what_is_not_there(bare_search_path, run):
    done = run("models", "bake", "nobody/nothing", "--undo", "-o", "back")
    assert (done.code, done.out) == (1, "")
    assert "no folder 'nobody/nothing', and no hub id whose files are on this machine" in done.err


def test_a_place_is_checked_before_anything_is_measured(deepseek, run, monkeypatch):
    def measure(*arguments):
        raise AssertionError(arguments)

    monkeypatch.setattr("steermoe.cli.bake._measure", measure)
    options = ("-d", "sport", "--strength", "0.5", "--choice-only", "--measure")
    done = run("models", "bake", "deepseek_v3", *options, "-o", "no/out")
    assert done.code == 1
    assert "can't write 'no/out' (No such file or directory): name another folder" in done.err
    run("models", "bake", "deepseek_v3", *options[:-1], "-o", "out")
    done = run("models", "bake", "out", *options, "-o", "again")
    assert done.code == 1
    assert "'out' is baked already" in done.err


def test_inspect_says_what_is_baked(oss, run):
    assert json.loads(run("models", "inspect", "gpt_oss", "--json").out)["baked"] is None
    run("models", "bake", "gpt_oss", "-d", "sport", "--strength", "3", "--layers", "1", "-o", "out")
    said = json.loads(run("models", "inspect", "out", "--json").out)["baked"]
    assert said == {"formula": "additive", "domain": "sport", "strength": 3.0, "layers": [1, 1]}
    lines = run("models", "inspect", "out").out.splitlines()
    assert "baked            sport, strength 3, additive, layers 1-1; --undo takes it out" in lines
    record = json.loads((oss / "out" / RECORD).read_text())
    for wrong in ({"domain": ["\x1b[31m"]}, {"strength": "3"}, {"layers": [1]}, {"formula": 5}, {"tensors": []}):
        (oss / "out" / RECORD).write_text(json.dumps(record | wrong))
        said = json.loads(run("models", "inspect", "out", "--json").out)["baked"]
        assert list(said) == ["error"]
        assert "is damaged" in said["error"]


def test_a_gguf_file_is_not_measured(bare_search_path, run):
    done = run("models", "bake", "x.gguf", "-d", "sport", "--choice-only", "--measure", "-o", "out.gguf")
    assert (done.code, done.out) == (2, "")
    assert "measure the checkpoint of this GGUF file" in done.err


def test_a_place_that_is_taken(oss, run):
    done = run("models", "bake", "gpt_oss", "-d", "sport", "--strength", "1", "-o", "steering_vectors")
    assert (done.code, done.err) == (
        1,
        "steermoe: 'steering_vectors' already exists: name a place where nothing is yet\n",
    )


def test_a_vector_of_another_model(oss, deepseek, run):
    path = "steering_vectors/deepseek_v3/sport.safetensors"
    done = run("models", "bake", "gpt_oss", "-d", path, "--strength", "1", "-o", "out")
    assert done.code == 1
    assert "vector 'sport' is for deepseek_v3 models, gpt_oss is gpt_oss" in done.err


@pytest.mark.default_model
def test_the_default_model_is_refused(run, tmp_path, monkeypatch):
    from steermoe.models.default.pull import is_pulled

    if not is_pulled():
        pytest.skip("the default model is not pulled: `make model`")
    monkeypatch.chdir(tmp_path)
    done = run("models", "bake", "-d", "sport", "--strength", "4", "-o", "out")
    assert (done.code, done.out) == (1, "")
    assert "'smollm2-moe' (granitemoeshared) can't be baked: its routers add no bias to their logits" in done.err
    assert list(tmp_path.iterdir()) == []
