"""Opens the model or engine that the options name, with a spinner; pulls the default model first if it is missing."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from steermoe.cli import options as o
from steermoe.engines.auto import EngineName

if TYPE_CHECKING:
    from collections.abc import Callable

    from steermoe.discovery.embedder import RoutingSource
    from steermoe.engines.engine import Engine
    from steermoe.models.description import ModelDescription
    from steermoe.models.loading import LoadedModel


@dataclass(frozen=True)
class ModelOptions:
    """Which model is opened, in which engine, and how; `vllm` and `active_experts` as in `auto.EngineOptions`."""

    model: o.Model = None
    engine: o.Engine = "auto"
    dtype: o.Dtype = "auto"
    device_map: o.DeviceMap = None
    trust_remote_code: o.TrustRemoteCode = False
    quantize: o.Quantize = None
    compiled_steps: o.CompiledSteps = True
    vllm: dict[str, Any] = field(default_factory=dict)
    active_experts: int | None = None

    @property
    def chosen(self) -> EngineName:
        from steermoe.engines.auto import choose_engine

        return choose_engine(self.model, self.engine)

    @property
    def group(self) -> str:
        """The name of the folder of this model's vectors, which is the model's own name."""
        from steermoe.models.default.pull import DEFAULT_MODEL
        from steermoe.routing.shape import name_of

        path = Path(self.model or DEFAULT_MODEL).resolve()
        return path.stem if path.suffix.lower() == ".gguf" else name_of(path)

    def open(self) -> "Engine":
        """As `auto.open_engine`."""
        with _loading(self.model, self.chosen):
            return self.opener()()

    def opener(self) -> "Callable[[], Engine]":
        """A function that opens the engine, here or on another machine that has the model at the same path."""
        from functools import partial

        from steermoe.engines import auto

        return partial(
            auto.open_engine,
            self.model,
            self.chosen,
            auto.EngineOptions(
                dtype=self.dtype,
                device_map=self.device_map,
                trust_remote_code=self.trust_remote_code,
                quantize=self.quantize,
                compiled_steps=self.compiled_steps,
                vllm=self.vllm,
                active_experts=self.active_experts,
            ),
        )

    def load(self) -> "LoadedModel":
        """Load the model in transformers."""
        with _loading(self.model):
            from steermoe.models.loading import load

            return load(
                self.model,
                dtype=self.dtype,
                device_map=self.device_map,
                trust_remote_code=self.trust_remote_code,
                quantize=self.quantize,
            )

    def compile_later(self, runner: "Engine") -> None:
        """Have the compiled steps that a run lacked made in the background, if they can be, and say so."""
        from steermoe.cli.terminal.console import note
        from steermoe.errors import SteerMoEError

        begin: Any = getattr(runner, "compile_later", None)
        if begin is None:
            return
        names = ("model", "dtype", "device_map", "trust_remote_code", "quantize")
        try:
            has_begun = begin({name: getattr(self, name) for name in names})
        except SteerMoEError as error:  # the answer is there already
            note(f"steermoe: {error}")
            return
        if has_begun:
            note(
                "steermoe: this model's decode step is now compiled in the background, once, which takes minutes; then "
                "texts come faster (STEERMOE_COMPILE=off or --no-compiled-steps switches this off)",
                "dim",
            )

    def source(self) -> "RoutingSource":
        """Open a model whose routing can be recorded."""
        if self.engine == "vllm":
            from steermoe.errors import ModelError

            raise ModelError(
                "vLLM can't record the routing of given texts: use --engine hf, or llamacpp for a GGUF file"
            )
        opened: Any = self.open()
        return getattr(opened, "loaded", opened)


LARGE: dict[EngineName, tuple[str, ...]] = {
    "hf": ("transformers.modeling_utils", "transformers.models.auto"),
    "llamacpp": ("steermoe.engines.llamacpp.engine",),
}
"""The modules whose import takes most of the time until a model of an engine is there."""

Loaded = Annotated[ModelOptions, o.Group(without=("engine", "quantize", "compiled_steps"))]
"""For commands that need the model in transformers."""
Source = Annotated[ModelOptions, o.Group(without=("quantize", "compiled_steps"))]
"""For commands that record routing."""


@contextmanager
def _loading(model: str | None, engine: EngineName = "hf") -> Iterator[None]:
    """Pull the default model if it is needed and missing, then show a spinner."""
    from steermoe.cli.terminal.console import quiet_transformers, working
    from steermoe.models.default.pull import DEFAULT_MODEL

    if engine != "llamacpp":
        _import("transformers.utils")
        quiet_transformers()
        pull_if_needed(model)
    with working(f"Loading {model or DEFAULT_MODEL} ..."):
        for name in LARGE.get(engine, ()):
            _import(name)
        yield


def _import(name: str) -> None:
    """Import a module for the first time without the garbage collector, which leaves it alone later on too.

    Modules and classes stay until the end. Looking through them again and again while they come takes a fifth of the
    time that importing transformers takes.
    """
    if name in sys.modules:
        return
    was_on = gc.isenabled()
    gc.disable()
    try:
        import_module(name)
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


def pull_if_needed(model: str | None) -> None:
    """Pull the default model if it is needed and missing."""
    from steermoe.cli.terminal.console import note, working
    from steermoe.models.default.pull import DEFAULT_MODEL, is_pulled, pull

    if model in (None, DEFAULT_MODEL) and not is_pulled():
        note("The default model is missing: pulling and assembling it, once (about 100 MB).")
        with working("Pulling the default model ..."):
            pull()


def describe_steerable(model: str, trust_remote_code: bool) -> "ModelDescription":
    """The description of a model that can be steered.

    Raises:
        ModelError: it can't be found. UnsupportedModel: no vector can fit it.
    """
    from steermoe.cli.terminal import console
    from steermoe.errors import UnsupportedModel
    from steermoe.models.description import describe

    with console.working(f"Inspecting {model} ..."):
        description = describe(model, trust_remote_code=trust_remote_code)
    if not description.steerable:
        raise UnsupportedModel(f"'{model}' can't be steered: {description.reason}")
    return description
