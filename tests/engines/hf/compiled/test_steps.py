"""Compiled decode steps give what the model gives, token by token, for any family, plan and mix of rows."""

import json
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from steermoe.engines.hf import rolling
from steermoe.engines.hf.compiled import artifacts, records
from steermoe.engines.hf.compiled.step import DecodeStep
from steermoe.engines.hf.compiled.steps import CompiledSteps
from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.request import Request, Sampling
from steermoe.errors import GenerationError, ModelError
from steermoe.models.quantization import quantize, quantize_model
from steermoe.routing.recording import record_routing
from steermoe.routing.routers import find_routers, shape_of
from steermoe.steering.banks import banks_for
from steermoe.steering.editing_graph import Edits, count_listed, edit
from steermoe.steering.handle import steer
from steermoe.steering.mapping import PlanMapping
from steermoe.steering.plans import SteeringPlan
from tests.support import steering_models as tiny
from tests.support.rolling import build, requests_for, roll
from tests.support.tiny_models import CORRECTION

QUICK = ("granitemoeshared", "gpt_oss")
FAMILIES = ("mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3", "olmoe", "glm4_moe", "phimoe", "ernie4_5_moe", "dots1")


def require_compiler():
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("there is no C++ compiler")
    if artifacts.torch_is_too_old():
        pytest.skip(f"torch {torch.__version__} compiles no steps")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Steps of models that nothing changes are compiled once, into this folder."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def compiled(kept, tmp_path, monkeypatch):
    """Puts compiled steps of a model into a folder of the test's own, and pretends that they pay off."""
    require_compiler()
    monkeypatch.setattr(artifacts.Facts, "pays", True)  # a tiny model's time is noise

    def make(model, kinds=artifacts.KINDS):
        facts = []
        for kind in kinds:
            monkeypatch.setenv("STEERMOE_CACHE", str(kept))
            made = artifacts.folder_of(model, kind)
            facts.append(artifacts.facts_of(model, kind) or artifacts.compile_step(model, kind))
            monkeypatch.setenv("STEERMOE_CACHE", str(tmp_path))
            shutil.copytree(made, artifacts.folder_of(model, kind))
        return facts

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


FORCED, BANNED = 2, (0, 1, 3, 6)
"""With groups of 4 of which a token uses one: bans leave the first group too few experts."""


def adverse(family):
    """A model whose correction biases are against the lists, as large as in real checkpoints."""
    model = build(family)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if CORRECTION.search(name):
            tensor.data[:] = torch.tensor([6.0 if n in BANNED else -6.0 if n == FORCED else n / 8 for n in range(8)])
    return model


def plans_with_lists(model):
    layers = shape_of(model).layers
    force, ban = tuple((layer, FORCED) for layer in layers), tuple((layer, n) for layer in layers for n in BANNED)
    return [
        SteeringPlan(force=force),
        None,
        SteeringPlan(ban=ban),
        tiny.plan_for_experts(model, 4, strength=25.0, force=force, ban=ban),
    ]


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "mixtral"])
def test_a_traced_step_keeps_to_the_lists_of_each_row(family):
    model = adverse(family)
    plans = plans_with_lists(model)
    mapping = PlanMapping(plans)
    banks = banks_for(shape_of(model), mapping.plans)
    tensors = Edits.of(mapping.plans, banks, mapping.numbers(plans), torch.ones(len(plans))).tensors()
    step, ids = DecodeStep(model), torch.tensor([[40], [41], [42], [43]])
    with torch.no_grad(), record_routing(model) as plain:
        model(input_ids=ids)
    with torch.no_grad(), step.traceable():
        step._call.edits = tensors
        model(input_ids=ids)
    chosen_RBk = torch.stack([step._call.chosen[number] for number in range(len(step.routers))])
    for row, plan in enumerate(plans):
        for number, layer in enumerate(shape_of(model).layers):
            chosen = set(chosen_RBk[number, row].tolist())
            if plan is None:
                assert chosen == set(plain.counts[row, number].nonzero().flatten().tolist())
            else:
                assert {expert for at, expert in plan.force if at == layer} <= chosen
                assert not {expert for at, expert in plan.ban if at == layer} & chosen
    places = 2 * len(step.routers)
    assert count_listed(tensors, chosen_RBk).tolist() == [places, places, 0, places * len(BANNED)]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ernie4_5_moe", "deepseek_v3"])
