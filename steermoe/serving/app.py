"""The web application: routes, keys, limits, errors; and the server that runs it until a signal ends it."""

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response
from starlette.requests import ClientDisconnect

from steermoe.engines.listening import Keys, ServerOptions
from steermoe.errors import GenerationError, ModelError, SteerMoEError, quoted, reason
from steermoe.serving import ollama, openai
from steermoe.serving.fields import Fields, Refused, dumps, parse
from steermoe.serving.live import Limits, LiveEngine, QueueFull
from steermoe.serving.metrics import Metrics
from steermoe.serving.service import Service
from steermoe.serving.steering import Steering
from steermoe.serving.streams import EVENTS, LINES, Receive, Scope, Send, Streamed, cancelling

if TYPE_CHECKING:
    from steermoe.engines.engine import Engine
    from steermoe.steering.resolver import PlanResolver

OPEN = ("/health", "/metrics")
"""Paths that answer without a key: how the server is."""
MOST_BODY = 4 << 20
"""Bytes of a request's body."""
API = ("/v1/", "/api/")
"""Paths of programs, which send a key as a header; a browser asks for it, as a password of any name."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
GRACE = 30.0
"""Seconds after a signal within which texts may be finished."""
CLOSING = 5
"""Seconds for answers to be sent after the last text has ended."""
SHOWING = 0.5
"""Seconds for open pages to show the end of their texts."""
TEXT_PATHS = ("/v1/completions", "/v1/chat/completions", "/api/generate", "/api/chat")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What a server lets in.

    Attributes:
        options: where it listens, and its keys.
        origins: web pages of these origins may use it; "*" for all.
        most_body: bytes of a request's body.
        grace: seconds after a signal within which texts may be finished.
    """

    options: ServerOptions = field(default_factory=ServerOptions)
    origins: Sequence[str] = ()
    most_body: int = MOST_BODY
    grace: float = GRACE

    def __post_init__(self) -> None:
        if not 0 <= self.grace < float("inf"):
            raise GenerationError(f"grace is {self.grace}, expected seconds, 0 or more")


def create_app(live: LiveEngine, resolver: "PlanResolver", settings: Settings | None = None) -> FastAPI:
    """The application for a live engine; mount further pages on it.

    Args:
        live: stays open when the application ends.
        resolver: turns specs into plans; made with `names_only` and `watch`.
        settings: by default those of `Settings`.

    Returns:
        an application whose `state.service` is the `Service`.
    """
    settings = settings or Settings()
    app = FastAPI(title="steermoe", docs_url=None, redoc_url=None, openapi_url=None)
    service = Service(live, Steering(live, resolver), Metrics(live))
    app.state.service = service
    Routes(service, settings.most_body).add_to(app)
    app.add_exception_handler(SteerMoEError, _on_error)
    app.add_exception_handler(404, _on_missing)
    app.add_exception_handler(405, _on_missing)
    app.add_middleware(Guard, settings=settings, metrics=service.metrics)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.origins), allow_methods=["*"], allow_headers=["*"]
        )
    return app


