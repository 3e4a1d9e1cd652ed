"""`steermoe serve`: one model for many clients, by OpenAI's and Ollama's protocols, each request steered on its own."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steermoe.cli import loading, on_demand
from steermoe.cli import options as o
from steermoe.steering.spec import SteeringSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi import FastAPI

    from steermoe.evaluation.new_topics import NewTopics

EXAMPLES = """Examples:

steermoe serve

steermoe serve smollm2-moe-q8_0.gguf --port 8001 --api-key secret --rows 8

steermoe serve org/some-moe --engine vllm --tensor-parallel-size 2

steermoe serve smollm2-moe --engine vllm --eager -- --max-num-seqs 32 --max-model-len 2048

curl localhost:8000/v1/completions --json '{"model": "smollm2-moe:sport", "prompt": "Once upon a time"}'
"""
SERVER = "Server"


@dataclass(frozen=True)
class Listening:
    """Where the server listens, and whom it lets in."""

    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 accepts other machines.", rich_help_panel=SERVER)
    ] = "127.0.0.1"
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any.", rich_help_panel=SERVER)
    ] = 8000
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            envvar="STEERMOE_API_KEY",
            help="Key that requests must send; repeat for several.",
            rich_help_panel=SERVER,
        ),
    ] = None


@dataclass(frozen=True)
class Serving:
    """What a server of ours does at once; vLLM has options of its own."""

    rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Texts generated at once. Default: as many as the engine and the memory allow; 16 in llama.cpp.",
            rich_help_panel=SERVER,
        ),
    ] = None
    queue: Annotated[
        int | None,
        typer.Option(min=0, help="Texts that may wait for a row. Default: 256.", rich_help_panel=SERVER),
    ] = None
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Most tokens of a text, prompt included. Default: the model's context, at most 4096.",
            rich_help_panel=SERVER,
        ),
    ] = None
    cors: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Let web pages of this origin use the server; repeat for several, * for all.",
            rich_help_panel=SERVER,
        ),
    ] = None
    grace: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="After SIGTERM or Ctrl-C, finish running texts for this long. Default: 30.",
            rich_help_panel=SERVER,
        ),
    ] = None

    page: Annotated[
        bool | None,
        typer.Option(
            "--page/--no-page",
            help="Show a page at /, to steer texts with sliders. Default: if Gradio is installed.",
            rich_help_panel=SERVER,
        ),
    ] = None

    def extension(self, model: str) -> "Callable[[FastAPI], Any]":
        """What adds the page to the server.

        Raises:
            SteerMoEError: the page was asked for, and Gradio is missing.
        """
        from importlib.util import find_spec

        from steermoe.cli.terminal import console

        if self.page is None and find_spec("gradio") is None:
            console.note("steermoe: no page at /: it needs Gradio (pip install 'steermoe[play]')", "dim")
        if not (find_spec("gradio") is not None if self.page is None else self.page):
            return lambda app: None
        from steermoe.serving.page.mounting import mount, require_gradio

        require_gradio()
        return lambda app: mount(app, model, new_topics(app.state.service.live.engine))

    def check_engine(self, engine: str) -> None:
        """Raise ModelError for an option that another engine's server does not have."""
        from steermoe.errors import ModelError

        given = [name for name, value in vars(self).items() if value not in (None, ())]
        if engine == "vllm" and given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ModelError(f"{names}: vLLM's server has options of its own, after --, such as -- --max-num-seqs 32")


def new_topics(engine: Any) -> "NewTopics":
    """What builds vectors of new topics for the page."""
    from steermoe.evaluation.new_topics import NewTopics

    return NewTopics(getattr(engine, "loaded", engine))


