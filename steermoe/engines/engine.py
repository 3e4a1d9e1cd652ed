"""What engines have in common: a request, its sampling, the completion, and the protocol. Knows no
library that runs models.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from steermoe.engines.request import Completion, Request

if TYPE_CHECKING:
    from steermoe.engines.memory import Room
    from steermoe.routing.shape import RoutingShape
    from steermoe.steering.report import SteeringReport


class Decoder(Protocol):
    """Takes requests whenever it has room, and gives completions as they are finished."""

    def __len__(self) -> int:
        """Requests that are begun and not finished."""

    def start(
        self,
        requests: Sequence[Request],
        prompts: Sequence[list[int]],
        on_text: Callable[[str], None] | None = None,
    ) -> None:
        """Begin requests, each with the tokens of its prompt.

        Args:
            requests: texts to continue.
            prompts: tokens of each one's prompt.
            on_text: called with each piece of their text as it comes.

        Raises:
            GenerationError, SteeringError: as `Engine.generate`.
        """

    def step(self) -> list[Completion]:
        """Go on by a token or more; the completions that are finished with it, perhaps none."""

    def clear(self) -> None:
        """Forget what is begun, as after an error; the next `start` begins anew."""

    def report(self) -> "SteeringReport | None":
        """What was steered so far; None if nothing was to be."""

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
        """What the model's numbers are kept as: equal requests may give other texts in another."""

    @property
    def most_rows(self) -> int:
        """Requests that are worth running together."""

    def encode(self, request: Request, known: list[int] | None = None) -> list[int]:
        """The prompt's tokens; text that looks like a special token stays text.

        Args:
            request: what to check and encode.
            known: the tokens, if another request had the same prompt.

        Raises:
            GenerationError: an empty prompt, or one that leaves no room in the model's context.
        """

    def generate(
        self, requests: Sequence[Request], *, on_text: Callable[[str], None] | None = None, record: bool = False
    ) -> list[Completion]:
        """Complete all requests, in their order.

        Args:
            requests: texts to continue.
            on_text: called with each piece of text as it comes; for a single request only.
            record: also fill `Completion.frequency`.

        Raises:
            GenerationError: a request can't be carried out. SteeringError: steering was asked for and did not happen.
        """

    def decoder(self, rows: int) -> Decoder:
        """What runs many requests, so many at once at most. One at a time, and not beside `generate`."""

    def room(self) -> "Room | None":
        """How many of them fit into the memory that is free now; None if the engine sees to that itself."""

    def fingerprint(self) -> str:
        """A hash that tells the model from others of its name."""
