"""A ticket: one text that a live engine generates, watched from any thread while it comes.

`live` writes to it; servers and pages read it, cancel it, and change its steering.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from steermoe.engines.request import Completion, Request, TokenScore
from steermoe.errors import SteerMoEError
from steermoe.serving.stopping import StopTexts

if TYPE_CHECKING:
    from steermoe.engines.decoding import Row
    from steermoe.steering.plans import SteeringPlan

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Piece:
    """What came since the last piece.

    Attributes:
        text: complete characters; of a chat, with the tags around its thinking (`messages.Splitter` separates them).
        tokens: the tokens since the last piece. Their text may come in a later one.
        scores: one per token, if `Request.logprobs` asks for them.
    """

    text: str
    tokens: tuple[int, ...] = ()
    scores: tuple[TokenScore, ...] = ()


class Commands:
    """What a ticket asks of its engine; `live.LiveEngine` carries it out."""

    def cancel(self, ticket: "Ticket") -> None:
        """End a text at the next step."""
        raise NotImplementedError

    def steer(self, ticket: "Ticket", plan: "SteeringPlan | None") -> "Future[None]":
        """Change a text's plan from the next token on."""
        raise NotImplementedError


class Ticket:
    """One text being generated, or waiting for its turn.

    Iterate over it for its pieces (`for piece in ticket`, `async for piece in ticket`), once; then ask `result`.

    Args:
        request: what to generate.
        prompt: tokens of its prompt.
        commands: carries out what is asked of the ticket.
        stop: texts that end it, and are not part of it.

    Attributes:
        text: what can be shown of it so far.
        is_cancelled: whether `cancel` was called.
        started: whether it has had its first token.
        plan: what steers it; `steer` changes it.
    """

    def __init__(self, request: Request, prompt: list[int], commands: Commands, stop: Sequence[str] = ()) -> None:
        self.request, self.prompt = request, prompt
        self.is_cancelled = self.started = False
        self.plan = request.plan
        self._commands = commands
        self._stop = StopTexts(stop)
        self._texts: list[str] = []
        self._pieces: deque[Piece] = deque()
        self._seen = 0
        self._tokens: list[int] = []
        self._scores: list[TokenScore] = []
        self._completion: Completion | None = None
        self._error: SteerMoEError | None = None
        self._changed = threading.Condition()
        self._listener: Callable[[], None] | None = None
        self._wants_pieces = True

    # ---- for whoever asked ----

    def cancel(self) -> None:
        """End the text: its row is free at the next step. Does nothing once it has ended."""
        self.is_cancelled = True
        self._commands.cancel(self)

    def steer(self, plan: "SteeringPlan | None") -> "Future[None]":
        """Follow another plan from the next token on.

        Returns:
            done once it is in force; it holds the SteeringError of a plan that can't be followed, which leaves the text
            as it was.
        """
        return self._commands.steer(self, plan)

    @property
    def is_done(self) -> bool:
        return self._completion is not None or self._error is not None

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def stopped_at(self) -> str:
        """The stop text that ended it; "" if none did."""
        return self._stop.found

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended; "stop" also where a stop text did."""
        if self._stop.found:
            return "stop"
        reason = self._completion.finish_reason if self._completion is not None else "interrupted"
        return "cancelled" if reason == "interrupted" else "stop" if reason == "stop" else "length"

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the end of the text.

        Its `text` may hold a stop text and what follows; `Ticket.text` does not.

        Raises:
            SteerMoEError: it could not be generated. TimeoutError: not within `timeout` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.is_done, timeout):
                raise TimeoutError(f"the text is not finished after {timeout:g} seconds")
        return self._outcome()

    def __iter__(self) -> Iterator[Piece]:
        """The pieces as they come; raises as `result`."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pieces or self.is_done)
            while self._pieces:
                yield self._pieces.popleft()
            if self.is_done and not self._pieces:
                self._outcome()
                return

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """As `__iter__`, for one event loop."""
        woken = self._listen()
        while True:
            woken.clear()
            while self._pieces:
                yield self._pieces.popleft()
            if self.is_done and not self._pieces:
                self._outcome()
                return
            await woken.wait()

    async def wait(self) -> Completion:
        """As `result`, for an event loop, which is not woken for pieces."""
        self._wants_pieces = False
        woken = self._listen()
        while not self.is_done:
            woken.clear()
            await woken.wait()
        return self._outcome()

    def _listen(self) -> asyncio.Event:
        """An event that is set whenever there is something new."""
        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(woken.set)

        self._listener = wake
        woken.set()
        return woken

    def _outcome(self) -> Completion:
        if self._error is not None:
            raise self._error
        assert self._completion is not None
        return self._completion

    # ---- for the live engine, on its own thread ----

    def add(self, row: "Row", text: str) -> bool:
        """Take what a row has new; returns whether the text goes on."""
        self.started = True
        self._tokens += row.new[self._seen :]
        self._scores += row.scores[self._seen :]
        self._seen = len(row.new)
        if shown := self._stop.add(text):
            self._emit(shown)
        return not self._stop.found

    def end(self, outcome: "Completion | SteerMoEError") -> None:
        """The text is finished, or failed."""
        rest = "" if self._stop.found else self._stop.rest()
        if (rest or self._tokens) and not isinstance(outcome, SteerMoEError):
            self._emit(rest)
        with self._changed:
            if isinstance(outcome, SteerMoEError):
                self._error = outcome
            else:
                self._completion = outcome
            self._changed.notify_all()
        if self._listener is not None:
            self._listener()

    def _emit(self, text: str) -> None:
        piece = Piece(text, tuple(self._tokens), tuple(self._scores))
        self._tokens, self._scores = [], []
        with self._changed:
            self._texts.append(text)
            self._pieces.append(piece)
            self._changed.notify_all()
        if self._listener is not None and self._wants_pieces:
            self._listener()
