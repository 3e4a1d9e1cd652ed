"""The script for people with a GPU runs, here on a CPU with tiny models, and says what is wrong."""

import json

import pytest

from benchmarks import gpu_check


def run(tmp_path, *arguments):
    file = tmp_path / "gpu.json"
    code = gpu_check.main(["--device", "cpu", "--small", "--json", str(file), *arguments])
    return code, json.loads(file.read_text())


def test_it_runs_without_a_gpu(tmp_path, capsys):
    code, report = run(tmp_path, "--only", "families", "decode", "vllm")
    out, err = capsys.readouterr()
    assert code == 0
    assert report["passed"]
    assert report["device"] == "cpu"
    lines = {(one["part"], one["name"]): one for one in report["lines"]}
    assert sum(part == "families" for part, _ in lines) == 3
    ways = {name for part, name in lines if part == "decode" and "rows" in name}
    assert len(ways) == len(gpu_check.SHAPES) * len(gpu_check.FEW_ROWS) * 2
    assert all("tokens/s steered" in lines["decode", name]["found"] for name in ways)
    assert all(one["passed"] for (part, _), one in lines.items() if part != "vllm")
    assert lines["vllm", "a steered text"]["passed"] is None
    assert "not run" in out
    assert "OLMoE-1B-7B, 1 rows, as generated" in err


def test_what_is_wrong_fails(tmp_path, monkeypatch, capsys):
    both = gpu_check.both
    monkeypatch.setattr(gpu_check, "both", lambda *given: (both(*given)[0], 0.1))
    monkeypatch.setattr(gpu_check, "measured", lambda *given: iter([gpu_check.line("decode", "a", fail, given[-1])]))

    def fail():
        raise RuntimeError("no kernel image is available\nfor execution")

    code, report = run(tmp_path, "--only", "families", "decode")
    assert code == 1
    assert not any(one["passed"] for one in report["lines"])
    assert report["lines"][-1]["found"] == "RuntimeError: no kernel image is available for execution"
    capsys.readouterr()


def test_what_does_not_fit_into_the_time_is_named(tmp_path, capsys):
    code, report = run(tmp_path, "--only", "families", "--seconds", "-1")
    assert code == 0
    assert {(one["passed"], one["found"]) for one in report["lines"]} == {(None, "no time left")}
    capsys.readouterr()


def test_a_device_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(["--device", "cuda:99"])
    assert stop.value.code == 2
    assert "--device 'cuda:99' can't be used here" in capsys.readouterr().err
