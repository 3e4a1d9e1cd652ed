"""`steermoe batch`: many stories from a file of prompts, resumable."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from steermoe.cli import on_demand
from steermoe.cli import options as o
from steermoe.cli.loading import ModelOptions, pull_if_needed
from steermoe.errors import BatchError, count_of
from steermoe.steering.spec import SteeringSpec

if TYPE_CHECKING:
    from steermoe.batch.batch import Batch, BatchSummary
    from steermoe.batch.jobs import Problem
    from steermoe.batch.worker import Worker
    from steermoe.engines.engine import Engine

EXAMPLES = """Examples:

steermoe batch prompts.txt -o stories.jsonl -d sport -d food -d none --samples 2

steermoe batch prompts.jsonl -o stories.jsonl --ordered --errors bad.jsonl

steermoe batch questions.txt -o answers.jsonl -d food --chat --system "Answer in one sentence."

steermoe batch prompts.txt -o stories.jsonl -d sport --engine vllm --tensor-parallel-size 2 --compile

cat prompts.txt | steermoe batch - -o stories.jsonl -d sport=0.7+food=0.3 --json

steermoe batch prompts.txt -o quantised.jsonl -d sport --model smollm2-moe-q8_0.gguf --engine llamacpp

steermoe batch prompts.txt -o stories.jsonl -d sport --ray auto --actors 4
"""
RAY = "Ray"
SHOWN_PROBLEMS = 5
"""Bad lines that are printed; the rest is only counted."""


@dataclass(frozen=True)
class FileOptions:
    """How the file of stories is written."""

    samples: Annotated[int, typer.Option(help="Stories per prompt and domain, with consecutive seeds.")] = 1
    ordered: Annotated[
        bool, typer.Option("--ordered", help="At the end, sort the stories into the order of the prompts.")
    ] = False
    errors: Annotated[Path | None, typer.Option(help="File for skipped lines, as JSON lines.")] = None
    keep: Annotated[bool, typer.Option("--keep", help="Add to a file that also holds other stories.")] = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False
    format: Annotated[
        Literal["auto", "text", "jsonl"],
        typer.Option(help="Format of the prompts; auto decides by the file name, then by line 1."),
    ] = "auto"
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for a file of JSON about each new story: which experts each of its tokens was sent to, and "
            "would have been without steering.",
        ),
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Stories in one batch. Default: as many as fit into memory, up to a limit.",
        ),
    ] = None


@dataclass(frozen=True)
class BatchModel(ModelOptions):
    """A model for many stories, which actors on other machines can open too."""

    dtype: Annotated[
        str,
        typer.Option(
            help="auto, float32, bfloat16 or float16. auto: float32 for small models on a CPU, which is repeatable.",
            rich_help_panel=o.MODEL,
        ),
    ] = "auto"

    @property
    def takes_gpus(self) -> bool:
        return self.chosen != "llamacpp" and self.device_map != "cpu"

    def repeatable(self) -> "BatchModel":
        """The same model with dtype "auto" resolved by `checkpoint.repeatable_dtype`, if that applies."""
        from steermoe.models.checkpoint import repeatable_dtype

        if self.dtype != "auto" or self.chosen == "llamacpp" or self.device_map is not None:
            return self
        pull_if_needed(self.model)
        return replace(self, dtype=repeatable_dtype(self.model))

    def for_inspection(self) -> "BatchModel":
        """For a process that only inspects the model: in transformers it stays in main memory."""
        return replace(self, device_map="cpu") if self.chosen == "hf" else self

    def for_actors(self) -> "BatchModel":
        """For processes with other working directories: a local path becomes absolute."""
        if self.model is None or not Path(self.model).exists():
            return self
        return replace(self, model=str(Path(self.model).absolute()))


@dataclass(frozen=True)
class Cluster:
    """Where stories are generated, if not in this process.

    Raises:
        BatchError: actors without a cluster.
    """

    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Generate on the machines of a Ray cluster: auto, local or host:port.",
            rich_help_panel=RAY,
        ),
    ] = None
    actors: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of actors, each with its own model. Default: one per machine.", rich_help_panel=RAY
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.ray is None and self.actors is not None:
            raise BatchError("--actors needs --ray ADDRESS")

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Connect to the cluster, if there is one, for the `with` block."""
        if self.ray is None:
            yield
            return
        from contextlib import ExitStack

        from steermoe.batch.cluster import connected
        from steermoe.cli.terminal import console

        with ExitStack() as undo:
            with console.working(f"Connecting to Ray ({self.ray}) ..."):
                undo.enter_context(connected(self.ray))
            yield

    def open(self, model: BatchModel, workers: int, rows: int | None) -> "tuple[Engine, Worker | None]":
        """The engine of this process, and the worker that generates the stories unless this engine does.

        Args:
            model: the model to open.
            workers: GPUs that the model takes, if there are any.
            rows: rows at once per actor; None for as many as its memory allows.
        """
        if self.ray is None:
            return model.open(), None
        runner = model.for_inspection().open()
        from steermoe.batch.cluster import ClusterWorker

        gpus = workers if model.takes_gpus else 0
        return runner, ClusterWorker(runner, model.for_actors().opener(), rows=rows, actors=self.actors, gpus=gpus)


