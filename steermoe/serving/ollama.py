"""Ollama's protocol: /api/generate, /api/chat, /api/tags, /api/show, /api/version.

Answers are streamed as lines of JSON.
"""

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from steermoe.engines.messages import Chat, Message, Part, Splitter, conversation, split_answer
from steermoe.errors import SteerMoEError
from steermoe.serving.fields import Fields, Refused, dumps
from steermoe.serving.openai import error_of, read_chat, room_for
from steermoe.serving.sampling import sampling_of
from steermoe.serving.service import Extras, Served, Service
from steermoe.serving.ticket import Ticket

if TYPE_CHECKING:
    from steermoe.engines.request import Sampling
    from steermoe.serving.steering import Asked

VERSION = "0.12.0"
"""The version of Ollama whose protocol this is."""
TEMPERATURE, TOP_K, TOP_P = 0.8, 40, 0.9
"""Ollama's defaults."""
UNLIMITED = (-1, -2)
"""Values of `num_predict` for as much as the context allows."""
OPTIONS = (
    "num_predict",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
    "steering",
)
IGNORED_OPTIONS = (
    "num_ctx",
    "num_batch",
    "num_gpu",
    "main_gpu",
    "num_thread",
    "use_mmap",
    "use_mlock",
    "numa",
    "num_keep",
)
"""Options that change no text."""
REFUSED_OPTIONS: dict[str, Sequence[Any]] = {
    "typical_p": (1, 1.0),
    "tfs_z": (1, 1.0),
    "repeat_last_n": (),
    "mirostat": (0,),
    "penalize_newline": (),
}
UNKNOWN_TIME = "1970-01-01T00:00:00Z"
SHARED = ("model", "options", "stream", "think", "steering")
IGNORED = ("keep_alive",)
REFUSED: dict[str, Sequence[Any]] = {
    "format": ("",),
    "images": ([],),
    "suffix": ("",),
    "template": ("",),
    "context": ([],),
    "tools": ([],),
    "logprobs": (False,),
    "top_logprobs": (0,),
}


@dataclass(frozen=True, eq=False)
class Form:
    """The form of an answer.

    Attributes:
        is_chat: whether it is an answer of `/api/chat`.
        name: the model as the client named it.
        started: nanoseconds of `perf_counter_ns`.
    """

    is_chat: bool
    name: str
    started: int = field(default_factory=time.perf_counter_ns)

    def part(self, part: Part) -> bytes:
        """A line with a piece of a text."""
        text, thinking = ("", part.text) if part.is_thinking else (part.text, "")
        return _line({**self._text(text, thinking), "done": False})

    def whole(self, text: str, thinking: str, end: dict[str, Any]) -> dict[str, Any]:
        """A whole answer; `end` as `end` gives it."""
        return {**self._text(text, thinking), **end}

    def last(self, end: dict[str, Any]) -> bytes:
        """The line after all pieces."""
        return _line(self.whole("", "", end))

    def end(self, finish_reason: str, prompt_tokens: int, new_tokens: int, first: int) -> dict[str, Any]:
        """What the answer says at its end.

        Args:
            finish_reason: "length", or anything else for "stop".
            prompt_tokens: of the prompt.
            new_tokens: of the answer.
            first: when the first piece came, in nanoseconds as `started`.
        """
        now = time.perf_counter_ns()
        return {
            "done": True,
            "done_reason": "length" if finish_reason == "length" else "stop",
            "total_duration": now - self.started,
            "load_duration": 0,
            "prompt_eval_count": prompt_tokens,
            "prompt_eval_duration": max(1, first - self.started),
            "eval_count": new_tokens,
            "eval_duration": max(1, now - first),
        }

    def _text(self, text: str, thinking: str) -> dict[str, Any]:
        head = {"model": self.name, "created_at": datetime.now(UTC).isoformat().replace("+00:00", "Z")}
        more = {"thinking": thinking} if thinking else {}
        if self.is_chat:
            return {**head, "message": {"role": "assistant", "content": text, **more}}
        return {**head, "response": text, **more}


@dataclass(frozen=True, eq=False)
class Wanted:
    """The text that a request asks for, whatever generates it.

    Attributes:
        asked: its steering.
        prompt: what to continue, or to answer.
        stop: texts that end it.
        streams: whether it is sent as it comes.
        form: of the answer.
    """

    asked: "Asked"
    prompt: str | Chat
    sampling: "Sampling"
    stop: Sequence[str]
    streams: bool
    form: Form


