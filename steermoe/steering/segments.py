"""Where a text thinks, answers and calls tools: read off its tokens, one after another.

A tag is a sequence of tokens. What is where follows from the tokens alone, so reading them again gives the same: a text
that is computed again, or continued elsewhere, is steered as it was. Knows no models; imports no torch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from steermoe.routing.positions import NOWHERE, SEGMENTS, Positions

Tag = tuple[frozenset[int], ...]
"""A tag as tokens, one after another; each is one of a set, where a token may hold more than a part of the tag."""


@dataclass(frozen=True)
class Between:
    """Everything between one of some opening and one of some closing tags; without closing ones, to the end."""

    opens: tuple[Tag, ...] = ()
    closes: tuple[Tag, ...] = ()


@dataclass(frozen=True)
class Tags:
    """A model's tags as tokens.

    Attributes:
        thinking: around its thinking.
        answer: around its answers; empty if they are simply what is outside of thinking and tool calls.
        tool_calls: around its tool calls.
        ends: tokens that end a turn, and whatever was open in it.
    """

    thinking: Between = Between()
    answer: Between = Between()
    tool_calls: Between = Between()
    ends: frozenset[int] = frozenset()

    def as_json(self) -> list[Any]:
        """All of it as lists of numbers, equal for equal tags."""
        betweens = (self.thinking, self.answer, self.tool_calls)
        listed = [[[list(map(sorted, tag)) for tag in tags] for tags in (one.opens, one.closes)] for one in betweens]
        return [*listed, sorted(self.ends)]

    @classmethod
    def of_json(cls, value: list[Any]) -> "Tags":
        """What `as_json` returned."""
        *listed, ends = value
        thinking, answer, calls = (
            Between(*(tuple(tuple(map(frozenset, tag)) for tag in tags) for tags in one)) for one in listed
        )
        return cls(thinking, answer, calls, frozenset(ends))


Kind = Literal["", "thinking", "answer", "tool-calls"]


class _State(NamedTuple):
    """What the tokens read so far have opened.

    Attributes:
        inside: the segment that the next token is in, unless it completes a tag; "" for none.
        outer: the segment that goes on after a tool call.
        counted: how many tokens the plan's own segment had so far.
    """

    inside: Kind = ""
    outer: Kind = ""
    counted: int = 0


class Segments:
    """Numbers the tokens of one text for a plan.

    Args:
        positions: the plan's.
        tags: the model's, or the plan's own.
        prompt: how many of the tokens are the prompt.

    Attributes:
        tokens: those read so far.
        numbers: a number for each, which `SteeringPlan.factor` takes: negative in the prompt; of a generated token, its
            place among those that schedules count, or NOWHERE if the plan leaves it alone.
    """

    def __init__(self, positions: Positions, tags: Tags, prompt: int) -> None:
        self._positions, self._tags, self._prompt = positions, tags, prompt
        self.tokens: list[int] = []
        self.numbers: list[int] = []
        self._states = [_State()]

    @property
    def prompt(self) -> int:
        return self._prompt

    def read(self, tokens: Iterable[int]) -> None:
        """Read the next tokens."""
        for token in tokens:
            before = self._states[-1]
            self.tokens.append(token)
            after, is_tag = self._next(before, token)
            number = self._number(before, after, is_tag)
            if self._positions in SEGMENTS and number >= 0:
                after = after._replace(counted=before.counted + 1)
            self.numbers.append(number)
            self._states.append(after)

    def cut(self, length: int) -> None:
        """Forget all tokens but the first ones, as where drafted tokens were not accepted."""
        del self.tokens[length:], self.numbers[length:], self._states[length + 1 :]

    def _number(self, before: _State, after: _State, is_tag: bool) -> int:
        index = len(self.tokens) - 1 - self._prompt
        if index < 0:
            return index
        if self._positions not in SEGMENTS:  # the opening tag too: it decides the first token inside
            is_call = after.inside == "tool-calls" if is_tag else before.inside == "tool-calls"
            return NOWHERE if is_call else index
        here = before.inside
        if not here and not self._tags.answer.opens:
            here = "answer"
        return before.counted if here == self._positions and not is_tag else NOWHERE

    def _next(self, state: _State, token: int) -> tuple[_State, bool]:
        """The state after a token, and whether it completes a tag."""
        tags = self._tags
        if token in tags.ends:
            return state._replace(inside="", outer=""), False
        match state.inside:
            case "tool-calls":
                if self._ends_with(tags.tool_calls.closes):
                    return state._replace(inside=state.outer, outer=""), True
                return state, False
            case "thinking" if self._ends_with(tags.thinking.closes):
                return state._replace(inside=""), True
            case "answer" if self._ends_with(tags.answer.closes):
                return state._replace(inside=""), True
        if state.inside != "thinking" and self._ends_with(tags.thinking.opens):
            return state._replace(inside="thinking"), True
        if not state.inside and self._ends_with(tags.thinking.closes):  # of what was opened out of sight
            return state, True
        if self._ends_with(tags.tool_calls.opens):
            return state._replace(inside="tool-calls", outer=state.inside), True
        if not state.inside and self._ends_with(tags.answer.opens):
            return state._replace(inside="answer"), True
        return state, False

    def _ends_with(self, tags: Sequence[Tag]) -> bool:
        """Whether the tokens read so far end with one of the tags."""
        tokens = self.tokens
        return any(
            len(tokens) >= len(tag)
            and all(token in some for token, some in zip(tokens[len(tokens) - len(tag) :], tag, strict=True))
            for tag in tags
        )


def follows_tags(positions: Positions, tags: Tags | None) -> bool:
    """Whether which tokens a plan with these positions steers depends on tags."""
    return positions in SEGMENTS or (positions != "prompt" and tags is not None and bool(tags.tool_calls.opens))
