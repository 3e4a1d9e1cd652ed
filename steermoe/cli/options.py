"""Options that several commands share, and `spread`, which turns dataclasses into options. Knows no command."""

import inspect
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from steermoe.engines.auto import EngineName
from steermoe.engines.request import Sampling as SamplingFields
from steermoe.steering.spec import SteeringSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from steermoe.discovery.corpus import Corpus
    from steermoe.discovery.writing import Writing
    from steermoe.engines.engine import Engine as RunningEngine
    from steermoe.engines.messages import Chat
    from steermoe.engines.request import Completion
    from steermoe.evaluation.topic_vectors import TopicWish
    from steermoe.routing.shape import RoutingShape
    from steermoe.steering.plans import SteeringPlan
    from steermoe.steering.resolver import PlanResolver

DEFAULT_PROMPT = "Once upon a time there was a brown dog named Milo who lived by the river."
STEERING, TOPIC, SAMPLING, MODEL, CORPUS, VLLM = "Steering", "Topic", "Sampling", "Model", "Corpus", "vLLM"
CHAT = "Chat"


# ---- groups of options ----


@dataclass(frozen=True)
class Group:
    """Annotates a command's dataclass parameter: the heading of its options, and which of them the command has.

    Attributes:
        without: fields that are not options here. only: the fields that are; None for all but `without`.
    """

    panel: str | None = None
    without: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None

    def options(self, kind: type[Any]) -> Iterator[inspect.Parameter]:
        """A parameter that typer understands for each field that is an option.

        Options are the fields that are annotated with `typer.Option` or have "help" in their metadata. A tuple of any
        length becomes a repeated option.
        """
        hints = get_type_hints(kind, include_extras=True)
        for field in fields(kind):
            name, hint, default = field.name, hints[field.name], field.default
            if name in self.without or (self.only is not None and name not in self.only):
                continue
            if "help" in field.metadata:
                if get_origin(hint) is tuple:
                    hint, default = list[get_args(hint)[0]] | None, None  # type: ignore[misc]
                flags, help = field.metadata.get("flags", ()), field.metadata["help"]
                hint = Annotated[hint, typer.Option(*flags, help=help, rich_help_panel=self.panel)]
            if get_origin(hint) is Annotated:
                hint = _bounded(hint) if "help" not in field.metadata else hint  # fields of the library have limits
                default = inspect.Parameter.empty if default is MISSING else default
                yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


MOST_NUMBER = 2**63 - 1
"""The largest whole number that an option takes, unless it has a limit of its own: all libraries can count to it."""


def _bounded(hint: Any) -> Any:
    """The annotation of an option; that of a whole number checks that the number is not too large."""
    if get_origin(hint) is not Annotated:  # the context of the command
        return hint
    kind, *marks = get_args(hint)
    if int not in (kind, *get_args(kind)):
        return hint
    for number, mark in enumerate(marks):
        if getattr(mark, "callback", mark) is None:
            marks[number] = copy(mark)
            marks[number].callback = _check_size
    return Annotated[kind, *marks]


def _check_size(value: int | None) -> int | None:
    if value is not None and value > MOST_NUMBER:
        raise typer.BadParameter(f"{value} is too large: expected at most {MOST_NUMBER}")
    return value


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Turn a command into one for typer: the fields of its dataclass parameters become options.

    Options that are missing or None leave the dataclass's own default.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, tuple[Any, list[inspect.Parameter]]] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        kind, *marks = get_args(hints[name]) if get_origin(hints[name]) is Annotated else (hints[name],)
        if is_dataclass(kind):
            group = next((mark for mark in marks if isinstance(mark, Group)), Group())
            groups[name] = kind, list(group.options(kind))  # type: ignore[arg-type]
            parameters += groups[name][1]
        else:
            hint = _bounded(hints[name])
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hint))

    def run(**given: Any) -> None:
        made = {}
        for name, (kind, options) in groups.items():
            values = {option.name: given.pop(option.name) for option in options}
            values = {field: tuple(value) if isinstance(value, list) else value for field, value in values.items()}
            made[name] = kind(**{field: value for field, value in values.items() if value is not None})
        command(**given, **made)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


# ---- steering, sampling, models, vLLM ----

Steering = Annotated[SteeringSpec, Group(STEERING)]
Sampling = Annotated[SamplingFields, Group(SAMPLING)]


def domains(help: str) -> Any:
    """The option --domain of a command where several domains are alternatives, not a mixture."""
    return typer.Option("--domain", "-d", help=help, rich_help_panel=STEERING)


