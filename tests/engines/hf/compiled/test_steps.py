"""Compiled decode steps give what the model gives, token by token, for any family, plan and mix of rows."""

import json
import shutil

import pytest
import torch

from steermoe.engines.hf.compiled import artifacts
from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.request import Request, Sampling
from steermoe.errors import ModelError
from steermoe.models.quantization import quantize, quantize_model
from steermoe.routing.routers import find_routers, shape_of
from steermoe.steering.banks import banks_for
from steermoe.steering.editing_graph import Edits, edit
from steermoe.steering.handle import steer
from tests.support import steering_models as tiny
from tests.support.rolling import build, requests_for, roll

QUICK = ("granitemoeshared", "gpt_oss")
FAMILIES = ("mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3", "olmoe", "glm4_moe", "phimoe", "ernie4_5_moe", "dots1")


def require_compiler():
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("there is no C++ compiler")


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Compiles both steps of a model into a folder of the test's own, and finds that they pay."""
    require_compiler()
    monkeypatch.setenv("STEERMOE_CACHE", str(tmp_path))
    monkeypatch.setattr(artifacts.Facts, "pays", True)  # a tiny model's time is noise

    def make(model, kinds=artifacts.KINDS):
        return [artifacts.compile_step(model, kind) for kind in kinds]

    return make


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES)])
def test_compiled_steps_tell_the_same_texts(family, compiled):
    model = build(family)
    facts = compiled(model)
    assert all(fact.error < 1e-4 for fact in facts)
    own, faster = HFEngine(tiny.loaded(model), compiled=False), HFEngine(tiny.loaded(model))
    requests = requests_for(model)
    expected = [own.generate([request])[0] for request in requests]
    for rows in (1, 5):
        decoder = faster.decoder(rows)
        found = roll(decoder, faster, requests, rows)
        decoder.close()
        assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    alone = [faster.generate([request])[0] for request in requests]
    assert [c.text for c in alone] == [c.text for c in expected]
    for mine, theirs in zip(alone, expected, strict=True):
        if theirs.report is not None and theirs.report.tokens_steered:
            assert mine.report.tokens_steered == theirs.report.tokens_steered
            assert mine.report.router_calls == theirs.report.router_calls
            assert mine.report.vector_share == pytest.approx(theirs.report.vector_share)


@pytest.mark.parametrize("formula", ["additive", "max_scaled", "zero_max_scaled"])
@pytest.mark.parametrize("scale", ["magnitude", "paper"])
@pytest.mark.parametrize("strength", [5.0, -5.0])
def test_edits_of_a_step_are_those_of_the_formulas(formula, scale, strength):
    from steermoe.formulas import BY_NAME

    model = build("mixtral")
    plan = tiny.plan_for_experts(model, 1, 5, formula=formula, scale=scale, strength=strength)
    routers = find_routers(model)
    banks = banks_for(shape_of(model, routers), [plan])
    tensors = Edits.of([plan], banks, [0, -1, 0], torch.tensor([1.0, 0.0, 0.0])).tensors()
    logits = torch.randn(3, tiny.EXPERTS, generator=torch.Generator().manual_seed(1)) - 1
    edited = edit(logits, 1, tensors)
    expected = BY_NAME[formula](logits[:1], plan.vector.experts[1], strength, scale)
    torch.testing.assert_close(edited[:1], expected)
    assert torch.equal(edited[1:], logits[1:])


def test_streaming_gives_the_same_pieces(compiled):
    model = build("granitemoeshared")
    compiled(model, ["one"])
    pieces = []
    request = Request("Once upon a time", tiny.plan_for_experts(model, 1), Sampling(max_new_tokens=12, do_sample=False))
    (completion,) = HFEngine(tiny.loaded(model)).generate([request], on_text=pieces.append)
    assert "".join(pieces) == completion.text
    assert len(pieces) > 1


def test_what_hangs_on_the_model_is_not_passed_by(compiled):
    model = build("granitemoeshared")
    compiled(model, ["one"])
    engine = HFEngine(tiny.loaded(model))
    assert engine.compiled_steps().serves(1)
    with steer(model, rows=[tiny.plan_for_experts(model, 1)]) as handle:
        assert engine.compiled_steps() is None
        engine.generate([Request("Once upon a time", None, Sampling(max_new_tokens=3))])
        assert handle.report().tokens_steered
    assert engine.compiled_steps().serves(1)


