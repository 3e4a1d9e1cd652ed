"""Load a checkpoint as a transformers model with its tokenizer."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steermoe.errors import ModelError
from steermoe.models.checkpoint import _locate, _natural_dtype, _parse_dtype, _why_not_loaded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from steermoe.models.quantization import Quantization
    from steermoe.routing.shape import RoutingShape


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model ready to generate.

    Attributes:
        name: what the user calls it: "smollm2-moe", a folder's name or a hub id.
    """

    name: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"

    @cached_property
    def shape(self) -> "RoutingShape":
        """What vectors and plans for it must fit."""
        from steermoe.routing.routers import shape_of

        return replace(shape_of(self.model), name=self.name)

    @property
    def context_length(self) -> int | None:
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)


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
    from transformers import AutoModelForCausalLM, AutoTokenizer

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
        loaded = AutoModelForCausalLM.from_pretrained(
            where, dtype=chosen, device_map=device_map, trust_remote_code=trust_remote_code, **weights
        )
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, **extra)
    except Exception as error:  # a damaged checkpoint can make transformers raise anything
        raise ModelError(_why_not_loaded(name, error)) from error
    find_routers(loaded)
    if quantize is not None:
        from steermoe.models.quantization import quantize_model

        quantize_model(loaded)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    return LoadedModel(name, loaded.eval(), tokenizer)
