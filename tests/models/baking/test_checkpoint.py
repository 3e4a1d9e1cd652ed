"""Baked into a checkpoint, steering gives the logits of formula (3) exactly, and is taken out to the bit."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from steermoe.errors import CompatibilityError, ModelError, SteeringError
from steermoe.evaluation.choice_only import choosing_by
from steermoe.models.baking import checkpoint as baking
from steermoe.models.baking.checkpoint import RECORD, Checkpoint, undo
from steermoe.models.baking.record import Steering
from steermoe.models.stored import local_folder
from steermoe.routing.biases import bias_of
from steermoe.routing.families import list_families
from steermoe.routing.routers import find_routers
from steermoe.steering.baking import pushes_of
from steermoe.steering.handle import steer
from steermoe.steering.plans import SteeringPlan
from steermoe.vectors.vector import SteeringVector
from tests.support import tiny_models as tiny

STRENGTH = 3.0


def plan_for(shape, strength=STRENGTH, **fields) -> SteeringPlan:
    """Different weights for every expert of every layer, some of them negative, as in a mixture."""
    weights = torch.randn(len(shape.routers), shape.num_experts, generator=torch.Generator().manual_seed(1))
    return SteeringPlan(SteeringVector("sport", None, shape.layers, weights=weights), strength, **fields)


def bake(source: Checkpoint, plan: SteeringPlan, output, kind="logits"):
    steering = Steering(kind, plan.vector.domain, plan.strength, "0" * 64, plan.layers)
    return source.bake(steering, pushes_of(source.shape, plan), output)


def exact(strength=STRENGTH, **fields):
    return {"strength": strength, "formula": "additive", "positions": "all", **fields}


@pytest.fixture(scope="module")
def oss(tmp_path_factory):
    """A tiny GPT-OSS, in memory and as a folder with files of other kinds."""
    folder = tmp_path_factory.mktemp("bake") / "tiny-oss"
    model = tiny.build("gpt_oss")
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return SimpleNamespace(folder=folder, model=model, source=Checkpoint(folder), inputs=tiny.tokens(model, rows=2))


def loaded(model, folder):
    return type(model).from_pretrained(folder, dtype=torch.float32).eval()


# ---- formula (3) ----


@pytest.mark.parametrize("fields", [{}, {"strength": -2.5}, {"layers": (1, 1)}], ids=str)
def test_baked_is_steered(oss, tmp_path, fields):
    plan = plan_for(oss.source.shape, **exact(**fields))
    done = bake(oss.source, plan, tmp_path / "out")
    assert (done.tensors, done.dtype, done.left_out) == (1 if "layers" in fields else tiny.LAYERS, "F32", ())
    assert done.rounding < 1e-6
    baked = loaded(oss.model, tmp_path / "out")
    new = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    with steer(oss.model, rows=[plan]):
        steered = tiny.run(oss.model, oss.inputs)
        text = oss.model.generate(**oss.inputs, **new, output_logits=True)
    again = baked.generate(**oss.inputs, **new, output_logits=True)
    torch.testing.assert_close(tiny.run(baked, oss.inputs), steered, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.stack(again.logits), torch.stack(text.logits), rtol=1e-5, atol=1e-5)
    assert torch.equal(again.sequences, text.sequences)
    assert (steered - tiny.run(oss.model, oss.inputs)).abs().max() > 1e-2


def test_only_the_biases_change(oss, tmp_path):
    bake(oss.source, plan_for(oss.source.shape, **exact()), tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (oss.folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{layer}.mlp.router.bias" for layer in range(tiny.LAYERS)}
    others = {path.name for path in oss.folder.iterdir()} - {"model.safetensors"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == others | {"model.safetensors", RECORD}
    assert all((tmp_path / "out" / name).read_bytes() == (oss.folder / name).read_bytes() for name in others)
    assert Checkpoint(tmp_path / "out").shape.fingerprint == oss.source.shape.fingerprint != ""
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert (record["formula"], record["domain"], record["strength"]) == ("additive", "sport", STRENGTH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_undo_restores_every_byte(tmp_path, dtype):
    model = tiny.build("gpt_oss", dtype=dtype)
    model.save_pretrained(tmp_path / "own", max_shard_size="40KB")
    assert len(list((tmp_path / "own").glob("*.safetensors"))) > 2
    source = Checkpoint(tmp_path / "own")
    done = bake(source, plan_for(source.shape, **exact()), tmp_path / "out")
    assert (done.rounding > 1e-4) == (dtype == torch.bfloat16)
    assert undo(tmp_path / "out", tmp_path / "back").tensors == tiny.LAYERS
    files = {path.name: path.read_bytes() for path in (tmp_path / "own").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()} == files
    assert {path.name for path in tmp_path.iterdir()} == {"own", "out", "back"}


def test_an_encoder_decoder(tmp_path):
    model = tiny.build("switch_transformers", router_bias=True)
    model.save_pretrained(tmp_path / "own")
    source = Checkpoint(tmp_path / "own")
    plan = plan_for(source.shape, **exact())
    bake(source, plan, tmp_path / "out")
    inputs = tiny.tokens(model)
    with steer(model, rows=[plan]):
        steered = tiny.run(model, inputs)
    torch.testing.assert_close(tiny.run(loaded(model, tmp_path / "out"), inputs), steered, rtol=1e-5, atol=1e-5)
    assert (steered - tiny.run(model, inputs)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "fields",
    [
        {"formula": "max_scaled"},
        {"positions": "generated"},
        {"schedule": "decay:9"},
        {"ban": ((0, 1),)},
        {"active_experts": 3},
    ],
    ids=str,
)
def test_what_a_bias_cannot_do(oss, fields):
    with pytest.raises(SteeringError, match="only formula additive with a constant strength at all positions"):
        pushes_of(oss.source.shape, plan_for(oss.source.shape, **exact(**fields)))


def test_a_vector_of_another_model(oss):
    vector = SteeringVector("sport", None, (0, 1), weights=torch.ones(2, 5))
    with pytest.raises(CompatibilityError, match="has 2x5 experts, tiny-oss has 2x8"):
        pushes_of(oss.source.shape, SteeringPlan(vector, **exact()))


# ---- choice only ----


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_only_the_choice_moves(tmp_path, family):
    """Experts are those with the largest sigmoid + bias + c E; their weights are the sigmoids, divided by their sum."""
    model = tiny.build(family, n_group=1, topk_group=1, routed_scaling_factor=1.0)
    model.save_pretrained(tmp_path / "own")
    source = Checkpoint(tmp_path / "own")
    plan = plan_for(source.shape, 0.3, formula="additive", positions="all")
    bake(source, plan, tmp_path / "out", "choice")
    baked = loaded(model, tmp_path / "out")
    hidden = torch.randn(1, 50, tiny.HIDDEN, generator=torch.Generator().manual_seed(2))
    moved = 0
    for row, (before, after) in enumerate(zip(find_routers(model), find_routers(baked), strict=True)):
        with torch.no_grad():
            scores = torch.nn.functional.linear(hidden[0], before.module.weight).sigmoid()
            _, weights, chosen = after.module(hidden)
            unsteered = before.module(hidden)[2]
        by = scores + before.module.e_score_correction_bias + 0.3 * plan.vector.experts[row]
        expected = by.topk(tiny.TOP_K).indices.sort(-1)
        order = chosen.view(50, -1).sort(-1)
        assert torch.equal(order.values, expected.values)
        own = scores.gather(1, expected.values)
        torch.testing.assert_close(weights.view(50, -1).gather(1, order.indices), own / own.sum(-1, keepdim=True))
        moved += int((unsteered.view(50, -1).sort(-1).values != order.values).sum())
    assert moved > 10


CHOOSING = ("afmoe", "deepseek_v3", "ernie4_5_moe", "hy_v3", "lfm2_moe", "longcat_flash", "minimax_m2", "zaya")
"""One family of each kind: where the bias is, and what its checkpoints call it."""


@pytest.mark.parametrize("family", CHOOSING)
def test_the_bias_decides_the_choice(tmp_path, family):
    """A large one on one expert sends all tokens there, from a checkpoint that may name it otherwise."""
    model = tiny.build(family)
    routers = find_routers(model)
    model.save_pretrained(tmp_path / "own")
    source = Checkpoint(tmp_path / "own")
    weights = torch.zeros(len(routers), source.shape.num_experts)
    weights[:, 5] = 1.0
    plan = SteeringPlan(SteeringVector("sport", None, source.shape.layers, weights=weights), **exact(50.0))
    bake(source, plan, tmp_path / "out", "choice")
    baked = loaded(model, tmp_path / "out")
    with steer(baked, SteeringVector("sport", None, source.shape.layers, weights=weights), 1e-9, positions="all") as it:
        tiny.run(baked, tiny.tokens(baked, rows=2))
    assert it.report().vector_share == pytest.approx(1 / routers[0].top_k)


@pytest.mark.slow
def test_every_family_with_such_a_bias(tmp_path):
    """In memory; and for those that have a class for text alone, as they are saved."""
    found, saved_names = [], 0
    for family in [one.family for one in list_families() if one.steerable]:
        model = tiny.build(family)
        routers = find_routers(model)
        if any(bias_of(model, router, "choice") is None for router in routers):
            continue
        found.append(family)
        push = torch.zeros(routers[0].num_experts)
        push[5] = 50.0
        weights = torch.zeros(len(routers), len(push))
        weights[:, 5] = 1.0
        vector = SteeringVector("sport", None, tuple(router.layer for router in routers), weights=weights)
        with choosing_by(model, [push] * len(routers)), steer(model, vector, 1e-9, positions="all") as handle:
            tiny.run(model, tiny.tokens(model, rows=2))
        assert handle.report().vector_share == pytest.approx(1 / routers[0].top_k), family
        if type(model).__name__.endswith("ForCausalLM"):
            model.save_pretrained(tmp_path / family)
            source = Checkpoint(tmp_path / family)
            bake(source, SteeringPlan(vector, **exact(50.0)), tmp_path / f"{family}-out", "choice")
            saved_names += 1
    assert len(found) >= 34
    assert saved_names >= 25


# ---- what is refused ----


def saved(folder, family, **overrides):
    tiny.build(family, **overrides).save_pretrained(folder)
    return Checkpoint(folder)


def test_where_nothing_can_be_baked(tmp_path, oss):
    mixtral = saved(tmp_path / "mixtral", "granitemoeshared")
    with pytest.raises(
        ModelError, match=r"'mixtral' \(granitemoeshared\) can't be baked: .* steer it while it runs"
    ) as of:
        mixtral.check("logits")
    assert "--choice-only" not in str(of.value)
    with pytest.raises(ModelError, match="add no bias, neither to logits nor to scores"):
        mixtral.check("choice")
    with pytest.raises(ModelError, match=r"can be baked exactly, by formula .3.: leave --choice-only out"):
        oss.source.check("choice")


def test_a_bias_that_is_left_out_is_none(tmp_path):
    """LongCat's routers have a bias on logits, if their configuration says so, and do not add it."""
    longcat = saved(tmp_path / "longcat", "longcat_flash", router_bias=True)
    with pytest.raises(ModelError, match=r"add no bias to their logits, .*; --choice-only moves which experts"):
        longcat.check("logits")
    longcat.check("choice")


