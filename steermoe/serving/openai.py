"""OpenAI's protocol: /v1/models, /v1/completions, /v1/chat/completions, /v1/embeddings."""

import base64
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from steermoe.engines.messages import Chat, Message, Part, Splitter, split_answer
from steermoe.engines.request import TokenScore
from steermoe.errors import GenerationError, SteerMoEError
from steermoe.serving.fields import Fields, Refused, dumps, for_clients
from steermoe.serving.sampling import samples, sampling_of
from steermoe.serving.service import MOST_CHOICES, Extras, Served, Service
from steermoe.serving.streams import merged
from steermoe.serving.ticket import Piece, Ticket
from steermoe.steering.asked import KEY

if TYPE_CHECKING:
    from concurrent.futures import Future

    from steermoe.discovery.embedder import Embedded
    from steermoe.serving.steering import Asked

DEFAULT_NEW_TOKENS = 16
"""Of a completion that names no limit, as OpenAI has it; an answer may become as long as the context allows."""
MOST_LOGPROBS = 20
MOST_INPUTS = 256
"""How many texts one request for embeddings may hold."""

IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
)
"""Fields that change no text."""
REFUSED: dict[str, Sequence[Any]] = {
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "echo": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "use_beam_search": (False,),
}
"""Fields that can't be carried out, each with the values that ask for nothing."""
SHARED = (
    "model",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "n",
    "stop",
    "stream",
    "stream_options",
    "logprobs",
    "steering",
    "vllm_xargs",
    "trace",
    "return_routed_experts",
)
COMPLETION = (*SHARED, "prompt")
CHAT = (*SHARED, "messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs")
CONTENT_KINDS = ("text", "input_text")


