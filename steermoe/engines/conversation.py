"""A conversation with a model: its turns, how answers are generated, and what fits into the context.

Knows no terminal: `cli.chat` reads messages and prints answers.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from steermoe.engines.engine import Engine
from steermoe.engines.messages import Chat, Message, conversation
from steermoe.engines.request import Completion, Request, Sampling
from steermoe.errors import GenerationError
from steermoe.files import atomic_path, why_not_written
from steermoe.steering.plans import SteeringPlan
from steermoe.steering.spec import SteeringSpec

PROBE = "Hello"
"""A message that shows whether a template takes what comes before it."""


@dataclass(frozen=True)
class Manner:
    """How answers are generated.

    Attributes:
        system: None for what the chat template says, if anything.
        thinking: as in `Engine.chat`.
    """

    steering: SteeringSpec = field(default_factory=SteeringSpec)
    sampling: Sampling = field(default_factory=Sampling)
    system: str | None = None
    thinking: bool | None = None


@dataclass(frozen=True, eq=False)
class Turn:
    """A message of the user and the answer to it."""

    completion: Completion

    @property
    def text(self) -> str:
        """What the user wrote."""
        return self.completion.request.prompt

    @property
    def messages(self) -> tuple[Message, Message]:
        """As later turns show them to the model, whose template decides what becomes of the thinking."""
        answer = Message("assistant", self.completion.text, self.completion.thinking or "")
        return Message("user", self.text), answer

    def as_dict(self, model: str) -> dict[str, Any]:
        """One flat object: that of the completion, without the messages of earlier turns."""
        found = self.completion.as_dict(model)
        found.pop("messages", None)
        return found


class Conversation:
    """Turns with one model; the manner may change between them.

    Args:
        engine: the model in its engine.
        plan: turns what a user asks of the steering into a plan.
        manner: how answers are generated until `change` is called.

    Raises:
        GenerationError: the model has no chat template, or one that takes no message of the system. SteerMoEError: the
            steering does not fit the model.
    """

    def __init__(self, engine: Engine, plan: Callable[[SteeringSpec], SteeringPlan | None], manner: Manner) -> None:
        self.engine = engine
        self._plan_of = plan
        self.turns: list[Turn] = []
        self.first = 0
        """The first turn that still fits into the model's context; earlier ones are not sent any more."""
        self._set(manner)

    def change(self, **fields: Any) -> None:
        """Answer in another manner from now on; after an error, as before.

        Args:
            fields: those of `Manner`.

        Raises:
            SteerMoEError: as the constructor.
        """
        self._set(replace(self.manner, **fields))

    def _set(self, manner: Manner) -> None:
        plan = self._plan_of(manner.steering)
        if plan is not None:
            Request(PROBE, plan, manner.sampling).require_steered()
        self.engine.chat(conversation(PROBE, manner.system), manner.thinking)
        self.manner, self.plan = manner, plan

    # ---- asking ----

    def request(self, text: str) -> Request:
        """What to generate to answer a new message."""
        return self._request(text, self.turns)

    def again(self) -> Request:
        """What to generate to answer the last message once more, with the next seed, which stays.

        Raises:
            GenerationError: there is none.
        """
        text = self._last().text
        sampling = self.manner.sampling
        self.manner = replace(self.manner, sampling=replace(sampling, seed=(sampling.seed + 1) % 2**63))
        return self._request(text, self.turns[:-1])

    def both(self) -> tuple[Request, Request]:
        """What to generate to see the last answer unsteered and steered.

        Raises:
            GenerationError: there is none, or nothing to steer toward.
        """
        text = self._last().text
        if self.plan is None:
            raise GenerationError("there is no steering to compare with: name a domain first, such as /domain sport")
        steered = self._request(text, self.turns[:-1])
        return replace(steered, plan=None), steered

    def answer(self, request: Request, on_text: Callable[[str], None], *, again: bool = False) -> Turn:
        """Generate an answer and keep the turn, unless it was interrupted before anything came.

        Args:
            request: from `request` or `again`.
            on_text: as in `Engine.generate`.
            again: the turn replaces the last one.

        Raises:
            GenerationError, SteeringError: as `Engine.generate`; the turns stay as they are.
        """
        (completion,) = self.engine.generate([request], on_text=on_text)
        turn = Turn(completion)
        if completion.text or completion.thinking or completion.finish_reason != "interrupted":
            self.turns[len(self.turns) - again :] = [turn]
        return turn

    def undo(self) -> Turn:
        """Take the last turn back.

        Raises:
            GenerationError: there is none.
        """
        turn = self._last()
        self.turns.pop()
        self.first = 0
        return turn

    def _last(self) -> Turn:
        if not self.turns:
            raise GenerationError("there is no answer yet: write a message first")
        return self.turns[-1]

    def _request(self, text: str, turns: list[Turn]) -> Request:
        """The request of a message after as many of the last turns as the context holds."""
        most = self.engine.context_length
        room = None if most is None else most - self.manner.sampling.max_new_tokens
        for first in range(min(self.first, len(turns)), len(turns) + 1):
            chat = self._chat(text, turns[first:])
            if room is None or len(chat.tokens) <= room:
                break
        else:
            first = 0  # not even the message alone fits, which `encode` says
        request = Request(text, self.plan, self.manner.sampling, chat=chat)
        self.engine.encode(request)
        self.first = first
        return request

    def _chat(self, text: str, turns: list[Turn]) -> Chat:
        *system, user = conversation(text, self.manner.system)
        messages = (*system, *(message for turn in turns for message in turn.messages), user)
        return self.engine.chat(messages, self.manner.thinking)

    # ---- saving ----

    def records(self) -> list[dict[str, Any]]:
        """One object for each turn."""
        return [turn.as_dict(self.engine.name) for turn in self.turns]

    def save(self, path: Path, *, replaces: bool = False) -> None:
        """Write the chat into a file: `.jsonl` or `.json` as one object for each turn on a line, else as text.

        Args:
            path: the file.
            replaces: whether it may be there already.

        Raises:
            GenerationError: it is, or can't be written, or there is no turn yet.
        """
        self._last()
        is_json = path.suffix.lower() in (".jsonl", ".json")
        text = (
            "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in self.records()) if is_json else self.as_text()
        )
        try:
            if path.exists() and not replaces:
                raise GenerationError(f"'{path}' is there already: name another file, or replace it with /save! {path}")
            with atomic_path(path) as partial:
                partial.write_text(text, encoding="utf-8")
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            why = why_not_written(error) if isinstance(error, OSError) else str(error)
            raise GenerationError(f"can't write '{path}': {why}; name another file") from error

    def as_text(self) -> str:
        """What was said, for people to read; without thinking."""
        return "".join(f"You: {turn.text}\n\n{self._speaker(turn)}: {turn.completion.text}\n\n" for turn in self.turns)

    def _speaker(self, turn: Turn) -> str:
        plan = turn.completion.request.plan
        if plan is None:
            return self.engine.name
        toward = plan.vector.domain if plan.vector is not None else "forced experts"
        return f"{self.engine.name} ({toward}, strength {plan.strength:g})"
