"""The tokens of vLLM's requests, read for plans that follow tags in them.

What a token's number is follows from the tokens before it, never from how often a request was seen: a request that is
computed again after it had to make room, or that begins after what the prefix cache holds, gets the same numbers.
Knows no vLLM.
"""

from collections.abc import Callable, Container, Sequence

from steermoe.engines.vllm.wire import tags_of, unpack
from steermoe.errors import SteeringError
from steermoe.steering.segments import Segments

SPARE = 256
"""How many requests that have ended may be kept before they are forgotten."""


def segments_of(data: bytes, prompt: int) -> Segments | None:
    """What numbers the tokens of a request with a packed plan; None if their places are enough."""
    tags = tags_of(data)
    return None if tags is None else Segments(unpack(data).positions, tags, prompt)


class Histories:
    """The requests that a worker computes."""

    def __init__(self) -> None:
        self._kept: dict[str, Segments] = {}

    def numbers(
        self,
        request: str,
        data: bytes,
        prompt: int,
        first: int,
        tokens: Sequence[int],
        before: Callable[[int], Sequence[int]],
    ) -> tuple[int, ...] | None:
        """The numbers of a request's tokens in a forward call, for `SteeringPlan.factor`; None if places are enough.

        Args:
            request: its id.
            data: its packed plan.
            prompt: tokens of its prompt.
            first: the position of its first token in the call.
            tokens: its tokens in the call.
            before: gives the tokens from a position on up to `first`.

        Raises:
            SteeringError: the tokens before the call are not known.
        """
        segments = self._kept.get(request)
        if segments is None or segments.prompt != prompt:
            new = segments_of(data, prompt)
            if new is None:
                return None
            segments = self._kept[request] = new
        segments.cut(first)  # what was drafted and not accepted, or is computed again
        missing = before(len(segments.tokens)) if len(segments.tokens) < first else ()
        if any(token < 0 for token in missing):
            raise SteeringError(
                f"positions {unpack(data).positions} follows the tags in a text, and vLLM does not say which tokens "
                "came before: run it with --no-async-scheduling"
            )
        segments.read(missing)
        segments.read(tokens)
        return tuple(segments.numbers[first:])

    def forget(self, running: Container[str], count: int) -> None:
        """Forget requests that have ended, now and then.

        Args:
            running: those that have not.
            count: how many they are.
        """
        if len(self._kept) > count + SPARE:
            self._kept = {request: segments for request, segments in self._kept.items() if request in running}
