"""Load a model with its tokenizer, assemble the default one, and describe any checkpoint without its weights."""

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steermoe.default_model import spec
from steermoe.errors import ModelError, UnsupportedModel
from steermoe.vectors import VectorInfo

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from steermoe.quantization import Quantization
    from steermoe.vectors import SteeringVector

DEFAULT_MODEL = spec.NAME
SAMPLED_BYTES = 32
"""Of each tensor of a checkpoint, what its fingerprint looks at."""
SMALL_CHECKPOINT_BYTES = 4 * 2**30
"""Up to this size a bfloat16 checkpoint is run in float32 on processors that compute bfloat16 slowly."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model ready to generate.

    Attributes:
        name: what the user calls it: "smollm2-moe", a folder's name or a hub id.
    """

    name: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"

    @property
    def context_length(self) -> int | None:
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)


@dataclass(frozen=True)
class ModelDescription:
    """What steermoe sees of a checkpoint: counts of the whole model, and of what would be steered.

    Attributes:
        scoring: how the router turns logits into weights, "softmax" or "sigmoid".
        shared_experts: whether every token also passes a shared expert.
        moe_layers: decoder layers that have a router.
        experts, top_k: of each router; several values where layers differ.
        parameters: of the whole model, all experts counted.
    """

    name: str
    architecture: str
    model_class: str
    layers: int | None
    moe_layers: tuple[int, ...]
    experts: tuple[int, ...]
    top_k: tuple[int, ...]
    scoring: str
    shared_experts: bool
    router_class: str
    parameters: int
    steerable: bool
    reason: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def vector_info(self) -> VectorInfo:
        """What a vector for this model says of it."""
        top_k = self.top_k[0] if len(self.top_k) == 1 else None
        return VectorInfo(model=self.name, architecture=self.architecture, top_k=top_k)

    def check_fits(self, vector: "SteeringVector") -> None:
        """As `SteeringVector.check_fits`, without loading the model."""
        vector.check_fits(self.moe_layers, self.experts, self.name, self.architecture)


def cache_folder() -> Path:
    """Where models are kept: $STEERMOE_CACHE, or the user's cache folder."""
    from platformdirs import user_cache_path

    return Path(os.environ["STEERMOE_CACHE"]) if os.environ.get("STEERMOE_CACHE") else user_cache_path("steermoe")


def default_model_folder() -> Path:
    """Where the default model is, or will be once it is pulled. Another trained part makes another folder."""
    return cache_folder() / "models" / f"{spec.NAME}-{trained_part_version()}"


def trained_part_version() -> str:
    """First digits of the trained part's sha256, so that an upgraded package never runs yesterday's model.

    Raises:
        ModelError: the package came without it.
    """
    import hashlib

    try:
        return hashlib.sha256(spec.TRAINED_PART.read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise ModelError(f"can't read the trained part '{spec.TRAINED_PART}': install steermoe again") from error


def is_pulled() -> bool:
    return (default_model_folder() / "config.json").is_file()


def pull(base: Path | str | None = None, force: bool = False) -> Path:
    """Assemble the default model in the cache and return its folder; does nothing if it is there.

    Args:
        base: where the dense base already is (GGUF file, folder, hub id); by default it is downloaded.
        force: assemble it anew.

    Raises:
        ModelError: the base can't be had, or the cache can't be written. What was there before stays.
    """
    from steermoe.default_model.assemble import assemble
    from steermoe.default_model.base import fetch

    folder = default_model_folder()
    if is_pulled() and not force:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder.parent) as scratch:
            source = base if base is not None else fetch(Path(scratch))
            made = Path(scratch) / folder.name
            assemble(source, made)
            shutil.rmtree(folder, ignore_errors=True)
            made.replace(folder)
    except OSError as error:
        raise ModelError(
            f"can't write the model to '{folder.parent}' ({error}); set STEERMOE_CACHE to another folder"
        ) from error
    return folder


