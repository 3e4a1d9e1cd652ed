"""A live engine: one thread owns a model and runs one continuous batch, which requests join and leave at any step.

Other threads talk to it through tickets. What they ask (a new text, the end of one, another plan) is carried out
between two tokens, so that no text depends on when its neighbours come and go.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from steermoe.engines.decoding import Row, Stop
from steermoe.engines.memory import is_out_of_memory
from steermoe.errors import GenerationError, SteerMoEError, TraceError, reason
from steermoe.serving.ticket import Commands, Piece, Ticket

if TYPE_CHECKING:
    from steermoe.engines.engine import Decoder, Engine
    from steermoe.engines.messages import Chat, Message
    from steermoe.engines.request import Completion, Request
    from steermoe.steering.plans import SteeringPlan

__all__ = ["Closed", "Limits", "LiveEngine", "Piece", "QueueFull", "Ticket"]

T = TypeVar("T")
MOST_TOKENS = 4096
"""Tokens of a text, prompt included, unless more are asked for; llama.cpp's cache is made for this many at once."""
MOST_QUEUED = 256
LLAMACPP_ROWS = 16
"""Rows of llama.cpp unless more are asked for: all of its cache is allocated at the start."""
LATE = "the server was shut down before the text was finished"
MOST_SECONDS = 60
"""The longest time after which a client is asked to come back."""

log = logging.getLogger(__name__)


class QueueFull(GenerationError):
    """As many texts are waiting as may wait; try again in `seconds`."""

    def __init__(self, waiting: int, seconds: int) -> None:
        super().__init__(f"{waiting} texts are waiting already, as many as may: try again in {seconds} s")
        self.seconds = seconds


class Closed(GenerationError):
    """The engine is being shut down, or was before the text was finished."""


