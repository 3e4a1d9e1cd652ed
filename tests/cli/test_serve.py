"""`steermoe serve` and --engine vllm without vLLM, and with it the arguments that vLLM's command line gets."""

import importlib.util

import pytest

from steermoe.engines import auto


@pytest.fixture
def no_vllm(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(auto, "find_spec", lambda name: None if name == "vllm" else found(name))


@pytest.mark.parametrize("command", [("serve",), ("generate", "--engine", "vllm"), ("compare", "--engine", "vllm")])
def test_without_vllm_one_line_says_how_to_install_it(run, no_vllm, command):
    result = run(*command)
    assert (result.code, result.out) == (1, "")
    assert "vLLM is not installed: pip install 'steermoe[vllm]'" in result.err
    assert len(result.err.splitlines()) == 1


def test_parallel_sizes_need_vllm(run, tiny_checkpoint, bare_search_path):
    (bare_search_path / "p.txt").write_text("A dog.\n")
    result = run("batch", "p.txt", "-o", "s.jsonl", "-m", tiny_checkpoint, "--tensor-parallel-size", 2, "--compile")
    assert result.code == 1
    assert "--tensor-parallel-size, --compile need --engine vllm" in result.err


def test_vllm_cannot_embed(run, tiny_checkpoint, bare_search_path):
    (bare_search_path / "texts.txt").write_text("A dog.\n")
    result = run("embed", "texts.txt", "-o", "out", "-m", tiny_checkpoint, "--engine", "vllm")
    assert result.code == 1
    assert "vLLM can't record the routing of given texts" in result.err


def test_arguments_for_vllm(run, monkeypatch, tiny_checkpoint, bare_search_path):
    pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
    from steermoe.engines.vllm import server

    seen = []
    monkeypatch.setattr(server, "_run", lambda *given: seen.append(given))
    for name in ("STEERMOE_VECTORS", "VLLM_PLUGINS", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "1")
        monkeypatch.delenv(name)
    options = ["--api-key", "a", "--api-key", "b", "--port", 9, "--dtype", "float32", "--tensor-parallel-size", 2]
    assert run("serve", tiny_checkpoint, *options, "--", "--max-num-seqs", "7").code == 0
    (((*given,), keys),) = seen
    text = " ".join(given)
    assert f"--model {tiny_checkpoint} --served-model-name tiny-mixtral --dtype float32" in text
    assert "--host 127.0.0.1 --port 9" in text
    assert keys == ["a", "b"]
    assert "--api-key" not in text
    assert text.endswith("--max-num-seqs 7")
    assert "--tensor-parallel-size=2" in given
    assert "--enforce-eager" not in given


EMPTY_KEYS = [
    (["--api-key", ""], {}),
    (["--api-key", "a", "--api-key", " "], {}),
    ([], {"STEERMOE_API_KEY": ""}),
    ([], {"STEERMOE_API_KEY": " "}),
    ([], {"VLLM_API_KEY": ""}),
]


@pytest.mark.parametrize(("options", "environment"), EMPTY_KEYS)
def test_an_empty_key_is_refused_before_anything_is_loaded(
    run, monkeypatch, bare_search_path, tiny_checkpoint, options, environment
):
    pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = run("serve", tiny_checkpoint, *options)
    assert (result.code, result.out) == (1, "")
    assert "is empty, which would let everyone in" in result.err
    assert len(result.err.splitlines()) == 1
