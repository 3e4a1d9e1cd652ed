"""Load a checkpoint as a transformers model with its tokenizer."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steermoe.errors import ModelError, UnsupportedModel
from steermoe.models.checkpoint import (
    _auto_class,
    _locate,
    _natural_dtype,
    _parse_dtype,
    _why_not_loaded,
    _why_not_run,
    load_tokenizer,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from steermoe.models.quantization import Quantization
    from steermoe.routing.shape import RoutingShape


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model ready to generate.

    Attributes:
        name: what the user calls it: "smollm2-moe", a folder's name or a hub id.
        source: its folder, GGUF file or hub id; "" if unknown.
    """

    name: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    source: str = ""

    @cached_property
    def shape(self) -> "RoutingShape":
        """What vectors and plans for it must fit.

        The fingerprint is that of the source where the loaded weights need not be its numbers.
        """
        import torch

        from steermoe.models.stored import stored_fingerprint
        from steermoe.routing.routers import find_routers, gates_of, language_model, shape_of

        shape = replace(shape_of(self.model), name=self.name)
        is_gguf, is_rounded = self.source.endswith(".gguf"), self.model.dtype == torch.float16
        if not self.source or not (is_gguf or is_rounded or not shape.fingerprint):
            return shape
        stored = stored_fingerprint(self.source, gates_of(find_routers(language_model(self.model))))
        return replace(shape, fingerprint=stored if is_gguf else stored or shape.fingerprint)

    @property
    def device(self) -> "torch.device":
        """Where it takes its tokens: the device of its weights, or the one that offloaded weights are moved to."""
        return input_device(self.model)

    @property
    def context_length(self) -> int | None:
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)


def input_device(model: Any) -> "torch.device":
    """The device that a model's inputs belong on, also if its first weights are offloaded, so that they are nowhere."""
    import torch

    from steermoe.routing.weights import hooks_of

    if model.device.type != "meta":
        return model.device
    found = (getattr(hook, "execution_device", None) for module in model.modules() for hook in hooks_of(module))
    return torch.device(next((device for device in found if device is not None), "cpu"))


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
        dtype: name of a torch dtype; "auto" takes the checkpoint's, or float32 for small models if bfloat16 is slow.
        device_map: as in transformers; by default "auto" if there is a GPU.
        trust_remote_code: run model code that comes with the checkpoint.
        quantize: "int8" for weights of that type, on a CPU.

    Raises:
        ModelError: it can't be found or loaded. UnsupportedModel: it has no routers.
    """
    import torch
    from transformers import AutoConfig

    from steermoe.routing.routers import find_routers

    if device_map is not None and device_map.partition(":")[0] == "meta":
        raise ModelError(f"device_map '{device_map}' keeps no weights, so nothing can be computed: use auto or cpu")
    name, where, extra = _locate(model)
    if device_map is None and torch.accelerator.is_available():
        device_map = "auto"
    chosen: Any = _parse_dtype(dtype) if dtype != "auto" else _natural_dtype(where, device_map)
    weights = dict(extra)
    if "gguf_file" in extra:
        from transformers import GgufConfig

        weights["quantization_config"] = GgufConfig(dequantize=True)
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, **extra)
        if wrong := _why_not_run(config):
            raise UnsupportedModel(f"'{name}' ({config.model_type}) can't be run by steermoe: {wrong}")
        loaded = _auto_class(config).from_pretrained(
            where, dtype=chosen, device_map=device_map, trust_remote_code=trust_remote_code, **weights
        )
    except UnsupportedModel:
        raise
    except Exception as error:  # a damaged checkpoint can make transformers raise anything
        raise ModelError(_why_not_loaded(name, error, where)) from error
    find_routers(loaded)
    tokenizer = load_tokenizer(name, where, trust_remote_code, **extra)
    if quantize is not None:
        from steermoe.models.quantization import quantize_model

        quantize_model(loaded)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    source = str(Path(where) / extra["gguf_file"]) if "gguf_file" in extra else where
    return LoadedModel(name, loaded.eval(), tokenizer, source)


def try_remote_code(loaded: LoadedModel) -> None:
    """Generate two tokens with code that came with a checkpoint: if it is outdated, that is known before long work.

    Raises:
        ModelError: it does not run.
    """
    import torch

    model: Any = loaded.model
    if not type(model).__module__.startswith("transformers_modules"):
        return
    ids = torch.zeros(1, 2, dtype=torch.long, device=loaded.device)
    try:
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    except Exception as error:  # foreign code can raise anything
        raise ModelError(_why_not_loaded(loaded.name, error, model.config.name_or_path)) from error
