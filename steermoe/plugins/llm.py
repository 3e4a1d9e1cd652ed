"""A plugin for Simon Willison's `llm`: `llm -m steermoe/smollm2-moe -o domain sport "Once upon a time"`.

`llm` imports it at every start, so engines and torch are imported only when a text is generated.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
import llm
from llm.parts import ReasoningPart, StreamEvent, TextPart

from steermoe.engines.text import printable
from steermoe.errors import GenerationError, SteerMoEError, escaped
from steermoe.plugins import llm_models
from steermoe.plugins.llm_options import Asked, Options, for_llm, read_options

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from steermoe.engines.messages import Message, Part
    from steermoe.engines.request import Completion, Request
    from steermoe.plugins.session import Session, Sessions
    from steermoe.serving.ticket import Ticket

NAME = re.compile(r"[\w.:-]+")
IN_LOG = ("text", "prompt", "messages", "thinking", "system")
"""What the log of `llm` has in columns of its own."""


# ---- from prompts of llm to texts ----


class Progress:
    """Shows long work on stderr."""

    def note(self, text: str, style: str = "", /) -> None:
        """One line."""
        click.echo(escaped(for_llm(text)), err=True)

    @contextmanager
    def counting(self, what: str, things: str, total: int, /) -> "Iterator[Callable[[int, int], None]]":
        """A progress bar; the function is called with the things and the tokens done since its last call."""
        with click.progressbar(length=total, label=f"{what} {things}", file=click.get_text_stream("stderr")) as bar:
            yield lambda done, tokens: bar.update(done)

    def working(self, what: str, /) -> "AbstractContextManager[Callable[[str], None]]":
        """Nothing: what it would show changes several times a second."""
        return nullcontext(lambda text: None)


PROGRESS = Progress()


@cache
def _sessions() -> "Sessions":
    from steermoe.plugins.session import Sessions

    return Sessions(PROGRESS)


def begin(fields: dict[str, Any], prompt: llm.Prompt) -> "tuple[Session, Ticket]":
    """Begin the text that a prompt asks for.

    Args:
        fields: of `session.Opening`.
        prompt: with its options and all earlier messages.

    Raises:
        SteerMoEError: it can't be carried out.
    """
    from steermoe.plugins.session import Opening, Vectors
    from steermoe.steering.plans import doubts

    asked = read_options(dict(prompt.options))
    messages = tuple(map(_message, prompt.messages))
    is_chat = _is_chat(asked, messages)
    sampling = asked.sampling(is_chat=is_chat)
    vectors = Vectors(asked.folder, asked.may_build)
    vectors.check(asked.spec)
    session = _sessions().of(Opening(**fields), asked.spec)
    text = messages[-1].content if messages else ""
    chat = session.chat(messages, asked.thinking) if is_chat else None
    plan = session.plan(asked.spec, vectors, text)
    for doubt in doubts(plan):
        PROGRESS.note(f"steermoe: {doubt}")
    from steermoe.engines.request import Request

    return session, session.submit(Request(text, plan, sampling, chat=chat))


def _is_chat(asked: Asked, messages: "tuple[Message, ...]") -> bool:
    """Whether a prompt is answered, instead of continued.

    Raises:
        GenerationError: options that contradict each other or the messages.
    """
    if asked.chat is False and len(messages) > 1:
        raise GenerationError(
            f"-o chat false continues one text, but there are {len(messages)} messages: leave out the system prompt "
            "and earlier turns, or this option"
        )
    is_chat = len(messages) > 1 if asked.chat is None else asked.chat
    if asked.thinking is not None and not is_chat:
        raise GenerationError("-o thinking belongs to an answer: add -o chat true")
    return is_chat


def _message(message: llm.Message) -> "Message":
    """A message of `llm` as the engines know it.

    Raises:
        GenerationError: it holds something that is no text.
    """
    from steermoe.engines.messages import Message

    if other := [part for part in message.parts if not isinstance(part, TextPart | ReasoningPart)]:
        raise GenerationError(
            f"a message holds a {type(other[0]).__name__}, which these models can't read: leave it out"
        )
    return Message(
        message.role,
        "".join(part.text for part in message.parts if isinstance(part, TextPart)),
        "".join(part.text for part in message.parts if isinstance(part, ReasoningPart)),
    )


class _Events:
    """Turns pieces of a text into what `llm` prints and logs: the thinking of a chat apart from the answer."""

    def __init__(self, request: "Request") -> None:
        from steermoe.engines.messages import Splitter

        self._splitter = None if request.chat is None else Splitter(request.chat)

    def add(self, text: str) -> list[str | StreamEvent]:
        if self._splitter is None:
            return [shown] if (shown := printable(text)) else []
        return self._made(self._splitter.add(text))

    def rest(self) -> list[str | StreamEvent]:
        return [] if self._splitter is None else self._made(self._splitter.rest())

    @staticmethod
    def _made(parts: "list[Part]") -> list[str | StreamEvent]:
        return [
            StreamEvent(type="reasoning", chunk=shown) if part.is_thinking else shown
            for part in parts
            if (shown := printable(part.text))
        ]


def _end(session: "Session", ticket: "Ticket", response: Any) -> None:
    """Give the counts of tokens and the record of a finished text to its response.

    Raises:
        SteeringError: the text was to be steered, and ended before any of its tokens was.
    """
    from steermoe.errors import SteeringError

    completion: Completion = ticket.result()
    response.set_usage(input=completion.prompt_tokens, output=completion.new_tokens)
    record = completion.as_dict(session.name)
    response.response_json = {name: value for name, value in record.items() if name not in IN_LOG}
    if completion.unanswered:
        PROGRESS.note(f"steermoe: {for_llm(completion.unanswered)}")
    if completion.missed:
        raise SteeringError(completion.missed)


@contextmanager
def _as_model_error() -> Iterator[None]:
    """What steermoe raises as the error of models that `llm` prints in one line."""
    try:
        yield
    except SteerMoEError as error:
        raise llm.ModelError(escaped(for_llm(str(error)))) from error


class SteeredModel(llm.Model):
    """A Mixture-of-Experts model, steered by the options of each prompt.

    Args:
        name: what follows `steermoe/` in its id.
        fields: of `session.Opening`.
    """

    can_stream = True
    Options = Options  # type: ignore[assignment]

    def __init__(self, name: str, fields: dict[str, Any]) -> None:
        self.model_id = f"steermoe/{name}"
        self._fields = fields

    def execute(
        self, prompt: llm.Prompt, stream: bool, response: llm.Response, conversation: llm.Conversation | None
    ) -> Iterator[str | StreamEvent]:
        """The text of a prompt, as it comes."""
        with _as_model_error():
            session, ticket = begin(self._fields, prompt)
            events = _Events(ticket.request)
            try:
                for piece in ticket:
                    yield from events.add(piece.text)
                yield from events.rest()
            finally:
                ticket.cancel()
            _end(session, ticket, response)


class AsyncSteeredModel(llm.AsyncModel):
    """As `SteeredModel`, for event loops."""

    can_stream = True
    Options = Options  # type: ignore[assignment]

    def __init__(self, name: str, fields: dict[str, Any]) -> None:
        self.model_id = f"steermoe/{name}"
        self._fields = fields

    async def execute(
        self, prompt: llm.Prompt, stream: bool, response: llm.AsyncResponse, conversation: Any
    ) -> AsyncIterator[str | StreamEvent]:
        """The text of a prompt, as it comes."""
        with _as_model_error():
            session, ticket = await asyncio.to_thread(begin, self._fields, prompt)
            events = _Events(ticket.request)
            try:
                async for piece in ticket:
                    for event in events.add(piece.text):
                        yield event
                for event in events.rest():
                    yield event
            finally:
                ticket.cancel()
            _end(session, ticket, response)


@llm.hookimpl
def register_models(register: Callable[..., None]) -> None:
    """Register each known model; if the file of added ones is damaged, say so and register the default one."""
    try:
        models = llm_models.known()
    except SteerMoEError as error:
        PROGRESS.note(f"steermoe: {error}")
        models = {llm_models.DEFAULT_NAME: {"model": llm_models.DEFAULT_NAME}}
    for name, fields in models.items():
        register(SteeredModel(name, fields), AsyncSteeredModel(name, fields))


# ---- commands ----


def _fail(error: SteerMoEError) -> NoReturn:
    raise click.ClickException(escaped(" ".join(str(error).split()))) from error


@click.group(name="steermoe")
def commands() -> None:
    """Mixture-of-Experts models that steermoe steers"""


@commands.command(name="add")
@click.argument("model")
@click.option("--name", help="What follows steermoe/ in its id. Default: the name of the model.")
@click.option("--engine", type=click.Choice(["auto", "hf", "llamacpp"]), default="auto", show_default=True)
@click.option("--quantize", type=click.Choice(["int8"]), help="Store weights in int8; CPU only.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the checkpoint.")
def _add(model: str, name: str | None, engine: str, quantize: str | None, trust_remote_code: bool) -> None:
    """Add MODEL, a checkpoint folder, GGUF file or hub id, as steermoe/NAME.

    Example: llm steermoe add allenai/OLMoE-1B-7B-0924-Instruct --name olmoe
    """
    from steermoe.errors import ModelError
    from steermoe.models.description import describe

    try:
        described = describe(model, trust_remote_code=trust_remote_code)
        if not described.steerable:
            raise ModelError(f"'{model}' can't be steered: {described.reason}")
        name = name or re.split(r"[/\\]", described.name)[-1].removesuffix(".gguf")
        if not NAME.fullmatch(name):
            raise ModelError(f"'{name}' is no name for a model: choose letters, digits and .:-_ with --name")
        where = str(Path(model).absolute()) if Path(model).exists() else model
        fields = {"model": where, "engine": engine, "quantize": quantize, "trust_remote_code": trust_remote_code}
        llm_models.add(name, fields)
    except SteerMoEError as error:
        _fail(error)
    click.echo(f"steermoe/{name}")


@commands.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def _list(as_json: bool) -> None:
    """List the models and where they are."""
    try:
        models = llm_models.known()
    except SteerMoEError as error:
        _fail(error)
    if as_json:
        click.echo(json.dumps({f"steermoe/{name}": fields for name, fields in models.items()}))
        return
    for name, fields in models.items():
        click.echo(escaped(f"steermoe/{name}: {fields['model']}"))


@commands.command(name="remove")
@click.argument("name")
def _remove(name: str) -> None:
    """Forget the model steermoe/NAME; the model itself stays where it is."""
    try:
        llm_models.remove(name.removeprefix("steermoe/"))
    except SteerMoEError as error:
        _fail(error)


@llm.hookimpl
def register_commands(cli: Any) -> None:
    """Add `llm steermoe`."""
    cli.add_command(commands)
