"""`steermoe play`, and the page of `steermoe serve`, without starting a server."""

import sys
import threading

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'steermoe[serve]'")

from steermoe.engines import auto
from steermoe.serving import app as serving


@pytest.fixture
def started(monkeypatch):
    """What would be run: the arguments of each `serving.app.run`."""
    calls = []
    monkeypatch.setattr(serving, "run", lambda *given: calls.append(given))
    return calls


@pytest.fixture
def no_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)


@pytest.mark.parametrize("command", [("play",), ("serve", "--page")])
def test_without_gradio_one_line_says_how_to_install_it(run, no_gradio, started, command):
    result = run(*command)
    assert (result.code, result.out) == (1, "")
    assert "pip install 'steermoe[play]'" in result.err
    assert len(result.err.splitlines()) == 1
    assert not started


def test_serve_does_without_the_page(run, no_gradio, started, tiny_checkpoint, bare_search_path):
    assert "no page at /: it needs Gradio" in run("serve", tiny_checkpoint).err
    assert "Gradio" not in run("serve", tiny_checkpoint, "--no-page").err
    assert len(started) == 2
    for *_, extend in started:
        assert extend(None) is None


def test_play_has_no_page_for_vllm(run, started):
    result = run("play", "--engine", "vllm")
    assert result.code == 1
    assert "--engine hf or llamacpp" in result.err


def test_vllms_server_has_no_page(run, started, monkeypatch):
    monkeypatch.setattr(auto, "find_spec", lambda name: name)
    result = run("serve", "--engine", "vllm", "--page")
    assert result.code == 1
    assert "--page: vLLM's server has" in result.err


def test_play_opens_the_page_where_the_server_listens(run, started, tiny_checkpoint, bare_search_path, monkeypatch):
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'steermoe[play]'")
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert run("play", "--model", tiny_checkpoint, "--port", "8765", "--no-browser").code == 0
    assert run("play", "--model", tiny_checkpoint).code == 0
    for engine, resolver, limits, settings, ready, _ in started:
        assert engine.name == resolver.shape.name == "tiny-mixtral"
        assert limits is None
        assert settings.options.host == "127.0.0.1"
        ready(f"http://127.0.0.1:{settings.options.port}")
    for thread in threading.enumerate():
        if thread.name == "steermoe-browser":
            thread.join(10)
    assert opened == ["http://127.0.0.1:8000"]