@dataclass(eq=False)
class Order:
    """A request for texts, on its way.

    Attributes:
        tickets: its texts, `n` of each prompt.
        kind: "text_completion" or "chat.completion".
        has_scores: whether the answer holds log-probabilities.
        streams: whether it is sent as it comes, and with `usage` at the end if `counts`.
        has_trace, has_experts: whether each text comes with its trace, and with the experts alone.
    """

    service: Service
    tickets: list[Ticket]
    n: int
    kind: str
    has_scores: bool
    streams: bool
    counts: bool
    has_trace: bool = False
    has_experts: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def is_chat(self) -> bool:
        return self.kind == "chat.completion"

    # ---- a whole answer ----

    async def answer(self) -> dict[str, Any]:
        """The answer, once all texts are finished.

        Raises:
            SteerMoEError: one of them could not be generated.
        """
        for ticket in self.tickets:
            await ticket.wait()
        choices = [self._choice(number, ticket) for number, ticket in enumerate(self.tickets)]
        return {**self._head(self.kind), "choices": choices, "usage": self._usage()}

    def _choice(self, number: int, ticket: Ticket) -> dict[str, Any]:
        scores = None
        if self.has_scores:
            completion = ticket.result(0)
            scores = self._scores(completion.token_ids, completion.scores or (), [0])
        end = {"logprobs": scores, "finish_reason": ticket.finish_reason, **self._traced(ticket)}
        if not self.is_chat:
            return {"index": number, "text": ticket.text, **end}
        chat = ticket.request.chat
        assert chat is not None
        answer, thinking = split_answer(chat, ticket.text)
        message = {"role": "assistant", "content": answer, **({"reasoning_content": thinking} if thinking else {})}
        return {"index": number, "message": message, **end}

    def _traced(self, ticket: Ticket) -> dict[str, Any]:
        """What is known of where a finished text was sent, as far as it was asked for."""
        trace = ticket.result(0).trace
        if trace is None:
            return {}
        experts = {"routed_experts": base64.b64encode(trace.chosen.astype("<i4").tobytes()).decode()}
        return {**({"trace": trace.to_dict()} if self.has_trace else {}), **(experts if self.has_experts else {})}

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        name = self.service.steering.served
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": name}

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(ticket.prompt) for ticket in self.tickets[:: self.n])
        new = sum(ticket.result(0).new_tokens for ticket in self.tickets)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    # ---- an answer as it comes ----

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events; an error that comes too late for a status is the last but one."""
        splitters = [Splitter(one.request.chat) if one.request.chat else None for one in self.tickets]
        offsets = [[0] for _ in self.tickets]
        try:
            if self.is_chat:
                for number in range(len(self.tickets)):
                    yield self._event(number, {"role": "assistant", "content": ""})
            async for number, piece in merged(self.tickets):
                splitter = splitters[number]
                if piece is None:
                    for part in splitter.rest() if splitter is not None else ():
                        yield self._event(number, _delta(part))
                    ticket = self.tickets[number]
                    yield self._event(number, {}, None, ticket.finish_reason, **self._traced(ticket))
                    continue
                scores = self._scores(piece.tokens, piece.scores, offsets[number]) if self.has_scores else None
                for delta in self._deltas(splitter, piece, always=scores is not None):
                    yield self._event(number, delta, scores)
                    scores = None
            if self.counts:
                yield _line({**self._head(self._chunk), "choices": [], "usage": self._usage()})
        except SteerMoEError as error:
            yield _line(error_of(error)[1])
        yield b"data: [DONE]\n\n"

    def _deltas(self, splitter: Splitter | None, piece: Piece, *, always: bool) -> list[dict[str, str]]:
        if splitter is None:
            return [{"content": piece.text}] if piece.text or always else []
        found = [_delta(part) for part in splitter.add(piece.text)]
        return found or ([{"content": ""}] if always else [])

    @property
    def _chunk(self) -> str:
        return "chat.completion.chunk" if self.is_chat else self.kind

    def _event(
        self,
        number: int,
        delta: dict[str, str],
        scores: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        **more: Any,
    ) -> bytes:
        content = {"delta": delta} if self.is_chat else {"text": delta.get("content", "")}
        choice = {"index": number, **content, "logprobs": scores, "finish_reason": finish_reason, **more}
        usage = {"usage": None} if self.counts else {}
        return _line({**self._head(self._chunk), "choices": [choice], **usage})

    # ---- log-probabilities ----

    def _scores(self, tokens: Sequence[int], scores: Sequence[TokenScore], offset: list[int]) -> dict[str, Any]:
        """Log-probabilities in the form of the protocol; `offset` holds the characters before, and is moved on."""
        text = self.service.token_text
        if self.is_chat:
            return {
                "content": [
                    {**_token(text(token), one.logprob), "top_logprobs": [_token(text(t), p) for t, p in one.top]}
                    for token, one in zip(tokens, scores, strict=True)
                ]
            }
        names = [text(token) for token in tokens]
        places = []
        for name in names:
            places.append(offset[0])
            offset[0] += len(name)
        return {
            "tokens": names,
            "token_logprobs": [one.logprob for one in scores],
            "top_logprobs": [{text(token): logprob for token, logprob in reversed(one.top)} for one in scores],
            "text_offset": places,
        }


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode(errors="surrogatepass"))}


def _delta(part: Part) -> dict[str, str]:
    return {"reasoning_content" if part.is_thinking else "content": part.text}


def _line(content: dict[str, Any]) -> bytes:
    return b"data: " + dumps(content) + b"\n\n"


def error_of(error: SteerMoEError) -> tuple[int, dict[str, Any]]:
    """The status and the body of an error, in OpenAI's form."""
    from steermoe.serving.live import Closed, QueueFull

    param = code = None
    if isinstance(error, Refused):
        status, param, code = error.status, error.param, error.code
    elif isinstance(error, QueueFull):
        status = 429
    else:
        status = 503 if isinstance(error, Closed) else 500
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return status, {"error": {"message": for_clients(str(error)), "type": kind, "param": param, "code": code}}


# ---- requests ----


