"""Open the model or engine that the options name, with a spinner; pull the default model first if it isn't here."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steermoe.engines.auto import EngineName

if TYPE_CHECKING:
    from collections.abc import Callable

    from steermoe.discovery.embedder import RoutingSource
    from steermoe.engines.engine import Engine as RunningEngine
    from steermoe.models.loading import LoadedModel
    from steermoe.models.quantization import Quantization


@dataclass(frozen=True)
class EngineOptions:
    """What decides which engine is opened, and how; `vllm` as in `opening.open_engine`."""

    model: str | None
    engine: EngineName
    dtype: str
    device_map: str | None
    trust_remote_code: bool
    quantize: "Quantization | None" = None
    compiled_steps: bool = True
    vllm: dict[str, Any] = field(default_factory=dict)

    @property
    def chosen(self) -> EngineName:
        from steermoe.engines.auto import choose_engine

        return choose_engine(self.model, self.engine)

    @property
    def takes_accelerators(self) -> bool:
        return self.chosen != "llamacpp" and self.device_map != "cpu"

    def open(self) -> "RunningEngine":
        """As `opening.open_engine`, with a spinner; the default model is pulled first if it isn't here."""
        from steermoe.cli.terminal.console import quiet_transformers, working
        from steermoe.models.default.pull import DEFAULT_MODEL

        if self.chosen != "llamacpp":
            quiet_transformers()
            pull_if_needed(self.model)
        with working(f"Loading {self.model or DEFAULT_MODEL} ..."):
            return self.opener()()

    def opener(self) -> "Callable[[], RunningEngine]":
        """Opens the engine, here or in a process on another machine that has the model at the same place."""
        from functools import partial

        from steermoe.engines import auto

        return partial(
            auto.open_engine,
            self.model,
            self.chosen,
            dtype=self.dtype,
            device_map=self.device_map,
            trust_remote_code=self.trust_remote_code,
            quantize=self.quantize,
            compiled_steps=self.compiled_steps,
            vllm=self.vllm,
        )

    def repeatable(self) -> "EngineOptions":
        """The same with dtype "auto" read as `models.repeatable_dtype` does, where the model has no other."""
        from steermoe.models.checkpoint import repeatable_dtype

        if self.dtype != "auto" or self.chosen == "llamacpp" or self.device_map is not None:
            return self
        pull_if_needed(self.model)
        return replace(self, dtype=repeatable_dtype(self.model))

    def beside_actors(self) -> "EngineOptions":
        """For a process that only looks at the model: transformers' stays in main memory."""
        return replace(self, device_map="cpu") if self.chosen == "hf" else self

    def for_actors(self) -> "EngineOptions":
        """For processes with other working folders."""
        if self.model is None or not Path(self.model).exists():
            return self
        return replace(self, model=str(Path(self.model).absolute()))


def parallel_sizes(tensor: int, pipeline: int, data: int) -> dict[str, int]:
    """The arguments of `VLLMEngine` for those that are more than one."""
    sizes = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline, "data_parallel_size": data}
    return {name: size for name, size in sizes.items() if size > 1}


def pull_if_needed(model: str | None) -> None:
    """Pull the default model if it is meant and isn't here."""
    from steermoe.cli.terminal.console import err, working
    from steermoe.models.default.pull import DEFAULT_MODEL, is_pulled, pull

    if model in (None, DEFAULT_MODEL) and not is_pulled():
        err.print("The default model is not here yet; it is pulled and assembled once (about 100 MB).")
        with working("Pulling the default model ..."):
            pull()


def open_source(
    model: str | None, engine: EngineName, dtype: str, device_map: str | None, trust_remote_code: bool
) -> "RoutingSource":
    """A model to record routing of, opened likewise."""
    if engine == "vllm":
        from steermoe.errors import ModelError

        raise ModelError(
            "vLLM records no routing of texts that are given: use --engine hf, or llamacpp for a GGUF file"
        )
    opened: Any = EngineOptions(model, engine, dtype, device_map, trust_remote_code).open()
    return getattr(opened, "loaded", opened)


def load_model(
    model: str | None,
    dtype: str,
    device_map: str | None,
    trust_remote_code: bool,
    *,
    quantize: "Quantization | None" = None,
) -> "LoadedModel":
    """Load with a spinner; the default model is pulled first if it isn't here."""
    from steermoe.cli.terminal.console import quiet_transformers, working
    from steermoe.models import loading
    from steermoe.models.default.pull import DEFAULT_MODEL

    quiet_transformers()
    pull_if_needed(model)
    with working(f"Loading {model or DEFAULT_MODEL} ..."):
        return loading.load(
            model, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code, quantize=quantize
        )