def load(
    model: str | Path | None = None,
    *,
    dtype: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
    quantize: "Quantization | None" = None,
) -> LoadedModel:
    """Load a model and its tokenizer with transformers.

    Args:
        model: the default model if None; else a checkpoint folder, a GGUF file, or a hub id.
        dtype: torch dtype by name; "auto" takes the checkpoint's, or float32 for small models where bfloat16 is slow.
        device_map: as in transformers; by default "auto" where there is an accelerator.
        trust_remote_code: run model code that comes with the checkpoint.
        quantize: "int8" for weights of that type, on a CPU.

    Raises:
        ModelError: it can't be found or loaded. UnsupportedModel: it has no routers.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from steermoe.routers import find_routers

    name, where, extra = _locate(model)
    if device_map is None and torch.accelerator.is_available():
        device_map = "auto"
    chosen: Any = _parse_dtype(dtype) if dtype != "auto" else _natural_dtype(where, device_map)
    weights = dict(extra)
    if "gguf_file" in extra:
        from transformers import GgufConfig

        weights["quantization_config"] = GgufConfig(dequantize=True)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            where, dtype=chosen, device_map=device_map, trust_remote_code=trust_remote_code, **weights
        )
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, **extra)
    except Exception as error:  # a damaged checkpoint can make transformers raise anything
        raise ModelError(_why_not_loaded(name, error)) from error
    find_routers(loaded)
    if quantize is not None:
        from steermoe.quantization import quantize_model

        quantize_model(loaded)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    return LoadedModel(name, loaded.eval(), tokenizer)


@dataclass(frozen=True)
class Source:
    """A checkpoint that another library than transformers loads.

    Attributes:
        name: as of `LoadedModel`.
        folder: where it is, or its hub id.
        dtype: torch dtype by name, or "auto".
    """

    name: str
    folder: str
    dtype: str

    def tokenizer(self, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
        """Its tokenizer.

        Raises:
            ModelError: it has none that can be loaded.
        """
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=trust_remote_code)
        except Exception as error:  # a damaged checkpoint can make transformers raise anything
            raise ModelError(_why_not_loaded(self.name, error)) from error

    def end_tokens(self, tokenizer: "PreTrainedTokenizerBase") -> set[int]:
        """Tokens that end a text, as its generation configuration says, else its tokenizer."""
        from transformers import GenerationConfig

        try:
            end = GenerationConfig.from_pretrained(self.folder).eos_token_id
        except OSError:
            end = None
        end = tokenizer.eos_token_id if end is None else end
        return set(end) if isinstance(end, list | tuple) else {end} - {None}

    def fingerprint(self) -> str:
        """Tells the checkpoint from others of its name: its configuration, and a few bytes of every tensor."""
        import hashlib

        digest = hashlib.sha256(self.name.encode())
        if not Path(self.folder).is_dir():
            return digest.hexdigest()  # of the hub, where names do not change hands
        digest.update((Path(self.folder) / "config.json").read_bytes())
        for path in sorted(Path(self.folder).glob("*.safetensors")):
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = file.read(length)
                digest.update(header)
                for name, entry in sorted(json.loads(header).items()):
                    if name != "__metadata__":
                        file.seek(8 + length + entry["data_offsets"][0])
                        digest.update(file.read(SAMPLED_BYTES))
        return digest.hexdigest()


def find_source(model: str | Path | None = None, dtype: str = "auto") -> Source:
    """Find a checkpoint without loading it; arguments as for `load`.

    Raises:
        ModelError: there is none, or it is a GGUF file, which only transformers and llama.cpp read.
    """
    import torch

    name, where, extra = _locate(model)
    if extra:
        raise ModelError(f"'{model}' is a GGUF file: run it with --engine llamacpp or --engine hf")
    device = "auto" if torch.accelerator.is_available() else None
    chosen = _parse_dtype(dtype) if dtype != "auto" else _natural_dtype(where, device)
    return Source(name, where, str(chosen).removeprefix("torch."))


def _locate(model: str | Path | None) -> tuple[str, str, dict[str, str]]:
    """Name, what transformers should load, and its extra arguments."""
    if model is None or str(model) == DEFAULT_MODEL:
        if not is_pulled():
            raise ModelError("the default model is not here yet: run `steermoe models pull` (once, about 100 MB)")
        return DEFAULT_MODEL, str(default_model_folder()), {}
    path = Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"no GGUF file '{path}'")
        return path.stem, str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"folder '{path}' holds no model: it has no config.json")
        return path.resolve().name, str(path), {}
    if path.is_absolute() or str(model).startswith(".") or str(model).count("/") > 1:
        raise ModelError(f"no model at '{model}': give a checkpoint folder, a .gguf file, or a hub id")
    return str(model), str(model), {}


def _parse_dtype(name: str) -> Any:
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"dtype '{name}' is unknown: use auto, float32, bfloat16 or float16")
    return found


def _natural_dtype(where: str, device_map: str | None) -> Any:
    """The checkpoint's own dtype, but float32 for a small one where bfloat16 products are emulated."""
    import torch

    if device_map is not None or torch.cpu._is_avx512_bf16_supported():
        return "auto"
    return torch.float32 if Path(where).is_dir() and _weight_bytes(where) <= SMALL_CHECKPOINT_BYTES else "auto"