class Routes:
    """What the application answers. What takes long is done on other threads, or awaited.

    Args:
        service: the model that is served.
        most_body: bytes of a request's body.
    """

    def __init__(self, service: Service, most_body: int) -> None:
        self._service, self._most_body = service, most_body

    def add_to(self, app: FastAPI) -> None:
        """Put them under their paths."""
        for method, path, answer in (
            ("GET", "/health", self.health),
            ("GET", "/metrics", self.metrics),
            ("GET", "/v1/models", self.models),
            ("POST", "/v1/completions", self.completions),
            ("POST", "/v1/chat/completions", self.chat_completions),
            ("POST", "/v1/embeddings", self.embeddings),
            ("GET", "/v1/steering", self.steering),
            ("POST", "/v1/steering", self.set_steering),
            ("POST", "/api/generate", self.generate),
            ("POST", "/api/chat", self.chat),
            ("GET", "/api/tags", self.tags),
            ("POST", "/api/show", self.show),
            ("GET", "/api/version", self.version),
        ):
            methods = [method, "HEAD"] if method == "GET" else [method]
            app.add_api_route(path, answer, methods=methods, response_model=None)

    async def health(self) -> Response:
        return json_answer({"status": "ok", "model": self._service.steering.served})

    async def metrics(self) -> Response:
        text = self._service.metrics.text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self) -> Response:
        return json_answer(await asyncio.to_thread(openai.models, self._service))

    async def completions(self, request: Request) -> Any:
        return await self._texts(request, openai.complete, EVENTS)

    async def chat_completions(self, request: Request) -> Any:
        return await self._texts(request, openai.chat, EVENTS)

    async def embeddings(self, request: Request) -> Response:
        order = openai.embed(self._service, await self._body(request))
        return json_answer(order.answer(await asyncio.wrap_future(order.computing)))

    async def steering(self) -> Response:
        return json_answer(self._service.steering.as_dict())

    async def set_steering(self, request: Request) -> Response:
        spec = asked_default(await self._body(request))
        return json_answer(await asyncio.to_thread(self._service.steering.set, spec))

    async def generate(self, request: Request) -> Any:
        return await self._texts(request, ollama.generate, LINES)

    async def chat(self, request: Request) -> Any:
        return await self._texts(request, ollama.chat, LINES)

    async def tags(self) -> Response:
        return json_answer(await asyncio.to_thread(ollama.tags, self._service))

    async def show(self, request: Request) -> Response:
        fields = await self._body(request)
        return json_answer(await asyncio.to_thread(ollama.show, self._service, fields))

    async def version(self) -> Response:
        return json_answer(ollama.version())

    async def _body(self, request: Request) -> Fields:
        return parse(await read_body(request, self._most_body))

    async def _texts(self, request: Request, begin: Callable[[Service, Fields], Any], media_type: str) -> Any:
        order = await asyncio.to_thread(begin, self._service, await self._body(request))
        if order.streams:
            return Streamed(order.events(), order.tickets, media_type)
        async with cancelling(request.receive, order.tickets):
            return json_answer(await order.answer())


def asked_default(fields: Fields) -> Any:
    """What `POST /v1/steering` asks for, for `Steering.set`: the field `steering`, or all fields.

    Raises:
        Refused: the field `steering` and others beside it.
    """
    asked = fields.values
    if "steering" in asked and len(asked) > 1:
        other = next(name for name in asked if name != "steering")
        raise Refused(
            f"field '{quoted(other)}' stands beside 'steering': put it into that object, or leave one of them out",
            param=other,
        )
    return asked.get("steering", asked or None)


async def read_body(request: Request, most: int) -> bytes:
    """The body.

    Raises:
        Refused: it is longer than `most` bytes; nothing beyond is kept.
    """
    length = request.headers.get("content-length", "")
    too_large = Refused(f"the body has more than {most} bytes: send a shorter request", status=413)
    if length.isdecimal() and int(length) > most:
        raise too_large
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise too_large
            parts.append(part)
    except ClientDisconnect as error:
        raise Refused("the body is not complete: the client went away") from error
    return b"".join(parts)