def test_lists_hold_whatever_the_biases(family, compiled):
    model = adverse(family)
    compiled(model, ["one"])
    own, faster = HFEngine(tiny.loaded(model), compiled=False), HFEngine(tiny.loaded(model))
    assert faster.compiled_steps().serves(1)
    for plan in plans_with_lists(model):
        request = Request("Once upon a time", plan, Sampling(max_new_tokens=12, min_new_tokens=12, do_sample=False))
        (expected,), (found,) = own.generate([request]), faster.generate([request])
        assert found.token_ids == expected.token_ids
        if plan is not None:
            assert found.report == expected.report
            assert found.report.forced_hits == found.report.forced_places == (22 if plan.force else 0)
            assert (found.report.banned_hits, found.report.banned_places) == (0, 22 * len(BANNED) if plan.ban else 0)


def test_streaming_gives_the_same_pieces(compiled):
    model = build("granitemoeshared")
    compiled(model, ["one"])
    pieces = []
    request = Request("Once upon a time", tiny.plan_for_experts(model, 1), Sampling(max_new_tokens=12, do_sample=False))
    (completion,) = HFEngine(tiny.loaded(model)).generate([request], on_text=pieces.append)
    assert "".join(pieces) == completion.text
    assert len(pieces) > 1


def steered_anew(engine, requests, rows):
    """Texts by a rolling decoder, `rows` of them at once; three get another plan, or none, after their third token."""
    model, waiting, done = engine.loaded.model, list(requests), {}
    later = {requests[0]: tiny.plan_for_experts(model, 5, strength=30.0), requests[1]: None, requests[2]: None}
    later[requests[2]] = tiny.plan_for_experts(model, 2, 4, ban=((1, 0),), force=((0, 3),))
    decoder = engine.decoder(rows)

    def act(row, text):
        if row.request in later and len(row.new) == 3:
            decoder.steer(row.request, later[row.request])

    while waiting or len(decoder):
        if room := min(rows - len(decoder), len(waiting)):
            decoder.start(waiting[:room], [engine.encode(one) for one in waiting[:room]], on_token=act)
            waiting = waiting[room:]
        done |= {completion.request: completion for completion in decoder.step()}
    decoder.close()
    return [done[request] for request in requests]


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES)])
def test_traces_of_compiled_steps_are_those_of_the_model(family, compiled, monkeypatch):
    model = build(family)
    compiled(model)
    own, faster = HFEngine(tiny.loaded(model), compiled=False), HFEngine(tiny.loaded(model))
    requests = [replace(request, trace=number != 3) for number, request in enumerate(requests_for(model, count=9))]
    expected = steered_anew(own, requests, 1)
    monkeypatch.setattr(rolling, "RoutingTracer", None)  # the model itself is never looked at
    moved = 0
    for rows in (1, 5):
        for mine, theirs in zip(steered_anew(faster, requests, rows), expected, strict=True):
            assert mine.token_ids == theirs.token_ids
            assert (mine.trace is None) == (theirs.trace is None) == (not mine.request.trace)
            if mine.trace is not None:
                for name in ("chosen", "unsteered", "share", "share_before", "strength"):
                    np.testing.assert_array_equal(getattr(mine.trace, name), getattr(theirs.trace, name), name)
                np.testing.assert_allclose(mine.trace.logprob, theirs.trace.logprob, atol=1e-3)
                moved += (mine.trace.chosen != mine.trace.unsteered).any((1, 2)).sum()
    assert moved > 20
    assert tiny.traces(model) == []


