"""What vLLM's own server lacks of our protocol: Ollama's paths, and a default steering that changes while it serves.

A request to Ollama's `/api/generate` or `/api/chat` goes on as one to `/v1/completions`, whose answer is sent back in
Ollama's form; so it is steered, sampled, streamed and cancelled like any other there. Imports no vLLM.
"""

import asyncio
import functools
import json
import time
from collections.abc import Iterator, MutableMapping
from typing import Any

from starlette.requests import ClientDisconnect, Request

from steermoe.engines.messages import Chat, Part, Splitter, split_answer
from steermoe.engines.request import Request as TextRequest
from steermoe.engines.vllm.server import SteeringEndpoint, path_below_root, replay, with_length
from steermoe.errors import GenerationError, SteerMoEError
from steermoe.serving import ollama
from steermoe.serving.app import MOST_BODY, answer_error, asked_default, json_answer, read_body
from steermoe.serving.fields import Fields, Refused, dumps, parse
from steermoe.serving.service import Served
from steermoe.serving.steering import Steering
from steermoe.serving.streams import LINES, Receive, Scope, Send
from steermoe.steering.asked import KEY, asked_spec

READERS = {"/api/generate": ollama.read_generate, "/api/chat": ollama.read_messages}
COMPLETIONS = "/v1/completions"
EVENT, DONE = b"data: ", b"[DONE]"


def extend_servers() -> None:
    """Add it to each server that `engines.vllm.server.serve` starts from now on."""
    SteeringEndpoint.extend = extend


def extend(app: Any) -> None:
    """Add it to vLLM's app."""
    from starlette.middleware import Middleware

    protocols = Protocols(app.state)
    app.state.steermoe_default = protocols.default
    app.user_middleware.append(Middleware(OllamaMiddleware, protocols=protocols))
    for method, path, answer in (
        ("GET", "/v1/steering", protocols.steering),
        ("POST", "/v1/steering", protocols.set_steering),
        ("GET", "/api/tags", protocols.tags),
        ("POST", "/api/show", protocols.show),
        ("GET", "/api/version", protocols.version),
    ):
        app.add_api_route(path, answer, methods=[method], response_model=None)


class Protocols:
    """Routes beside vLLM's own.

    Args:
        state: of vLLM's app, which gets its `steermoe_host` before anything is served.
    """

    def __init__(self, state: Any) -> None:
        self._state = state

    @functools.cached_property
    def served(self) -> Served:
        """The model."""
        host = self._state.steermoe_host
        return Served(host, Steering(host, host.resolver))

    def default(self) -> Any:
        """The spec of requests that name no steering; None for no steering."""
        return self.served.steering.default()

    async def steering(self) -> Any:
        return json_answer(self.served.steering.as_dict())

    async def set_steering(self, request: Request) -> Any:
        try:
            _refuse_other_pages(request)
            spec = asked_default(parse(await read_body(request, MOST_BODY)))
            return json_answer(await asyncio.to_thread(self.served.steering.set, spec))
        except SteerMoEError as error:
            return answer_error("/v1/steering", error)

    async def tags(self) -> Any:
        return json_answer(await asyncio.to_thread(ollama.tags, self.served))

    async def show(self, request: Request) -> Any:
        try:
            fields = parse(await read_body(request, MOST_BODY))
            return json_answer(await asyncio.to_thread(ollama.show, self.served, fields))
        except SteerMoEError as error:
            return answer_error("/api/show", error)

    async def version(self) -> Any:
        return json_answer(ollama.version())


def _refuse_other_pages(request: Request) -> None:
    """Raise Refused for a web page of another origin: vLLM lets all in, and this changes the texts of others."""
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
        raise Refused(f"pages of {origin!r:.80} may not change the steering of this server", status=403)


class OllamaMiddleware:
    """Carries out requests of Ollama's protocol as completions of vLLM's server."""

    def __init__(self, app: Any, protocols: Protocols) -> None:
        self._app, self._protocols = app, protocols

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = path_below_root(scope) if scope["type"] == "http" else ""
        if path not in READERS or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            fields = parse(await read_body(Request(scope, receive), MOST_BODY))
            wanted, body = await asyncio.to_thread(self._read, path, fields)
        except ClientDisconnect:
            return
        except SteerMoEError as error:
            await answer_error(path, error)(scope, receive, send)
            return
        where = scope["path"].removesuffix(path) + COMPLETIONS
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-type"]
        headers.append((b"content-type", b"application/json"))  # which clients of Ollama need not say
        changed = {**scope, "path": where, "raw_path": where.encode(), "headers": headers}
        await self._app(with_length(changed, body), replay(body, receive), Answer(wanted, scope, receive, send))

    def _read(self, path: str, fields: Fields) -> tuple[ollama.Wanted, bytes]:
        served = self._protocols.served
        wanted = READERS[path](served, fields)
        return wanted, dumps(completion_body(served, fields, wanted))


