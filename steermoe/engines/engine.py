"""The protocols of engines and decoders. Knows no library that runs models."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from steermoe.engines.request import Completion, Request

if TYPE_CHECKING:
    from steermoe.engines.memory import Room
    from steermoe.engines.messages import Chat, Message
    from steermoe.routing.shape import RoutingShape
    from steermoe.steering.plans import SteeringPlan
    from steermoe.steering.report import SteeringReport
    from steermoe.steering.tags import ModelTags

OnToken = Callable[[Any, str], None]
"""Called with a `decoding.Row` after each of its tokens, and with the text that the token completes."""


class Decoder(Protocol):
    """Takes requests whenever it has room, and returns completions as they finish."""

    def __len__(self) -> int:
        """Requests that have started and not finished."""

    def start(
        self,
        requests: Sequence[Request],
        prompts: Sequence[list[int]],
        on_text: Callable[[str], None] | None = None,
        on_token: OnToken | None = None,
    ) -> None:
        """Start requests, each with the tokens of its prompt.

        Args:
            requests: texts to continue.
            prompts: the tokens of each request's prompt.
            on_text: called with each piece of their text as it comes.
            on_token: called after each token with the row and the text that the token completes, perhaps none; what is
                held back at the end comes without a token. It may raise `decoding.Stop`, and call `drop` and `steer`.

        Raises:
            GenerationError, SteeringError: as `Engine.generate`.
        """

    def step(self) -> list[Completion]:
        """Advance by one or more tokens; returns the completions that this finishes, perhaps none."""

    def drop(self, request: Request) -> None:
        """End a text where it is, with the finish reason "interrupted"; a later `step` returns its completion.

        Does nothing if it has ended.
        """

    def steer(self, request: Request, plan: "SteeringPlan | None") -> None:
        """Change the plan of a text, from the token that is read next on. Does nothing if it has ended.

        Args:
            request: the one that was started; it is left as it was, as is what it has read.
            plan: None to steer it no more.

        Raises:
            SteeringError: the plan follows tags that the model does not have, or the engine can't change it now. The
                text goes on as before.
        """

    def clear(self) -> None:
        """Drop what has started, for example after an error; the next `start` begins afresh."""

    def report(self) -> "SteeringReport | None":
        """What was steered so far; None if nothing was to be steered."""

    def close(self) -> None:
        """Take the steering off the model."""


class Engine(Protocol):
    """Runs requests on a model."""

    @property
    def name(self) -> str:
        """The model's name."""

    @property
    def shape(self) -> "RoutingShape":
        """What vectors and plans must fit."""

    @property
    def dtype(self) -> str:
        """How the model's numbers are stored. Equal requests may give different texts in another dtype."""

    @property
    def tags(self) -> "ModelTags":
        """The model's tags around thinking, answers and tool calls, which some positions of plans follow."""

    @property
    def most_rows(self) -> int:
        """How many requests are worth running together."""

    @property
    def context_length(self) -> int | None:
        """The most tokens that a prompt and its text can have together; None if unknown."""

    def chat(self, messages: "Sequence[Message]", thinking: bool | None = None) -> "Chat":
        """What the model reads to answer messages, by its own chat template: `Request.chat`.

        Args:
            messages: the last one is answered.
            thinking: let the model think first, or not; None as its template does by default.

        Raises:
            GenerationError: the model has no chat template, or one that refuses the messages or has no such switch.
        """

    def encode(self, request: Request, known: list[int] | None = None) -> list[int]:
        """The prompt's tokens; text that looks like a special token stays text.

        Args:
            request: what to check and encode.
            known: the tokens, if another request had the same prompt.

        Raises:
            GenerationError: an empty prompt, or one that leaves no room in the model's context.
            SteeringError: its plan follows tags that the model does not have.
        """

    def generate(
        self, requests: Sequence[Request], *, on_text: Callable[[str], None] | None = None, record: bool = False
    ) -> list[Completion]:
        """Complete all requests, in their order.

        Args:
            requests: texts to continue.
            on_text: called with each piece of text as it comes; for a single request only. It may raise
                `decoding.Stop`. Of a chat it gets the thinking too, with its tags; `messages.Splitter` separates them.
            record: also fill `Completion.frequency`.

        Raises:
            GenerationError: a request can't be run. SteeringError: steering was asked for and did not happen.
        """

    def decoder(self, rows: int, tokens: int | None = None) -> Decoder:
        """Runs many requests, at most `rows` at once. Use one decoder at a time, and not during `generate`.

        Args:
            rows: requests at once.
            tokens: for a decoder whose requests come one by one, as those of a server do: the most tokens of a text,
                prompt included, so that there is room for it whenever it comes. Another thread may then call `encode`
                and `chat` while the decoder runs.
        """

    def room(self) -> "Room | None":
        """How many rows fit into the memory that is free now; None if the engine manages its memory itself."""

    def fingerprint(self) -> str:
        """A hash that distinguishes the model from others with the same name."""
