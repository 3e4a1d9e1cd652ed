"""What a server knows of the model that vLLM runs in its processes: it reads requests, and generates nothing."""

import threading
from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from steermoe.engines.chat import read_chat
from steermoe.engines.request import Request
from steermoe.engines.text import HFEncoder, encode_prompt
from steermoe.engines.vllm.spec import refuse_lists
from steermoe.errors import UnsupportedModel

if TYPE_CHECKING:
    from steermoe.engines.messages import Chat, Message
    from steermoe.steering.plans import SteeringPlan
    from steermoe.steering.resolver import PlanResolver


class VLLMHost:
    """Reads requests, from any thread.

    Args:
        name: what clients call the model.
        inputs: vLLM's `InputProcessor`.
        resolver: turns specs into plans.
        no_lists: why plans that force or ban experts are refused; "" if they are not.
        template: the source of another chat template than the tokenizer's.

    Attributes:
        tokens: most tokens of a text, prompt included.
    """

    def __init__(
        self, name: str, inputs: Any, resolver: "PlanResolver", no_lists: str = "", template: str | None = None
    ) -> None:
        self.name, self.resolver = name, resolver
        self.tokens = int(inputs.model_config.max_model_len)
        self.dtype = str(inputs.model_config.dtype).removeprefix("torch.")
        self._no_lists = no_lists
        self._lock = threading.Lock()
        tokenizer = deepcopy(inputs.tokenizer)  # one of its own: tokenizers are not made for several threads
        if template is not None and tokenizer is not None:
            tokenizer.chat_template = template
        self._known = None if tokenizer is None else HFEncoder(tokenizer)

    @property
    def _encoder(self) -> HFEncoder:
        if self._known is None:
            raise UnsupportedModel(f"{self.name} is served without a tokenizer: leave --skip-tokenizer-init out")
        return self._known

    def chat(self, messages: "Sequence[Message]", thinking: bool | None = None) -> "Chat":
        """As `Engine.chat`."""
        with self._lock:
            return read_chat(self._encoder, messages, self.name, thinking)

    def encode(self, request: Request) -> list[int]:
        """As `Engine.encode`."""
        with self._lock:
            return encode_prompt(self._encoder, request, self.name, self.tokens)

    def check(self, plan: "SteeringPlan | None") -> None:
        """Raise SteerMoEError for a plan that follows tags which the model does not have, or lists where none hold."""
        if plan is not None:
            self.resolver.tags.of(plan)
            refuse_lists(plan, self._no_lists)
