"""Assemble the default model: the dense base's weights as shared experts, the trained part as routed experts beside
them.

Sparse upcycling (Komatsuzaki et al., 2212.05055) into GraniteMoeShared: each dense feed-forward block becomes the
shared expert, which every token passes through; small routed experts are added to it. While their down projections are
zero the result is bit-identical to the base.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from steermoe.models.default import spec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GraniteMoeSharedForCausalLM, LlamaForCausalLM

    TrainedPart = dict[str, Tensor]


def upcycle(base: "LlamaForCausalLM") -> "GraniteMoeSharedForCausalLM":
    """The base as a mixture of experts whose routed experts and routers are all zero."""
    import torch
    from transformers import GraniteMoeSharedConfig, GraniteMoeSharedForCausalLM
    from transformers.initialization import no_init_weights

    dense = base.config
    head_dim = dense.hidden_size // dense.num_attention_heads
    config = GraniteMoeSharedConfig(
        vocab_size=dense.vocab_size,
        hidden_size=dense.hidden_size,
        intermediate_size=spec.EXPERT_WIDTH,
        shared_intermediate_size=dense.intermediate_size,
        num_hidden_layers=dense.num_hidden_layers,
        num_attention_heads=dense.num_attention_heads,
        num_key_value_heads=dense.num_key_value_heads,
        max_position_embeddings=dense.max_position_embeddings,
        rms_norm_eps=dense.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        bos_token_id=dense.bos_token_id,
        eos_token_id=dense.eos_token_id,
        pad_token_id=dense.pad_token_id,
        attention_multiplier=head_dim**-0.5,
        num_local_experts=spec.NUM_EXPERTS,
        num_experts_per_tok=spec.TOP_K,
        initializer_range=dense.initializer_range,
        dtype=base.dtype,
    )
    with no_init_weights():  # every weight is set below
        model = GraniteMoeSharedForCausalLM._from_config(config, dtype=base.dtype).eval()
    dense_weights = base.state_dict()
    weights = {}
    for name, tensor in dense_weights.items():
        if name.endswith("mlp.gate_proj.weight"):
            up = dense_weights[name.replace("gate_proj", "up_proj")]
            weights[name.replace("mlp.gate_proj", "shared_mlp.input_linear")] = torch.cat([tensor, up])
        elif name.endswith("mlp.down_proj.weight"):
            weights[name.replace("mlp.down_proj", "shared_mlp.output_linear")] = tensor
        elif not name.endswith("mlp.up_proj.weight"):
            weights[name] = tensor
    for name, tensor in model.state_dict().items():
        if "block_sparse_moe" in name:
            weights[name] = torch.zeros_like(tensor)
    model.load_state_dict(weights)
    return model


def pack(model: "GraniteMoeSharedForCausalLM") -> "TrainedPart":
    """The trained part of a model as it is stored: routers in bfloat16, experts in int8 with one scale per row."""
    import torch

    stored: TrainedPart = {}
    for number, layer in enumerate(model.model.layers):
        moe = layer.block_sparse_moe
        stored[f"{number}.router"] = moe.router.weight.detach().to(torch.bfloat16).contiguous()
        if number < spec.FIRST_EXPERT_LAYER:
            continue
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(moe.experts, name).detach().float()
            scale = (weight.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)
            stored[f"{number}.{name}"] = (weight / scale).round().to(torch.int8).contiguous()
            stored[f"{number}.{name}.scale"] = scale.contiguous()
    return stored


def unpack(stored: "TrainedPart", model: "GraniteMoeSharedForCausalLM") -> None:
    """Write a stored trained part into an upcycled model, in place."""
    import torch

    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            moe = layer.block_sparse_moe
            moe.router.weight.copy_(stored[f"{number}.router"])
            if number >= spec.FIRST_EXPERT_LAYER:
                for name in ("gate_up_proj", "down_proj"):
                    weight = stored[f"{number}.{name}"].float() * stored[f"{number}.{name}.scale"]
                    getattr(moe.experts, name).copy_(weight)


def assemble(source: Path | str, folder: Path, trained_part: Path = spec.TRAINED_PART) -> None:
    """Write the default model, weights and tokenizer, as a checkpoint into `folder`.

    Args:
        source: the dense base: a GGUF file, a checkpoint folder or a hub id (`base.fetch` gives one).
        folder: where to write; created if necessary.
        trained_part: the routers and experts, as `pack` stored them.

    Raises:
        ModelError: the base can't be loaded or is a different model.
    """
    from safetensors.torch import load_file

    from steermoe.models.default.base import load_base

    base, tokenizer = load_base(source)
    model = upcycle(base)
    unpack(load_file(trained_part), model)
    model.generation_config.eos_token_id = base.config.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
