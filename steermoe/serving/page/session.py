"""One visitor of the page: two texts from one prompt, unsteered and steered, and steering that changes as they come.

The texts run on the engine's own thread; all that is here only asks for them and reads what has come.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from steermoe.engines.messages import conversation
from steermoe.engines.request import Completion, Request
from steermoe.engines.trace import Domain, TokenTrace, Trace, domains_of, shares
from steermoe.errors import SteeringError, SteerMoEError, TraceError
from steermoe.serving.live import LiveEngine
from steermoe.serving.page.settings import MOST_PROMPT, Settings
from steermoe.serving.ticket import Ticket
from steermoe.steering.resolver import PlanResolver
from steermoe.steering.spec import SteeringSpec

if TYPE_CHECKING:
    from steermoe.steering.plans import SteeringPlan

SIDES = ("unsteered", "steered")

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Text:
    """One of the two texts, as far as it has come.

    Attributes:
        ticket: what the engine generates.
        seen: its tokens so far, those that the model has read.
    """

    ticket: Ticket
    seen: list[TokenTrace] = field(default_factory=list)

    @property
    def completion(self) -> Completion | None:
        """The text once it has ended; None before, and if it was cancelled before it began."""
        if not self.ticket.is_done:
            return None
        try:
            return self.ticket.result(0)
        except SteerMoEError:
            return None

    @property
    def error(self) -> str:
        """Why it failed; "" if it did not."""
        return "" if self._failure is None else str(self._failure)

    @property
    def is_untraceable(self) -> bool:
        """Whether it failed because its model can't be traced."""
        return isinstance(self._failure, TraceError)

    @property
    def _failure(self) -> SteerMoEError | None:
        if not self.ticket.is_done or self.ticket.is_cancelled:
            return None
        try:
            self.ticket.result(0)
        except SteerMoEError as error:
            return error
        return None


@dataclass(eq=False)
class Run:
    """Two texts from one prompt.

    Attributes:
        settings: those it began with.
        shown_prompt: what comes before the texts, for people: the prompt, and what was kept of an earlier text.
        prompt: its tokens.
        texts: the unsteered one and the steered one.
        domains: of the vectors that have steered it, which colour both texts.
        request: what both texts begin with.
        is_continued: whether it continues an earlier text after one of its tokens.
        is_changed: whether it was steered anew while it was being written.
    """

    settings: Settings
    shown_prompt: str
    prompt: list[int]
    request: Request
    texts: Sequence[Text] = ()
    domains: tuple[Domain, ...] = ()
    is_continued: bool = False
    is_changed: bool = False

    @property
    def again(self) -> Settings | None:
        """The settings that write both texts again; None if none do: steered anew, or an answer that was continued."""
        if self.is_changed:
            return None
        if not self.is_continued:
            return self.settings
        if self.request.chat is not None or len(self.shown_prompt) > MOST_PROMPT:
            return None
        return replace(self.settings, prompt=self.shown_prompt)

    @property
    def is_done(self) -> bool:
        return all(text.ticket.is_done for text in self.texts)

    def trace(self, side: int) -> Trace | None:
        """The whole trace of a text that has ended, with the domains of both."""
        completion = self.texts[side].completion
        return None if completion is None or completion.trace is None else completion.trace.with_domains(self.domains)

    def shares(self, token: TokenTrace) -> np.ndarray:
        """[D], the share of a token's places that went to each domain."""
        found: np.ndarray = shares(token.chosen[None], self.domains)[0]
        return found