def test_another_place(oss, tmp_path):
    plan = plan_for(oss.source.shape, **exact())
    (tmp_path / "there").mkdir()
    with pytest.raises(ModelError, match=r"'.*there' already exists: name a folder that is not there yet"):
        bake(oss.source, plan, tmp_path / "there")
    with pytest.raises(ModelError, match=r"can't write '.*' \(No such file or directory\): name another folder"):
        bake(oss.source, plan, tmp_path / "no" / "such")
    with pytest.raises(ModelError, match="is in the checkpoint's own folder: name another place"):
        bake(oss.source, plan, oss.folder / "inside")
    assert not (oss.folder / "inside").exists()
    bake(oss.source, plan, tmp_path / "out")
    with pytest.raises(ModelError, match="is baked already: take that out first"):
        bake(Checkpoint(tmp_path / "out"), plan, tmp_path / "twice")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "there"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interruption_leaves_nothing(oss, tmp_path, monkeypatch, error):
    def end(*arguments):
        raise error

    monkeypatch.setattr(baking, "_patch", end)
    with pytest.raises((KeyboardInterrupt, ModelError), match=r"No space left|^$"):
        bake(oss.source, plan_for(oss.source.shape, **exact()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_weights_in_another_form_are_left_out(oss, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    for file in oss.folder.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    for name in ("original/model.bin", "docs/notes.txt", "old.gguf", ".git/head"):
        (own / name).parent.mkdir(exist_ok=True)
        (own / name).write_text("x")
    source = Checkpoint(own)
    done = bake(source, plan_for(source.shape, **exact()), tmp_path / "out")
    assert done.left_out == (".git/", "old.gguf", "original/")
    assert (tmp_path / "out/docs/notes.txt").read_text() == "x"
    assert not {path.name for path in (tmp_path / "out").iterdir()} & {"original", "old.gguf", ".git"}


def test_damaged_checkpoints(oss, tmp_path):
    plan = plan_for(oss.source.shape, **exact())
    own = saved(tmp_path / "own", "gpt_oss")
    weights = tmp_path / "own" / "model.safetensors"
    whole = weights.read_bytes()
    for content, message in (
        (b"", "files are damaged"),
        (whole[:2000], "files are damaged"),
        (None, "has no .safetensors"),
    ):
        weights.write_bytes(content) if content is not None else weights.unlink()
        with pytest.raises(ModelError, match=message):
            bake(own, plan, tmp_path / "out")
    renamed = whole.replace(b"layers.1.mlp.router.bias", b"layers.1.mlp.router.bios")
    weights.write_bytes(renamed)
    with pytest.raises(ModelError, match=r"has 0 tensors that could be the model's 'model.layers.1.mlp.router.bias'"):
        bake(own, plan, tmp_path / "out")
    (tmp_path / "own" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(ModelError, match=r"'own' lacks 1 file, such as gone.safetensors"):
        bake(own, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_header_that_claims_too_much(oss, tmp_path):
    """Of a tensor whose bytes would not fit into memory."""
    bake(oss.source, plan_for(oss.source.shape, **exact()), tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    whole = weights.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for size in (2**44, 2**80):
        header = json.loads(whole[8 : 8 + length])
        header["model.layers.0.mlp.router.bias"]["shape"] = [size]
        text = json.dumps(header).encode()
        weights.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
        with pytest.raises(ModelError, match="its files are damaged, get it again"):
            undo(tmp_path / "out", tmp_path / "back")


def test_what_cannot_be_copied_is_named(oss, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(oss.folder, own)
    (own / "notes.txt").symlink_to("nowhere")
    source = Checkpoint(own)
    with pytest.raises(ModelError, match=r"notes.txt' is a link to nowhere or no regular file, .*: remove it"):
        bake(source, plan_for(source.shape, **exact()), tmp_path / "out")
    (own / "notes.txt").unlink()
    (own / "more").mkdir()
    (own / "more" / "notes.txt").symlink_to("nowhere")
    with pytest.raises(ModelError, match=r"can't copy '.*more/notes.txt' \(.*No such file.*\): mend or remove it"):
        bake(source, plan_for(source.shape, **exact()), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"own"}


def test_a_copy_of_the_hub_is_undone(oss, tmp_path, monkeypatch):
    bake(oss.source, plan_for(oss.source.shape, **exact()), tmp_path / "out")
    monkeypatch.setattr(baking, "local_folder", lambda where: {"USER/oss": tmp_path / "out"}[str(where)])
    assert undo(Path("USER/oss"), tmp_path / "back").tensors == tiny.LAYERS


def test_not_on_this_machine(oss, tmp_path, monkeypatch):
    monkeypatch.setattr(baking, "local_folder", lambda where: local_folder("nobody/nothing"))
    with pytest.raises(ModelError, match="are not on this machine: run `hf download tiny-oss` first"):
        bake(oss.source, plan_for(oss.source.shape, **exact()), tmp_path / "out")


def test_what_undo_refuses(oss, tmp_path):
    with pytest.raises(ModelError, match="nothing was baked into it, so nothing can be undone"):
        undo(oss.folder, tmp_path / "back")
    bake(oss.source, plan_for(oss.source.shape, **exact()), tmp_path / "out")
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    changed = record["tensors"][0] | {"after_sha256": "0" * 64}
    for wrong, message in (
        ("[]", "is damaged"),
        ("{", "is damaged"),
        (json.dumps(record | {"format": 9}), "another version of steermoe"),
        (json.dumps(record | {"tensors": [changed]}), "is not what was baked"),
        (json.dumps(record | {"tensors": [changed | {"before": "?"}]}), "is damaged"),
        (json.dumps(record | {"tensors": [changed | {"file": "../x"}]}), "files are damaged"),
        (json.dumps(record | {"tensors": [record["tensors"][0] | {"before": None}]}), "is not what was baked"),
    ):
        (tmp_path / "out" / RECORD).write_text(wrong)
        with pytest.raises(ModelError, match=message):
            undo(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_strength_that_its_type_cannot_hold(tmp_path):
    model = tiny.build("gpt_oss", dtype=torch.float16)
    model.save_pretrained(tmp_path / "own")
    source = Checkpoint(tmp_path / "own")
    bake(source, plan_for(source.shape, **exact(1e3)), tmp_path / "out")
    vector = SteeringVector("sport", None, source.shape.layers, weights=torch.full((2, 8), 10.0))
    with pytest.raises(ModelError, match=r"too large for the bias .* of type F16: lower the strength"):
        bake(source, SteeringPlan(vector, **exact(1e4)), tmp_path / "again")


def test_every_bias_of_transformers(oss):
    assert [bias.name for bias in oss.source.biases("logits")] == [
        f"model.layers.{layer}.mlp.router.bias" for layer in range(tiny.LAYERS)
    ]
    assert [bias_of(oss.model, router, "choice") for router in find_routers(oss.model)] == [None, None]