def models(service: Service) -> dict[str, Any]:
    """What `/v1/models` answers: the model, and the model with each domain that has a vector."""
    served = service.steering.served
    cards = [
        {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "steermoe",
            "max_model_len": service.live.tokens,
            **({"parent": served} if name != served else {}),
        }
        for name in service.steering.names()
    ]
    return {"object": "list", "data": cards}


def complete(service: Service, fields: Fields) -> Order:
    """Begin the texts of a request to `/v1/completions`.

    Raises:
        Refused: a field that is wrong. SteerMoEError: as `Service.start`.
    """
    fields.check_names(COMPLETION, REFUSED, IGNORED)
    fields.object("vllm_xargs").check_names((KEY,), {})
    asked = service.steering.asked(fields.values)
    prompts = fields.texts("prompt", MOST_CHOICES)
    n = _number_of_texts(fields, len(prompts))
    logprobs = fields.whole("logprobs", 0, MOST_LOGPROBS, 0) if fields.get("logprobs") is not None else None
    new = fields.whole("max_tokens", 1, service.live.tokens - 1, min(DEFAULT_NEW_TOKENS, service.live.tokens - 1))
    samplings = samples(sampling_of(fields, new), n)
    return _order(service, fields, asked, [(prompt, samplings) for prompt in prompts], logprobs, "text_completion")


def chat(service: Service, fields: Fields) -> Order:
    """Begin the answers of a request to `/v1/chat/completions`.

    Raises:
        Refused: a field that is wrong. SteerMoEError: as `Service.start`.
    """
    fields.check_names(CHAT, REFUSED, IGNORED)
    fields.object("vllm_xargs").check_names((KEY,), {})
    asked = service.steering.asked(fields.values)
    messages = [_message(one) for one in fields.objects("messages")]
    made = read_chat(service, messages, _thinking(fields))
    n = _number_of_texts(fields, 1)
    logprobs = None
    if fields.flag("logprobs", False):
        logprobs = fields.whole("top_logprobs", 0, MOST_LOGPROBS, 0)
    elif fields.get("top_logprobs"):
        raise fields.wrong("top_logprobs", "it together with logprobs true")
    name = "max_completion_tokens" if fields.get("max_completion_tokens") is not None else "max_tokens"
    room = room_for(service, made)
    new = fields.whole(name, 1, service.live.tokens - 1, room)
    samplings = samples(sampling_of(fields, new), n)
    return _order(service, fields, asked, [(made, samplings)], logprobs, "chat.completion")


def room_for(service: Served, made: Chat) -> int:
    """How many tokens an answer may have at most.

    Raises:
        Refused: the messages leave no room for one.
    """
    room = service.live.tokens - len(made.tokens)
    if room < 1:
        raise Refused(
            f"the messages have {len(made.tokens)} tokens, but a text has at most {service.live.tokens} here, answer "
            "included: shorten them",
            param="messages",
            code="context_length_exceeded",
        )
    return room


def read_chat(service: Served, messages: Sequence[Message], thinking: bool | None = None) -> Chat:
    """As `LiveEngine.chat`, with errors that name the field."""
    try:
        return service.live.chat(messages, thinking)
    except GenerationError as error:
        raise Refused(str(error), param="messages") from error


def _order(
    service: Service,
    fields: Fields,
    asked: "Asked",
    parts: Sequence[tuple[str | Chat, Sequence[Any]]],
    logprobs: int | None,
    kind: str,
) -> Order:
    """Queue each prompt with its samplings."""
    streams = fields.flag("stream", False)
    options = fields.object("stream_options")
    options.check_names(("include_usage",), {"continuous_usage_stats": (False,)}, ("include_obfuscation",))
    counts = options.flag("include_usage", False)
    if options.values and not streams:
        raise fields.wrong("stream_options", "it only together with stream true")
    prompts = [prompt for prompt, samplings in parts for _ in samplings]
    all_samplings = [sampling for _, samplings in parts for sampling in samplings]
    has_trace, has_experts = fields.flag("trace", False), fields.flag("return_routed_experts", False)
    extras = Extras(fields.stop(), logprobs, has_trace or has_experts)
    tickets = service.start(asked, prompts, all_samplings, extras)
    n = len(tickets) // len(parts)
    return Order(service, tickets, n, kind, logprobs is not None, streams, counts, has_trace, has_experts)