@dataclass(eq=False)
class Order:
    """A request for one text, on its way.

    Attributes:
        tickets: its only text.
        streams: whether it is sent as it comes.
        form: of the answer.
    """

    tickets: list[Ticket]
    streams: bool
    form: Form

    @property
    def ticket(self) -> Ticket:
        return self.tickets[0]

    async def answer(self) -> dict[str, Any]:
        """The answer, once the text is finished.

        Raises:
            SteerMoEError: it could not be generated.
        """
        first = time.perf_counter_ns()
        await self.ticket.wait()
        chat, text, thinking = self.ticket.request.chat, self.ticket.text, None
        if chat is not None:
            text, thinking = split_answer(chat, text)
        return self.form.whole(text, thinking or "", self._end(first))

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as lines of JSON."""
        chat = self.ticket.request.chat
        splitter = None if chat is None else Splitter(chat)
        first = 0
        try:
            async for piece in self.ticket:
                first = first or time.perf_counter_ns()
                for part in [Part(piece.text)] if splitter is None else splitter.add(piece.text):
                    yield self.form.part(part)
            for part in splitter.rest() if splitter is not None else ():
                yield self.form.part(part)
            yield self.form.last(self._end(first or time.perf_counter_ns()))
        except SteerMoEError as error:
            yield error_line(error_of(error)[1]["error"]["message"])

    def _end(self, first: int) -> dict[str, Any]:
        completion = self.ticket.result(0)
        reason = self.ticket.finish_reason or ""
        return self.form.end(reason, completion.prompt_tokens, completion.new_tokens, first)


def error_line(message: str) -> bytes:
    """The line of an error that comes too late for a status."""
    return _line({"error": message})


def _line(content: dict[str, Any]) -> bytes:
    return dumps(content) + b"\n"


def generate(service: Service, fields: Fields) -> Order:
    """Begin the text of a request to `/api/generate`: as `read_generate`.

    Raises:
        Refused: a field that is wrong. SteerMoEError: as `Service.start`.
    """
    return _order(service, read_generate(service, fields))


def chat(service: Service, fields: Fields) -> Order:
    """Begin the answer of a request to `/api/chat`.

    Raises:
        Refused: a field that is wrong. SteerMoEError: as `Service.start`.
    """
    return _order(service, read_messages(service, fields))


def read_generate(served: Served, fields: Fields) -> Wanted:
    """What a request to `/api/generate` asks for: an answer to the prompt, or with `raw` its continuation.

    A model without a chat template always continues.

    Raises:
        Refused: a field that is wrong.
    """
    fields.check_names((*SHARED, "prompt", "system", "raw"), REFUSED, IGNORED)
    asked = served.steering.asked(fields.values)
    prompt, system = fields.text("prompt"), fields.text("system") or None
    if not prompt:
        raise fields.wrong("prompt", "a text")
    if fields.flag("raw", False) or not served.can_chat:
        if system is not None:
            raise Refused("field 'system' needs a chat template, and none is used here: leave it out", param="system")
        return _wanted(served, fields, asked, prompt, is_chat=False)
    made = read_chat(served, conversation(prompt, system), _think(fields))
    return _wanted(served, fields, asked, made, is_chat=False)


def read_messages(served: Served, fields: Fields) -> Wanted:
    """What a request to `/api/chat` asks for.

    Raises:
        Refused: a field that is wrong.
    """
    fields.check_names((*SHARED, "messages"), REFUSED, IGNORED)
    asked = served.steering.asked(fields.values)
    messages = [_message(one) for one in fields.objects("messages")]
    return _wanted(served, fields, asked, read_chat(served, messages, _think(fields)), is_chat=True)


def tags(served: Served) -> dict[str, Any]:
    """What `/api/tags` answers: the model, and the model with each domain that has a vector."""
    details = _details(served, "moe")
    return {
        "models": [
            {"name": name, "model": name, "modified_at": UNKNOWN_TIME, "size": 0, "digest": "", "details": details}
            for name in served.steering.names()
        ]
    }


def show(served: Served, fields: Fields) -> dict[str, Any]:
    """What `/api/show` answers: what is known about the model, whatever steers it.

    Raises:
        Refused: a model that is not served, or a field that is wrong.
    """
    fields.check_names(("model", "name"), {"system": ("",), "template": ("",), "options": ({},)}, ("verbose",))
    name = fields.text("model") or fields.text("name")
    if name is None:
        raise fields.wrong("model", f"a name such as '{served.steering.served}'")
    served.steering.asked({"model": name})
    shape = served.steering.resolver.shape
    kind = shape.architecture or "moe"
    sizes = {
        "context_length": served.live.tokens,
        "expert_count": shape.num_experts,
        "expert_used_count": shape.top_k,
        "expert_layer_count": len(shape.routers),
    }
    return {
        "modified_at": UNKNOWN_TIME,
        "details": _details(served, kind),
        "model_info": {"general.architecture": kind, **{f"{kind}.{size}": number for size, number in sizes.items()}},
        "capabilities": ["completion"],
    }


def _details(served: Served, family: str) -> dict[str, Any]:
    kind = served.live.dtype
    return {"format": kind, "family": family, "families": [family], "quantization_level": kind}


def version() -> dict[str, Any]:
    """What `/api/version` answers."""
    return {"version": VERSION}


def _wanted(served: Served, fields: Fields, asked: "Asked", prompt: str | Chat, *, is_chat: bool) -> Wanted:
    options = fields.object("options")
    options.check_names(OPTIONS, REFUSED_OPTIONS, IGNORED_OPTIONS)
    room = room_for(served, prompt) if isinstance(prompt, Chat) else served.room_after(prompt)
    new = options.get("num_predict")
    new = room if new is None or new in UNLIMITED else options.whole("num_predict", 1, served.live.tokens - 1, room)
    sampling = sampling_of(options, new, temperature=TEMPERATURE, top_p=TOP_P, top_k=TOP_K, repetition="repeat_penalty")
    streams = fields.flag("stream", True)
    name = fields.text("model") or served.steering.served
    return Wanted(asked, prompt, sampling, options.stop(), streams, Form(is_chat, name))


def _order(service: Service, wanted: Wanted) -> Order:
    tickets = service.start(wanted.asked, [wanted.prompt], [wanted.sampling], Extras(wanted.stop))
    return Order(tickets, wanted.streams, wanted.form)


def _message(one: Fields) -> Message:
    from steermoe.errors import GenerationError

    one.check_names(("role", "content", "thinking"), {"images": ([],), "tool_calls": ([],)}, ("tool_name",))
    role, content = one.text("role"), one.text("content")
    if role is None or content is None:
        raise one.wrong("content" if role is not None else "role", "a text")
    try:
        return Message(role, content, one.text("thinking") or "")
    except GenerationError as error:
        raise Refused(str(error), param=one.name("role")) from error


def _think(fields: Fields) -> bool | None:
    return None if fields.get("think") is None else fields.flag("think", False)
