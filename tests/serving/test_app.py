"""Whom a server lets in, what it refuses, and what it says about itself."""

import httpx
import pytest

from steermoe.engines.listening import Keys, ServerOptions, check_keys
from steermoe.errors import ModelError
from steermoe.serving.app import Settings
from steermoe.serving.live import Limits
from tests.support import served

BODY = {"model": "tiny-mixtral", "prompt": "A dog", "max_tokens": 2}


@pytest.fixture(scope="module")
def closed(tiny_checkpoint, vectors):
    """A server with two keys, for pages of one origin, that takes bodies of 10,000 bytes."""
    options = ServerOptions(port=0, api_keys=("secret", "other"))
    settings = Settings(options, ("https://page.example",), most_body=10_000, grace=1)
    with served.running(served.tiny_engine(tiny_checkpoint), vectors, Limits(rows=2, tokens=64), settings) as running:
        yield running.url


def post(url, path="/v1/completions", body=BODY, **headers):
    return httpx.post(url + path, json=body, headers={name.replace("_", "-"): value for name, value in headers.items()})


@pytest.mark.parametrize("key", ["Bearer secret", "Bearer other", "bearer secret"])
def test_right_keys(closed, key):
    assert post(closed, authorization=key).status_code == 200


@pytest.mark.parametrize("key", ["Bearer wrong", "Bearer", "secret", "Basic secret", "Bearer secret2", "Bearer \xe9"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/steering", "/api/chat", "/nothing"])
def test_wrong_keys(closed, path, key):
    answer = httpx.post(closed + path, json=BODY, headers={"authorization": key.encode("latin-1")})
    assert answer.status_code == 401
    assert "needs a key" in str(answer.json()["error"])


def test_without_a_key_only_the_state_is_shown(closed):
    assert httpx.get(f"{closed}/health").json() == {"status": "ok", "model": "tiny-mixtral"}
    metrics = httpx.get(f"{closed}/metrics").text
    assert "steermoe_rows 2.0" in metrics
    assert 'steermoe_requests_total{path="/health",status="200"}' in metrics
    assert httpx.get(f"{closed}/v1/models").status_code == 401
    assert httpx.get(f"{closed}/docs").status_code == 401


def test_keys_are_compared_as_a_whole():
    keys = Keys(["secret", "\udcff"])
    assert keys.admit("Bearer secret")
    assert not keys.admit("Bearer secre")
    assert not keys.admit(None)
    assert Keys([]).admit(None)


def test_an_empty_key_is_refused(monkeypatch):
    monkeypatch.setenv("STEERMOE_API_KEY", " ")
    with pytest.raises(ModelError, match="let everyone in"):
        check_keys([])
    with pytest.raises(ModelError, match="let everyone in"):
        ServerOptions(api_keys=("a", ""))


def test_pages_of_other_origins_are_refused(closed, server):
    key = {"authorization": "Bearer secret"}
    assert post(closed, origin="https://evil.example", **key).status_code == 403
    allowed = post(closed, origin="https://page.example", **key)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    asked = {"origin": "https://page.example", "access-control-request-method": "POST"}
    assert httpx.options(f"{closed}/v1/completions", headers=asked).status_code == 200
    answer = post(server.url, origin="https://page.example")
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers
    assert post(server.url, origin=server.url).status_code == 200


def test_an_origin_that_is_no_address_is_refused(closed, server):
    for url in (closed, server.url):
        answer = post(url, origin="http://[", authorization="Bearer secret")
        assert answer.status_code == 403
        assert "pages of 'http://['" in answer.json()["error"]["message"]


def test_names_that_only_look_like_this_machine_are_refused(server):
    """A page whose name is made to mean 127.0.0.1 would come with its own name as host."""
    answer = post(server.url, host="evil.example:8000")
    assert answer.status_code == 403
    assert "is not this machine" in answer.json()["error"]["message"]


def test_long_bodies(closed):
    key = {"authorization": "Bearer secret"}
    answer = post(closed, body={**BODY, "prompt": "x" * 10_000}, **key)
    assert answer.status_code == 413
    assert "more than 10000 bytes" in answer.json()["error"]["message"]

    def parts():
        for _ in range(20):
            yield b"x" * 1000

    assert httpx.post(f"{closed}/v1/completions", content=parts(), headers=key).status_code == 413
    assert post(closed, **key).status_code == 200


def test_paths_that_are_not_there(server):
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["message"] == "there is no GET '/v1/nothing' here"
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405
    assert httpx.get(f"{server.url}/openapi.json").status_code == 404
    assert httpx.get(f"{server.url}/api/version").json()["version"]


@pytest.mark.parametrize(
    "name", ["../sport", "/etc/passwd", "vectors/sport.safetensors", "a/../../b", "~/x.safetensors"]
)
def test_no_request_names_a_file(server, vectors, name):
    for steering in (name, {"domain": name}):
        answer = post(server.url, body={**BODY, "steering": steering})
        assert answer.status_code == 400
        assert str(vectors) not in answer.json()["error"]["message"]
    answer = post(server.url, body={**BODY, "steering": str(vectors / "sport.safetensors")})
    assert answer.status_code == 400
    assert "is not allowed" in answer.json()["error"]["message"]
