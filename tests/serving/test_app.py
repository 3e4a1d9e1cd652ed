"""Whom a server lets in, what it refuses, and what it says about itself."""

import asyncio
import queue
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fastapi.responses import StreamingResponse

from steermoe.engines.listening import Keys, ServerOptions, check_keys
from steermoe.errors import ModelError
from steermoe.serving import app as serving
from steermoe.serving.app import Settings, make_server
from steermoe.serving.live import Limits
from steermoe.steering.resolver import PlanResolver
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
    assert [httpx.head(server.url + path).status_code for path in ("/health", "/v1/models", "/nothing")] == [
        200,
        200,
        404,
    ]
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


def half_a_request(url):
    """A connection whose request says that more of its body follows."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{")
    return connection


def test_a_client_that_goes_away_within_its_body_leaves_no_error(server, caplog):
    before = answered(server.url)
    half_a_request(server.url).close()
    deadline = time.monotonic() + 10
    while answered(server.url) == before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert answered(server.url) == before + 1
    assert not [record for record in caplog.records if record.exc_info]


def answered(url):
    text = httpx.get(f"{url}/metrics").text
    found = re.findall(r'steermoe_requests_total{path="/v1/completions",status="400"} (\d+)', text)
    return int(found[0]) if found else 0


def test_what_stays_open_does_not_hold_up_the_end(tiny_checkpoint, vectors, monkeypatch, caplog):
    """A page keeps its connection, a body never comes, a text runs: the text is finished, and the server ends."""
    made, ready = [], queue.SimpleQueue()
    monkeypatch.setattr(serving, "CLOSING", 0.5)
    monkeypatch.setattr(serving, "make_server", lambda *given: made.append(make_server(*given)) or made[0])

    async def forever():
        while True:
            yield b"."
            await asyncio.sleep(0.05)

    def extend(app):
        app.add_api_route("/open", lambda: StreamingResponse(forever()), methods=["GET"])

    engine = served.tiny_engine(tiny_checkpoint)
    resolver = PlanResolver(engine.shape, vectors, watch=True, names_only=True)
    settings = Settings(ServerOptions(port=0), grace=60)
    run = threading.Thread(target=serving.run, args=(engine, resolver, Limits(rows=2), settings, ready.put, extend))
    run.start()
    url = ready.get(timeout=30)
    with httpx.stream("GET", f"{url}/open") as page, half_a_request(url):
        next(page.iter_raw())
        with ThreadPoolExecutor() as pool:
            text = pool.submit(post, url, body={**BODY, "max_tokens": 200, "min_tokens": 200})
            while not made[0].server_state.tasks or "steermoe_running 1.0" not in httpx.get(f"{url}/metrics").text:
                time.sleep(0.005)
            made[0].should_exit = True
            assert text.result(60).json()["usage"]["completion_tokens"] == 200
        run.join(20)
    assert not run.is_alive()
    assert not [record for record in caplog.records if record.exc_info]
