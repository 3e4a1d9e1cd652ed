"""`steermoe play`: the server with its page, and a browser that opens it."""

from typing import TYPE_CHECKING, Annotated

import typer

from steermoe.cli import options as o
from steermoe.cli.loading import ModelOptions

if TYPE_CHECKING:
    from fastapi import FastAPI

EXAMPLES = """Examples:

steermoe play

steermoe play --model ./my-model --port 8001

steermoe play --model smollm2-moe-q8_0.gguf --no-browser
"""


@o.spread
def play(
    *,
    model: ModelOptions,
    vectors: Annotated[o.VectorOptions, o.Group(without=("no_build", "language"))],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any that is free.")] = 8000,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page, or only print its address.")
    ] = True,
) -> None:
    """Open a page: a text unsteered and steered side by side, with sliders that work while it is written.

    The API of `steermoe serve` is there, too. Ctrl-C ends both.
    """
    import threading
    import webbrowser

    from steermoe.cli.serve import new_topics
    from steermoe.cli.terminal import console
    from steermoe.errors import ModelError
    from steermoe.serving.page.mounting import mount, require_gradio

    if model.engine == "vllm":
        raise ModelError("the page needs an engine whose texts can be steered as they come: --engine hf or llamacpp")
    require_gradio()
    from steermoe.engines.listening import ServerOptions
    from steermoe.serving.app import Settings, run
    from steermoe.steering.resolver import PlanResolver

    engine = model.open()
    resolver = PlanResolver(engine.shape, vectors.vectors, watch=True, names_only=True, any_model=vectors.any_model)

    def extend(app: "FastAPI") -> None:
        mount(app, model.model, new_topics(engine))

    def ready(address: str) -> None:
        console.note(f"steermoe: the page is at {address}; Ctrl-C ends it")
        if browser:
            threading.Thread(target=webbrowser.open, args=(address,), name="steermoe-browser", daemon=True).start()

    options = ServerOptions("127.0.0.1", port, (), vectors.vectors, vectors.any_model)
    run(engine, resolver, None, Settings(options), ready, extend)