@o.spread
def serve(
    *,
    model: Annotated[str, typer.Argument(help="Checkpoint folder, GGUF file or hub id.")] = "smollm2-moe",
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- VLLM_ARGUMENTS...]", help="Arguments passed on to vLLM's server.")
    ] = None,
    engine: o.Engine = "auto",
    listening: Listening,
    serving: Serving,
    vectors: Annotated[o.VectorOptions, o.Group(without=("no_build",))],
    build: Annotated[
        list[str] | None,
        typer.Option(
            help="Build and calibrate this domain's vector before serving, if the model has none; repeat for several.",
            rich_help_panel=o.STEERING,
        ),
    ] = None,
    dtype: o.Dtype = "auto",
    device_map: o.DeviceMap = None,
    compiled_steps: o.CompiledSteps = True,
    vllm: Annotated[o.VLLMOptions, o.Group(without=("compiled",))],
    eager: Annotated[
        bool,
        typer.Option(
            "--eager",
            help="Start vLLM without compiling the model: sooner, but slower afterwards.",
            rich_help_panel=o.VLLM,
        ),
    ] = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Serve a model. Requests choose steering by the model's name (smollm2-moe:sport) or by a field "steering"."""
    if model.startswith("-"):  # no MODEL before the arguments of vLLM
        model, arguments = "smollm2-moe", [model, *(arguments or ())]
    from steermoe.engines.listening import ServerOptions

    opened = loading.ModelOptions(model, engine, dtype, device_map, trust_remote_code, compiled_steps=compiled_steps)
    chosen = opened.chosen
    serving.check_engine(chosen)
    options = ServerOptions(listening.host, listening.port, listening.api_key or (), vectors.vectors, vectors.any_model)
    for domain in build or ():
        vectors.check(SteeringSpec(domain=(domain,)))
    if chosen == "vllm":
        _serve_vllm(opened, options, vectors, build or (), eager, vllm.arguments(), arguments or ())
        return
    _check_ours(chosen, vllm.arguments(), eager, arguments or ())
    _serve_ours(opened, options, serving, vectors, build or ())


def _serve_vllm(
    opened: loading.ModelOptions,
    options: Any,
    vectors: o.VectorOptions,
    build: Any,
    eager: bool,
    parallel: Any,
    arguments: Any,
) -> None:
    from steermoe.engines.vllm.server import serve
    from steermoe.serving.vllm import extend_servers

    loading.pull_if_needed(opened.model)
    on_demand.before_opening(opened, vectors, on_demand.wish(vectors, build))
    extend_servers()
    serve(
        opened.model,
        options,
        dtype=opened.dtype,
        trust_remote_code=opened.trust_remote_code,
        eager=eager,
        parallel=parallel,
        arguments=arguments,
    )


def _check_ours(engine: str, vllm: Any, eager: bool, arguments: Any) -> None:
    """Raise ModelError for options of vLLM, and if the server's libraries are missing."""
    from importlib.util import find_spec

    from steermoe.errors import ModelError, quoted

    given = [f"--{name.replace('_', '-')}" for name in vllm] + ["--eager"] * eager
    given += [f"'{quoted(' '.join(arguments))}'"] if arguments else []
    if given:
        raise ModelError(f"{', '.join(given)} needs --engine vllm; this model is served by {engine}")
    if missing := [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]:
        raise ModelError(f"`steermoe serve` needs {' and '.join(missing)}: pip install 'steermoe[serve]'")


def _serve_ours(
    opened: loading.ModelOptions, options: Any, serving: Serving, vectors: o.VectorOptions, build: Any
) -> None:
    from steermoe.cli.terminal import console
    from steermoe.models.default.pull import DEFAULT_MODEL
    from steermoe.serving.app import GRACE, Settings, run
    from steermoe.serving.live import MOST_QUEUED, Limits
    from steermoe.steering.resolver import PlanResolver

    queued = MOST_QUEUED if serving.queue is None else serving.queue
    limits = Limits(serving.rows, queued, serving.max_tokens)
    settings = Settings(options, serving.cors or (), grace=GRACE if serving.grace is None else serving.grace)
    extend = serving.extension(opened.model or DEFAULT_MODEL)
    runner = opened.open()
    found = on_demand.files(opened, runner, vectors, on_demand.wish(vectors, build))
    resolver = PlanResolver(
        runner.shape, vectors.vectors, watch=True, names_only=True, any_model=vectors.any_model, given=found
    )
    console.note(f"{runner.name}: domains {', '.join(resolver.domains()) or 'none'}")

    def ready(address: str) -> None:
        console.note(f"steermoe serves {runner.name} at {address}")

    run(runner, resolver, limits, settings, ready, extend)