def repeatable_dtype(model: str | Path | None) -> str:
    """The dtype under which a text is the same in any batch: float32 for a small model on a CPU, else "auto".

    In bfloat16 logits change in their third digit with the number of rows, and a sampled text soon goes another way.

    Raises:
        ModelError: there is no such model.
    """
    import torch

    _, where, _ = _locate(model)
    is_small = 0 < _weight_bytes(where) <= SMALL_CHECKPOINT_BYTES
    return "float32" if is_small and not torch.accelerator.is_available() else "auto"


def _weight_bytes(where: str) -> int:
    """Of the weight files in a folder; 0 if it is none."""
    return sum(file.stat().st_size for file in Path(where).glob("*.safetensors")) if Path(where).is_dir() else 0


def _why_not_loaded(name: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return f"'{name}' brings its own model code: pass --trust-remote-code if you trust it"
    if isinstance(error, OSError) and ("offline" in text.lower() or "connect" in text.lower() or "not a local" in text):
        return f"can't find '{name}', neither as a folder nor on the hub: check the name and the connection"
    return f"can't load '{name}': {text[:300]}"


def describe(model: str | Path | None = None, *, trust_remote_code: bool = False) -> ModelDescription:
    """Describe a checkpoint from its configuration alone, whatever its size: no weights are loaded.

    Raises:
        ModelError: there is no such checkpoint, or its configuration can't be built.
    """
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from steermoe.routers import find_routers, scoring

    name, where, extra = _locate(model)
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, **extra)
        causal = type(config) in AutoModelForCausalLM._model_mapping or trust_remote_code
        factory = AutoModelForCausalLM if causal else AutoModel
        with torch.device("meta"):
            built = factory.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged checkpoint can make transformers raise anything
        raise ModelError(_why_not_loaded(name, error)) from error
    text = config.get_text_config()
    try:
        routers, reason = find_routers(built), "its routers' logits are changed before top-k"
    except UnsupportedModel as error:
        routers, reason = [], str(error)
    return ModelDescription(
        name=name,
        architecture=built.config.model_type,
        model_class=type(built).__name__,
        layers=getattr(text, "num_hidden_layers", None),
        moe_layers=tuple(router.layer for router in routers),
        experts=tuple(sorted({router.num_experts for router in routers})),
        top_k=tuple(sorted({router.top_k for router in routers})),
        scoring=scoring(routers[0].module, text) if routers else "",
        shared_experts=any("shared_expert" in n or "shared_mlp" in n for n, _ in built.named_modules()),
        router_class=type(routers[0].module).__name__ if routers else "",
        parameters=sum(parameter.numel() for parameter in built.parameters()),
        steerable=bool(routers),
        reason=reason,
    )