@o.spread
def batch(
    *,
    prompts: Annotated[
        str, typer.Argument(metavar="PROMPTS", help="File of prompts, one per line, as text or JSON; - reads stdin.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File of stories; an existing one is resumed.")],
    domain: Annotated[
        list[str] | None,
        o.domains(
            "Continue every prompt with this domain; repeat for several. sport=0.7+food=0.3 mixes, none is unsteered."
        ),
    ] = None,
    files: FileOptions,
    steering: Annotated[SteeringSpec, o.Group(o.STEERING, without=("domain",))],
    topics: o.TopicOptions,
    vectors: o.VectorOptions,
    sampling: o.Sampling,
    model: BatchModel,
    special_tokens: o.SpecialTokens = None,
    vllm: o.VLLMOptions,
    cluster: Cluster,
    chat: o.ChatOptions,
    json: o.Json = False,
) -> None:
    """Generate many stories: prompts times domains times samples, in one batch that is refilled as stories finish.

    After an interruption, run the same command again to resume. Prints how many stories the file holds.
    """
    from contextlib import closing

    from steermoe.batch.jobs import BatchSettings, PromptFile
    from steermoe.batch.output import ErrorFile, StoryFile, check_apart

    asked = (chat.chat, chat.system, chat.thinking, special_tokens)
    settings = BatchSettings(steering, tuple(domain or ()), sampling, files.samples, *asked)
    check_apart(prompts, output, files.errors)
    _check_trace(files.trace, model, cluster)
    for spec in settings.steerings():
        vectors.check(spec)
    settings = replace(settings, domains=(*settings.domains, *topics.names()))
    with (
        closing(PromptFile(prompts, files.format)) as source,
        StoryFile(output, files.overwrite) as stories,
        closing(ErrorFile(files.errors)) as errors,
        cluster.connected(),
    ):
        model = replace(model, vllm=vllm.arguments()).repeatable()
        needs = _Needs(*source.needs(settings), vectors, topics, settings.steerings(), chat)
        runner, worker, built = needs.open(cluster, model, vllm.workers, files.batch_size)
        from steermoe.batch.batch import Batch, BatchOptions

        problems, worker, where = _ProblemPrinter(), worker or _tracing_worker(runner, files), vectors.vectors
        options = BatchOptions(where, files.keep, errors, problems, files.batch_size, worker, vectors.any_model, built)
        remark = "; they get no trace: write to another file, or --overwrite" if files.trace is not None else ""
        summary = _run(Batch(runner, source, settings, stories, options), output, files.ordered, remark)
        problems.sum_up()
    _print(summary, output, json)
    model.compile_later(runner)
    if not summary.stories:
        raise BatchError(f"no story could be generated, and '{output}' holds none: stderr and --errors say why")


