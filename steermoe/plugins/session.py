"""A model that stays open between prompts, with the vectors that they ask for. Knows no other program.

Texts may be asked for from any thread; a vector that the model lacks is built on the thread that asks for it, so that
Ctrl-C interrupts the work and nothing of it is lost.
"""

import atexit
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steermoe.discovery.packaged import is_packaged, language_of
from steermoe.engines import auto
from steermoe.evaluation.provision import Watcher, Wish, check_there, known_file, lacking, provide
from steermoe.models.default.pull import DEFAULT_MODEL, is_pulled, pull
from steermoe.serving.live import Limits, LiveEngine
from steermoe.steering.resolver import PlanResolver, check_spec, names_of
from steermoe.steering.spec import NO_DOMAIN, SteeringSpec

if TYPE_CHECKING:
    from steermoe.engines.engine import Engine
    from steermoe.engines.messages import Chat, Message
    from steermoe.engines.request import Request
    from steermoe.models.quantization import Quantization
    from steermoe.serving.ticket import Ticket
    from steermoe.steering.plans import SteeringPlan

ROWS, LLAMACPP_ROWS = 4, 1
"""Texts that are generated together; further ones wait. All of llama.cpp's cache is allocated at the start."""


@dataclass(frozen=True)
class Opening:
    """Which model is opened, and how; as for `auto.open_engine` and `auto.EngineOptions`.

    Attributes:
        active_experts: of all texts, for llama.cpp; elsewhere None, as each text can have its own number.
    """

    model: str = DEFAULT_MODEL
    engine: auto.EngineName = "auto"
    quantize: "Quantization | None" = None
    trust_remote_code: bool = False
    active_experts: int | None = None

    @property
    def chosen(self) -> auto.EngineName:
        """As `auto.choose_engine`."""
        return auto.choose_engine(self.model, self.engine)


@dataclass(frozen=True)
class Vectors:
    """Where vectors are looked for.

    Attributes:
        folder: one to search first.
        may_build: whether a packaged domain that the model lacks is built and calibrated.
    """

    folder: Path | None = None
    may_build: bool = True

    def check(self, spec: SteeringSpec) -> None:
        """As `resolver.check_spec`: raise what is wrong with a spec for any model, before one is loaded."""
        check_spec(spec, self.folder, lambda domain: self.may_build and is_packaged(domain))


class Session:
    """An open model.

    Args:
        opening: which one. The default model is pulled if it is missing.
        watcher: shows what is done.

    Raises:
        ModelError: the engine or the model is not available. UnsupportedModel: the model has no routers.
    """

    def __init__(self, opening: Opening, watcher: Watcher) -> None:
        if opening.chosen != "llamacpp":
            _quiet()
            if opening.model == DEFAULT_MODEL and not is_pulled():
                watcher.note("steermoe: the default model is missing: pulling and assembling it, once (about 100 MB)")
                pull()
        self._watcher = watcher
        self._lock = threading.Lock()
        self._live: LiveEngine | None = None
        options = auto.EngineOptions(
            quantize=opening.quantize,
            trust_remote_code=opening.trust_remote_code,
            active_experts=opening.active_experts,
        )
        self.engine: Engine = auto.open_engine(opening.model, opening.chosen, options)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.engine.name

    def plan(self, spec: SteeringSpec, vectors: Vectors, text: str) -> "SteeringPlan | None":
        """The plan of a spec, after building the vectors that the model lacks.

        Args:
            spec: what was asked for.
            vectors: where they are.
            text: the prompt, whose language decides from which texts a vector is built.

        Raises:
            SteerMoEError: a vector is missing and may not be built, or the plan does not fit the model.
        """
        if not spec.is_unsteered and spec.strength != 0:
            self.engine.tags.check(spec.positions, spec.think_tags)
        wish = Wish(tuple(names_of(spec)), language_of(text), vectors.folder)
        given = self._files(wish, vectors.may_build)
        return PlanResolver(self.engine.shape, vectors.folder, given=given).plan(spec)

    def _files(self, wish: Wish, may_build: bool) -> dict[str, Path]:
        """The files of vectors that were built on demand, now or earlier."""
        source: Any = getattr(self.engine, "loaded", self.engine)
        if not may_build:
            check_there(source.shape, wish)
        elif lacking(source.shape, wish):
            with self._lock:
                self.close()
                return provide(source, wish, self._watcher)
        return known_file(source.shape, wish)

    def chat(self, messages: "tuple[Message, ...]", thinking: bool | None) -> "Chat":
        """As `Engine.chat`."""
        with self._lock:
            return self._running().chat(messages, thinking)

    def submit(self, request: "Request") -> "Ticket":
        """Begin a text.

        Raises:
            GenerationError, SteeringError: the request can't be run.
        """
        request.require_steered()
        with self._lock:
            (ticket,) = self._running().submit([request])
        return ticket

    def _running(self) -> LiveEngine:
        """The live engine; to be called with the lock."""
        if self._live is None:
            self._live = LiveEngine(self.engine, Limits(ROWS if hasattr(self.engine, "loaded") else LLAMACPP_ROWS))
            atexit.register(self._live.close, 0)
        return self._live

    def close(self) -> None:
        """End the live engine, once the texts that it generates are finished; the next text starts another one."""
        if self._live is not None:
            self._live.close()
            atexit.unregister(self._live.close)
            self._live = None


def _quiet() -> None:
    """Keep the progress bars of transformers off the terminal."""
    from transformers.utils import logging

    logging.disable_progress_bar()


class Sessions:
    """The open models of this process; each is opened once.

    Args:
        watcher: shows what is done.
    """

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._lock = threading.Lock()
        self._open: dict[Opening, Session] = {}

    def of(self, opening: Opening, spec: SteeringSpec) -> Session:
        """The session of a model, opened if it is not open yet.

        Args:
            opening: which model.
            spec: what steers the text; llama.cpp opens a model with the number of experts that it asks for.

        Raises:
            ModelError, UnsupportedModel: as `Session`.
        """
        if opening.chosen == "llamacpp" and spec.domain != (NO_DOMAIN,):
            opening = replace(opening, active_experts=spec.active_experts)
        with self._lock:
            if opening not in self._open:
                self._open[opening] = Session(opening, self._watcher)
            return self._open[opening]
