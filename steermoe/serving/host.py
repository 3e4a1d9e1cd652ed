"""What the protocols ask of what generates, without generating anything."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from steermoe.engines.messages import Chat, Message
    from steermoe.engines.request import Request
    from steermoe.steering.plans import SteeringPlan


class Host(Protocol):
    """Reads requests to a model, from any thread: `live.LiveEngine`, or `engines.vllm.host.VLLMHost`.

    Attributes:
        tokens: most tokens of a text, prompt included.
    """

    tokens: int

    @property
    def name(self) -> str:
        """The model's name."""

    @property
    def dtype(self) -> str:
        """The type of its weights."""

    def chat(self, messages: "Sequence[Message]", thinking: bool | None = None) -> "Chat":
        """As `Engine.chat`."""

    def encode(self, request: "Request") -> list[int]:
        """As `Engine.encode`; a text that may become longer than `tokens` is a GenerationError too."""

    def check(self, plan: "SteeringPlan | None") -> None:
        """Raise SteerMoEError for a plan that fits the shape of the model and still can't be carried out."""