def json_answer(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer in JSON."""
    return Response(dumps(content), status_code=status, media_type="application/json", headers=headers)


async def _on_error(request: Request, error: Any) -> Response:
    return answer_error(request.url.path, error)


async def _on_missing(request: Request, error: Any) -> Response:
    wrong = f"there is no {request.method} {request.url.path!r:.200} here"
    return answer_error(request.url.path, Refused(wrong, status=error.status_code))


def answer_error(path: str, error: SteerMoEError) -> Response:
    """An error in the form that the clients of a path expect."""
    status, content = openai.error_of(error)
    if path.startswith("/api/"):
        content = {"error": content["error"]["message"]}
    headers = {"Retry-After": str(error.seconds)} if isinstance(error, QueueFull) else {}
    if status == 413:
        headers["Connection"] = "close"
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer" if path.startswith(API) else 'Basic realm="steermoe"'
    return json_answer(content, status, headers)


class Guard:
    """Lets in who may, and counts what is answered. Web pages may ask only if they are allowed to, or ours.

    Args:
        app: the application.
        settings: who may.
        metrics: counts.
    """

    def __init__(self, app: Any, settings: Settings, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        self._keys = Keys(settings.options.api_keys)
        self._origins = frozenset(settings.origins)
        self._is_local = settings.options.host in LOOPBACK

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        path = scope["path"]
        refusal = self._refusal(path, headers)
        self._metrics.answering += path.startswith(API)
        try:
            if refusal is not None:
                await answer_error(path, refusal)(scope, receive, counted)
            else:
                await self._app(scope, receive, counted)
        finally:
            self._metrics.answering -= path.startswith(API)
            route = scope.get("route")
            known = getattr(route, "path", "other")
            self._metrics.answered(known, status, started, is_text=path in TEXT_PATHS and status == 200)

    def _refusal(self, path: str, headers: dict[str, str]) -> Refused | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._is_local and _name(f"//{host}") not in (*LOOPBACK, None):
            return Refused(f"host {host!r:.80} is not this machine: use localhost, or serve with --host", status=403)
        is_ours = origin is None or _place(origin) == host
        if not is_ours and origin not in self._origins and "*" not in self._origins:
            return Refused(f"pages of {origin!r:.80} may not use this server: allow them with --cors", status=403)
        if path in OPEN or self._keys.admit(headers.get("authorization")):
            return None
        return Refused("this needs a key: send the header 'Authorization: Bearer KEY'", status=401)


def _place(url: str) -> str | None:
    try:
        return urlsplit(url).netloc
    except ValueError:
        return None


def _name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return ""


class Server(uvicorn.Server):
    """A server that ends by SIGTERM or Ctrl-C as if it had been asked to: with 0, once what runs is finished."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but it does not raise the signal again at the end."""
        try:
            before = {one: signal.signal(one, self.handle_exit) for one in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not in the main thread
            before = {}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    async def finish(self, live: LiveEngine, grace: float, metrics: Metrics) -> None:
        """Finish the texts within the grace, a second Ctrl-C at once; send the answers; then close what is still open.

        Open are pages, which keep connections as long as they are shown, and requests whose body never came.
        """
        closing = asyncio.create_task(asyncio.to_thread(live.close, grace))
        while not closing.done():
            if self.force_exit:
                await asyncio.to_thread(live.close, 0)
            await asyncio.wait([closing], timeout=0.1)
        await closing
        until = time.monotonic() + CLOSING
        while metrics.answering and time.monotonic() < until:
            await asyncio.sleep(0.02)
        await asyncio.sleep(SHOWING if self.server_state.connections else 0)
        for connection in list(self.server_state.connections):
            connection.transport.close()


def run(
    engine: "Engine",
    resolver: "PlanResolver",
    limits: Limits | None = None,
    settings: Settings | None = None,
    ready: Callable[[str], None] = lambda address: None,
    extend: Callable[[FastAPI], Any] = lambda app: None,
) -> None:
    """Serve an engine until SIGTERM or Ctrl-C; then finish what runs, within the grace.

    Args:
        engine: nothing else may use it.
        resolver: as for `create_app`.
        limits: by default those of `Limits`.
        settings: by default those of `Settings`.
        ready: called with the address once requests are taken.
        extend: called with the application, to mount further pages on it.

    Raises:
        ModelError: the address can't be used.
    """
    settings = settings or Settings()
    live = LiveEngine(engine, limits)
    try:
        app = create_app(live, resolver, settings)
        asyncio.run(_serve(app, live, settings, ready, extend))
    finally:
        live.close(0)


async def _serve(
    app: FastAPI,
    live: LiveEngine,
    settings: Settings,
    ready: Callable[[str], None],
    extend: Callable[[FastAPI], Any],
) -> None:
    options = settings.options
    sockets = [_bound(options)]
    extend(app)  # here, since Gradio would otherwise leave an event loop of its own behind
    server = make_server(app, settings)
    host, port = sockets[0].getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host

    async def watch() -> None:
        while not server.started:
            await asyncio.sleep(0.01)
        ready(f"http://{shown}:{port}")
        while not server.should_exit:
            await asyncio.sleep(0.1)
        await server.finish(live, settings.grace, app.state.service.metrics)

    watching = asyncio.create_task(watch())
    await server.serve(sockets)
    await watching


def make_server(app: FastAPI, settings: Settings) -> Server:
    """A server for the application, which does not run yet."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(settings.grace) + CLOSING,
        server_header=False,
        ws="none",
        loop="asyncio",
        http="h11",
    )
    return Server(config)


def _bound(options: ServerOptions) -> Any:
    import socket

    made = None
    try:
        found = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(found[0], socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(found[4])
    except OSError as error:
        if made is not None:
            made.close()
        raise ModelError(
            f"the server can't listen at {options.host}:{options.port}: {reason(error)}; take another --host or --port"
        ) from error
    return made