VectorsFolder = Annotated[
    Path | None, typer.Option("--vectors", help="Folder of vectors to search first.", rich_help_panel=STEERING)
]
AnyModel = Annotated[
    bool,
    typer.Option(
        "--any-model",
        help="Also take vectors that were built for another model of the same shape.",
        rich_help_panel=STEERING,
    ),
]
NoBuild = Annotated[
    bool,
    typer.Option(
        "--no-build",
        help="Refuse a domain that the model has no vector of, instead of building and calibrating one first.",
        rich_help_panel=STEERING,
    ),
]
TextLanguage = Annotated[
    Literal["en", "ru", "both"] | None,
    typer.Option(
        "--language",
        help="Language of the texts that vectors are built from: en, ru or both. Default: that of the prompt.",
        rich_help_panel=STEERING,
    ),
]
BUILD_ONE = "build one with"
"""What the error about a domain without a vector advises."""


@dataclass(frozen=True)
class VectorOptions:
    """Where a command finds its vectors, and which ones it takes."""

    vectors: VectorsFolder = None
    any_model: AnyModel = False
    no_build: NoBuild = False
    language: TextLanguage = None

    def check(self, spec: SteeringSpec) -> None:
        """As `resolver.check_spec`: raise what is wrong with a spec for any model, before a model is loaded."""
        from steermoe.errors import VectorNotFound
        from steermoe.steering.resolver import check_spec

        try:
            check_spec(spec, self.vectors, self.can_build)
        except VectorNotFound as error:
            if BUILD_ONE not in str(error):  # a folder or a file is missing
                raise
            raise VectorNotFound(f"{error}{self._hint()}") from error

    def _hint(self) -> str:
        """What else helps if there is no vector of a domain, to be added to the advice to build one."""
        from steermoe.models.default.spec import DOMAINS

        if self.no_build:
            return f"; without --no-build that happens now for {', '.join(DOMAINS)}"
        return f"; for {', '.join(DOMAINS)} that happens on demand, for other topics use --topic"

    def can_build(self, domain: str) -> bool:
        """Whether a domain's vector is built if a model has none."""
        from steermoe.discovery.packaged import is_packaged

        return not self.no_build and is_packaged(domain)

    def resolver(
        self, model: "RunningEngine | RoutingShape", given: "Mapping[str, Path] | None" = None
    ) -> "PlanResolver":
        """What turns specs into plans for a model, given as the engine that runs it or as its shape.

        `given` as for `PlanResolver`: what `on_demand.files` returned.
        """
        from steermoe.routing.shape import RoutingShape
        from steermoe.steering.resolver import PlanResolver

        shape = model if isinstance(model, RoutingShape) else model.shape
        return PlanResolver(shape, self.vectors, any_model=self.any_model, given=given)


Topic = Annotated[
    list[str] | None,
    typer.Option(
        "--topic",
        help="A topic in words, such as 'pirates at sea': the model writes texts about it, from which a vector is "
        "built, once; repeat for several.",
        rich_help_panel=TOPIC,
    ),
]
TextsPerTopic = Annotated[
    int | None,
    typer.Option(
        "--texts-per-topic",
        min=4,
        max=4096,
        help="Texts that the model writes about a topic, and about other things. Default: 32.",
        rich_help_panel=TOPIC,
    ),
]


@dataclass(frozen=True)
class TopicOptions:
    """Topics in words to steer toward; each gets a vector of its own.

    Raises:
        BadParameter: a topic that is empty or none, or texts without a topic.
    """

    topic: Topic = None
    texts_per_topic: TextsPerTopic = None

    def __post_init__(self) -> None:
        from steermoe.errors import VectorError

        if self.texts_per_topic is not None and not self.topic:
            raise typer.BadParameter("--texts-per-topic needs a topic: name one with --topic, such as 'pirates at sea'")
        try:
            self.names()
        except VectorError as error:
            raise typer.BadParameter(str(error)) from error

    def names(self) -> list[str]:
        """The names of the topics' vectors."""
        if not self.topic:
            return []
        from steermoe.discovery.topic import kept_name

        return [kept_name(topic) for topic in self.topic]

    def added_to(self, spec: SteeringSpec) -> SteeringSpec:
        """The spec with the topics as further domains of its mixture.

        Raises:
            BadParameter: the spec asks for no steering.
        """
        from steermoe.steering.spec import NO_DOMAIN

        if self.topic and NO_DOMAIN in spec.domain:
            raise typer.BadParameter(f"--domain {NO_DOMAIN} leaves the text unsteered: leave it out, or --topic")
        return replace(spec, domain=(*spec.domain, *self.names()))

    @property
    def writing(self) -> "Writing":
        """How the texts are written."""
        from steermoe.discovery.writing import Writing

        return Writing() if self.texts_per_topic is None else Writing(self.texts_per_topic)

    def wish(self, vectors: VectorOptions) -> "TopicWish":
        """What has to be there before the topics can be steered toward."""
        from steermoe.evaluation.topic_vectors import TopicWish

        return TopicWish(tuple(self.topic or ()), vectors.language, self.writing)


Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Checkpoint folder, GGUF file or hub id. Default: smollm2-moe.", rich_help_panel=MODEL
    ),
]
Engine = Annotated[
    EngineName,
    typer.Option(
        "--engine",
        help="hf is transformers; auto takes llama.cpp for GGUF files if it is installed, else hf.",
        rich_help_panel=MODEL,
    ),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=MODEL)]
