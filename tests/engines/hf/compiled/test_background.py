"""Compiled steps that a run lacked are made after it: when, how, once, what is remembered. Only the process is fake."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from steermoe.engines.hf.compiled import artifacts, background, records
from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.request import Request, Sampling
from steermoe.errors import ModelError, SteerMoEError
from tests.engines.hf.compiled.test_steps import require_compiler
from tests.support import steering_models as tiny

GREEDY = Sampling(max_new_tokens=3, min_new_tokens=3, do_sample=False)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own; compiling unasked is asked for, and no process is started but noted."""
    require_compiler()
    monkeypatch.setenv("STEERMOE_CACHE", str(tmp_path))
    monkeypatch.setenv(background.SWITCH, "on")
    started = []

    class Process:
        returncode = None

        def __init__(self, command, **options):
            started.append((command, options))

    monkeypatch.setattr(subprocess, "Popen", Process)
    return tmp_path / "compiled", started


@pytest.fixture
def fails(monkeypatch):
    """Torch can't export any model."""
    tried = []

    def export(*given, **options):
        tried.append(1)
        raise RuntimeError("a graph\nwith two lines")

    monkeypatch.setattr(torch.export, "export", export)
    return tried


@pytest.fixture(scope="module")
def model():
    return tiny.build("mixtral")


def ran(model, rows=1, compiled=True):
    engine = HFEngine(tiny.loaded(model), compiled)
    engine.generate([Request("Once upon", None, GREEDY)] * rows)
    return engine


def job_of(started):
    (command, options), *others = started
    assert not others
    assert command[:4] == [sys.executable, "-P", "-m", "steermoe.engines.hf.compiled.background"]
    assert (options["start_new_session"], options["stdin"]) == (True, subprocess.DEVNULL)
    assert options["env"][background.SWITCH] == "off"
    return background.Job(**json.loads(command[4]))


@pytest.mark.parametrize(("rows", "kind"), [(1, "one"), (3, "many")])
def test_what_a_run_lacked_is_begun_after_it(cache, model, rows, kind):
    folder, started = cache
    assert ran(model, rows).compile_later({"model": "some", "dtype": "auto"})
    job = job_of(started)
    assert job.load == {"model": "some", "dtype": "auto"}
    assert job.targets == {kind: str(artifacts.folder_of(model, kind))}
    assert job.threads == torch.get_num_threads()
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "background.log"]


def test_nothing_is_begun_unless_it_is_wanted(cache, model, monkeypatch):
    _, started = cache
    assert not ran(model, compiled=False).compile_later({})  # --no-compiled-steps
    engine = ran(model)
    for switch, others in (("off", {}), ("", {"CI": "true"}), ("", {"PYTEST_CURRENT_TEST": "this"})):
        with monkeypatch.context() as only:
            only.delenv("CI", raising=False)
            only.delenv("PYTEST_CURRENT_TEST", raising=False)
            only.setenv(background.SWITCH, switch)
            for name, value in others.items():
                only.setenv(name, value)
            assert not engine.compile_later({})
    monkeypatch.setenv(background.SWITCH, "maybe")
    with pytest.raises(SteerMoEError, match="STEERMOE_COMPILE is 'maybe', expected on or off"):
        engine.compile_later({})
    monkeypatch.setenv(background.SWITCH, "on")
    with monkeypatch.context() as only:
        only.setattr("steermoe.engines.memory.free_memory", lambda device: background.SPARE)
        assert not engine.compile_later({})
    with monkeypatch.context() as only:
        only.setenv("PATH", "")  # no compiler
        assert not engine.compile_later({})
    assert not started
    monkeypatch.delenv(background.SWITCH)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    assert engine.compile_later({})


def test_one_process_compiles_at_a_time(cache, model):
    folder, started = cache
    engine = ran(model)
    folder.mkdir()
    with records.turn_to_compile(folder, wait=False) as held:
        assert held
        assert not engine.compile_later({})
        with pytest.raises(ModelError, match="another process compiles a step now"):
            artifacts.compile_step(model, "one", wait=False)
    assert not started
    assert engine.compile_later({})


