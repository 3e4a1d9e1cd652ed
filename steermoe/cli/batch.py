"""`steermoe batch`: many stories from a file of prompts, resumable."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from steermoe.cli import options as o
from steermoe.cli.loading import ModelOptions, pull_if_needed
from steermoe.errors import BatchError
from steermoe.steering.spec import SteeringSpec

if TYPE_CHECKING:
    from steermoe.batch.batch import Batch, Summary
    from steermoe.batch.jobs import Problem
    from steermoe.batch.worker import Teller
    from steermoe.engines.engine import Engine

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


@dataclass(frozen=True)
class FileOptions:
    """How the file of stories is filled."""

    samples: Annotated[int, typer.Option(help="Stories of each prompt and domain, with seeds that follow.")] = 1
    ordered: Annotated[
        bool, typer.Option("--ordered", help="At the end, put the stories into the order of the prompts.")
    ] = False
    errors: Annotated[Path | None, typer.Option(help="File for the lines that are left out, as JSON lines.")] = None
    keep: Annotated[bool, typer.Option("--keep", help="Go on with a file that holds other stories too.")] = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start the file anew.")] = False
    format: Annotated[
        Literal["auto", "text", "jsonl"], typer.Option(help="Of the prompts; auto goes by the name, then by line 1.")
    ] = "auto"
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Stories at once. Default: as many as the memory allows, up to a limit.")
    ] = None


@dataclass(frozen=True)
class BatchModel(ModelOptions):
    """A model for many stories, which actors on other machines may open too."""

    dtype: Annotated[
        str,
        typer.Option(
            help="auto, float32, bfloat16 or float16. auto: float32 for a small model on a CPU, to be repeatable.",
            rich_help_panel=o.MODEL,
        ),
    ] = "auto"

    @property
    def takes_accelerators(self) -> bool:
        return self.chosen != "llamacpp" and self.device_map != "cpu"

    def repeatable(self) -> "BatchModel":
        """The same with dtype "auto" read as `checkpoint.repeatable_dtype` does, where the model has no other."""
        from steermoe.models.checkpoint import repeatable_dtype

        if self.dtype != "auto" or self.chosen == "llamacpp" or self.device_map is not None:
            return self
        pull_if_needed(self.model)
        return replace(self, dtype=repeatable_dtype(self.model))

    def beside_actors(self) -> "BatchModel":
        """For a process that only looks at the model: transformers' stays in main memory."""
        return replace(self, device_map="cpu") if self.chosen == "hf" else self

    def for_actors(self) -> "BatchModel":
        """For processes with other working folders."""
        if self.model is None or not Path(self.model).exists():
            return self
        return replace(self, model=str(Path(self.model).absolute()))


@dataclass(frozen=True)
class Cluster:
    """Where stories are told, if not in this process.

    Raises:
        BatchError: actors without a cluster.
    """

    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Tell on the machines of a Ray cluster: auto, local or host:port.",
            rich_help_panel=RAY,
        ),
    ] = None
    actors: Annotated[
        int | None, typer.Option(min=1, help="Copies of the model. Default: one a machine.", rich_help_panel=RAY)
    ] = None

    def __post_init__(self) -> None:
        if self.ray is None and self.actors is not None:
            raise BatchError("--actors needs --ray ADDRESS")

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Connected to the cluster, if there is one, inside the `with` block."""
        if self.ray is None:
            yield
            return
        from contextlib import ExitStack

        from steermoe.batch.cluster import connected
        from steermoe.cli.terminal import console

        with ExitStack() as undo:
            with console.working(f"Connecting to Ray ({console.printable(self.ray)}) ..."):
                undo.enter_context(connected(self.ray))
            yield

    def open(self, model: BatchModel, workers: int, rows: int | None) -> "tuple[Engine, Teller | None]":
        """The engine of this process, and what tells the stories if it doesn't.

        Args:
            model: what is opened.
            workers: GPUs that the model takes, where there are any.
            rows: stories at once of an actor; None for what its memory allows.
        """
        if self.ray is None:
            return model.open(), None
        runner = model.beside_actors().open()
        from steermoe.batch.cluster import ClusterTeller

        gpus = workers if model.takes_accelerators else 0
        return runner, ClusterTeller(runner, model.for_actors().opener(), rows=rows, actors=self.actors, gpus=gpus)


@o.spread
def batch(
    *,
    prompts: Annotated[
        str, typer.Argument(metavar="PROMPTS", help="File of prompts, lines of text or JSON; - reads stdin.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File of stories; one begun is gone on with.")],
    domain: Annotated[
        list[str] | None,
        o.domains(
            "Tell every prompt with this domain; repeat for several. sport=0.7+food=0.3 mixes, none leaves alone."
        ),
    ] = None,
    files: FileOptions,
    steering: Annotated[SteeringSpec, o.Group(o.STEERING, without=("domain",))],
    vectors: o.VectorsFolder = None,
    sampling: o.Sampling,
    model: BatchModel,
    vllm: o.VLLMOptions,
    cluster: Cluster,
    json: o.Json = False,
) -> None:
    """Tell many stories: prompts times domains times samples, in one batch that is refilled as stories are finished.

    Run again after an interruption, it goes on where it stopped. Prints how many stories the file holds.
    """
    from contextlib import closing

    from steermoe.batch.jobs import PromptFile, Settings
    from steermoe.batch.output import ErrorFile, StoryFile, check_apart

    settings = Settings(steering, tuple(domain or ()), sampling, files.samples)
    check_apart(prompts, output, files.errors)
    with (
        closing(PromptFile(prompts, files.format)) as source,
        StoryFile(output, files.overwrite) as stories,
        closing(ErrorFile(files.errors)) as left_out,
        cluster.connected(),
    ):
        model = replace(model, vllm=vllm.arguments()).repeatable()
        runner, teller = cluster.open(model, vllm.workers, files.batch_size)
        from steermoe.batch.batch import Batch

        problems = _Problems()
        job = Batch(
            runner,
            source,
            settings,
            stories,
            vectors=vectors,
            keep=files.keep,
            errors=left_out,
            on_problem=problems,
            rows=files.batch_size,
            teller=teller,
        )
        summary = _run(job, output, files.ordered)
        problems.sum_up()
    _print(summary, output, json)


def _run(job: "Batch", output: Path, ordered: bool) -> "Summary":
    """Run it with a progress bar."""
    from steermoe.cli.terminal import console

    with console.working("Reading the prompts ..."):
        job.prepare()
    if job.already:
        console.err.print(f"{job.already} of {job.total} stories are in '{output}' already", style="dim")
    try:
        with console.counting("Telling", "stories", job.total, done=job.already) as progress:
            return job.run(progress, ordered=ordered)
    except KeyboardInterrupt:
        console.err.print(f"steermoe: the stories so far are in '{output}'; run again to go on", soft_wrap=True)
        raise


def _print(summary: "Summary", output: Path, json: bool) -> None:
    from steermoe.cli.terminal import console

    if json:
        console.write_json({"output": str(output), **summary.as_dict()})
        return
    console.write(f"{summary.stories} stories in {output}, {summary.new} of them new\n")
    if summary.new:
        rate = summary.tokens / summary.seconds
        steered = f"; steered {summary.report.tokens_steered} tokens" if summary.report else ""
        console.err.print(
            f"{summary.tokens} tokens, {rate:,.0f} a second{steered}; {summary.rows} stories at once at most",
            style="dim",
            soft_wrap=True,
        )


class _Problems:
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