DeviceMap = Annotated[
    str | None, typer.Option(help="As in transformers, for example auto or cpu.", rich_help_panel=MODEL)
]
Quantize = Annotated[
    Literal["int8"] | None, typer.Option(help="Store weights in int8; CPU only.", rich_help_panel=MODEL)
]
CompiledSteps = Annotated[
    bool, typer.Option(help="Use the steps that `steermoe models compile` compiled.", rich_help_panel=MODEL)
]
TrustRemoteCode = Annotated[
    bool, typer.Option(help="Run Python code that comes with the checkpoint.", rich_help_panel=MODEL)
]


@dataclass(frozen=True)
class VLLMOptions:
    """How vLLM spreads a model over GPUs (or over processes on a CPU), and whether it compiles it."""

    tensor_parallel_size: Annotated[
        int, typer.Option(min=1, help="Tensor-parallel workers, which split each layer.", rich_help_panel=VLLM)
    ] = 1
    pipeline_parallel_size: Annotated[
        int,
        typer.Option(min=1, help="Pipeline-parallel stages, which split the stack of layers.", rich_help_panel=VLLM),
    ] = 1
    data_parallel_size: Annotated[
        int, typer.Option(min=1, help="Data-parallel replicas, which split the texts.", rich_help_panel=VLLM)
    ] = 1
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile", help="Let vLLM compile the model first; pays off for long batches.", rich_help_panel=VLLM
        ),
    ] = False

    @property
    def workers(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size

    def arguments(self) -> dict[str, int]:
        """The options that differ from their defaults, as arguments of `VLLMEngine`."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}


# ---- chats ----

System = Annotated[
    str | None,
    typer.Option(
        help="Message of the system, before all others. Default: the chat template's own, if it has one.",
        rich_help_panel=CHAT,
    ),
]
Thinking = Annotated[
    bool | None,
    typer.Option(
        "--thinking/--no-thinking",
        help="Let the model think before it answers, or not. Default: as its chat template does.",
        rich_help_panel=CHAT,
    ),
]


@dataclass(frozen=True)
class ChatOptions:
    """Whether a prompt is a user's message that the model answers, and what comes before it.

    Raises:
        typer.BadParameter: options for chats without --chat.
    """

    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="PROMPT is a user's message: answer it, by the model's chat template, instead of continuing it.",
            rich_help_panel=CHAT,
        ),
    ] = False
    system: System = None
    thinking: Thinking = None

    def __post_init__(self) -> None:
        if self.chat:
            return
        switch = "--thinking" if self.thinking else None if self.thinking is None else "--no-thinking"
        if given := switch or (None if self.system is None else "--system"):
            raise typer.BadParameter(f"{given} belongs to a chat: add --chat")

    def read(self, engine: "RunningEngine", prompt: str) -> "Chat | None":
        """The chat of one turn that a prompt begins; None if it is to be continued."""
        if not self.chat:
            return None
        from steermoe.engines.messages import conversation

        return engine.chat(conversation(prompt, self.system), self.thinking)


# ---- texts ----

TextField = Annotated[str, typer.Option(help="Field or column with the text.", rich_help_panel=CORPUS)]
MaxTokens = Annotated[
    int, typer.Option(min=1, max=2**31 - 1, help="Tokens to read of each text, at most.", rich_help_panel=CORPUS)
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        help="Read only files whose name or path matches, such as '*.py', of any kind; repeat for several.",
        rich_help_panel=CORPUS,
    ),
]
Encoding = Annotated[
    str | None,
    typer.Option(
        help="Encoding of the texts, such as cp1251. Default: UTF-8, or UTF-16 if marked.", rich_help_panel=CORPUS
    ),
]


@dataclass(frozen=True)
class CorpusOptions:
    """How texts are read from a corpus."""

    text_field: TextField = "text"
    label_field: Annotated[
        str | None,
        typer.Option(
            help="Field or column with the known domain. Default: name of the subfolder or file.",
            rich_help_panel=CORPUS,
        ),
    ] = None
    include: Include = None
    encoding: Encoding = None
    max_tokens: MaxTokens = 512

    def open(self, path: Path) -> "Corpus":
        """The texts at a path.

        Raises:
            CorpusError: the path does not exist, or is a file of another kind.
        """
        from steermoe.discovery.corpus import Corpus

        return Corpus(
            path,
            text_field=self.text_field,
            label_field=self.label_field,
            include=self.include or (),
            encoding=self.encoding,
        )


# ---- others ----

Prompt = Annotated[
    str | None, typer.Argument(help="Beginning of the text; - reads stdin. Default: the opening of a built-in story.")
]
SpecialTokens = Annotated[
    bool | None,
    typer.Option(
        "--special-tokens/--no-special-tokens",
        help="Encode the special tokens of prompts that hold the chat template's, or begin with any, or leave them "
        "text. Default: encode those of a typed PROMPT.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")]
JsonDocument = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Overwrite = Annotated[bool, typer.Option("--force", help="Overwrite the file if it exists.")]


def read_prompt(prompt: str | None, language: str | None = None) -> str:
    """The prompt as given, from stdin, or the built-in one; in Russian the opening about Barney.

    Raises:
        GenerationError: it is not text, or stdin can't be read.
    """
    import sys

    from steermoe.engines.text import check_not_empty, check_text, not_utf8
    from steermoe.errors import GenerationError

    if prompt is None and language == "ru":
        from steermoe.discovery.packaged import openings

        return openings("ru")[0]
    if prompt is None:
        return DEFAULT_PROMPT
    if prompt != "-":
        return check_not_empty(check_text(prompt, "the prompt"))
    if sys.stdin is None:
        raise GenerationError("stdin is closed: pipe a text into it, or give the prompt as an argument")
    try:
        return check_not_empty(check_text(sys.stdin.read(), "stdin").rstrip("\n"))
    except UnicodeDecodeError as error:
        raise GenerationError(f"stdin {not_utf8(error)}") from error
    except OSError as error:
        raise GenerationError(f"can't read stdin: {error.strerror}; give the prompt as an argument") from error


def check_steered(completions: "Sequence[Completion]") -> None:
    """Raise SteeringError if a text was to be steered, and ended before any token was."""
    from steermoe.errors import SteeringError

    for reason in filter(None, (completion.missed for completion in completions)):
        raise SteeringError(reason)


def warn_unanswered(completions: "Sequence[Completion]") -> None:
    """Warn about each answer of a chat that is empty."""
    from steermoe.cli.terminal.console import note

    for completion in completions:
        if why := completion.unanswered:
            note(f"steermoe: {why}")


def _check_trace(path: Path | None) -> Path | None:
    if path is not None and path.suffix.lower() not in (".json", ".html"):
        raise typer.BadParameter(f"'{path}' ends in neither .html nor .json, which say what to write")
    return path


Trace = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        metavar="FILE",
        callback=_check_trace,
        help="Also write which experts each token was sent to, and would have been without steering: FILE.html, a "
        "page to look at, or FILE.json.",
    ),
]
Overwrites = Annotated[bool, typer.Option("--overwrite", help="Replace the file of --trace if it exists.")]
TRACING_ENGINES = "vLLM does not show what its routers choose for each token: use --engine hf, or llamacpp for GGUF"


def check_tracing(engine: str, path: Path | None, shows: bool = False, overwrite: bool = False) -> None:
    """Fail before long work if a trace that is wanted can't be made or written.

    Args:
        engine: its name, as the user gave it.
        path: the trace's file; None if none is wanted.
        shows: whether a trace is wanted for the terminal.
        overwrite: whether the file may be replaced.

    Raises:
        GenerationError: the engine can't trace, or the file has no folder or is there already.
    """
    if path is None and not shows:
        return
    from steermoe.errors import GenerationError
    from steermoe.tracing.file import check_ending

    if engine == "vllm":
        raise GenerationError(TRACING_ENGINES)
    if path is not None and check_ending(path).is_file() and not overwrite:
        raise GenerationError(f"'{path}' already exists: pass --overwrite to replace it, or name another file")


def save_trace(path: Path | None, completions: "Sequence[Completion]", model: str, engine: str) -> None:
    """Write the traces of completions of one prompt, if they are wanted, with the command of this run."""
    if path is None:
        return
    import shlex
    import sys

    from steermoe.tracing.file import write_traces

    write_traces(path, completions, model, shlex.join(["steermoe", *sys.argv[1:]]), engine)


def has_special_tokens(prompt: str | None, wanted: bool | None) -> bool | None:
    """Whether special tokens of the prompt are to be encoded as such: by default those of a typed one."""
    return True if wanted is None and prompt not in (None, "-") else wanted


def warn_beyond_safe_range(plans: "Sequence[SteeringPlan | None]") -> None:
    """Warn once about each vector whose strength is a guess, or beyond its calibrated safe range."""
    from steermoe.cli.terminal.console import note
    from steermoe.steering.plans import doubts

    for warning in dict.fromkeys(warning for plan in plans for warning in doubts(plan)):
        note(f"steermoe: {warning}")
