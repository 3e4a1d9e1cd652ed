"""Answers that come piece by piece, and clients that go away before an answer is complete."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.responses import Response

from steermoe.errors import SteerMoEError
from steermoe.serving.ticket import Piece, Ticket

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
EVENTS, LINES = "text/event-stream", "application/x-ndjson"


class Streamed(Response):
    """A response whose parts are sent as they come; it cancels its texts if the client goes away.

    Args:
        parts: what to send.
        tickets: the texts that are sent.
        media_type: EVENTS or LINES.
    """

    def __init__(self, parts: AsyncIterator[bytes], tickets: Sequence[Ticket], media_type: str) -> None:
        super().__init__(media_type=media_type, headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._parts, self._tickets = parts, tickets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with cancelling(receive, self._tickets):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for part in self._parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


@asynccontextmanager
async def cancelling(receive: Receive, tickets: Sequence[Ticket]) -> AsyncIterator[None]:
    """Cancel texts as soon as their client is gone, and whatever of them is unfinished at the end of the block."""
    watcher = asyncio.create_task(_watch(receive, tickets))
    try:
        yield
    finally:
        watcher.cancel()
        _cancel(tickets)


async def _watch(receive: Receive, tickets: Sequence[Ticket]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    _cancel(tickets)


def _cancel(tickets: Sequence[Ticket]) -> None:
    for ticket in tickets:
        if not ticket.is_done:
            ticket.cancel()


async def merged(tickets: Sequence[Ticket]) -> AsyncIterator[tuple[int, Piece | None]]:
    """The pieces of several texts as they come, each with the number of its text; None once that text is finished.

    Raises:
        SteerMoEError: one of them could not be generated.
    """
    if len(tickets) == 1:
        async for one in tickets[0]:
            yield 0, one
        yield 0, None
        return
    queue: asyncio.Queue[tuple[int, Piece | SteerMoEError | None]] = asyncio.Queue()

    async def pump(number: int, ticket: Ticket) -> None:
        try:
            async for piece in ticket:
                queue.put_nowait((number, piece))
            queue.put_nowait((number, None))
        except SteerMoEError as error:
            queue.put_nowait((number, error))

    tasks = [asyncio.create_task(pump(number, ticket)) for number, ticket in enumerate(tickets)]
    try:
        left = len(tickets)
        while left:
            number, piece = await queue.get()
            if isinstance(piece, SteerMoEError):
                raise piece
            left -= piece is None
            yield number, piece
    finally:
        for task in tasks:
            task.cancel()