def test_a_failure_is_remembered_with_its_reason(cache, model, fails, monkeypatch):
    folder, started = cache
    engine = ran(model)
    assert engine.compile_later({})
    job = job_of(started)
    monkeypatch.setattr("steermoe.models.loading.load", lambda **given: tiny.loaded(model))
    monkeypatch.setattr(os, "nice", lambda by: by)
    threads = torch.get_num_threads()
    background.run(job)
    assert torch.get_num_threads() == threads
    target = artifacts.folder_of(model, "one")
    record = records.read_record(target)
    assert (record.state, record.kind, record.dtype) == ("failed", "one", "float32")
    assert record.reason.endswith("can't be compiled: RuntimeError: a graph with two lines")
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "background.log", f"{target.name}.json"]
    assert not ran(model).compile_later({})  # in a later run
    with pytest.raises(ModelError, match="can't be compiled"):  # asked for, it is tried again
        artifacts.compile_step(model, "one")
    assert len(fails) == 2
    monkeypatch.setattr(records, "compiler", lambda: "another one")
    assert ran(model).compile_later({})


def test_a_step_that_does_not_pay_is_not_made_again(cache, model):
    """Its facts are kept: runs know that there is a step, and that it is slower."""
    _, started = cache
    target = artifacts.folder_of(model, "one")
    target.mkdir(parents=True)
    facts = {"kind": "one", "seconds": 60.0, "error": 0.0, "speedup": 0.8, "traces": True}
    (target / artifacts.FACTS).write_text(json.dumps(facts))
    engine = ran(model)
    assert not engine.compiled_steps().serves(1)
    assert not engine.compile_later({})
    assert not started


def test_a_process_that_was_killed_is_followed_by_one_more(cache, model):
    folder, _ = cache
    folder.mkdir()
    target = artifacts.folder_of(model, "one")
    for attempts, begun in ((1, True), (records.MOST_ATTEMPTS, False)):
        records.write_record(
            target, records.Record("m", "float32", "one", attempts=attempts, compiler=records.compiler())
        )
        assert ran(model).compile_later({}) == begun


def test_what_a_killed_process_left_is_deleted(cache):
    folder, _ = cache
    folder.mkdir()
    old, new = folder / f"{records.SCRATCH}old", folder / f"{records.SCRATCH}new"
    for path in (old, new):
        path.mkdir()
        (path / "step.cpp").write_text("half")
    long_ago = time.time() - 2 * records.OLD
    os.utime(old, (long_ago, long_ago))
    with records.turn_to_compile(folder, wait=False):
        assert (old.exists(), new.exists()) == (False, True)


def test_a_model_that_is_loaded_otherwise_is_not_begun_again(cache, model, monkeypatch):
    _, started = cache
    assert ran(model).compile_later({})
    monkeypatch.setattr("steermoe.models.loading.load", lambda **given: tiny.loaded(tiny.build("olmoe")))
    background.run(job_of(started))
    assert "loads the model in another way" in records.read_record(artifacts.folder_of(model, "one")).reason
    assert not ran(model).compile_later({})


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"model": 1, "dtype": "x", "kind": "one"}', "[" * 9999])
def test_a_damaged_record_is_none(cache, content):
    folder, _ = cache
    folder.mkdir()
    (folder / "step.json").write_text(content)
    assert records.read_record(folder / "step") is None
    assert records.records_in(folder) == []


@pytest.mark.slow
def test_a_real_process_makes_the_next_run_compiled(tmp_path, tiny_checkpoint, monkeypatch):
    """Of the command itself, in the default setting, as a shell starts it."""
    require_compiler()
    environment = {**os.environ, "STEERMOE_CACHE": str(tmp_path), "STEERMOE_COMPILE": "on"}
    words = [sys.executable, "-m", "steermoe", "generate", "Once", "--no-stream", "--max-new-tokens", "3"]
    command = [*words, "--model", str(tiny_checkpoint), "--domain", "none"]

    def generate():
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)

    first = generate()
    assert "compiled in the background" in first.stderr
    folder = tmp_path / "compiled"
    until = time.monotonic() + 800
    while not any(record.state == "compiled" for record, _ in records.records_in(folder)):
        assert time.monotonic() < until, (folder / background.LOG).read_text()
        time.sleep(1)
    while list(folder.glob(f"{records.SCRATCH}*")):  # the process deletes what it needed, and ends
        assert time.monotonic() < until
        time.sleep(0.1)
    ((record, is_there),) = records.records_in(folder)
    assert (record.kind, record.state, is_there) == ("one", "compiled", True)
    second = generate()
    assert "background" not in second.stderr
    assert second.stdout == first.stdout
    wanted = {".lock", background.LOG, target_name(folder), f"{target_name(folder)}.json"}
    assert {path.name for path in folder.iterdir()} == wanted


def target_name(folder):
    (path,) = (path for path in folder.iterdir() if path.is_dir())
    return path.name