@dataclass(frozen=True)
class _Needs:
    """What the stories need besides a model: the vectors of these domains and topics, for texts like this one.

    Attributes:
        specs: the steerings of lines that name none.
        chat: whether prompts are messages.
    """

    names: Sequence[str]
    text: str
    vectors: o.VectorOptions
    topics: o.TopicOptions
    specs: "Sequence[SteeringSpec]"
    chat: o.ChatOptions

    def open(
        self, cluster: Cluster, model: BatchModel, workers: int, rows: int | None
    ) -> "tuple[Engine, Worker | None, dict[str, Path]]":
        """The engine, what opens further workers, and the files of vectors that were missing and are built now."""
        wanted = on_demand.wish(self.vectors, self.names, self.text)
        built = on_demand.before_opening(model, self.vectors, wanted, self.topics)
        runner, worker = cluster.open(on_demand.with_active_experts(model, self.specs), workers, rows)
        self.chat.read(runner, "Hello")  # fails at once, not for each line, if the model can't chat
        on_demand.check_tags(runner, self.specs)
        built |= on_demand.files(model, runner, self.vectors, wanted, self.topics)
        on_demand.warn_of_script(runner.shape, self.text)
        return runner, worker, built


def _check_trace(folder: Path | None, model: BatchModel, cluster: Cluster) -> None:
    """Fail before long work if stories can't be traced."""
    if folder is None:
        return
    if cluster.ray is not None:
        raise BatchError("--trace works in this process alone: leave it out, or --ray")
    o.check_tracing(model.engine, None, shows=True)


def _tracing_worker(runner: "Engine", files: FileOptions) -> "Worker | None":
    """A worker that also writes each story's trace into a folder; None if that is not wanted."""
    if files.trace is None:
        return None
    from functools import partial

    from steermoe.batch.worker import EngineWorker
    from steermoe.tracing.file import make_folder, write_story

    return EngineWorker(runner, files.batch_size, partial(write_story, make_folder(files.trace)))


def _run(job: "Batch", output: Path, ordered: bool, remark: str = "") -> "BatchSummary":
    """Run a batch with a progress bar; `remark` follows the number of stories that are there already."""
    from steermoe.cli.terminal import console

    with console.working("Reading the prompts ..."):
        job.prepare()
    for warning in job.warnings[:SHOWN_PROBLEMS]:
        console.note(f"steermoe: {warning}")
    if job.already:
        console.note(f"{job.already} of {job.total} stories are already in '{output}'{remark}", "dim")
    try:
        with console.counting("Generating", "stories", job.total, done=job.already) as progress:
            return job.run(progress, ordered=ordered)
    except KeyboardInterrupt:
        console.note(f"steermoe: the stories so far are in '{output}'; run again to resume")
        raise


def _print(summary: "BatchSummary", output: Path, json: bool) -> None:
    from steermoe.cli.terminal import console

    if json:
        console.write_json({"output": str(output), **summary.as_dict()})
        return
    console.say(f"{count_of(summary.stories, 'story')} in {output}, {summary.new} of them new")
    if summary.new:
        rate = summary.tokens / summary.seconds
        steered = f"; steered {summary.report.tokens_steered} tokens" if summary.report else ""
        console.note(
            f"{summary.tokens} tokens, {rate:,.0f} tokens/s{steered}; at most {summary.rows} stories at once", "dim"
        )


class _ProblemPrinter:
    """Prints the first problems on stderr and counts the rest."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, problem: "Problem") -> None:
        from steermoe.cli.terminal import console

        self.count += 1
        if self.count <= SHOWN_PROBLEMS:
            console.note(f"steermoe: skipped {problem}")

    def sum_up(self) -> None:
        from steermoe.cli.terminal import console

        if self.count > SHOWN_PROBLEMS:
            console.note(f"steermoe: {self.count} lines were skipped in total")
