"""The memory that a model needs, from its configuration: its weights by their type, and its attention cache."""

from collections.abc import Collection
from typing import Any

from torch import nn

WIDTHS = {"float32": 4, "bfloat16": 2}
"""Bytes of a number."""
LATENT = ("kv_lora_rank", "mamba_d_state", "ssm_state_size", "conv_L_cache", "linear_num_value_heads")
"""Settings of models whose cache is not keys and values of all heads in all layers."""
ATTENDING = {"full_attention", "sliding_attention", "chunked_attention", "attention"}


def weight_bytes(model: nn.Module, *, steerable: bool) -> dict[str, int]:
    """Bytes of a model's weights by type; the model may be on the meta device.

    int8 is what `--quantize int8` makes of bfloat16; only models with routers have it.
    """
    numbers = sum(parameter.numel() for parameter in model.parameters())
    found = {name: numbers * width for name, width in WIDTHS.items()}
    if steerable:
        from steermoe.models.quantization import int8_bytes

        found["int8"] = int8_bytes(model, WIDTHS["bfloat16"])
    return found


def cache_bytes(config: Any, tokens: int = 1000) -> int | None:
    """Bytes of the keys and values of `tokens` tokens in bfloat16, at most; None for other kinds of caches.

    Args:
        config: the part of a configuration that describes the text model.
        tokens: how many tokens a text has.
    """
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int):
        return None
    if getattr(config, "is_heterogeneous", False):
        numbers = [_numbers(one) for one in config.per_layer_config]
    else:
        numbers = [_numbers(config)] * layers
    return None if None in numbers else sum(filter(None, numbers)) * tokens * WIDTHS["bfloat16"]


def _numbers(config: Any) -> int | None:
    """Numbers that a token has in the cache of one layer; None if they are not keys and values of its heads."""
    kinds: Collection[str] = getattr(config, "layer_types", None) or ()
    if any(getattr(config, name, None) for name in LATENT) or not ATTENDING.issuperset(kinds):
        return None
    heads = getattr(config, "num_attention_heads", None)
    pairs = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
    return 2 * pairs * size if isinstance(pairs, int) and isinstance(size, int) else None
