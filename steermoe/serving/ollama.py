"""Ollama's protocol: /api/generate, /api/chat, /api/tags, /api/version; answers are streamed as lines of JSON."""

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
from steermoe.serving.service import Extras, Service
from steermoe.serving.ticket import Ticket

if TYPE_CHECKING:
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
    "min_p": (0, 0.0),
    "typical_p": (1, 1.0),
    "tfs_z": (1, 1.0),
    "repeat_last_n": (),
    "mirostat": (0,),
    "penalize_newline": (),
}
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


@dataclass(eq=False)
class Order:
    """A request for one text, on its way.

    Attributes:
        tickets: its only text.
        streams: whether it is sent as it comes.
        is_chat: whether it is an answer of `/api/chat`.
        name: the model as the client named it.
    """

    tickets: list[Ticket]
    streams: bool
    is_chat: bool
    name: str
    started: int = field(default_factory=time.perf_counter_ns)

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
        return {**self._text(text, thinking or ""), **self._end(first)}

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as lines of JSON."""
        chat = self.ticket.request.chat
        splitter = None if chat is None else Splitter(chat)
        first = 0
        try:
            async for piece in self.ticket:
                first = first or time.perf_counter_ns()
                for part in [Part(piece.text)] if splitter is None else splitter.add(piece.text):
                    yield self._part(part)
            for part in splitter.rest() if splitter is not None else ():
                yield self._part(part)
            yield dumps({**self._text("", ""), **self._end(first or time.perf_counter_ns())}) + b"\n"
        except SteerMoEError as error:
            yield dumps({"error": error_of(error)[1]["error"]["message"]}) + b"\n"

    def _part(self, part: Part) -> bytes:
        text, thinking = ("", part.text) if part.is_thinking else (part.text, "")
        return dumps({**self._text(text, thinking), "done": False}) + b"\n"

    def _text(self, text: str, thinking: str) -> dict[str, Any]:
        head = {"model": self.name, "created_at": datetime.now(UTC).isoformat().replace("+00:00", "Z")}
        more = {"thinking": thinking} if thinking else {}
        if self.is_chat:
            return {**head, "message": {"role": "assistant", "content": text, **more}}
        return {**head, "response": text, **more}

    def _end(self, first: int) -> dict[str, Any]:
        completion, now = self.ticket.result(0), time.perf_counter_ns()
        return {
            "done": True,
            "done_reason": "length" if self.ticket.finish_reason == "length" else "stop",
            "total_duration": now - self.started,
            "load_duration": 0,
            "prompt_eval_count": completion.prompt_tokens,
            "prompt_eval_duration": max(1, first - self.started),
            "eval_count": completion.new_tokens,
            "eval_duration": max(1, now - first),
        }


def generate(service: Service, fields: Fields) -> Order:
    """Begin the text of a request to `/api/generate`: an answer to the prompt, or with `raw` its continuation.

    A model without a chat template always continues.

    Raises:
        Refused: a field that is wrong. SteerMoEError: as `Service.start`.
    """
    fields.check_names((*SHARED, "prompt", "system", "raw"), REFUSED, IGNORED)
    asked = service.steering.asked(fields.values)
    prompt, system = fields.text("prompt"), fields.text("system") or None
    if not prompt:
        raise fields.wrong("prompt", "a text")
    if fields.flag("raw", False) or not service.can_chat:
        if system is not None:
            raise Refused("field 'system' needs a chat template, and none is used here: leave it out", param="system")
        return _order(service, fields, asked, prompt, is_chat=False)
    made = read_chat(service, conversation(prompt, system), _think(fields))
    return _order(service, fields, asked, made, is_chat=False)


def chat(service: Service, fields: Fields) -> Order:
    """Begin the answer of a request to `/api/chat`.

    Raises:
        Refused: a field that is wrong. SteerMoEError: as `Service.start`.
    """
    fields.check_names((*SHARED, "messages"), REFUSED, IGNORED)
    asked = service.steering.asked(fields.values)
    messages = [_message(one) for one in fields.objects("messages")]
    return _order(service, fields, asked, read_chat(service, messages, _think(fields)), is_chat=True)


def tags(service: Service) -> dict[str, Any]:
    """What `/api/tags` answers: the model, and the model with each domain that has a vector."""
    live = service.live
    details = {
        "format": live.engine.dtype,
        "family": "moe",
        "families": ["moe"],
        "quantization_level": live.engine.dtype,
    }
    now = datetime.fromtimestamp(0, UTC).isoformat().replace("+00:00", "Z")
    return {
        "models": [
            {"name": name, "model": name, "modified_at": now, "size": 0, "digest": "", "details": details}
            for name in service.steering.names()
        ]
    }


def version() -> dict[str, Any]:
    """What `/api/version` answers."""
    return {"version": VERSION}


def _order(service: Service, fields: Fields, asked: "Asked", prompt: str | Chat, *, is_chat: bool) -> Order:
    options = fields.object("options")
    options.check_names(OPTIONS, REFUSED_OPTIONS, IGNORED_OPTIONS)
    room = room_for(service, prompt) if isinstance(prompt, Chat) else service.room_after(prompt)
    new = options.get("num_predict")
    new = room if new is None or new in UNLIMITED else options.whole("num_predict", 1, service.live.tokens - 1, room)
    sampling = sampling_of(options, new, temperature=TEMPERATURE, top_p=TOP_P, top_k=TOP_K, repetition="repeat_penalty")
    streams = fields.flag("stream", True)
    name = fields.text("model") or service.steering.served
    tickets = service.start(asked, [prompt], [sampling], Extras(options.stop()))
    return Order(tickets, streams, is_chat, name)


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
