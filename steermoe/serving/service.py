"""What the protocols share: the engine, the steering, the figures, and how requests become tickets."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steermoe.engines.messages import conversation
from steermoe.engines.request import Request, Sampling
from steermoe.errors import GenerationError, SteeringError
from steermoe.serving.fields import Refused
from steermoe.serving.host import Host
from steermoe.serving.live import LiveEngine
from steermoe.serving.steering import Asked, Steering
from steermoe.serving.ticket import Ticket

if TYPE_CHECKING:
    from steermoe.engines.messages import Chat
    from steermoe.serving.metrics import Metrics

MOST_CHOICES = 128
"""How many texts one request may ask for."""


@dataclass(frozen=True)
class Extras:
    """What else a request asks for.

    Attributes:
        stop: texts that end each of its texts.
        logprobs: as `Request.logprobs`.
        trace: as `Request.trace`.
    """

    stop: Sequence[str] = ()
    logprobs: int | None = None
    trace: bool = False


@dataclass(frozen=True, eq=False)
class Served:
    """What is needed to read requests to a model, whatever generates their texts."""

    live: Host
    steering: Steering

    @functools.cached_property
    def can_chat(self) -> bool:
        """Whether the model has a chat template."""
        try:
            self.live.chat(conversation("x"))
        except GenerationError:
            return False
        return True

    def room_after(self, prompt: str) -> int:
        """How many tokens a continuation may have at most.

        Raises:
            Refused: the prompt can't be continued.
        """
        try:
            one = Request(prompt, sampling=Sampling(max_new_tokens=1), special_tokens=False)
            return self.live.tokens - len(self.live.encode(one))
        except GenerationError as error:
            raise Refused(str(error), param="prompt") from error


@dataclass(frozen=True, eq=False)
class Service(Served):
    """A model that is served by a live engine."""

    live: LiveEngine
    metrics: "Metrics"

    def start(
        self,
        asked: Asked,
        prompts: Sequence["str | Chat"],
        samplings: Sequence[Sampling],
        extras: Extras | None = None,
    ) -> list[Ticket]:
        """Queue texts, or none of them.

        Args:
            asked: the steering of all.
            prompts: what to continue or to answer, one for each text.
            samplings: one for each text.
            extras: of all texts.

        Raises:
            Refused: a prompt that can't be continued. SteerMoEError: as `LiveEngine.submit`.
        """
        extras = extras or Extras()
        requests, tokens = [], []
        known: dict[int, list[int]] = {}
        for prompt, sampling in zip(prompts, samplings, strict=True):
            text, chat = (prompt, None) if isinstance(prompt, str) else (prompt.prompt, prompt)
            request = Request(text, asked.plan, sampling, False, chat, logprobs=extras.logprobs, trace=extras.trace)
            try:
                if not asked.follows_default:
                    request.require_steered()
                if id(prompt) not in known:
                    known[id(prompt)] = self.live.encode(request)
            except SteeringError as error:
                raise Refused(f"steering: {error}", param="steering") from error
            except GenerationError as error:
                raise Refused(str(error), param="prompt" if chat is None else "messages") from error
            requests.append(request)
            tokens.append(known[id(prompt)])
        tickets = self.live.submit(requests, tokens, extras.stop)
        self.steering.follow(tickets, asked)
        self.metrics.started(tickets)
        return tickets

    def token_text(self, token: int) -> str:
        """The text of a token, special or not."""
        return self._texts(token)

    @functools.cached_property
    def _texts(self) -> Any:
        engine: Any = self.live.engine
        tokenizer = engine.tokenizer if hasattr(engine, "tokenizer") else engine.loaded.tokenizer

        @functools.lru_cache(1 << 16)
        def text(token: int) -> str:
            return str(tokenizer.decode([token], skip_special_tokens=False))

        return text
