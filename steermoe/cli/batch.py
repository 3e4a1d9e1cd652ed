"""`steermoe batch`: many stories from a file of prompts, resumable."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from steermoe.cli import loading
from steermoe.cli import options as o

if TYPE_CHECKING:
    from steermoe.batch.jobs import Problem

EXAMPLES = """Examples:

steermoe batch prompts.txt -o stories.jsonl -d sport -d food -d none --samples 2

steermoe batch prompts.jsonl -o stories.jsonl --ordered --errors bad.jsonl

steermoe batch prompts.txt -o stories.jsonl -d sport --engine vllm --tensor-parallel-size 2 --compile

cat prompts.txt | steermoe batch - -o stories.jsonl -d sport=0.7+food=0.3 --json

steermoe batch prompts.txt -o quantised.jsonl -d sport --model smollm2-moe-q8_0.gguf --engine llamacpp

steermoe batch prompts.txt -o stories.jsonl -d sport --ray auto --actors 4
"""
RAY = "Ray"
SHOWN_PROBLEMS = 5
"""So many bad lines are told one by one; the rest is a number."""


def batch(
    prompts: Annotated[
        str, typer.Argument(metavar="PROMPTS", help="File of prompts, lines of text or JSON; - reads stdin.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File of stories; one begun is gone on with.")],
    domain: Annotated[
        list[str] | None,
        typer.Option(
            "--domain",
            "-d",
            help="Tell every prompt with this domain; repeat for several. sport=0.7+food=0.3 mixes, none leaves alone.",
            rich_help_panel=o.STEERING,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Stories of each prompt and domain, with seeds that follow.")] = 1,
    ordered: Annotated[
        bool, typer.Option("--ordered", help="At the end, put the stories into the order of the prompts.")
    ] = False,
    errors: Annotated[Path | None, typer.Option(help="File for the lines that are left out, as JSON lines.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Go on with a file that holds other stories too.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start the file anew.")] = False,
    format: Annotated[
        Literal["auto", "text", "jsonl"], typer.Option(help="Of the prompts; auto goes by the name, then by line 1.")
    ] = "auto",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Stories at once. Default: as many as the memory allows, up to a limit.")
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
    dtype: Annotated[
        str,
        typer.Option(
            help="auto, float32, bfloat16 or float16. auto: float32 for a small model on a CPU, to be repeatable.",
            rich_help_panel=o.MODEL,
        ),
    ] = "auto",
    device_map: o.DeviceMap = None,
    tensor_parallel_size: o.TensorParallelSize = 1,
    pipeline_parallel_size: o.PipelineParallelSize = 1,
    data_parallel_size: o.DataParallelSize = 1,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Let vLLM compile the model first, for long batches.", rich_help_panel=o.VLLM),
    ] = False,
    trust_remote_code: o.TrustRemoteCode = False,
    quantize: o.Quantize = None,
    compiled_steps: o.CompiledSteps = True,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Tell on the machines of a Ray cluster: auto, local or host:port.",
            rich_help_panel=RAY,
        ),
    ] = None,
    actors: Annotated[
        int | None, typer.Option(min=1, help="Copies of the model. Default: one a machine.", rich_help_panel=RAY)
    ] = None,
    json: o.Json = False,
) -> None:
    """Tell many stories: prompts times domains times samples, in one batch that is refilled as stories are finished.

    Run again after an interruption, it goes on where it stopped. Prints how many stories the file holds.
    """
    from contextlib import ExitStack, closing

    from steermoe.batch.jobs import PromptFile, Settings
    from steermoe.batch.output import ErrorFile, StoryFile, check_apart
    from steermoe.cli.terminal import console
    from steermoe.engines.request import Sampling
    from steermoe.errors import BatchError
    from steermoe.steering.spec import SteeringSpec

    settings = Settings(
        SteeringSpec(
            strength=strength,
            formula=cast("Any", formula),
            scale=scale,
            positions=positions,
            schedule=schedule,
            layers=layers,
            force=tuple(force or ()),
            ban=tuple(ban or ()),
        ),
        tuple(domain or ()),
        Sampling(
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            seed=seed,
        ),
        samples,
    )
    check_apart(prompts, output, errors)
    with (
        closing(PromptFile(prompts, format)) as source,
        StoryFile(output, overwrite) as stories,
        closing(ErrorFile(errors)) as left_out,
        ExitStack() as undo,
    ):
        if ray is not None:
            from steermoe.batch.cluster import connected

            with console.working(f"Connecting to Ray ({console.printable(ray)}) ..."):
                undo.enter_context(connected(ray))
        elif actors is not None:
            raise BatchError("--actors needs --ray ADDRESS")
        sizes = loading.parallel_sizes(tensor_parallel_size, pipeline_parallel_size, data_parallel_size)
        options = loading.EngineOptions(
            model,
            engine,
            dtype,
            device_map,
            trust_remote_code,
            quantize,
            compiled_steps,
            {**sizes, **({"compiled": True} if compiled else {})},
        ).repeatable()
        runner = (options if ray is None else options.beside_actors()).open()
        from steermoe.batch.batch import Batch

        teller = None
        if ray is not None:
            from steermoe.batch.cluster import ClusterTeller

            gpus = tensor_parallel_size * pipeline_parallel_size * data_parallel_size
            gpus = gpus if options.takes_accelerators else 0
            teller = ClusterTeller(runner, options.for_actors().opener(), rows=batch_size, actors=actors, gpus=gpus)
        complain = _Complaints()
        job = Batch(
            runner,
            source,
            settings,
            stories,
            vectors=vectors,
            keep=keep,
            errors=left_out,
            on_problem=complain,
            rows=batch_size,
            teller=teller,
        )
        with console.working("Reading the prompts ..."):
            job.prepare()
        if job.already:
            console.err.print(f"{job.already} of {job.total} stories are in '{output}' already", style="dim")
        try:
            with console.counting("Telling", "stories", job.total, done=job.already) as progress:
                summary = job.run(progress, ordered=ordered)
        except KeyboardInterrupt:
            console.err.print(f"steermoe: the stories so far are in '{output}'; run again to go on", soft_wrap=True)
            raise
        complain.sum_up()
    if json:
        console.write_json({"output": str(output), **summary.as_dict()})
    else:
        console.write(f"{summary.stories} stories in {output}, {summary.new} of them new\n")
        if summary.new:
            rate = summary.tokens / summary.seconds
            steered = f"; steered {summary.report.tokens_steered} tokens" if summary.report else ""
            console.err.print(
                f"{summary.tokens} tokens, {rate:,.0f} a second{steered}; {summary.rows} stories at once at most",
                style="dim",
                soft_wrap=True,
            )


class _Complaints:
    """Tells the first problems on stderr and counts the rest."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, problem: "Problem") -> None:
        from steermoe.cli.terminal import console

        self.count += 1
        if self.count <= SHOWN_PROBLEMS:
            console.err.print(f"steermoe: left out: {console.printable(str(problem))}", soft_wrap=True)

    def sum_up(self) -> None:
        from steermoe.cli.terminal import console

        if self.count > SHOWN_PROBLEMS:
            console.err.print(f"steermoe: {self.count} lines were left out in all")
