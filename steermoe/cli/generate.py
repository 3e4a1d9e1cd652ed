"""`steermoe generate`: one text, steered or not."""

import sys
from typing import Annotated

import typer

from steermoe.cli import loading
from steermoe.cli import options as o

EXAMPLES = """Examples:

steermoe generate --domain sport

steermoe generate "The two sisters met at the station." -d space=0.6 -d music=0.4

echo "It rained all night." | steermoe generate - -d food --json

steermoe generate --model smollm2-moe-q8_0.gguf -d space --engine llamacpp
"""


def generate(
    prompt: o.Prompt = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(
            "--domain",
            "-d",
            help="Domain or vector file to steer to; repeat as name=weight to mix.",
            rich_help_panel=o.STEERING,
        ),
    ] = None,
    strength: o.Strength = None,
    formula: o.Formula = None,
    scale: o.Scale = None,
    positions: o.Positions = "generated",
    schedule: o.ScheduleText = "constant",
    layers: o.Layers = None,
    force: o.Force = None,
    ban: o.Ban = None,
    vectors: o.VectorsFolder = None,
    max_new_tokens: o.MaxNewTokens = 120,
    do_sample: o.DoSample = True,
    temperature: o.Temperature = 0.7,
    top_p: o.TopP = 1.0,
    top_k: o.TopK = 0,
    repetition_penalty: o.RepetitionPenalty = 1.0,
    seed: o.Seed = 0,
    model: o.Model = None,
    engine: o.Engine = "auto",
    dtype: o.Dtype = "auto",
    device_map: o.DeviceMap = None,
    trust_remote_code: o.TrustRemoteCode = False,
    quantize: o.Quantize = None,
    compiled_steps: o.CompiledSteps = True,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="Show text as it comes. Default: on a terminal.")
    ] = None,
    json: o.Json = False,
) -> None:
    """Continue a text, steered toward a domain (or, without --domain, unsteered)."""
    from steermoe.cli.terminal import console
    from steermoe.engines.request import Request, Sampling

    text = o.read_prompt(prompt)
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    runner = loading.EngineOptions(model, engine, dtype, device_map, trust_remote_code, quantize, compiled_steps).open()
    from steermoe.steering.spec import make_plan

    plan = make_plan(
        runner.shape,
        domain or [],
        strength=strength,
        layers=layers,
        force=force,
        ban=ban,
        vectors=vectors,
        formula=formula,
        scale=scale,
        positions=positions,
        schedule=schedule,
    )
    o.warn_beyond_safe_range([plan])
    streams = sys.stdout.isatty() if stream is None else stream
    if streams and not json:
        request = Request(text, plan, sampling)
        runner.encode(request)
        console.write(text)
        (completion,) = runner.generate([request], on_text=console.write)
        console.write("\n")
    else:
        with console.working("Generating ..."):
            (completion,) = runner.generate([Request(text, plan, sampling)])
        if json:
            console.write_json(completion.as_dict(runner.name))
        else:
            console.write(f"{text}{completion.text}\n")
    if completion.report is not None:
        report = completion.report
        console.err.print(
            f"steered {report.tokens_steered} of {report.tokens_seen} tokens; {report.vector_share:.0%} of their slots "
            f"went to the vector's experts; {completion.new_tokens / completion.seconds:.1f} tokens/s",
            style="dim",
            soft_wrap=True,
        )