def completion_body(served: Served, fields: Fields, wanted: ollama.Wanted) -> dict[str, Any]:
    """What to ask vLLM's `/v1/completions` for.

    Raises:
        Refused: a prompt that can't be continued.
    """
    sampling, prompt = wanted.sampling, wanted.prompt
    if isinstance(prompt, Chat):
        tokens, special = list(prompt.tokens), prompt.special
        if len(tokens) + sampling.max_new_tokens > served.live.tokens:
            more = f"{len(tokens)} tokens and {sampling.max_new_tokens} more were asked for"
            raise Refused(f"the messages have {more}, but a text has at most {served.live.tokens} here: ask for fewer")
    else:
        try:
            tokens, special = served.live.encode(TextRequest(prompt, None, sampling, special_tokens=False)), ()
        except GenerationError as error:
            raise Refused(str(error), param="prompt") from error
    _, spec = asked_spec(served.steering.without_latest(fields.values), [served.steering.served])
    return {
        "model": served.steering.served,
        "prompt": tokens,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature if sampling.do_sample else 0,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "seed": sampling.seed,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.penalties[0],
        "frequency_penalty": sampling.penalties[1],
        "stop": list(wanted.stop),
        "skip_special_tokens": not special,
        "stream": wanted.streams,
        **({"stream_options": {"include_usage": True}} if wanted.streams else {}),
        **({} if spec is None else {KEY: spec}),
    }


class Answer:
    """Sends an answer of `/v1/completions` on in Ollama's form.

    Args:
        wanted: the text that is asked for.
        scope: of the request to Ollama's path.
        receive: of it.
        send: sends to the client.
    """

    def __init__(self, wanted: ollama.Wanted, scope: Scope, receive: Receive, send: Send) -> None:
        self._wanted, self._chat = wanted, wanted.prompt if isinstance(wanted.prompt, Chat) else None
        self._request, self._send = (scope, receive, send), send
        self._splitter = None if self._chat is None else Splitter(self._chat)
        self._streams = False
        self._status = 200
        self._held = b""
        self._first = 0
        self._reason = ""
        self._usage: dict[str, Any] = {}
        self._has_failed = False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        """Take what vLLM sends."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._streams = self._wanted.streams and self._status == 200
            if self._streams:
                headers = [(b"content-type", LINES.encode()), (b"cache-control", b"no-cache")]
                await self._send({**message, "headers": headers})
        elif message["type"] == "http.response.body":
            self._held += message.get("body", b"")
            has_more = message.get("more_body", False)
            if self._streams:
                lines = b"".join(self._lines()) + (b"" if has_more else b"".join(self._last()))
                if lines or not has_more:
                    await self._send({**message, "body": lines})
            elif not has_more:
                await self._whole()(*self._request)

    def _whole(self) -> Any:
        """The answer to a request that does not stream, or an error."""
        try:
            answer = json.loads(self._held)
        except ValueError:
            answer = {"error": {"message": self._held.decode(errors="replace")[:1000] or "vLLM's server failed"}}
        if self._status != 200:
            return json_answer({"error": _message_of(answer)}, self._status)
        (choice,), usage = answer["choices"], answer["usage"]
        text, thinking = (choice["text"], None) if self._chat is None else split_answer(self._chat, choice["text"])
        end = self._end(choice["finish_reason"], usage, self._wanted.form.started)
        return json_answer(self._wanted.form.whole(text, thinking or "", end))

    def _lines(self) -> Iterator[bytes]:
        """The lines for the events that have come completely."""
        *events, self._held = self._held.split(b"\n\n")
        for event in events:
            data = event.strip().removeprefix(EVENT)
            if not data or data == DONE:
                continue
            content = json.loads(data)
            if "error" in content:
                self._has_failed = True
                yield ollama.error_line(_message_of(content))
            self._usage = content.get("usage") or self._usage
            for choice in content.get("choices", ()):
                self._first = self._first or time.perf_counter_ns()
                self._reason = choice["finish_reason"] or self._reason
                for part in self._parts(choice["text"]):
                    yield self._wanted.form.part(part)

    def _parts(self, text: str) -> list[Part]:
        if self._splitter is not None:
            return self._splitter.add(text)
        return [Part(text)] if text else []

    def _last(self) -> Iterator[bytes]:
        if not self._has_failed:
            for part in self._splitter.rest() if self._splitter is not None else ():
                yield self._wanted.form.part(part)
            yield self._wanted.form.last(self._end(self._reason, self._usage, self._first or time.perf_counter_ns()))

    def _end(self, finish_reason: str, usage: dict[str, Any], first: int) -> dict[str, Any]:
        prompt, new = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
        return self._wanted.form.end(finish_reason, prompt, new, first)


def _message_of(answer: Any) -> str:
    """What an error of vLLM's says, on one line."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    message = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(message).split())