@dataclass(frozen=True)
class Limits:
    """How much a live engine does at once.

    Attributes:
        rows: texts that are generated together; None for as many as is usual for the engine and fits into memory.
        queued: texts that may wait for a row.
        tokens: most tokens of a text, prompt included; None for the model's context, and at most MOST_TOKENS.
    """

    rows: int | None = None
    queued: int = MOST_QUEUED
    tokens: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("queued", 0), ("tokens", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise GenerationError(f"{name} is {value}, expected {least} or more")


class LiveEngine(Commands):
    """Owns an engine and its thread. Use it in a `with` block, or `close` it.

    Args:
        engine: nothing else may run requests on it meanwhile.
        limits: by default those of `Limits`.

    Attributes:
        rows: texts that are generated together.
        tokens: most tokens of a text, prompt included.
        finished, failed: how many texts have ended so far, and how many of them with an error.
        generated: tokens generated so far.
        steps: steps of the decoder so far.
        untraced: why texts can't be traced, once that has shown; "" before.
    """

    def __init__(self, engine: "Engine", limits: Limits | None = None) -> None:
        limits = limits or Limits()
        self.engine = engine
        known = engine.context_length
        self.tokens = min(known or MOST_TOKENS, limits.tokens or MOST_TOKENS)
        if limits.tokens is not None and known is not None and limits.tokens > known:
            raise GenerationError(f"{limits.tokens} tokens are more than the {known} of the context of {engine.name}")
        self.queued = limits.queued
        self.untraced = ""
        self.finished = self.failed = self.generated = self.steps = 0
        self._room = engine.room()
        self.rows = limits.rows or self._usual_rows()
        self._decoder: Decoder = engine.decoder(self.rows, self.tokens)
        self._waiting: deque[Ticket | _Call[Any]] = deque()
        self._running: dict[Request, Ticket] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._encoding = threading.Lock()
        self._is_closing = self._is_starting = False
        self._deadline: float | None = None
        self._seconds = 1.0
        self._thread = threading.Thread(target=self._run, name="steermoe-live", daemon=True)
        self._thread.start()

    def __enter__(self) -> "LiveEngine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close(0)

    # ---- for other threads ----

    @property
    def name(self) -> str:
        """The model's name."""
        return self.engine.name

    @property
    def dtype(self) -> str:
        """The type of its weights."""
        return self.engine.dtype

    def chat(self, messages: "Sequence[Message]", thinking: bool | None = None) -> "Chat":
        """As `Engine.chat`, from any thread."""
        with self._encoding:
            return self.engine.chat(messages, thinking)

    def encode(self, request: "Request") -> list[int]:
        """As `Engine.encode`, from any thread.

        Raises:
            GenerationError: also for a text that may become longer than `tokens`.
        """
        shortest = replace(request.sampling, max_new_tokens=1, min_new_tokens=0)
        with self._encoding:
            prompt = self.engine.encode(replace(request, sampling=shortest))
        if len(prompt) + request.sampling.max_new_tokens > self.tokens:
            raise GenerationError(
                f"the prompt has {len(prompt)} tokens and {request.sampling.max_new_tokens} more were asked for, but a "
                f"text has at most {self.tokens} here: ask for fewer"
            )
        return prompt

    def check(self, plan: "SteeringPlan | None") -> None:
        """Raise SteeringError for a plan that follows tags which the model does not have."""
        with self._encoding:
            self.engine.tags.of(plan)

    def submit(
        self, requests: "Sequence[Request]", prompts: Sequence[list[int]] | None = None, stop: Sequence[str] = ()
    ) -> list[Ticket]:
        """Queue texts: all of them, or none.

        Args:
            requests: what to generate.
            prompts: tokens of each one's prompt, as `encode` gives them; None to encode them here.
            stop: texts that end each of them.

        Raises:
            QueueFull: too many are waiting. Closed: the engine is being shut down. GenerationError, SteeringError: a
                request that can't be run.
        """
        tokens = [self.encode(one) for one in requests] if prompts is None else prompts
        tickets = [Ticket(one, prompt, self, stop) for one, prompt in zip(requests, tokens, strict=True)]
        with self._changed:
            if self._is_closing:
                raise Closed("the server is shutting down: it takes no more requests")
            waiting = len(self._waiting) + len(self._running)
            if waiting + len(tickets) > self.rows + self.queued:
                raise QueueFull(len(self._waiting), self._retry_after())
            self._waiting += tickets
            self._changed.notify()
        return tickets

    def call(self, function: "Callable[[], T]") -> "Future[T]":
        """Run a function on the engine's thread while no text is being generated, such as one that records routing.

        It waits for its turn like a text, and for the texts that are being generated; later ones wait for it.

        Raises:
            QueueFull, Closed: as `submit`.
        """
        call = _Call(function)
        with self._changed:
            if self._is_closing:
                raise Closed("the server is shutting down: it takes no more requests")
            if len(self._waiting) + len(self._running) >= self.rows + self.queued:
                raise QueueFull(len(self._waiting), self._retry_after())
            self._waiting.append(call)
            self._changed.notify()
        return call.future

    def cancel(self, ticket: Ticket) -> None:
        """As `Ticket.cancel`."""
        self._command(lambda: self._drop(ticket))

    def steer(self, ticket: Ticket, plan: "SteeringPlan | None") -> "Future[None]":
        """As `Ticket.steer`."""
        future: Future[None] = Future()

        def act() -> None:
            try:
                self._steer(ticket, plan)
            except SteerMoEError as error:
                future.set_exception(error)
            else:
                future.set_result(None)

        self._command(act)
        return future

    @property
    def waiting(self) -> int:
        """Texts that wait for a row."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Texts that are being generated."""
        return len(self._running)

    def close(self, grace: float | None = None) -> None:
        """Take no more texts, finish those that were taken, and end the thread.

        Args:
            grace: seconds after which texts that are not finished fail with `Closed`; None to wait for all of them.
        """
        with self._changed:
            self._is_closing = True
            if grace is not None:
                self._deadline = time.monotonic() + grace
            self._changed.notify()
        self._thread.join()

    def _command(self, act: Callable[[], None]) -> None:
        with self._changed:
            if self._thread.is_alive():
                self._commands.append(act)
                self._changed.notify()
                return
        act()

    def _retry_after(self) -> int:
        """Seconds after which a row will probably be free for one more text."""
        turns = 1 + len(self._waiting) / self.rows
        return max(1, min(MOST_SECONDS, math.ceil(turns * self._seconds)))

    def _usual_rows(self) -> int:
        rows = self.engine.most_rows
        if not hasattr(self.engine, "loaded"):
            rows = min(rows, LLAMACPP_ROWS)
        return rows if self._room is None else min(rows, self._room.rows(self.tokens))

    # ---- on the engine's thread ----

    def _run(self) -> None:
        try:
            self._loop()
        finally:
            with self._changed:
                self._is_closing = True
                left: list[Ticket | _Call[Any]] = [*self._running.values(), *self._waiting]
                self._running.clear()
                self._waiting.clear()
            for one in left:  # none, unless the loop itself failed
                one.end(Closed("the server has failed: its log says why"))
            self._carry_out()

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._commands or self._running or self._is_closing)
                if self._is_closing and not self._waiting and not self._running:
                    break
            if self._is_late():
                self._fail(Closed(LATE), everything=True)
                continue
            self._carry_out()
            with self._guarded():
                self._turn()
        self._carry_out()
        self._decoder.close()

    def _turn(self) -> None:
        """Start what there is room for, and add a token to every text."""
        if call := self._next_call():
            self._decoder.close()
            call.run()
            self._decoder = self.engine.decoder(self.rows, self.tokens)
            return
        if starting := self._starting():
            self._is_starting = True  # a decoder may draw first tokens of rows that it does not know yet
            self._decoder.start(
                [ticket.request for ticket in starting],
                [ticket.prompt for ticket in starting],
                on_token=self._on_token,
            )
        self._is_starting = False
        if self._running:
            self.steps += 1
            for completion in self._decoder.step():
                self._end(completion)
        if not self._running:
            self._decoder.clear()  # gives up the memory of the widest batch

    def _next_call(self) -> "_Call[Any] | None":
        """The call whose turn it is, if no text is being generated."""
        with self._changed:
            if self._running or not self._waiting or not isinstance(self._waiting[0], _Call):
                return None
            call = self._waiting.popleft()
        assert isinstance(call, _Call)
        return call

    def _starting(self) -> list[Ticket]:
        """The texts that begin now: in their order, as many as there are rows and memory for, up to the next call."""
        found: list[Ticket] = []
        longest = max((_most(ticket) for ticket in self._running.values()), default=0)
        with self._changed:
            while self._waiting and len(self._running) < self.rows:
                ticket = self._waiting[0]
                if isinstance(ticket, _Call):
                    break
                longest = max(longest, _most(ticket))
                if self._running and self._room is not None and self._room.rows(longest) <= len(self._running):
                    break
                self._waiting.popleft()
                self._running[ticket.request] = ticket
                found.append(ticket)
        return found

    def _on_token(self, row: Row, text: str) -> None:
        if self._commands and not self._is_starting:
            self._carry_out()
        ticket = self._running.get(row.request)
        if ticket is None or row.finish_reason == "interrupted":
            return
        if not ticket.add(row, text) or self._is_late():
            raise Stop

    def _end(self, completion: "Completion") -> None:
        ticket = self._running.pop(completion.request)
        self.finished += 1
        self.generated += completion.new_tokens
        self._seconds += (completion.seconds - self._seconds) / 8
        was_late = completion.finish_reason == "interrupted" and self._is_late() and not ticket.is_cancelled
        ticket.end(Closed(LATE) if was_late and not ticket.stopped_at else completion)

    def _is_late(self) -> bool:
        """Whether the grace is over."""
        return self._deadline is not None and time.monotonic() > self._deadline

    def _carry_out(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _drop(self, ticket: Ticket) -> None:
        with self._changed:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                ticket.end(Closed("the text was cancelled before it began"))
                return
        if ticket.request in self._running:
            self._decoder.drop(ticket.request)

    def _steer(self, ticket: Ticket, plan: "SteeringPlan | None") -> None:
        if ticket.request in self._running:
            self._decoder.steer(ticket.request, plan)
            ticket.plan = plan
        elif not ticket.is_done:
            self.check(plan)
            ticket.request, ticket.plan = replace(ticket.request, plan=plan), plan

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """An error of the model ends the texts that were being generated, and no others."""
        try:
            yield
            return
        except SteerMoEError as error:
            failed = error
            if isinstance(error, TraceError):
                self.untraced = str(error)
        except Exception as error:
            log.exception("the model failed")
            memory = "there is not enough memory for all texts at once" if is_out_of_memory(error) else reason(error)
            failed = GenerationError(f"the model failed: {memory}")
        self._fail(failed)

    def _fail(self, error: SteerMoEError, *, everything: bool = False) -> None:
        """End all texts that are being generated, and with `everything` those that wait, and begin afresh."""
        with self._changed:
            ended: list[Ticket | _Call[Any]] = list(self._running.values())
            self._running.clear()
            if everything:
                ended += self._waiting
                self._waiting.clear()
        self._is_starting = False
        self._decoder.close()
        self._decoder = self.engine.decoder(self.rows, self.tokens)
        self.failed += len(ended)
        for one in ended:
            one.end(error)


class _Call(Generic[T]):
    """A function that waits for its turn."""

    def __init__(self, function: "Callable[[], T]") -> None:
        self.future: Future[T] = Future()
        self._function = function

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self._function())
        except BaseException as error:
            self.future.set_exception(error)

    def end(self, error: SteerMoEError) -> None:
        self.future.set_exception(error)


def _most(ticket: Ticket) -> int:
    """The most tokens that a text can have, prompt included."""
    return len(ticket.prompt) + ticket.request.sampling.max_new_tokens
