"""Every route of vLLM's server: steered, absent, open to all, or one that generates nothing and asks for the key."""

import json
import re

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from fastapi import FastAPI
from starlette.routing import Mount, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from steermoe.engines.vllm import server
from steermoe.errors import ModelError, SteeringError
from steermoe.serving.vllm import extend

KEY = "a-key"
TASKS = ("generate", "render", "transcription", "realtime")
"""More than a text model has, so that all routes that could generate are there."""
QUIET = {
    *("/v1/models", "/tokenize", "/detokenize", "/tokenizer_info", "/kv_event_sources"),
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters", "/adapters/{adapter_name}"),
    *("/v1/chat/completions/derender", "/v1/completions/derender"),
    *("/scale_elastic_ep", "/is_scaling_elastic_ep", "/start_profile", "/stop_profile", "/abort_requests"),
    *("/docs/oauth2-redirect", "/v1/responses/{response_id}"),
    *("/v1/steering", "/api/tags", "/api/show", "/api/version"),
}
"""Routes that generate nothing, or read what was generated; a new one is to be looked at before it is added here."""


@pytest.fixture
def make_app(monkeypatch):
    """vLLM's app as the server builds it, without an engine."""

    def make(*options: str) -> FastAPI:
        monkeypatch.setenv("VLLM_PLUGINS", "steermoe")
        monkeypatch.setattr(server.SteeringEndpoint, "extend", extend)
        parser = make_arg_parser(FlexibleArgumentParser())
        return build_app(parser.parse_args(["--model", "tiny", *options]), TASKS)

    return make


@pytest.fixture
def steered(monkeypatch):
    """The requests whose steering was read; each is refused, since no engine could answer it."""
    seen = []

    def read(body, served, resolver, default):
        seen.append(json.loads(body))
        raise SteeringError("it was read")

    monkeypatch.setattr(server, "steered_body", read)
    return seen


class NoEngine:
    """What the server reads requests with, of a model that nothing runs."""

    name, dtype, tokens = "tiny", "float32", 64

    @property
    def resolver(self):
        return self

    def plan(self, spec):
        raise SteeringError("it was read")


def no_engine(app):
    app.state.steermoe = None, ["tiny"]
    app.state.steermoe_host = NoEngine()


def routes_of(app):
    """(method, path) of every route; WEBSOCKET is a method here."""
    for route in app.routes:
        if isinstance(route, WebSocketRoute):
            yield "WEBSOCKET", route.path
        elif isinstance(route, Mount):
            yield "GET", route.path
        elif hasattr(route, "methods"):
            yield from ((method, route.path) for method in sorted(route.methods - {"HEAD", "OPTIONS"}))
        else:
            raise AssertionError(f"a route of an unknown kind: {route!r}")


def ask(client, method, path, key=None):
    """The status of a request with a body that asks for steering; that of a refused websocket is 403."""
    path = re.sub(r"\{.*?\}", "x", path)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    if method == "WEBSOCKET":
        try:
            with client.websocket_connect(path, headers=headers):
                return 101, ""
        except (WebSocketDisconnect, WebSocketDenialResponse):
            return 403, ""
    answer = client.request(method, path, headers=headers, json={"model": "tiny:sport"} if method == "POST" else None)
    return answer.status_code, answer.text


def is_under(path, places):
    return any(path == place or path.startswith(f"{place}/") for place in places)


def test_every_route_is_guarded_and_steered_or_absent(make_app, steered):
    app = make_app("--api-key", KEY)
    client = TestClient(app, raise_server_exceptions=False)
    no_engine(app)
    found = sorted(set(routes_of(app)))
    assert {"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"} <= {path for _, path in found}
    assert ("POST", "/invocations") in found
    for method, path in found:
        if is_under(path, server.OPEN):
            assert method == "GET" or path == "/ping"
            continue
        for key in (None, "", "wrong"):
            assert ask(client, method, path, key)[0] in (401, 403), (method, path)
        before = len(steered)
        status, text = ask(client, method, path, KEY)
        if is_under(path, server.ABSENT):
            assert status in (404, 403), (method, path)
            assert method == "WEBSOCKET" or "is not offered here" in text
        elif method == "POST" and is_under(path, server.STEERED) and path not in QUIET:
            assert (status, len(steered)) == (400, before + 1), (method, path)
        else:
            assert path in QUIET, f"{method} {path} is new: does it generate?"


def test_ollamas_paths_ask_for_the_key(make_app, steered):
    app = make_app("--api-key", KEY)
    no_engine(app)
    client = TestClient(app, raise_server_exceptions=False)
    for path in ("/api/generate", "/api/chat"):
        assert ask(client, "POST", path)[0] == 401
        status, text = ask(client, "POST", path, KEY)
        assert status == 400
        assert json.loads(text) == {"error": "steering: it was read"}
    assert ask(client, "POST", "/v1/embeddings")[0] == 401


def test_a_page_of_another_origin_does_not_change_the_default(make_app, steered):
    app = make_app()
    no_engine(app)
    client = TestClient(app, raise_server_exceptions=False)

    def change(**headers):
        answer = client.post("/v1/steering", headers=headers, json={"domain": "sport"})
        return answer.status_code, answer.json()["error"]["message"]

    assert change(origin="http://elsewhere.example")[0] == 403
    assert change(origin="http://testserver") == change() == (400, "steering: it was read")


def test_without_a_key_all_may_in_but_nothing_runs_unsteered(make_app, steered):
    app = make_app()
    no_engine(app)
    client = TestClient(app, raise_server_exceptions=False)
    assert ask(client, "POST", "/invocations")[0] == 404
    assert ask(client, "POST", "/inference/v1/generate")[0] == 404
    assert ask(client, "POST", "/v1/completions")[0] == 400
    assert ask(client, "GET", "/health", "wrong")[0] != 401


def test_every_key_is_one(monkeypatch, make_app, steered):
    app = make_app("--api-key", "a", "b")
    no_engine(app)
    client = TestClient(app, raise_server_exceptions=False)
    assert [ask(client, "POST", "/v1/completions", key)[0] for key in ("a", "b", "c", None)] == [400, 400, 401, 401]


@pytest.mark.parametrize("root", ["/", "/v1/comp", "/inv"])
def test_a_root_path_that_is_only_the_beginning_of_a_path_hides_no_route(make_app, steered, root):
    app = make_app("--api-key", KEY, "--root-path", root)
    no_engine(app)
    client = TestClient(app, raise_server_exceptions=False)
    for path, status in (("/v1/completions", 400), ("/invocations", 404)):
        assert ask(client, "POST", path)[0] == 401
        assert ask(client, "POST", path, KEY)[0] == status, (root, path)
    assert len(steered) == 1
    assert ask(client, "GET", "/health")[0] != 401


def test_a_root_path_hides_no_route(make_app, steered):
    app = make_app("--api-key", KEY, "--root-path", "/under")
    no_engine(app)
    client = TestClient(app, raise_server_exceptions=False)
    for prefix in ("", "/under"):
        assert ask(client, "POST", f"{prefix}/v1/completions")[0] == 401
        assert ask(client, "POST", f"{prefix}/v1/completions", KEY)[0] == 400
        assert ask(client, "POST", f"{prefix}/invocations")[0] == 401
        assert ask(client, "POST", f"{prefix}/invocations", KEY)[0] == 404


def test_vllms_own_record_of_experts_is_refused_before_the_model_is_read():
    with pytest.raises(ModelError, match="needs vLLM's model runner V2, which can't be steered"):
        server._run(["--model", "no/such/folder", "--enable-return-routed-experts"], [])