def test_a_step_that_is_wrong_is_not_kept(compiled, monkeypatch, tmp_path):
    from steermoe.engines.hf.compiled import step

    monkeypatch.setattr(step, "edit", lambda logits, router, tensors: logits.flip(-1))
    with pytest.raises(ModelError, match="is off by"):
        compiled(build("granitemoeshared"), ["one"])
    assert not list((tmp_path / "compiled").iterdir())


def test_a_step_that_is_slower_is_not_used(compiled, monkeypatch):
    model = build("granitemoeshared")
    compiled(model, ["one"])
    folder = artifacts.folder_of(model, "one")
    monkeypatch.undo()
    facts = json.loads((folder / artifacts.FACTS).read_text()) | {"speedup": 0.9}
    (folder / artifacts.FACTS).write_text(json.dumps(facts))
    monkeypatch.setenv("STEERMOE_CACHE", str(folder.parent.parent))
    assert artifacts.find_step(model, "one") is None
    (folder / artifacts.FACTS).write_text("{")
    assert artifacts.find_step(model, "one") is None


def test_a_damaged_step_is_passed_by(compiled, caplog):
    model = build("granitemoeshared")
    compiled(model, ["one"])
    program = artifacts.folder_of(model, "one") / artifacts.PROGRAM
    request = Request("Once upon a time", None, Sampling(max_new_tokens=5, do_sample=False))
    expected = HFEngine(tiny.loaded(model)).generate([request])[0].token_ids
    whole = program.read_bytes()
    for part in (b"", whole[: len(whole) // 2], None):
        program.unlink()
        if part is not None:
            program.write_bytes(part)
        caplog.clear()
        assert HFEngine(tiny.loaded(model)).generate([request])[0].token_ids == expected
        assert "is damaged" in caplog.text
        assert "`steermoe models compile` makes it anew" in caplog.text
        program.touch()


def test_what_can_not_be_compiled_says_why(monkeypatch):
    model = build("granitemoeshared")
    monkeypatch.setattr(artifacts.shutil, "which", lambda name: None)
    with pytest.raises(ModelError, match="no C\\+\\+ compiler"):
        artifacts.compile_step(model, "one")


def test_other_weights_types_and_threads_have_steps_of_their_own():
    model = build("granitemoeshared")
    folders = {artifacts.folder_of(model, kind) for kind in artifacts.KINDS}
    half = tiny.loaded(build("mixtral")).model
    folders.add(artifacts.folder_of(half, "one"))
    assert len(folders) == 3


@torch.no_grad()
def test_int8_is_near_and_routers_are_left_alone():
    weights = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(0))
    numbers, scale = quantize(weights)
    assert numbers.dtype == torch.int8
    assert float((numbers * scale[..., None] - weights).abs().max()) <= float(scale.max()) / 2 + 1e-6
    model = build.__wrapped__("qwen3_moe")
    before = model(input_ids=torch.arange(3, 9)[None]).logits
    gates = [router.module.weight.dtype for router in find_routers(model)]
    quantize_model(model)
    assert gates == [router.module.weight.dtype for router in find_routers(model)]
    assert model.model.layers[0].mlp.experts.gate_up_proj.weight.dtype == torch.int8
    after = model(input_ids=torch.arange(3, 9)[None]).logits
    assert 0 < float((after - before).norm() / before.norm()) < 0.05


def test_int8_steps_compile_too(compiled):
    model = build.__wrapped__("granitemoeshared")
    quantize_model(model)
    assert all(facts.error < 1e-3 for facts in compiled(model, ["one"]))


def test_the_command_compiles_and_generate_takes_it(run, tiny_checkpoint, tmp_path, monkeypatch):
    require_compiler()
    monkeypatch.setenv("STEERMOE_CACHE", str(tmp_path))
    arguments = ("generate", "A dog", "--model", str(tiny_checkpoint), "--dtype", "float32", "--max-new-tokens", "8")
    before = run(*arguments)
    result = run("models", "compile", str(tiny_checkpoint), "--dtype", "float32", "--json")
    rows = json.loads(result.out)
    assert [row["kind"] for row in rows] == list(artifacts.KINDS)
    assert all(row["error"] < 1e-4 and row["speedup"] > 0 for row in rows)
    monkeypatch.setattr(artifacts.Facts, "pays", True)
    used = []
    monkeypatch.setattr(artifacts.CompiledStep, "__call__", spied(artifacts.CompiledStep.__call__, used))
    assert run(*arguments).out == before.out
    assert used
    used.clear()
    assert run(*arguments, "--no-compiled-steps").out == before.out
    assert not used


def spied(method, used):
    def call(*arguments):
        used.append(1)
        return method(*arguments)

    return call
