"""Which plan a request follows: its own, or the server's default, which can be changed while texts are generated."""

import threading
from collections.abc import Mapping
from concurrent.futures import wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from steermoe.errors import SteerMoEError
from steermoe.serving.fields import Refused
from steermoe.serving.host import Host
from steermoe.serving.ticket import Ticket
from steermoe.steering.asked import KEY, asked_spec, read_asked
from steermoe.steering.spec import NO_DOMAIN, SteeringSpec, read_spec

if TYPE_CHECKING:
    from steermoe.steering.plans import SteeringPlan
    from steermoe.steering.resolver import PlanResolver

LATEST = "latest"
"""What Ollama's clients put after the colon of a model's name if they put nothing else."""
PATIENCE = 60.0
"""Seconds within which texts that are being generated follow a new default."""


@dataclass(frozen=True)
class Asked:
    """The steering of a request.

    Attributes:
        plan: None leaves it unsteered.
        follows_default: whether it is the server's default, now and when that changes.
    """

    plan: "SteeringPlan | None"
    follows_default: bool


class Steering:
    """The steering of a server's requests.

    Args:
        live: what generates. Only texts of a `LiveEngine` follow the default while they are generated.
        resolver: turns specs into plans.
    """

    def __init__(self, live: Host, resolver: "PlanResolver") -> None:
        self.resolver = resolver
        self._live = live
        self._default: Any = None
        self._spec: SteeringSpec | None = None
        self._plan: SteeringPlan | None = None
        self._followers: WeakSet[Ticket] = WeakSet()
        self._lock = threading.Lock()

    @property
    def served(self) -> str:
        """The name of the model."""
        return self._live.name

    def names(self) -> list[str]:
        """What can be asked for as a model: the model, and the model with each domain that has a vector."""
        return [self.served, *(f"{self.served}:{domain}" for domain in self.resolver.domains())]

    def asked(self, request: Mapping[str, Any]) -> Asked:
        """What a request asks for.

        Raises:
            Refused: a model that is not served, or steering that can't be read, found or fitted.
        """
        try:
            base, spec = asked_spec(self.without_latest(request), [self.served])
            name = request.get("model", self.served)
            if not isinstance(name, str):
                raise Refused(f"field 'model' is {name!r:.80}, expected a name such as '{self.served}'", param="model")
            if base is None and name.removesuffix(f":{LATEST}") != self.served:
                message = f"model {name!r:.80} is not served here: the models are {', '.join(self.names()[:50])}"
                raise Refused(message, status=404, param="model", code="model_not_found")
            if spec is None:
                with self._lock:
                    return Asked(self._plan, follows_default=True)
            return Asked(self.resolver.plan(read_spec(read_asked(spec))), follows_default=False)
        except Refused:
            raise
        except SteerMoEError as error:
            raise Refused(f"steering: {error}", param=KEY) from error

    def follow(self, tickets: list[Ticket], asked: Asked) -> None:
        """Let tickets follow the default from now on, if their request does."""
        if asked.follows_default:
            with self._lock:
                self._followers.update(tickets)
                if self._plan is not asked.plan:
                    for ticket in tickets:
                        ticket.steer(self._plan)

    def as_dict(self) -> dict[str, Any]:
        """The default as `GET /v1/steering` shows it: as it was asked for, and the plan that it comes to."""
        with self._lock:
            spec, plan = self._spec, self._plan
        asked = None if spec is None else {name: value for name, value in vars(spec).items() if value not in (None, ())}
        return {KEY: asked, "plan": None if plan is None else plan.as_dict()}

    def set(self, asked: Any) -> dict[str, Any]:
        """Change the default, for requests to come and for texts that are being generated.

        Args:
            asked: a spec in JSON, text such as "sport", or None for no steering.

        Returns:
            as `as_dict`, with the number of texts that follow it "at once", and what "refused" it.

        Raises:
            Refused: it can't be read, found or fitted; everything stays as it was.
        """
        try:
            default = None if asked is None else read_asked(asked)
            spec = None if default is None else read_spec(default)
            if spec is not None and spec.domain == (NO_DOMAIN,):
                spec = default = None
            plan = None if spec is None else self.resolver.plan(spec)
            self._live.check(plan)
        except SteerMoEError as error:
            raise Refused(f"steering: {error}", param=KEY) from error
        with self._lock:
            self._default, self._spec, self._plan = default, spec, plan
            following = [ticket for ticket in self._followers if not ticket.is_done]
            futures = [ticket.steer(plan) for ticket in following]
        wait(futures, timeout=PATIENCE)
        errors = [str(future.exception()) for future in futures if future.done() and future.exception()]
        return {**self.as_dict(), "at_once": len(following) - len(errors), "refused": sorted(set(errors))}

    def default(self) -> Any:
        """The default as it was asked for, for `read_spec`; None for no steering."""
        with self._lock:
            return self._default

    def without_latest(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """The request with the model's own name, if it has Ollama's `LATEST` behind it."""
        name = request.get("model")
        if name == f"{self.served}:{LATEST}":
            return {**request, "model": self.served}
        return request
