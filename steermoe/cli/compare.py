"""`steermoe compare`: the same prompt unsteered and steered, side by side."""

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steermoe.cli import options as o
from steermoe.cli.loading import ModelOptions
from steermoe.cli.on_demand import open_engine
from steermoe.steering.spec import SteeringSpec

if TYPE_CHECKING:
    from steermoe.evaluation.comparison import Column

EXAMPLES = """Examples:

steermoe compare --domain sport --domain food

steermoe compare "The old bus was late again." -d space --strength 2 --strength 4 --strength 8

steermoe compare -d sport -d space --svg comparison.svg

steermoe compare --topic "pirates at sea" --topic "a robot in the kitchen"

steermoe compare "How do I spend a free evening?" --chat -d music -d sport

steermoe compare -d sport --trace sport.html

steermoe compare -d law --formula additive --formula zero_max_scaled --json
"""


class FormulaName(StrEnum):
    """The formulas as an enumeration: typer needs one for a repeated choice."""

    additive = "additive"
    max_scaled = "max_scaled"
    zero_max_scaled = "zero_max_scaled"


@o.spread
def compare(
    *,
    prompt: o.Prompt = None,
    domain: Annotated[
        list[str] | None,
        o.domains("Domain or vector file, or a mixture such as sport=0.7+food=0.3; repeat for several texts."),
    ] = None,
    strength: Annotated[
        list[float] | None,
        typer.Option(
            help="Strength c; repeat for several texts. Default: the vector's own.", rich_help_panel=o.STEERING
        ),
    ] = None,
    formula: Annotated[
        list[FormulaName] | None,
        typer.Option(help="Formula; repeat for several texts. Default: the vector's own.", rich_help_panel=o.STEERING),
    ] = None,
    steering: Annotated[SteeringSpec, o.Group(o.STEERING, without=("domain", "strength", "formula"))],
    topics: o.TopicOptions,
    vectors: o.VectorOptions,
    sampling: o.Sampling,
    model: ModelOptions,
    chat: o.ChatOptions,
    special_tokens: o.SpecialTokens = None,
    svg: Annotated[Path | None, typer.Option(help="Also draw the comparison as this SVG file.")] = None,
    trace: o.Trace = None,
    overwrite: o.Overwrites = False,
    json: o.Json = False,
) -> None:
    """Generate the same story, or answer with --chat, unsteered and steered, side by side, with routing shares."""
    from steermoe.cli.terminal import console
    from steermoe.engines.request import Request

    o.check_tracing(model.engine, trace, overwrite=overwrite)
    text = o.read_prompt(prompt, vectors.language)
    from steermoe.evaluation.comparison import compare_completions

    names = topics.names()
    given: dict[str, list[Any]] = {"formula": formula or [None], "strength": strength or [None]}
    for spec in _specs(steering, domain=domain or ([] if names else ["sport"]), **given):
        vectors.check(spec)
    specs = _specs(steering, domain=[*(domain or []), *names] or ["sport"], **given)
    runner, resolver = open_engine(model, vectors, specs, text, topics, lambda engine: chat.read(engine, text))
    plans = list(map(resolver.plan, specs))
    o.warn_beyond_safe_range(plans)
    how = sampling, o.has_special_tokens(prompt, special_tokens), chat.read(runner, text), trace is not None
    requests = [Request(text, plan, *how) for plan in (None, *plans)]
    for request in requests:
        request.require_steered()
    with console.working(f"Generating {len(requests)} stories ..."):
        completions = runner.generate(requests, record=True)
    columns = compare_completions(completions)
    _show(text, columns, runner.name if json else None, svg)
    o.save_trace(trace, completions, runner.name, model.chosen)
    o.warn_unanswered(completions)
    o.check_steered(completions)


def _show(prompt: str, columns: "Sequence[Column]", model: str | None, svg: Path | None) -> None:
    """Print a comparison, as JSON if the model's name is given for it, and draw it."""
    from steermoe.cli.terminal import console
    from steermoe.cli.terminal.columns import print_columns, save_svg

    if model is not None:
        for column in columns:
            console.write_json(column.as_dict(model))
    else:
        print_columns(prompt, columns)
    if svg is not None:
        save_svg(prompt, columns, svg)


def _specs(steering: SteeringSpec, domain: list[Any], formula: list[Any], strength: list[Any]) -> list[SteeringSpec]:
    """One spec for each combination; None leaves a field as it is."""
    return [
        replace(steering, domain=(names,), formula=one and one.value, strength=c)
        for names in domain
        for one in formula
        for c in strength
    ]
