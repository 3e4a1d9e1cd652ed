"""Takes down the trace of one row, token by token, from what its decoder passes to it. Knows no engine.

Shapes: as in `trace`.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from steermoe.engines.text import Pieces, Tokenizer
from steermoe.engines.trace import NO_EXPERT, Domain, TokenTrace, Trace, domains_of, shares

if TYPE_CHECKING:
    from steermoe.routing.shape import RoutingShape
    from steermoe.steering.plans import SteeringPlan
    from steermoe.vectors.vector import SteeringVector


class Recorder:
    """Takes down the trace of one row while it is generated.

    Args:
        shape: the model's.
        tokenizer: turns the row's tokens into text.
        prompt: tokens of its prompt.
        shows_special: whether its text is decoded with special tokens.
        on_trace: called with each token, in order, once the model has read it, or the text has ended.
    """

    def __init__(
        self,
        shape: "RoutingShape",
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        shows_special: bool,
        on_trace: Callable[[TokenTrace], None] | None = None,
    ) -> None:
        self._shape = shape
        self._top_k = max(router.top_k for router in shape.routers)
        self._limit = np.array([router.num_experts for router in shape.routers])[:, None]
        self._pieces = Pieces(tokenizer, prompt, shows_special)
        self._on_trace = on_trace
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._read: dict[int, tuple[NDArray[np.int32], NDArray[np.int32]]] = {}
        self._strengths: dict[int, float] = {}
        self._vectors: dict[int, SteeringVector] = {}
        self._domains: tuple[Domain, ...] | None = None
        self._sent = 0

    def drew(self, logprob: float) -> None:
        """Note the log-probability of the next token, before it is taken; also of a token that ends the text."""
        self._logprobs.append(logprob)

    def took(self, token: int) -> None:
        """Note the next token of the text."""
        self._token_ids.append(token)
        self._texts.append(self._pieces.add(token))

    def read(
        self,
        number: int,
        chosen: NDArray[np.int32],
        unsteered: NDArray[np.int32],
        plan: "SteeringPlan | None",
        place: int | None,
    ) -> None:
        """Note what was chosen when the model read a token.

        Args:
            number: of the token in the text; it may be known before the token is taken.
            chosen: [L, k]; -1 or a number beyond the layer's experts where no expert was chosen.
            unsteered: [L, k].
            plan: what steered it.
            place: its number for `SteeringPlan.factor`; None if that is known at the end only.
        """
        self._read[number] = self._cleaned(chosen), self._cleaned(unsteered)
        self._top_k = max(self._top_k, chosen.shape[1])
        self._follow(plan)
        if place is not None:
            self._strengths[number] = strength_at(plan, place)
        self._send(len(self._token_ids))

    def _cleaned(self, chosen: NDArray[np.int32]) -> NDArray[np.int32]:
        return np.where(chosen < self._limit, chosen, NO_EXPERT).astype(np.int32)

    def _follow(self, plan: "SteeringPlan | None") -> None:
        if plan is not None and plan.vector is not None and id(plan.vector) not in self._vectors:
            self._vectors[id(plan.vector)] = plan.vector
            self._domains = None

    def _send(self, ready: int, is_over: bool = False) -> None:
        while self._on_trace is not None and self._sent < ready and (is_over or self._sent in self._read):
            number, self._sent = self._sent, self._sent + 1
            self._on_trace(self._token(number))

    def _token(self, number: int) -> TokenTrace:
        nothing = np.full((len(self._shape.routers), self._top_k), NO_EXPERT, dtype=np.int32)
        chosen, unsteered = self._read.get(number, (nothing, nothing))
        domains = self._all_domains()
        names = [domain.name for domain in domains]
        now, before = (shares(one[None], domains)[0].tolist() for one in (chosen, unsteered))
        return TokenTrace(
            number=number,
            text=self._texts[number],
            token_id=self._token_ids[number],
            logprob=self._logprobs[number],
            is_read=number in self._read,
            chosen=chosen,
            unsteered=unsteered,
            share=dict(zip(names, now, strict=True)),
            share_before=dict(zip(names, before, strict=True)),
            strength=self._strengths.get(number, 0.0),
        )

    def _all_domains(self) -> tuple[Domain, ...]:
        if self._domains is None:
            self._domains = domains_of(list(self._vectors.values()), self._shape)
        return self._domains

    def finish(self, plan: "SteeringPlan | None", places: Sequence[int], read: int) -> Trace:
        """The trace of the whole text.

        Args:
            plan: what steered it last.
            places: [T], the number of each token, for `SteeringPlan.factor`.
            read: how many of its tokens the model had to read; a batch may have read more, for its other rows.
        """
        self._follow(plan)
        count, shape = len(self._token_ids), self._shape
        self._read = {number: found for number, found in self._read.items() if number < read}
        if count:
            self._texts[-1] += self._pieces.rest() if self._pieces.is_pending else ""
        for number in range(count):
            if number in self._read and number not in self._strengths:
                self._strengths[number] = strength_at(plan, places[number])
        self._send(count, is_over=True)
        chosen, unsteered = (
            np.full((count, len(shape.routers), self._top_k), NO_EXPERT, dtype=np.int32) for _ in range(2)
        )
        for number in range(count):
            if number in self._read:
                for whole, part in zip((chosen, unsteered), self._read[number], strict=True):
                    whole[number, :, : part.shape[1]] = part
        empty = np.zeros((count, 0), dtype=np.float32)
        trace = Trace(
            tokens=tuple(self._texts),
            token_ids=np.array(self._token_ids, dtype=np.int64),
            logprob=np.array(self._logprobs[:count], dtype=np.float32),
            layers=shape.layers,
            experts=tuple(router.num_experts for router in shape.routers),
            chosen=chosen,
            unsteered=unsteered,
            domains=(),
            share=empty,
            share_before=empty,
            strength=np.array([self._strengths.get(number, 0.0) for number in range(count)], dtype=np.float32),
        )
        return trace.with_domains(self._all_domains())


def strength_at(plan: "SteeringPlan | None", place: int) -> float:
    """The strength in force at a token with this number; 0 where it is not steered."""
    if plan is None:
        return 0.0
    (factor,) = plan.factor(np.array([place], dtype=np.float32))
    return float(np.float32(plan.strength) * factor)
