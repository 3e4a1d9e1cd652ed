"""The memory that a model needs is known before it is loaded, and is what it then takes."""

import pytest

from steermoe.engines.hf.cache import bytes_of_a_token
from steermoe.models.needs import cache_bytes, weight_bytes
from steermoe.models.quantization import quantize_model
from tests.support import tiny_models as tiny


def stored(model):
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granitemoeshared", "gpt_oss"])
def test_int8_takes_what_was_said(family):
    import torch

    model = tiny.build(family, dtype=torch.bfloat16)
    said = weight_bytes(model, steerable=True)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert said["bfloat16"] == stored(model) - buffers == said["float32"] // 2
    quantize_model(model)
    assert said["int8"] == stored(model) - buffers < said["bfloat16"]


@pytest.mark.parametrize(
    ("family", "is_known"), [("mixtral", True), ("gpt_oss", True), ("deepseek_v3", False), ("qwen3_next", False)]
)
def test_the_cache_takes_what_was_said(family, is_known):
    model = tiny.build(family)
    said = cache_bytes(model.config, tokens=1)
    assert said == (bytes_of_a_token(model) // 2 if is_known else None)
