"""`steermoe serve`: an OpenAI-compatible server that steers each request on its own."""

from typing import Annotated

import typer

from steermoe.cli import loading, on_demand
from steermoe.cli import options as o
from steermoe.steering.spec import SteeringSpec

EXAMPLES = """Examples:

steermoe serve

steermoe serve org/some-moe --port 8001 --api-key secret --tensor-parallel-size 2

steermoe serve smollm2-moe --eager -- --max-num-seqs 32 --max-model-len 2048

curl localhost:8000/v1/completions --json '{"model": "smollm2-moe:sport", "prompt": "Once upon a time"}'
"""


@o.spread
def serve(
    *,
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")] = "smollm2-moe",
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- VLLM_ARGUMENTS...]", help="Arguments passed on to vLLM's server.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 accepts other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option("--api-key", envvar="STEERMOE_API_KEY", help="Key that requests must send; repeat for several."),
    ] = None,
    vectors: Annotated[o.VectorOptions, o.Group(without=("no_build",))],
    build: Annotated[
        list[str] | None,
        typer.Option(
            help="Build and calibrate this domain's vector before serving, if the model has none; repeat for several.",
            rich_help_panel=o.STEERING,
        ),
    ] = None,
    dtype: o.Dtype = "auto",
    vllm: Annotated[o.VLLMOptions, o.Group(without=("compiled",))],
    eager: Annotated[
        bool, typer.Option("--eager", help="Start without compiling the model: sooner, but slower afterwards.")
    ] = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Serve a model with vLLM. Requests choose steering by the model's name (smollm2-moe:sport) or by vllm_xargs."""
    from steermoe.engines.auto import require_vllm

    require_vllm()
    if model.startswith("-"):  # no MODEL before the arguments of vLLM
        model, arguments = "smollm2-moe", [model, *(arguments or ())]
    from steermoe.engines.listening import ServerOptions
    from steermoe.engines.vllm.server import serve

    options = ServerOptions(host, port, api_key or (), vectors.vectors, vectors.any_model)
    loading.pull_if_needed(model)
    for domain in build or ():
        vectors.check(SteeringSpec(domain=(domain,)))
    opened = loading.ModelOptions(model, "vllm", dtype, trust_remote_code=trust_remote_code)
    on_demand.before_opening(opened, vectors, on_demand.wish(vectors, build or ()))
    serve(
        model,
        options,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        eager=eager,
        parallel=vllm.arguments(),
        arguments=arguments or (),
    )
