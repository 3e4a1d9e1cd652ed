"""`steermoe compare`: the same opening unsteered and steered, side by side."""

from pathlib import Path
from typing import Annotated

import typer

from steermoe.cli import loading
from steermoe.cli import options as o

EXAMPLES = """Examples:

steermoe compare --domain sport --domain food

steermoe compare "The old bus was late again." -d space --strength 2 --strength 4 --strength 8

steermoe compare -d sport -d space --svg comparison.svg

steermoe compare -d law --formula additive --formula zero_max_scaled --json
"""


def compare(
    prompt: o.Prompt = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(
            "--domain",
            "-d",
            help="A text for each domain or vector file; a mixture as sport=0.7+food=0.3.",
            rich_help_panel=o.STEERING,
        ),
    ] = None,
    strength: Annotated[
        list[float] | None,
        typer.Option(help="A text for each strength. Default: the vector's own.", rich_help_panel=o.STEERING),
    ] = None,
    formula: Annotated[
        list[o.FormulaName] | None,
        typer.Option(help="A text for each formula. Default: the vector's own.", rich_help_panel=o.STEERING),
    ] = None,
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
    svg: Annotated[Path | None, typer.Option(help="Draw the comparison into this SVG file too.")] = None,
    json: o.Json = False,
) -> None:
    """Tell the same story unsteered and steered, side by side, with what steering did to the routing."""
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
    from steermoe.evaluation.comparison import compare_completions
    from steermoe.steering.spec import make_plan
    from steermoe.vectors.file import SUFFIX

    plans = [
        make_plan(
            runner.shape,
            [names] if names.endswith(SUFFIX) else names.split("+"),
            strength=c,
            layers=layers,
            force=force,
            ban=ban,
            vectors=vectors,
            formula=f,
            scale=scale,
            positions=positions,
            schedule=schedule,
        )
        for names in (domain or ["sport"])
        for f in formula or (None,)
        for c in strength or (None,)
    ]
    o.warn_beyond_safe_range(plans)
    requests = [Request(text, plan, sampling) for plan in (None, *plans)]
    with console.working(f"Telling {len(requests)} stories ..."):
        completions = runner.generate(requests, record=True)
    columns = compare_completions(completions)
    from steermoe.cli.terminal.columns import print_columns, save_svg

    if json:
        for column in columns:
            console.write_json(column.as_dict(runner.name))
    else:
        print_columns(text, columns)
    if svg is not None:
        save_svg(text, columns, svg)
