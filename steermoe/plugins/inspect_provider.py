"""Inspect's models on a running server: each request carries the steering that the model's arguments ask for.

`steermoe serve` answers by OpenAI's protocol, which Inspect speaks already; this adds the field `steering`, an address,
a check that the server is there before the first sample, and plain continuations for models of stories.
"""

import os
from typing import Any

from inspect_ai._util.error import PrerequisiteError
from inspect_ai.model import ChatMessage, GenerateConfig, ModelCall, ModelOutput
from inspect_ai.model._providers.openai_compatible import OpenAICompatibleAPI
from inspect_ai.model._providers.openai_compatible_completions import (
    generate_raw_completions,
    resolve_completions_prompt,
)
from inspect_ai.tool import ToolChoice, ToolInfo
from openai import APIConnectionError, APIStatusError, OpenAI, OpenAIError
from rich.markup import escape

from steermoe.engines.request import Sampling
from steermoe.errors import SteeringError, quoted, reason
from steermoe.steering.asked import KEY, spec_of_name
from steermoe.steering.spec import NAMES, read_spec

ADDRESS = "http://127.0.0.1:8000/v1"
"""Where `steermoe serve` listens by default."""
PATIENCE = 20.0
"""Seconds within which a server must list its models."""


class ServedModel(OpenAICompatibleAPI):
    """A model of a running server.

    Args:
        model_name: as the server lists it: "smollm2-moe", or "smollm2-moe:sport", which names the steering.
        base_url: of the server, up to `/v1`; by default $STEERMOE_BASE_URL, or this machine.
        api_key: by default $STEERMOE_API_KEY; a server without keys lets everyone in.
        config: Inspect's.
        chat: answer messages by the model's chat template; false continues a single message.
        steering: the fields of a plan (docs/steering.md), such as domain="sport" and strength=2.

    Raises:
        PrerequisiteError: an argument that is none, steering that can't be read, or no server that has the model.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),
        chat: bool = True,
        **steering: Any,
    ) -> None:
        self.steering = _checked(model_name, steering)
        self.is_chat = chat
        key = api_key or os.environ.get("STEERMOE_API_KEY") or "none"
        super().__init__(model_name, base_url, key, config, service="steermoe", service_base_url=ADDRESS)
        _require_served(model_name, str(self.base_url), key)

    def service_model_name(self) -> str:
        """The name that the server knows."""
        return self.model_name

    def connection_key(self) -> str:
        """What limits connections together: the server."""
        return str(self.base_url)

    def completion_params(self, config: GenerateConfig, tools: bool) -> dict[str, Any]:
        """The fields of a request, with the steering."""
        return super().completion_params(self._with_steering(config), tools)

    def _with_steering(self, config: GenerateConfig) -> GenerateConfig:
        body = config.extra_body or {}
        if not self.steering:
            return config
        if KEY in body:
            raise _refused("both -M and extra_body ask for steering: leave one of them out")
        return config.model_copy(update={"extra_body": {**body, KEY: self.steering}})

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput | tuple[ModelOutput | Exception, ModelCall]:
        """An answer, or without `chat` a continuation."""
        if self.is_chat:
            return await super().generate(input, tools, tool_choice, config)
        if tools:
            raise _refused("a continuation uses no tools: leave out -M chat=false")
        prompt = resolve_completions_prompt(input, "steermoe with chat=false")
        if config.max_tokens is None:
            config = config.model_copy(update={"max_tokens": Sampling().max_new_tokens})
        return await generate_raw_completions(self, prompt, self._with_steering(config))


def _refused(message: str) -> PrerequisiteError:
    """The error that Inspect prints alone, without a traceback; it reads rich's markup in it."""
    return PrerequisiteError(escape(message))


def _checked(model_name: str, steering: dict[str, Any]) -> dict[str, Any]:
    """The fields of a plan, if they can be read; None leaves one out."""
    given = {name: value for name, value in steering.items() if value is not None}
    if unknown := [name for name in given if name not in NAMES]:
        raise _refused(f"-M {quoted(unknown[0])} is no argument of steermoe: they are chat, {', '.join(NAMES)}")
    try:
        if given:
            read_spec(given)
    except SteeringError as error:
        raise _refused(f"-M: {error}") from error
    if given and ":" in model_name:
        raise _refused(f"both the model's name '{quoted(model_name)}' and -M ask for steering: leave one of them out")
    return given


def _require_served(model_name: str, address: str, key: str) -> None:
    """Raise PrerequisiteError if no server answers at an address, or it has no such model."""
    try:
        with OpenAI(base_url=address, api_key=key, max_retries=0, timeout=PATIENCE) as client:
            served = [model.id for model in client.models.list()]
        spec_of_name(model_name, served)
    except APIConnectionError as error:
        raise _refused(
            f"no server answers at {address}: start one with `steermoe serve`, or name another with --model-base-url"
        ) from error
    except APIStatusError as error:
        hint = "; name a key in STEERMOE_API_KEY" if error.status_code == 401 else ""
        raise _refused(f"the server at {address} refuses to list its models: {reason(error)}{hint}") from error
    except (OpenAIError, SteeringError) as error:
        raise _refused(f"the server at {address}: {reason(error)}") from error
    if model_name.partition(":")[0] not in {name.partition(":")[0] for name in served}:
        raise _refused(f"the server at {address} has no model '{quoted(model_name)}': it has {', '.join(served[:20])}")