def _number_of_texts(fields: Fields, prompts: int) -> int:
    return fields.whole("n", 1, max(1, MOST_CHOICES // prompts), 1)


def _message(one: Fields) -> Message:
    one.check_names(("role", "content", "reasoning_content"), {"tool_calls": ([],), "function_call": ()}, ("name",))
    role, content = one.text("role"), one.get("content")
    if isinstance(content, list):
        content = "".join(_content(part) for part in one.objects("content"))
    if role is None:
        raise one.wrong("role", "a role such as 'user'")
    if not isinstance(content, str):
        raise one.wrong("content", "a text, or a list of parts of type text")
    try:
        return Message(role, content, one.text("reasoning_content") or "")
    except GenerationError as error:
        raise Refused(str(error), param=one.name("role")) from error


def _content(part: Fields) -> str:
    if part.get("type") not in CONTENT_KINDS:
        raise part.wrong("type", "text: the model reads nothing else")
    text = part.text("text")
    if text is None:
        raise part.wrong("text", "a text")
    return text


def _thinking(fields: Fields) -> bool | None:
    options = fields.object("chat_template_kwargs")
    options.check_names(("enable_thinking", "thinking"), {})
    name = "thinking" if "thinking" in options.values else "enable_thinking"
    return options.flag(name, False) if options.values else None


# ---- embeddings ----


@dataclass(frozen=True, eq=False)
class Embedding:
    """A request for embeddings, on its way.

    Attributes:
        name: of the model.
        form: "float" or "base64".
        computing: what is computed: an `Embedded`.
    """

    name: str
    form: str
    computing: "Future[Any]"

    def answer(self, embedded: "Embedded") -> dict[str, Any]:
        """The answer.

        Raises:
            Refused: a text has no tokens.
        """
        if 0 in embedded.tokens:
            raise Refused(f"text {embedded.tokens.tolist().index(0)} has no tokens: leave it out", param="input")
        data = [
            {"object": "embedding", "index": number, "embedding": _vector(row.flatten(), self.form)}
            for number, row in enumerate(embedded.frequency)
        ]
        tokens = int(embedded.tokens.sum())
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": self.name, "usage": usage}


def embed(service: Service, fields: Fields) -> Embedding:
    """Have the routing embeddings [L * N] of texts computed, once no text is being generated.

    Raises:
        Refused: a field that is wrong. SteerMoEError: as `LiveEngine.call`.
    """
    fields.check_names(("model", "input", "encoding_format"), {"dimensions": ()}, IGNORED)
    asked = service.steering.asked({"model": fields.get("model")} if fields.get("model") is not None else {})
    if not asked.follows_default:
        raise Refused("embeddings are of the unsteered model: name the model alone", param="model")
    texts = fields.texts("input", MOST_INPUTS)
    form = fields.text("encoding_format", "float") or ""
    if form not in ("float", "base64"):
        raise fields.wrong("encoding_format", "float or base64")

    def compute() -> "Embedded":
        from steermoe.discovery.embed_corpus import embedder
        from steermoe.discovery.embedder import EmbeddingOptions

        engine: Any = service.live.engine
        source = getattr(engine, "loaded", engine)
        with embedder(source, EmbeddingOptions(max_tokens=service.live.tokens)) as embed:
            return embed.texts(texts)

    return Embedding(service.steering.served, form, service.live.call(compute))


def _vector(values: Any, form: str) -> Any:
    return values.tolist() if form == "float" else base64.b64encode(values.float().numpy().tobytes()).decode()
