"""`steermoe verify` on a tiny checkpoint: it passes, and it fails where steering does something else."""

import json

import pytest

from steermoe.steering.editing import Editor


@pytest.fixture
def hurried(monkeypatch):
    """A tiny model's texts take less time than what steering adds to them; one pair is enough."""
    monkeypatch.setattr("steermoe.evaluation.verification.STEP_SECONDS", 10.0)
    monkeypatch.setattr("steermoe.evaluation.verification.PAIRS", 1)


def test_all_checks_pass(run, tiny_checkpoint, hurried):
    done = run("verify", "-m", tiny_checkpoint, "--json")
    report = json.loads(done.out)
    failed = [check for check in report["checks"] if check["passed"] is False]
    assert (done.code, failed) == (0, [])
    assert report["passed"] is True
    assert len(report["checks"]) == 13
    not_run = [check["name"] for check in report["checks"] if check["passed"] is None]
    assert not_run == ["compiled steps"]
    assert report["model"].endswith("3 MoE layers on cpu")
    assert "torch" in report["versions"]


def test_the_report_is_text(run, tiny_checkpoint, hurried):
    done = run("verify", "-m", tiny_checkpoint, "--device", "cpu")
    assert done.code == 0
    assert done.out.splitlines()[-1] == "12 passed, 0 failed, 1 not run"
    assert "formula zero_max_scaled, scale paper" in done.out
    assert "fingerprint" in done.out


def test_a_wrong_edit_is_found(run, tiny_checkpoint, hurried, monkeypatch):
    right = Editor.edit
    monkeypatch.setattr(Editor, "edit", lambda self, logits: right(self, logits) * 1.001)
    done = run("verify", "-m", tiny_checkpoint, "--json")
    report = json.loads(done.out)
    failed = {check["name"] for check in report["checks"] if check["passed"] is False}
    assert done.code == 1
    assert report["passed"] is False
    assert {name for name in failed if name.startswith("formula")} == {
        "formula additive, scale magnitude",
        "formula max_scaled, scale magnitude",
        "formula max_scaled, scale paper",
        "formula zero_max_scaled, scale magnitude",
        "formula zero_max_scaled, scale paper",
    }
    assert "checks failed (formula additive" in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_lists_that_do_nothing_are_found(run, tiny_checkpoint, hurried, monkeypatch):
    monkeypatch.setattr("steermoe.formulas.force", lambda logits, forced, eps=0: logits)
    monkeypatch.setattr("steermoe.steering.handle.keep_lists", lambda *given: lambda: None)
    report = json.loads(run("verify", "-m", tiny_checkpoint, "--json").out)
    (lists,) = (check for check in report["checks"] if check["name"] == "forced and banned experts")
    assert lists["passed"] is False


@pytest.mark.parametrize("device", ["cuda:99", "toaster"])
def test_a_device_that_is_not_there_is_wrong_usage(run, tiny_checkpoint, device):
    done = run("verify", "-m", tiny_checkpoint, "--device", device)
    assert done.code == 2
    assert device in done.err
    assert "Traceback" not in done.err
