"""The loop that all engines share: requests become rows, rows take tokens until they end, then become completions.

Knows no model and no library that runs one: a decoder computes logits and draws tokens.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from steermoe.engines.engine import Decoder, OnToken
from steermoe.engines.messages import split_answer
from steermoe.engines.recorder import Recorder
from steermoe.engines.request import Completion, Request, TokenScore
from steermoe.engines.text import Pieces, Tokenizer, continuation
from steermoe.errors import GenerationError
from steermoe.steering.segments import Segments, Tags

if TYPE_CHECKING:
    from torch import Tensor

    from steermoe.engines.trace import Trace
    from steermoe.routing.shape import RoutingShape
    from steermoe.steering.plans import SteeringPlan

S = TypeVar("S")
"""What draws the tokens of a row; each engine has its own."""


class Stop(Exception):
    """Raised by `on_text` to end the text where it is; the completion holds what came so far."""


@dataclass(eq=False)
class Row(Generic[S]):
    """One text being generated.

    Attributes:
        prompt: tokens of the request's prompt.
        tokenizer: turns its tokens into text.
        ends: tokens that end a text and are not part of it.
        sampler: draws its tokens; None if the library that runs the model does.
        on_text: called with each piece of text as it comes; of a chat, with the tags around its thinking.
        number: identifies the row in a decoder that keeps something by number.
        started: when it was created, by `time.perf_counter`.
        new: tokens generated so far.
        finish_reason: as in `Completion`; empty while it is being generated.
        tags: what its plan follows, as `ModelTags.of` gives it.
        on_token: as in `Decoder.start`.
        plan: the request's, until `steer` changes it.
        scores: one per token in `new`, if the request asks for them.
        shape: the model's; needed only for a request that asks for a trace.
        recorder: takes down the trace; None if none was asked for.
    """

    request: Request
    prompt: list[int]
    tokenizer: Tokenizer
    ends: set[int]
    sampler: S
    on_text: Callable[[str], None] | None = None
    number: int = 0
    started: float = field(default_factory=time.perf_counter)
    new: list[int] = field(default_factory=list)
    finish_reason: str = ""
    tags: Tags | None = None
    on_token: OnToken | None = None
    scores: list[TokenScore] = field(default_factory=list)
    shape: "RoutingShape | None" = None
    recorder: Recorder | None = None

    def __post_init__(self) -> None:
        self.plan = self.request.plan
        self._segments = segments_of(self.plan, self.tags, self.prompt)
        self._text: list[str] = []
        is_watched = self.on_text is not None or self.on_token is not None
        self._pieces = Pieces(self.tokenizer, self.prompt, self.shows_special) if is_watched else None
        if self.request.trace and self.shape is not None:
            on_trace = self.request.on_trace
            self.recorder = Recorder(self.shape, self.tokenizer, self.prompt, self.shows_special, on_trace)

    @property
    def shows_special(self) -> bool:
        """Whether its text is decoded with special tokens, which tell thinking and answer apart."""
        return self.request.chat is not None and bool(self.request.chat.special)

    @property
    def cached(self) -> int:
        """Tokens that the model has read, once it has generated one: all but the last one."""
        return len(self.prompt) + len(self.new) - 1

    @property
    def place(self) -> int:
        """The number of its last token, for `SteeringPlan.factor`."""
        return len(self.new) - 1 if self._segments is None else self._segments.numbers[-1]

    @property
    def was_steered(self) -> bool | None:
        """Whether its plan steered any of its tokens; None if their places alone tell."""
        plan, segments = self.plan, self._segments
        if plan is None or segments is None:
            return None
        import numpy as np

        read = segments.numbers[: len(segments.numbers) - (self.finish_reason == "length")]
        return bool(plan.factor(np.array(read, dtype=np.float32)).any())

    def finished_trace(self) -> "Trace | None":
        """The trace, if one was asked for; to be called once, when the row has ended."""
        if self.recorder is None:
            return None
        numbers = range(len(self.new)) if self._segments is None else self._segments.numbers[len(self.prompt) :]
        read = len(self.new) - (self.finish_reason != "stop")
        return self.recorder.finish(self.plan, numbers, read)

    @property
    def text(self) -> str | None:
        """Its whole text, if somebody watches it come."""
        return "".join(self._text) if self.on_token is not None and self._pieces is not None else None

    @property
    def most(self) -> int:
        """The most tokens that it can have, prompt included."""
        return len(self.prompt) + self.request.sampling.max_new_tokens

    def steer(self, plan: "SteeringPlan | None", tags: Tags | None) -> None:
        """Follow another plan from the token that is read next on.

        Args:
            plan: the new plan.
            tags: what it follows, as `ModelTags.of` gives it.
        """
        self.plan, self.tags = plan, tags
        self._segments = segments_of(plan, tags, self.prompt)
        if self._segments is not None:
            self._segments.read(self.new)

    def take(self, token: int, score: TokenScore | None = None) -> None:
        """Add a token, or end the row at an end token; the last token allowed also ends it."""
        if self.finish_reason:
            return
        if token in self.ends:
            self.end("stop")
            return
        self.new.append(token)
        if score is not None:
            self.scores.append(score)
        if self.recorder is not None:
            self.recorder.took(token)
        if self._segments is not None:
            self._segments.read([token])
        if self._pieces is not None:
            self._send(self._pieces.add(token))
        if len(self.new) == self.request.sampling.max_new_tokens:
            self.end("length")

    def end(self, reason: str) -> None:
        """Take no more tokens. A row that has already ended keeps its reason."""
        if self.finish_reason:
            return
        self.finish_reason = reason
        if self._pieces is not None and (rest := self._pieces.rest()):
            self._send(rest)

    def _send(self, text: str) -> None:
        self._text.append(text)
        try:
            if text and self.on_text is not None:
                self.on_text(text)
            if self.on_token is not None:
                self.on_token(self, text)
        except Stop:
            self._pieces = None
            self.end("interrupted")


def finish(row: Row, frequency: "Tensor | None" = None) -> Completion:
    """The completion of a row that has ended, with its own seconds.

    Args:
        row: the row.
        frequency: the routing embedding F [L, N] of its new tokens, if it was recorded.
    """
    text = row.text
    if text is None:
        text = continuation(row.tokenizer, row.prompt, row.new, row.shows_special)
    chat, thinking = row.request.chat, None
    if chat is not None:
        text, thinking = split_answer(chat, text)
    return Completion(
        request=row.request,
        text=text,
        token_ids=tuple(row.new),
        prompt_tokens=len(row.prompt),
        finish_reason=row.finish_reason,
        seconds=time.perf_counter() - row.started,
        frequency=frequency,
        was_steered=row.was_steered,
        thinking=thinking,
        scores=None if row.request.logprobs is None else tuple(row.scores),
        trace=row.finished_trace(),
    )


def score_of(logits_V: "Tensor", token: int, most: int) -> TokenScore:
    """How likely a token is by the model's logits.

    Args:
        logits_V: [V], the model's, unwarped.
        token: the one that was drawn.
        most: how many of the likeliest tokens to keep.
    """
    (score,) = scores_of(logits_V[None], [token], [most])
    assert score is not None
    return score


def scores_of(logits_BV: "Tensor", tokens: Sequence[int], most: Sequence[int | None]) -> list[TokenScore | None]:
    """As `score_of`, one for each row, or None where `most` is; a device is waited for once.

    Args:
        logits_BV: [B, V], the model's, unwarped.
        tokens: [B], the ones that were drawn.
        most: [B], how many of the likeliest tokens to keep.
    """
    import torch

    asked = {row: number for row, number in enumerate(most) if number is not None}
    found = []
    for row, number in asked.items():
        logprob_V = logits_BV[row].float().log_softmax(-1)
        top = logprob_V.topk(min(number, len(logprob_V)))
        own = logprob_V[tokens[row] : tokens[row] + 1]
        # float64 holds a token's number and a float32 exactly
        found.append(torch.cat([own.double(), top.values.double(), top.indices.double()]))
    numbers = iter(torch.cat(found).tolist() if found else [])
    scores: list[TokenScore | None] = [None] * len(most)
    for row, one in zip(asked, found, strict=True):
        logprob, *values = (next(numbers) for _ in range(1 + len(one) // 2))
        scores[row] = TokenScore(logprob, tuple((int(next(numbers)), value) for value in values))
    return scores


def segments_of(plan: "SteeringPlan | None", tags: Tags | None, prompt: Sequence[int]) -> Segments | None:
    """What numbers the tokens of a text, its prompt read; None if a token's place is its number."""
    if plan is None or tags is None:
        return None
    segments = Segments(plan.positions, tags, len(prompt))
    segments.read(prompt)
    return segments


