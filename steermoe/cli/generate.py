"""`steermoe generate`: continues one text, steered or not."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from steermoe.cli import options as o
from steermoe.cli.loading import ModelOptions
from steermoe.cli.on_demand import open_engine

if TYPE_CHECKING:
    from steermoe.engines.engine import Engine
    from steermoe.engines.request import Completion, Request
    from steermoe.routing.shape import RoutingShape

EXAMPLES = """Examples:

steermoe generate --domain sport

steermoe generate "The two sisters met at the station." -d space=0.6 -d music=0.4

steermoe generate "What is a good breakfast?" --chat -d food --system "Answer in one sentence."

echo "It rained all night." | steermoe generate - -d food --json

steermoe generate --model ./my-model --domain sport

steermoe generate --topic "pirates at sea"

steermoe generate --model smollm2-moe-q8_0.gguf -d space --engine llamacpp

steermoe generate -d sport --show-routing --trace sport.html
"""


@o.spread
def generate(
    *,
    prompt: o.Prompt = None,
    steering: o.Steering,
    topics: o.TopicOptions,
    vectors: o.VectorOptions,
    sampling: o.Sampling,
    model: ModelOptions,
    chat: o.ChatOptions,
    special_tokens: o.SpecialTokens = None,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="Print text as it is generated. Default: on a terminal only."),
    ] = None,
    show_routing: Annotated[
        bool,
        typer.Option(
            "--show-routing", help="Colour each token by the share of its places that a domain's experts got."
        ),
    ] = False,
    trace: o.Trace = None,
    overwrite: o.Overwrites = False,
    json: o.Json = False,
) -> None:
    """Continue a text, or answer a message with --chat, steered toward a domain or a topic, or unsteered."""
    from steermoe.cli.terminal import console
    from steermoe.engines.request import Request

    if show_routing and json:
        raise typer.BadParameter("--show-routing prints a coloured text, --json one object: leave one of them out")
    o.check_tracing(model.engine, trace, show_routing, overwrite)
    text = o.read_prompt(prompt, vectors.language)
    vectors.check(steering)
    steering = topics.added_to(steering)
    runner, resolver = open_engine(model, vectors, [steering], text, topics, lambda engine: chat.read(engine, text))
    plan = resolver.plan(steering)
    o.warn_beyond_safe_range([plan])
    special = o.has_special_tokens(prompt, special_tokens)
    request = Request(text, plan, sampling, special, chat.read(runner, text), show_routing or trace is not None)
    request.require_steered()
    streams = sys.stdout.isatty() if stream is None else stream
    if show_routing:
        completion = _show_routing(runner, request, streams)
    elif streams and not json:
        completion = _stream(runner, request)
    else:
        with console.working("Generating ..."):
            (completion,) = runner.generate([request])
        if json:
            console.write_json(completion.as_dict(runner.name))
        else:
            console.write(f"{completion.text if chat.chat else text + completion.text}\n")
    o.save_trace(trace, [completion], runner.name, model.chosen)
    o.warn_unanswered([completion])
    _print_report(completion, runner.shape)
    model.compile_later(runner)
    o.check_steered([completion])


def _stream(runner: "Engine", request: "Request") -> "Completion":
    """Print the text as it comes: after its prompt, or the answer of a chat, whose thinking goes to stderr."""
    from steermoe.cli.terminal import console

    runner.encode(request)
    if request.chat is None:
        console.write(request.prompt)
        (completion,) = runner.generate([request], on_text=console.write)
        console.write("\n")
        return completion
    from steermoe.cli.terminal.answers import AnswerPrinter

    printer = AnswerPrinter(request.chat)
    (completion,) = runner.generate([request], on_text=printer)
    printer.end()
    return completion


def _show_routing(runner: "Engine", request: "Request", streams: bool) -> "Completion":
    """Print the text in colours, token by token as it comes or all at once, and what they mean on stderr."""
    from contextlib import nullcontext
    from dataclasses import replace

    from steermoe.cli.terminal import console
    from steermoe.cli.terminal.routing import RoutingPrinter

    runner.encode(request)
    printer = RoutingPrinter(request, streams)
    with console.working("Generating ...") if not streams else nullcontext():
        (completion,) = runner.generate([replace(request, on_trace=printer)])
    printer.end()
    return completion


def _print_report(completion: "Completion", shape: "RoutingShape") -> None:
    """Print the steering report on stderr, with the share of the slots in all MoE layers, steered or not.

    Without a vector there is no such share; what became of forced and banned experts follows.
    """
    from steermoe.cli.terminal import console
    from steermoe.steering.tables import steered_layers

    report, plan = completion.report, completion.request.plan
    if report is not None:
        layers = len(shape.routers)
        steered = layers if plan is None else steered_layers(shape, plan)
        where = "" if steered == layers else f" in {steered} of {layers} MoE layers"
        parts = [f"steered {report.tokens_steered} of {report.tokens_seen} tokens{where}"]
        if plan is None or plan.vector is not None:
            parts.append(f"{report.vector_share:.0%} of their slots went to the vector's experts")
        if report.forced_places:
            parts.append(f"forced experts took {report.forced_share:.0%} of their places")
        if report.banned_places:
            parts.append(f"banned experts took {report.banned_share:.0%} of theirs")
        parts.append(f"{completion.new_tokens / completion.seconds:.1f} tokens/s")
        console.note("; ".join(parts), "dim")
