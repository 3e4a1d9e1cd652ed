"""`steermoe generate`: continues one text, steered or not."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from steermoe.cli import options as o
from steermoe.cli.loading import ModelOptions

if TYPE_CHECKING:
    from steermoe.engines.request import Completion

EXAMPLES = """Examples:

steermoe generate --domain sport

steermoe generate "The two sisters met at the station." -d space=0.6 -d music=0.4

echo "It rained all night." | steermoe generate - -d food --json

steermoe generate --model smollm2-moe-q8_0.gguf -d space --engine llamacpp
"""


@o.spread
def generate(
    *,
    prompt: o.Prompt = None,
    steering: o.Steering,
    vectors: o.VectorsFolder = None,
    sampling: o.Sampling,
    model: ModelOptions,
    special_tokens: o.SpecialTokens = None,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="Print text as it is generated. Default: on a terminal only."),
    ] = None,
    json: o.Json = False,
) -> None:
    """Continue a text, steered toward a domain; without --domain, unsteered."""
    from steermoe.cli.terminal import console
    from steermoe.engines.request import Request

    text = o.read_prompt(prompt)
    runner = model.open()
    from steermoe.steering.resolver import PlanResolver

    plan = PlanResolver(runner.shape, vectors).plan(steering)
    o.warn_beyond_safe_range([plan])
    request = Request(text, plan, sampling, o.has_special_tokens(prompt, special_tokens))
    streams = sys.stdout.isatty() if stream is None else stream
    if streams and not json:
        runner.encode(request)
        console.write(text)
        (completion,) = runner.generate([request], on_text=console.write)
        console.write("\n")
    else:
        with console.working("Generating ..."):
            (completion,) = runner.generate([request])
        if json:
            console.write_json(completion.as_dict(runner.name))
        else:
            console.write(f"{text}{completion.text}\n")
    _print_report(completion)


def _print_report(completion: "Completion") -> None:
    """Print the steering report on stderr."""
    from steermoe.cli.terminal import console

    if completion.report is not None:
        report = completion.report
        console.err.print(
            f"steered {report.tokens_steered} of {report.tokens_seen} tokens; {report.vector_share:.0%} of their slots "
            f"went to the vector's experts; {completion.new_tokens / completion.seconds:.1f} tokens/s",
            style="dim",
            soft_wrap=True,
        )
