"""`steermoe serve` and --engine vllm without vLLM, and with it the arguments that vLLM's command line gets."""

import importlib.util

import pytest

from steermoe.engines import auto


@pytest.fixture
def no_vllm(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(auto, "find_spec", lambda name: None if name == "vllm" else found(name))


@pytest.mark.parametrize(
    "command", [("serve", "--engine", "vllm"), ("generate", "--engine", "vllm"), ("compare", "--engine", "vllm")]
)
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
    assert run("serve", tiny_checkpoint, "--engine", "vllm", *options, "--", "--max-num-seqs", "7").code == 0
    (((*given,), keys),) = seen
    text = " ".join(given)
    assert f"--model {tiny_checkpoint} --served-model-name tiny-mixtral --dtype float32" in text
    assert "--host 127.0.0.1 --port 9" in text
    assert list(keys) == ["a", "b"]
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
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = run("serve", tiny_checkpoint, *options)
    assert (result.code, result.out) == (1, "")
    assert "is empty, which would let everyone in" in result.err
    assert len(result.err.splitlines()) == 1


OTHERS = [
    (("--eager",), "--eager needs --engine vllm; this model is served by hf"),
    (("--tensor-parallel-size", 2), "--tensor-parallel-size needs --engine vllm"),
    (("--", "--max-num-seqs", "7"), "'--max-num-seqs 7' needs --engine vllm"),
    (("--host", "no.such.host.invalid"), "can't listen at no.such.host.invalid:8000"),
    (("--max-tokens", 500), "500 tokens are more than the 256 of the context of tiny-mixtral"),
]


@pytest.mark.parametrize(("options", "message"), OTHERS)
def test_what_our_server_refuses(run, tiny_checkpoint, bare_search_path, options, message):
    pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'steermoe[serve]'")
    result = run("serve", tiny_checkpoint, *options)
    assert (result.code, result.out) == (1, "")
    assert message in result.err.splitlines()[-1]


@pytest.mark.parametrize("option", [("--rows", 3), ("--queue", 0), ("--cors", "*"), ("--grace", 1)])
def test_options_that_vllm_does_not_have(run, monkeypatch, tiny_checkpoint, option):
    monkeypatch.setattr(auto, "require_vllm", lambda: None)
    result = run("serve", tiny_checkpoint, "--engine", "vllm", *option)
    assert result.code == 1
    assert f"{option[0]}: vLLM's server has options of its own" in result.err


def test_without_its_libraries_one_line_says_how_to_install_them(run, monkeypatch, tiny_checkpoint):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else found(name))
    result = run("serve", tiny_checkpoint)
    assert (result.code, len(result.err.splitlines())) == (1, 1)
    assert "needs uvicorn: pip install 'steermoe[serve]'" in result.err


def test_a_port_that_is_taken(run, tiny_checkpoint, bare_search_path):
    import socket

    pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'steermoe[serve]'")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", tiny_checkpoint, "--port", port)
    assert result.code == 1
    assert f"can't listen at 127.0.0.1:{port}: " in result.err


@pytest.mark.slow
def test_sigterm_finishes_what_runs_and_ends_with_0(tiny_checkpoint, tmp_path):
    import re
    import signal
    import subprocess
    import sys
    import threading

    httpx = pytest.importorskip("httpx")
    command = [
        sys.executable,
        "-m",
        "steermoe",
        "serve",
        tiny_checkpoint,
        "--port",
        "0",
        "--grace",
        "30",
        "--rows",
        "2",
    ]
    with subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = next(match[0] for line in process.stderr if (match := re.search(r"http://\S+", line)))
        body = {"prompt": "A dog", "max_tokens": 200, "min_tokens": 200, "stream": True}
        answers = []

        def ask():
            answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        while "steermoe_running 2.0" not in httpx.get(f"{url}/metrics").text:
            pass
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert process.wait(40) == 0
    assert [answer.text.endswith("data: [DONE]\n\n") and "error" not in answer.text for answer in answers] == [True] * 3
