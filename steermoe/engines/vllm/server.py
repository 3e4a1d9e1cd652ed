"""vLLM's OpenAI-compatible server with steering: by a field of the request, or by the name of the model it asks for.

Requests are read here before vLLM sees them, so that wrong steering is refused with status 400 even if the text is
streamed.
"""

import json
import math
import os
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from importlib.metadata import entry_points
from typing import Any, ClassVar

from starlette.requests import Request

from steermoe.engines.listening import ServerOptions, check_keys
from steermoe.engines.request import require_steered
from steermoe.engines.vllm.host import VLLMHost
from steermoe.engines.vllm.launch import WORKER, cache_bytes, check_sizes, parallel_sizes, prepare_environment
from steermoe.engines.vllm.spec import ANY_MODEL, packed, resolver_for
from steermoe.engines.vllm.wire import unpack
from steermoe.errors import ModelError, SteeringError, SteerMoEError, UnsupportedModel, escaped
from steermoe.models.checkpoint import find_source
from steermoe.steering.asked import KEY, asked_spec, read_asked
from steermoe.steering.plans import SteeringPlan
from steermoe.steering.resolver import PlanResolver

STEERED = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
"""Paths of requests for texts, which are steered; longer paths, such as /v1/chat/completions/batch, count too."""
ABSENT = ("/invocations", "/inference", "/generative_scoring", "/v1/systemone", "/v1/audio", "/v1/realtime", "/cohere")
"""Paths where vLLM would run the model without the steering that was asked for."""
OPEN = ("/health", "/ping", "/version", "/metrics", "/load", "/docs", "/redoc", "/openapi.json", "/static")
"""Paths that answer without a key: how the server is, and vLLM's description of its API."""
LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
"""Fields of requests that limit the new tokens, the first that is given first."""
ELSEWHERE = {
    "/v1/embeddings": "routing embeddings are not offered here, since vLLM does not show what its routers choose",
}
"""Paths whose answers other engines have, with why this one has none."""
RECORDS = {"trace": "traces", "return_routed_experts": "record of the experts that its routers choose"}
"""Fields that ask for a record of routing."""
OTHER_ENGINES = "serve the model with --engine hf, or llamacpp for a GGUF file"
PLUGIN_GROUPS = ("general", "io_processor", "platform", "stat_logger")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Extend = Callable[[Any], None]


