"""Options that several commands share, as types, and what turns them into the library's objects."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from steermoe.engines.auto import EngineName

if TYPE_CHECKING:
    from collections.abc import Sequence

    from steermoe.steering.plans import SteeringPlan

DEFAULT_PROMPT = "Once upon a time there was a brown dog named Milo who lived by the river."


class FormulaName(StrEnum):
    """Typer takes repeated choices as an enumeration only."""

    additive = "additive"
    max_scaled = "max_scaled"
    zero_max_scaled = "zero_max_scaled"


ScaleName = Literal["magnitude", "paper"]
PositionsName = Literal["generated", "prompt", "all"]

STEERING, SAMPLING, MODEL = "Steering", "Sampling", "Model"

Prompt = Annotated[
    str | None, typer.Argument(help="Beginning of the text; - reads stdin; without it a built-in story is told.")
]
Strength = Annotated[
    float | None,
    typer.Option(help="c of the formulas; negative steers away. Default: the vector's own.", rich_help_panel=STEERING),
]
Formula = Annotated[
    FormulaName | None, typer.Option(help="How logits change. Default: the vector's own.", rich_help_panel=STEERING)
]
Scale = Annotated[
    ScaleName | None,
    typer.Option(help="What max-scaled formulas multiply by: |max z| or max z.", rich_help_panel=STEERING),
]
Positions = Annotated[PositionsName, typer.Option(help="Which tokens are steered.", rich_help_panel=STEERING)]
ScheduleText = Annotated[
    str, typer.Option(help="constant, decay:N or window:A-B, in generated tokens.", rich_help_panel=STEERING)
]
Layers = Annotated[str | None, typer.Option(help="Decoder layers to steer, such as 15-29.", rich_help_panel=STEERING)]
Force = Annotated[
    list[str] | None, typer.Option(help="Expert to use always, as layer:expert; repeat.", rich_help_panel=STEERING)
]
Ban = Annotated[
    list[str] | None, typer.Option(help="Expert never to use, as layer:expert; repeat.", rich_help_panel=STEERING)
]
VectorsFolder = Annotated[
    Path | None, typer.Option("--vectors", help="Folder of vectors to search first.", rich_help_panel=STEERING)
]

MaxNewTokens = Annotated[int, typer.Option(help="Tokens to generate at most.", rich_help_panel=SAMPLING)]
DoSample = Annotated[bool, typer.Option(help="Sample, or take the likeliest token.", rich_help_panel=SAMPLING)]
Temperature = Annotated[float, typer.Option(help="Flattens (over 1) or sharpens the choice.", rich_help_panel=SAMPLING)]
TopP = Annotated[float, typer.Option(help="Sample from this much probability.", rich_help_panel=SAMPLING)]
TopK = Annotated[int, typer.Option(help="Sample from so many tokens; 0 for all.", rich_help_panel=SAMPLING)]
RepetitionPenalty = Annotated[float, typer.Option(help="Over 1 discourages repetition.", rich_help_panel=SAMPLING)]
Seed = Annotated[int, typer.Option(help="The same seed gives the same text.", rich_help_panel=SAMPLING)]

Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Checkpoint folder, GGUF file or hub id. Default: smollm2-moe.", rich_help_panel=MODEL
    ),
]
Engine = Annotated[
    EngineName,
    typer.Option("--engine", help="transformers (hf), llama.cpp for a GGUF file, or vLLM.", rich_help_panel=MODEL),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=MODEL)]
DeviceMap = Annotated[str | None, typer.Option(help="As in transformers, such as auto or cpu.", rich_help_panel=MODEL)]
Quantize = Annotated[
    Literal["int8"] | None, typer.Option(help="Keep weights in int8, on a CPU.", rich_help_panel=MODEL)
]
CompiledSteps = Annotated[
    bool, typer.Option(help="Take steps that `steermoe models compile` made.", rich_help_panel=MODEL)
]
TrustRemoteCode = Annotated[bool, typer.Option(help="Run model code of the checkpoint.", rich_help_panel=MODEL)]

VLLM = "vLLM"
TensorParallelSize = Annotated[int, typer.Option(min=1, help="Workers that share each layer.", rich_help_panel=VLLM)]
PipelineParallelSize = Annotated[
    int, typer.Option(min=1, help="Workers that divide the layers among them.", rich_help_panel=VLLM)
]
DataParallelSize = Annotated[
    int, typer.Option(min=1, help="Copies of the model that divide the texts.", rich_help_panel=VLLM)
]

Json = Annotated[bool, typer.Option("--json", help="Write JSON, one object a line.")]


def read_prompt(prompt: str | None) -> str:
    """The prompt as given, from stdin, or the built-in one.

    Raises:
        GenerationError: stdin is not text.
    """
    import sys

    from steermoe.errors import GenerationError

    if prompt != "-":
        return DEFAULT_PROMPT if prompt is None else prompt
    try:
        return sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise GenerationError(f"stdin is not UTF-8 text ({error.reason} at byte {error.start})") from error


def warn_beyond_safe_range(plans: "Sequence[SteeringPlan | None]") -> None:
    """Tell once of each vector that is steered with more strongly than it was calibrated to."""
    from steermoe.cli.terminal.console import err, printable
    from steermoe.steering.plans import beyond_safe_range

    for warning in dict.fromkeys(beyond_safe_range(plan) for plan in plans if plan is not None):
        if warning:
            err.print(printable(f"steermoe: {warning}"), soft_wrap=True)
