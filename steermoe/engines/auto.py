"""Choose the engine that runs a model, and open it. Imports an engine only once it is chosen.

A GGUF file of a Mixture-of-Experts model runs in llama.cpp if that is installed, everything else in transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from steermoe.errors import ModelError, UnsupportedModel

if TYPE_CHECKING:
    from steermoe.engines.engine import Engine
    from steermoe.models.quantization import Quantization

EngineName = Literal["auto", "hf", "llamacpp", "vllm"]

LIBRARIES = ("llama_cpp", "numba")
"""What the llamacpp engine needs in addition to steermoe's own dependencies."""


def choose_engine(model: str | Path | None, engine: EngineName = "auto") -> EngineName:
    """The engine that will run a model: "hf" or "llamacpp".

    Raises:
        ModelError: llama.cpp is asked for but not installed, or the model is not a GGUF file.
    """
    if engine == "hf":
        return "hf"
    if engine == "vllm":
        require_vllm()
        return "vllm"
    is_gguf = model is not None and Path(model).suffix.lower() == ".gguf"
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if engine == "llamacpp":
        if not is_gguf:
            raise ModelError(
                f"llama.cpp runs .gguf files, not '{model or 'smollm2-moe'}': make one with `steermoe models export "
                "--gguf q8_0`, or use --engine hf"
            )
        if missing:
            raise ModelError(
                f"--engine llamacpp needs {' and '.join(missing)}: pip install 'steermoe[llamacpp]' (which compiles "
                "llama.cpp, about 6 minutes on 2 cores), or use --engine hf"
            )
        return "llamacpp"
    if not is_gguf or missing:
        return "hf"
    from steermoe.models.gguf.header import is_moe

    return "llamacpp" if is_moe(str(model)) else "hf"


def require_vllm() -> None:
    """Raise ModelError if vLLM is not installed."""
    if find_spec("vllm") is None:
        raise ModelError(
            "vLLM is not installed: pip install 'steermoe[vllm]' on a machine with a GPU, `make vllm` in a checkout "
            "for CPUs (docs/serve.md), or use --engine hf"
        )


def with_hint(error: ModelError, model: str | Path | None) -> ModelError:
    """The error of a GGUF file that transformers can't run: what is damaged in it, or a hint at llama.cpp.

    Any other error is returned unchanged.
    """
    if model is None or Path(model).suffix.lower() != ".gguf":
        return error
    from steermoe.models.gguf.header import read_gguf

    try:
        read_gguf(model)
    except UnsupportedModel:
        return error
    except ModelError as damage:
        return damage
    if all(find_spec(name) for name in LIBRARIES):
        return error
    return ModelError(f"{error}; transformers tried it, llama.cpp can run it: pip install 'steermoe[llamacpp]'")


@dataclass(frozen=True)
class EngineOptions:
    """How a model is opened. An engine refuses options that only another engine supports.

    Attributes:
        dtype: as in `loading.load`; for llama.cpp, the GGUF file determines it.
        device_map: as in `loading.load`, for transformers.
        trust_remote_code: as in `loading.load`.
        quantize: as in `loading.load`, for transformers.
        compiled_steps: `compiled` of `HFEngine`.
        vllm: further arguments of `VLLMEngine`, for example `tensor_parallel_size`.
        active_experts: as in `LlamaCppEngine`; other engines read it from each plan.
    """

    dtype: str = "auto"
    device_map: str | None = None
    trust_remote_code: bool = False
    quantize: "Quantization | None" = None
    compiled_steps: bool = True
    vllm: Mapping[str, Any] = field(default_factory=dict)
    active_experts: int | None = None


def open_engine(
    model: str | Path | None = None, engine: EngineName = "auto", options: EngineOptions | None = None
) -> "Engine":
    """Load a model into the engine that `choose_engine` names.

    Args:
        model: as in `loading.load`.
        engine: "auto", "hf", "llamacpp" or "vllm".
        options: by default those of `EngineOptions`.

    Raises:
        ModelError: the engine or the model is not available. UnsupportedModel: the model has no routers.
    """
    options = options or EngineOptions()
    chosen = choose_engine(model, engine)
    if options.vllm and chosen != "vllm":
        given = ", ".join(f"--{name.replace('_', '-').replace('compiled', 'compile')}" for name in options.vllm)
        raise ModelError(f"{given} need --engine vllm")
    if options.quantize is not None and chosen != "hf":
        raise ModelError(f"--quantize belongs to --engine hf: {chosen} uses the weights as they are in the checkpoint")
    match chosen:
        case "vllm":
            return _open_vllm(None if model is None else str(model), options)
        case "llamacpp":
            return _open_llamacpp(str(model), options)
        case _:
            return _open_hf(model, options)


def _open_vllm(model: str | None, options: EngineOptions) -> "Engine":
    if options.device_map is not None:
        raise ModelError("--device-map belongs to --engine hf: vLLM has --tensor-parallel-size instead")
    from steermoe.engines.vllm.engine import VLLMEngine

    return VLLMEngine(model, dtype=options.dtype, trust_remote_code=options.trust_remote_code, **options.vllm)


def _open_hf(model: str | Path | None, options: EngineOptions) -> "Engine":
    from steermoe.engines.hf.engine import HFEngine
    from steermoe.models.loading import load

    try:
        loaded = load(
            model,
            dtype=options.dtype,
            device_map=options.device_map,
            trust_remote_code=options.trust_remote_code,
            quantize=options.quantize,
        )
    except ModelError as error:
        raise with_hint(error, model) from error
    return HFEngine(loaded, options.compiled_steps)


def _open_llamacpp(model: str, options: EngineOptions) -> "Engine":
    if options.dtype != "auto" or options.device_map is not None:
        raise ModelError("--dtype and --device-map belong to --engine hf: llama.cpp uses the types in the file")
    from steermoe.engines.llamacpp.engine import LlamaCppEngine

    return LlamaCppEngine(model, active_experts=options.active_experts)