class NotOffered(SteerMoEError):
    """A field of a request that vLLM's server can't carry out."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def serve(
    model: str | None = None,
    server: ServerOptions | None = None,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    eager: bool = False,
    parallel: Mapping[str, int] | None = None,
    arguments: Sequence[str] = (),
) -> None:
    """Serve until interrupted.

    Args:
        model: as for `VLLMEngine`.
        server: by default those of `ServerOptions`.
        dtype: as for `VLLMEngine`.
        trust_remote_code: as for `VLLMEngine`.
        eager: start at once, without compiling.
        parallel: `VLLMEngine`'s sizes of parallelism, by name.
        arguments: further arguments of vLLM's server, as on its command line.

    Raises:
        ModelError: the model can't be found, or vLLM can't be started. UnsupportedModel: it can't be steered.
    """
    server = server or ServerOptions()
    check_keys(server.api_keys)
    sizes = parallel_sizes(parallel or {})
    check_sizes(sizes, compiled=not eager)
    source = find_source(model, dtype)
    if server.vectors is not None:
        before = os.environ.get("STEERMOE_VECTORS")
        os.environ["STEERMOE_VECTORS"] = os.pathsep.join(filter(None, (str(server.vectors), before)))
    if server.any_model:
        os.environ[ANY_MODEL] = "1"
    _allow_plugins()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    prepare_environment(math.prod(sizes.values()), in_process=False)
    given = ["--model", source.folder, "--served-model-name", source.name, "--dtype", source.dtype]
    given += ["--host", server.host, "--port", str(server.port), "--worker-extension-cls", WORKER]
    given += ["--trust-remote-code"] * trust_remote_code + ["--enforce-eager"] * eager
    given += [f"--{name.replace('_', '-')}={size}" for name, size in sizes.items() if size > 1]
    if not any(part.startswith(("--kv-cache-memory", "--gpu-memory")) for part in arguments) and _is_cpu():
        given += ["--kv-cache-memory-bytes", str(cache_bytes())]
    _run([*given, *arguments], server.api_keys)


def _run(arguments: Sequence[str], keys: Sequence[str]) -> None:
    """Run vLLM's server; `keys` are added to those of its arguments, of which the last option alone would count."""
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from steermoe.engines.vllm import plugin

    plugin.register()
    args = make_arg_parser(FlexibleArgumentParser(prog="steermoe serve MODEL --")).parse_args(list(arguments))
    args.api_key = [*keys, *(args.api_key or ())] or None
    check_keys(args.api_key or ())
    if args.enable_return_routed_experts:
        raise ModelError(
            "--enable-return-routed-experts needs vLLM's model runner V2, which can't be steered: leave it out, or "
            f"{OTHER_ENGINES}"
        )
    try:
        validate_parsed_serve_args(args)
        uvloop.run(run_server(args))
    except (SteerMoEError, KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:  # vLLM raises anything, from its configuration's checks to its workers' end
        raise ModelError(f"vLLM's server ended: {' '.join(str(error).split())[:400]}") from error


def _allow_plugins() -> None:
    """Allow our plugin by name, as vLLM requires of plugins that extend the server; the others stay allowed."""
    if "VLLM_PLUGINS" not in os.environ:
        names = {point.name for kind in PLUGIN_GROUPS for point in entry_points(group=f"vllm.{kind}_plugins")}
        os.environ["VLLM_PLUGINS"] = ",".join(sorted({*names, "steermoe"}))


def _is_cpu() -> bool:
    import torch

    return not torch.accelerator.is_available()


class SteeringEndpoint:
    """What vLLM's server loads (entry point `vllm.endpoint_plugins`)."""

    name = "steermoe"
    required_tasks = ("generate",)
    extend: ClassVar[Extend | None] = None
    """Called with the server's app, to add routes and what runs between the check of keys and the steering."""

    def attach_router(self, app: Any) -> None:
        """Read requests before vLLM does, behind its own check of keys, and list the steered models."""
        from starlette.middleware import Middleware

        app.user_middleware.append(Middleware(GuardMiddleware, state=app.state))
        if SteeringEndpoint.extend is not None:
            SteeringEndpoint.extend(app)
        app.user_middleware.append(Middleware(SteeringMiddleware, state=app.state))
        app.get("/v1/models")(list_models)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Make sure that the model can be steered, before anything is served."""
        from steermoe.engines.vllm import plugin

        reasons = await engine_client.collective_rpc("steermoe_reason")
        if reason := next(filter(None, reasons), ""):
            raise UnsupportedModel(f"{args.model} can't be steered in vLLM: {reason}")
        resolver = resolver_for(engine_client.model_config, names_only=True)
        resolver.tags = plugin.tags_of_inputs(engine_client.input_processor)
        engine_client.input_processor.steermoe_resolver = resolver
        found = await engine_client.collective_rpc("steermoe_no_lists")
        no_lists = next(filter(None, found), "")
        engine_client.input_processor.steermoe_no_lists = no_lists
        state.steermoe = resolver, list(args.served_model_name)
        template = state.online_renderer.chat_template
        name = args.served_model_name[0]
        state.steermoe_host = VLLMHost(name, engine_client.input_processor, resolver, no_lists, template)


async def list_models(request: Request) -> Any:
    """The served models, and each of them with every domain that has a vector."""
    from fastapi.responses import JSONResponse

    listed = (await request.app.state.openai_serving_models.show_available_models()).model_dump()
    resolver, served = request.app.state.steermoe
    own = [card for card in listed["data"] if card["id"] in served]
    listed["data"] += [
        {**card, "id": f"{card['id']}:{domain}", "parent": card["id"]} for card in own for domain in resolver.domains()
    ]
    return JSONResponse(content=listed)


class GuardMiddleware:
    """Lets in who has a key, and answers under paths where vLLM would run the model without steering.

    vLLM asks for a key under some paths only; here it is asked for under all that are not `OPEN`.
    """

    def __init__(self, app: Any, state: Any) -> None:
        self._app = app
        self._is_admitted = _admission(state.args)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        path = path_below_root(scope)
        if not is_under(path, OPEN) and scope.get("method") != "OPTIONS" and not self._is_admitted(scope):
            await _answer(scope, receive, send, 401, {"error": "Unauthorized"})
        elif is_under(path, ABSENT):
            reason = f"{path} is not offered here, where it would run unsteered: use {', '.join(STEERED)}"
            await _answer(scope, receive, send, 404, {"error": {"message": reason, "code": 404}})
        elif (place := next((place for place in ELSEWHERE if is_under(path, (place,))), None)) is not None:
            await _refuse(scope, receive, send, f"{ELSEWHERE[place]}: {OTHER_ENGINES}", None)
        else:
            await self._app(scope, receive, send)


class SteeringMiddleware:
    """Turns the steering of a request into what the plugin reads, or answers 400 with the reason why it can't.

    A request that names no steering gets what `state.steermoe_default` returns, if there is such a function.
    """

    def __init__(self, app: Any, state: Any) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_text = scope["type"] == "http" and scope["method"] == "POST" and is_under(path_below_root(scope), STEERED)
        await (self._steer if is_text else self._app)(scope, receive, send)

    async def _steer(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read(receive)
        if body is None:
            return
        try:
            resolver, served = self._state.steermoe
            default = getattr(self._state, "steermoe_default", None)
            changed = steered_body(body, served, resolver, None if default is None else default())
        except NotOffered as error:
            await _refuse(scope, receive, send, str(error), error.field)
            return
        except SteerMoEError as error:
            await _refuse(scope, receive, send, f"steering: {escaped(str(error))}", KEY)
            return
        await self._app(with_length(scope, changed), replay(changed, receive), send)


def _admission(args: Any) -> Callable[[Scope], bool]:
    """Whether a request carries one of the server's keys, as vLLM itself does; if there are none, all may in."""
    from starlette.datastructures import Headers
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    keys = [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]
    check = AuthenticationMiddleware(None, keys)  # type: ignore[arg-type]  # only asked about headers
    return lambda scope: not keys or check.verify_token(Headers(scope=scope))


def path_below_root(scope: Scope) -> str:
    """The path by which the app finds a route: a root path counts only where the next part of the path begins."""
    path, root = scope["path"], scope.get("root_path", "")
    rest = path.removeprefix(root)
    return rest if rest.startswith("/") else path


def is_under(path: str, places: Sequence[str]) -> bool:
    """Whether a path is one of these, or a longer one."""
    return any(path == place or path.startswith(f"{place}/") for place in places)


async def _answer(scope: Scope, receive: Receive, send: Send, status: int, content: Any) -> None:
    from fastapi.responses import JSONResponse

    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
    else:
        await JSONResponse(content=content, status_code=status)(scope, receive, send)


def steered_body(body: bytes, served: list[str], resolver: PlanResolver, default: Any = None) -> bytes:
    """A request's body as vLLM gets it: the served model's name, and the steering in `vllm_xargs`, checked.

    Args:
        body: as it came.
        served: names of the model.
        resolver: turns specs into plans.
        default: the spec for a request that names no steering; None leaves it unsteered.

    Raises:
        NotOffered: it asks for a record of its routing. SteerMoEError: steering that can't be read or found, does not
            fit the model, or would not happen.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return body  # vLLM says what is wrong
    if not isinstance(asked, dict):
        return body
    extra = asked.get("vllm_xargs")
    if isinstance(asked.get("extra_body"), dict) and KEY in asked["extra_body"]:
        raise SteeringError("the field 'steering' belongs into the request itself, not into a field 'extra_body' of it")
    _refuse_records(asked)
    base, spec = asked_spec(asked, served)
    asked.pop(KEY, None)
    is_default = spec is None
    spec = default if is_default else spec
    if spec is None:
        return body
    if asked.get("use_beam_search"):
        raise SteeringError("vLLM's beam search can't be steered: leave use_beam_search out")
    if base is not None:
        asked["model"] = base
    spec = read_asked(spec)
    plan = unpack(found) if (found := packed(resolver, spec)) else None
    try:
        _check_length(plan, asked)
    except SteeringError:
        if is_default:
            return body  # nobody asked to have this one steered, and no token of it could be
        raise
    own = extra if isinstance(extra, dict) else {}
    asked["vllm_xargs"] = {**own, KEY: spec if isinstance(spec, str) else json.dumps(spec)}
    return json.dumps(asked).encode()


def _refuse_records(asked: Mapping[str, Any]) -> None:
    """Raise NotOffered if a request asks for a record of its routing."""
    for field, what in RECORDS.items():
        if asked.get(field) not in (None, False):
            raise NotOffered(field, f"field '{field}': vLLM's server has no {what}: leave it out, or {OTHER_ENGINES}")


def _check_length(plan: SteeringPlan | None, asked: Mapping[str, Any]) -> None:
    """Raise SteeringError if a request asks for too few tokens to steer any."""
    most = next((asked[name] for name in LIMITS if asked.get(name) is not None), None)
    if plan is not None and isinstance(most, int) and most > 0:
        require_steered(plan, most)


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None if the client is gone."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def replay(body: bytes, receive: Receive) -> Receive:
    """Delivers the body once, then the client's own messages, such as a disconnect."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> MutableMapping[str, Any]:
        return waiting.pop() if waiting else await receive()

    return replay


def with_length(scope: Scope, body: bytes) -> Scope:
    """The scope of a request whose body has become another one."""
    headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}


async def _refuse(scope: Scope, receive: Receive, send: Send, message: str, field: str | None) -> None:
    from vllm.entrypoints.serve import create_error_response

    answer = create_error_response(message, param=field)
    await _answer(scope, receive, send, 400, answer.model_dump())