def test_steps_that_show_no_choices_are_not_used_for_traces(compiled, caplog):
    """Such as those of a router that does not choose by its logits alone."""
    model = build("granitemoeshared")
    compiled(model)
    for kind in artifacts.KINDS:
        path = artifacts.folder_of(model, kind) / artifacts.FACTS
        path.write_text(json.dumps(json.loads(path.read_text()) | {"traces": False}))
    rolling._tell_uncompiled.cache_clear()
    usual = requests_for(model)[:6]
    asked = [replace(request, trace=number in (1, 4)) for number, request in enumerate(usual)]
    faster, own = HFEngine(tiny.loaded(model)), HFEngine(tiny.loaded(model), compiled=False)
    decoder = faster.decoder(3)
    found = roll(decoder, faster, asked, 3)
    decoder.close()
    assert tiny.traces(model) == []
    assert [record.message for record in caplog.records if record.name == rolling.__name__] == [
        "texts with a trace are generated without compiled steps: this model's show no router's own choice"
    ]
    for request, done in zip(asked, found, strict=True):
        (alone,) = own.generate([request])
        assert done.token_ids == alone.token_ids
        assert (done.trace is None) == (not request.trace)
        if done.trace is not None:
            np.testing.assert_array_equal(done.trace.unsteered, alone.trace.unsteered)


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
    """One that was compiled well, but computes with other weights than the model."""
    model = build("granitemoeshared")
    compiled(model, ["one"])
    folder, weights = artifacts.folder_of(model, "one"), artifacts._weights
    program = (folder / artifacts.PROGRAM).rename(tmp_path / "program")
    shutil.rmtree(folder)
    monkeypatch.setattr(artifacts, "_compile", lambda model, kind, place: shutil.copy(program, place))
    monkeypatch.setattr(
        artifacts, "_weights", lambda model: {name: 2 * tensor for name, tensor in weights(model).items()}
    )
    with pytest.raises(ModelError, match="is off by"):
        artifacts.compile_step(model, "one")
    assert {path.name for path in (tmp_path / "compiled").iterdir()} == {".lock", f"{folder.name}.json"}
    assert "is off by" in records.read_record(folder).reason


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


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "3",
        "\udcff",
        "[" * 100_000,
        '{"kind": "one", "seconds": 1, "error": 0}',
        '{"kind": "one", "seconds": 1, "error": 0, "speedup": "fast", "traces": true}',
        '{"kind": "one", "seconds": "1", "error": 0, "speedup": 2, "traces": true}',
        '{"kind": "one", "seconds": 1, "error": null, "speedup": 2, "traces": true}',
        '{"kind": "one", "seconds": 1, "error": 0, "speedup": true, "traces": true}',
        '{"kind": ["one"], "seconds": 1, "error": 0, "speedup": 2, "traces": true}',
        '{"kind": "one", "seconds": 1, "error": 0, "speedup": 2}',
        '{"kind": "one", "seconds": 1, "error": 0, "speedup": 2, "traces": 1}',
    ],
)
def test_damaged_facts_are_told_and_passed_by(tmp_path, caplog, content):
    (tmp_path / artifacts.FACTS).write_bytes(content.encode(errors="surrogateescape"))
    assert artifacts._facts_in(tmp_path) is None
    assert "is damaged" in caplog.text
    assert "`steermoe models compile` makes it anew" in caplog.text
    assert len(caplog.text.splitlines()) == 1


def test_no_facts_are_no_damage(tmp_path, caplog):
    assert artifacts._facts_in(tmp_path) is None
    assert caplog.text == ""