class Session:
    """What one visitor does. Any thread may call it.

    Args:
        live: generates the texts.
        resolver: finds vectors by their names.
    """

    def __init__(self, live: LiveEngine, resolver: PlanResolver) -> None:
        self._live, self._resolver = live, resolver
        self._lock = threading.RLock()
        self.run: Run | None = None

    # ---- texts ----

    def start(self, settings: Settings) -> Run:
        """Write both texts from the beginning; earlier ones end.

        Raises:
            SteerMoEError: steering that does not exist or fit, a prompt that is too long, or a queue that is full.
        """
        chat = self._live.chat(conversation(settings.prompt)) if settings.is_chat else None
        wanted = not self._live.untraced
        request = Request(settings.prompt, sampling=settings.sampling(), special_tokens=False, chat=chat, trace=wanted)
        return self._begin(Run(settings, settings.prompt, self._live.encode(request), request))

    def branch(self, side: int, number: int, settings: Settings) -> Run:
        """Write both texts on from a token of one of them, which is kept, by the present settings.

        Args:
            side: 0 for the unsteered text, 1 for the steered one.
            number: of the token.
            settings: the present ones; the prompt stays that of the text.

        Raises:
            SteerMoEError: there is no such token, or as of `start`.
        """
        with self._lock:
            run = self.run
        trace = None if run is None else run.trace(side)
        if run is None or trace is None or not 0 <= number < len(trace):
            raise SteeringError(f"there is no token {number} to continue after: let the text finish, then click one")
        settings = replace(settings, prompt=run.settings.prompt, is_chat=run.settings.is_chat)
        kept = run.prompt + trace.token_ids[: number + 1].tolist()
        shown = run.shown_prompt + "".join(trace.tokens[: number + 1])
        request = replace(run.request, sampling=settings.sampling())
        if request.chat is None:
            request = replace(request, prompt=shown)
        elif len(kept) + settings.tokens > self._live.tokens:
            raise SteeringError(f"the text has no room for {settings.tokens} more tokens: ask for fewer")
        return self._begin(Run(settings, shown, kept, request, is_continued=True))

    def without_trace(self, run: Run) -> Run | None:
        """Write both texts again without traces if they failed because their model can't be traced.

        Raises:
            SteerMoEError: as of `start`.
        """
        if self.run is not run or not run.request.trace or not any(text.is_untraceable for text in run.texts):
            return None
        return self._begin(replace(run, texts=(), request=replace(run.request, trace=False)))

    def _begin(self, run: Run) -> Run:
        plan = self.plan(run.settings)
        texts = []
        for one in (None, plan):
            seen: list[TokenTrace] = []
            on_trace = seen.append if run.request.trace else None
            texts.append((seen, replace(run.request, plan=one, on_trace=on_trace)))
        if plan is not None:
            texts[1][1].require_steered()
        with self._lock:
            self.stop()
            self._follow(run, plan)
            tickets = self._live.submit([request for _, request in texts], [run.prompt] * len(texts))
            run.texts = [Text(ticket, seen) for ticket, (seen, _) in zip(tickets, texts, strict=True)]
            self.run = run
        return run

    def stop(self) -> None:
        """End both texts where they are. Does nothing once they have ended."""
        with self._lock:
            for text in self.run.texts if self.run is not None else ():
                if not text.ticket.is_done:
                    text.ticket.cancel()

    # ---- steering ----

    def own_strength(self, domain: str) -> float:
        """The strength that a domain's vector was calibrated with, or the default one."""
        plan = self._resolver.plan(SteeringSpec(domain=(domain,)))
        assert plan is not None
        return plan.strength

    def spec(self, settings: Settings) -> SteeringSpec:
        """The steering that settings ask for, with its strength as a number."""
        return settings.spec(self.own_strength)

    def plan(self, settings: Settings) -> "SteeringPlan | None":
        """The plan of settings; None for no steering.

        Raises:
            SteerMoEError: steering that does not exist, or does not fit.
        """
        plan = self._resolver.plan(self.spec(settings))
        self._live.check(plan)
        return plan

    def steer(self, settings: Settings) -> "Future[None] | None":
        """Have the steered text follow other settings from its next token on, if it is being written.

        Raises:
            SteerMoEError: as of `plan`.
        """
        plan = self.plan(settings)
        with self._lock:
            run = self.run
            if run is None or run.texts[1].ticket.is_done:
                return None
            self._follow(run, plan)
            run.is_changed = True
            return run.texts[1].ticket.steer(plan)

    def _follow(self, run: Run, plan: "SteeringPlan | None") -> None:
        """Colour a run's texts by the domains of a plan, too."""
        if plan is not None and plan.vector is not None:
            known = {domain.name: domain for domain in run.domains}
            for domain in domains_of([plan.vector], self._live.engine.shape):
                known.setdefault(domain.name, domain)
            run.domains = tuple(known.values())


class Sessions:
    """The sessions of all visitors, each by a name that the page gives it.

    Args:
        make: a new session.
        most: how many are kept; the one that was used longest ago goes first.
    """

    def __init__(self, make: Callable[[], Session], most: int = 1000) -> None:
        self._make, self._most = make, most
        self._known: dict[str, Session] = {}
        self._lock = threading.Lock()

    def of(self, name: str) -> Session:
        """A visitor's session; a new one at the first call."""
        with self._lock:
            session = self._known.pop(name, None) or self._make()
            self._known[name] = session
            gone = [self._known.pop(next(iter(self._known))) for _ in range(len(self._known) - self._most)]
        for one in gone:
            one.stop()
        return session

    def end(self, name: str) -> None:
        """A visitor has left: what is written for it ends."""
        with self._lock:
            session = self._known.pop(name, None)
        if session is not None:
            session.stop()

    def __len__(self) -> int:
        return len(self._known)