def steers_prompt(plan: "SteeringPlan | None") -> bool:
    """Whether a plan changes how the prompt is computed."""
    return plan is not None and plan.positions in ("prompt", "all", "last-prompt")


def by_prompt(rows: Sequence[Row[S]]) -> list[list[Row[S]]]:
    """The rows in groups whose prompts are computed alike: the same tokens, under the same steering of prompts."""
    groups: dict[Any, list[Row[S]]] = {}
    for row in rows:
        plan = row.plan
        groups.setdefault((tuple(row.prompt), plan if steers_prompt(plan) else None), []).append(row)
    return list(groups.values())


def require_steering(requests: Sequence[Request]) -> None:
    """Raise SteeringError if steering was asked for and could happen in none of the requests."""
    asked = [request for request in requests if request.plan is not None and request.plan.does_something]
    if not any(request.plan.steers(1, request.sampling.max_new_tokens - 1) for request in asked if request.plan):
        for request in asked:
            request.require_steered()


def complete(
    decoder: Decoder,
    requests: Sequence[Request],
    prompts: Sequence[list[int]],
    on_text: Callable[[str], None] | None = None,
) -> list[Completion]:
    """`Engine.generate`: run requests through a decoder, and close it.

    Args:
        decoder: is given all requests at once; it starts as many as it has room for.
        requests: texts to continue.
        prompts: tokens of each one's prompt, as `Engine.encode` gives them.
        on_text: called with each piece of text as it comes; for a single request only.

    Returns:
        completions in the requests' order, each with the seconds and the steering report of the whole batch.

    Raises:
        GenerationError, SteeringError: as `Engine.generate`.
    """
    if not requests:
        return []
    require_steering(requests)
    if on_text is not None and len(requests) != 1:
        raise GenerationError(f"text can be streamed for one request at a time, not for {len(requests)}")
    done: dict[int, list[Completion]] = {}
    started = time.perf_counter()
    try:
        decoder.start(requests, prompts, on_text)
        while len(decoder):
            for completion in decoder.step():
                done.setdefault(id(completion.request), []).append(completion)
        seconds = time.perf_counter() - started
        report = decoder.report()
    finally:
        decoder.close()
    return [replace(done[id(request)].pop(), seconds=seconds, report=report) for request in requests]