@pytest.mark.parametrize(("speedup", "promised"), [(2.0, True), (0.9, False), (None, False)])
def test_a_step_is_loaded_when_it_is_first_needed(monkeypatch, speedup, promised):
    loads, looks = [], []
    facts = None if speedup is None else artifacts.Facts("one", 1.0, 0.0, speedup, True)
    monkeypatch.setattr("steermoe.engines.hf.compiled.steps.find_step", lambda model, kind: loads.append(kind))
    monkeypatch.setattr("steermoe.engines.hf.compiled.steps.facts_of", lambda model, kind: looks.append(kind) or facts)
    steps = CompiledSteps(build("granitemoeshared"))
    assert steps.promise(1) == steps.promise(1) == promised
    assert (loads, looks) == ([], ["one", "one"] if promised else ["one"])  # damaged facts are told once
    assert not steps.serves(1)
    assert loads == (["one"] if promised else [])
    assert not steps.promise(1)  # it turned out to be damaged


def test_a_cache_that_can_not_be_written(monkeypatch, tmp_path):
    require_compiler()
    (tmp_path / "file").touch()
    monkeypatch.setenv("STEERMOE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"can't write the compiled step to .*file/compiled'.*; set STEERMOE_CACHE to"):
        artifacts.compile_step(build("granitemoeshared"), "one")


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


def traced_modules(model, tmp_path, monkeypatch):
    """The modules of steermoe that run while a step is traced."""
    names = {module.__file__: name for name, module in sys.modules.items() if name.startswith("steermoe.")}
    ran = set()
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda *_, **__: None)
    with warnings.catch_warnings(action="ignore"):  # torch's, as in `compile_step`
        sys.setprofile(lambda frame, event, _: ran.add(frame.f_code.co_filename))
        try:
            artifacts._compile(model, "one", tmp_path / "none")
        finally:
            sys.setprofile(None)
    return [sys.modules[names[file]] for file in sorted(ran & names.keys())]


def test_a_step_is_found_only_by_the_code_that_was_compiled_into_it(tmp_path, monkeypatch):
    require_compiler()
    from steermoe import formulas
    from steermoe.routing import architectures

    model = build.__wrapped__("granitemoeshared")
    quantize_model(model)
    modules = traced_modules(model, tmp_path, monkeypatch)
    assert len(modules) >= 7
    folder = artifacts.folder_of(model, "one")
    for module in (*modules, architectures, formulas):  # the last two give constants only
        changed = tmp_path / "changed.py"
        changed.write_bytes(Path(module.__file__).read_bytes() + b"\nCHANGED = True\n")
        with monkeypatch.context() as patch:
            patch.setattr(module, "__file__", str(changed))
            assert artifacts.folder_of(model, "one") != folder, module.__name__
        assert artifacts.folder_of(model, "one") == folder


def test_a_step_is_found_only_by_the_models_own_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    source = tmp_path / "custom_norm.py"
    source.write_text("import torch\n\n\nclass Norm(torch.nn.Identity):\n    pass\n")
    model = build.__wrapped__("granitemoeshared")
    plain = artifacts.folder_of(model, "one")
    import custom_norm

    model.model.norm = custom_norm.Norm()
    folder = artifacts.folder_of(model, "one")
    source.write_text(source.read_text() + "\n    def forward(self, x):\n        return 2 * x\n")
    assert len({plain, folder, artifacts.folder_of(model, "one")}) == 3


def test_a_torch_that_is_too_old_says_so(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(torch, "__version__", "2.12.9+cpu")
    with pytest.raises(ModelError, match=r"torch 2\.12\.9\+cpu can't export it: install torch 2\.13 or newer"):
        artifacts.compile_step(build("granitemoeshared"), "one")


def test_inputs_with_gaps_are_refused(compiled):
    model = build("granitemoeshared")
    compiled(model, ["one"])
    step = artifacts.find_step(model, "one")
    traced = artifacts.DecodeStep(model)
    tokens, *rest = artifacts._inputs(traced, artifacts._states(model, 1, 8), 1, 7)
    step(tokens, *rest)
    states = rest[3]
    states[1] = states[1].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(GenerationError, match=r"input 5 .* must be contiguous: .* --no-compiled-steps"):
        step(tokens, *rest)


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
