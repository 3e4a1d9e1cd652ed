"""Write a checkpoint as a GGUF file for llama.cpp: its weights under GGUF's names, its settings, its tokenizer.

One table maps families, another maps tensors by the end of their name in transformers. A tensor that is not in the
tables is an error, never left out.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from steermoe.errors import ModelError
from steermoe.files import atomic_path
from steermoe.models.gguf.vocabulary import add_vocabulary

if TYPE_CHECKING:
    from torch import Tensor

    from steermoe.models.loading import LoadedModel

Quantization = Literal["q8_0", "q4_1", "bf16", "f32"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)

MODEL_TYPE_KEY, MODEL_NAME_KEY = "steermoe.model_type", "steermoe.model"
"""Metadata that name the checkpoint, so that its vectors are known to fit the file."""


@dataclass(frozen=True)
class GGUFFamily:
    """How GGUF stores a transformers family.

    Attributes:
        architecture: GGUF's name for it.
        permutes: whether queries and keys are stored for rotation in neighbouring pairs.
        settings: adds the family's own settings from the configuration.
    """

    architecture: str
    permutes: bool = False
    settings: Callable[[Any, Any], None] = lambda writer, config: None


def _granite(writer: Any, config: Any) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    if getattr(config, "shared_intermediate_size", 0):
        writer.add_expert_shared_feed_forward_length(config.shared_intermediate_size)


def _mixtral(writer: Any, config: Any) -> None:
    if config.sliding_window is not None:
        raise ModelError(
            f"its attention window is {config.sliding_window} tokens, but llama.cpp's mixtral has none: it can't be "
            "exported"
        )
    writer.add_rope_dimension_count(_head_size(config))


def _qwen(writer: Any, config: Any) -> None:
    if config.use_sliding_window:
        raise ModelError("its attention has a sliding window, but llama.cpp's qwen has none: it can't be exported")
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if getattr(config, "shared_expert_intermediate_size", 0):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if bool(config.norm_topk_prob) != (config.model_type == "qwen3_moe"):
        raise ModelError(
            f"norm_topk_prob is {config.norm_topk_prob}: llama.cpp runs qwen3_moe only with it, qwen2_moe only without"
        )


def _olmoe(writer: Any, config: Any) -> None:
    if config.norm_topk_prob or config.clip_qkv is not None or config.num_key_value_heads != config.num_attention_heads:
        raise ModelError(
            "llama.cpp runs olmoe only without norm_topk_prob, without clip_qkv, and with as many key heads as query "
            "heads"
        )


def _deepseek(writer: Any, config: Any) -> None:
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    if config.model_type == "deepseek_v3":
        from gguf import ExpertGatingFuncType

        writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_norm(bool(config.norm_topk_prob))
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    elif config.topk_method != "greedy":
        raise ModelError("llama.cpp scores groups of experts differently than deepseek_v2's group_limited_greedy")


def _gpt_oss(writer: Any, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_expert_feed_forward_length(config.intermediate_size)


FAMILIES = {
    "granitemoe": GGUFFamily("granitemoe", True, _granite),
    "granitemoeshared": GGUFFamily("granitemoe", True, _granite),
    "mixtral": GGUFFamily("llama", True, _mixtral),
    "qwen2_moe": GGUFFamily("qwen2moe", False, _qwen),
    "qwen3_moe": GGUFFamily("qwen3moe", False, _qwen),
    "olmoe": GGUFFamily("olmoe", False, _olmoe),
    "deepseek_v2": GGUFFamily("deepseek2", False, _deepseek),
    "deepseek_v3": GGUFFamily("deepseek2", False, _deepseek),
    "gpt_oss": GGUFFamily("gpt-oss", False, _gpt_oss),
}

WHOLE_MODEL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
IN_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.sinks": "attn_sinks",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "block_sparse_moe.router": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    **{
        f"mlp.{shared}.{name}_proj": f"ffn_{name}_shexp"
        for shared in ("shared_expert", "shared_experts")
        for name in ("gate", "up", "down")
    },
    "shared_mlp.output_linear": "ffn_down_shexp",
    "mlp.experts.down_proj": "ffn_down_exps",
    "block_sparse_moe.experts.down_proj": "ffn_down_exps",
}
ROUTER = "ffn_gate_inp"
"""Routers stay in float32, as llama.cpp's own quantisation leaves them."""


def export_gguf(loaded: "LoadedModel", path: Path | str, quantization: Quantization = "q8_0") -> Path:
    """Write a model that transformers loaded as one GGUF file, whole or not at all.

    Args:
        loaded: the model with its tokenizer.
        path: the file, which is overwritten.
        quantization: of the matrices; routers, norms and biases stay float32. With q4_1 the embedding is q8_0.

    Returns:
        the path.

    Raises:
        ModelError: the family, a setting or the tokenizer is not supported, or the file can't be written.
    """
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
    from gguf.quants import quantize

    path = Path(path)
    config: Any = loaded.model.config
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            f"{loaded.name} is {config.model_type}: steermoe exports {', '.join(sorted(FAMILIES))}; "
            "convert others with llama.cpp's convert_hf_to_gguf.py"
        )
    kind = GGMLQuantizationType[quantization.upper()]
    file_type = "ALL_F32" if quantization == "f32" else f"MOSTLY_{quantization.upper()}"
    try:
        with atomic_path(path) as partial:
            writer = GGUFWriter(partial, family.architecture)
            writer.add_name(loaded.name)
            writer.add_string(MODEL_NAME_KEY, loaded.name)
            writer.add_string(MODEL_TYPE_KEY, config.model_type)
            writer.add_file_type(LlamaFileType[file_type])
            writer.add_quantization_version(2)
            _add_settings(writer, config, family)
            add_vocabulary(writer, loaded.tokenizer, config.vocab_size)
            for name, tensor in tensors(loaded.model, config, family):
                values = tensor.detach().float().contiguous().cpu().numpy()
                used = _kind_of(name, values.shape, kind)
                packed = np.ascontiguousarray(quantize(values, used))
                writer.add_tensor(name, packed, raw_dtype=used)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
    except OSError as error:
        raise ModelError(f"can't write '{path}': {error.strerror or error}; name another file") from error
    return path


def _kind_of(name: str, shape: tuple[int, ...], kind: Any) -> Any:
    """The type in which a tensor is stored."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) == 1 or ROUTER in name or shape[-1] % GGML_QUANT_SIZES[kind][0]:
        return GGMLQuantizationType.F32
    if kind == GGMLQuantizationType.Q4_1 and name.startswith(("token_embd.", "output.")):
        return GGMLQuantizationType.Q8_0
    return kind


def tensors(model: Any, config: Any, family: GGUFFamily) -> "Iterator[tuple[str, Tensor]]":
    """All weights of a model under GGUF's names.

    Raises:
        ModelError: a weight has no GGUF name.
    """
    is_tied = bool(getattr(config, "tie_word_embeddings", False))
    for name, tensor in model.state_dict().items():
        if name.startswith("lm_head.") and is_tied:
            continue
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name):
            for end, part in _layer_tensors(match[2], tensor, config, family):
                yield f"blk.{match[1]}.{end}", part
            continue
        stem, _, suffix = name.rpartition(".")
        if stem not in WHOLE_MODEL:
            raise ModelError(
                f"weight '{name}' has no name in GGUF's {family.architecture}: the model can't be exported"
            )
        yield f"{WHOLE_MODEL[stem]}.{suffix}", tensor


def _layer_tensors(name: str, tensor: "Tensor", config: Any, family: GGUFFamily) -> "Iterator[tuple[str, Tensor]]":
    """The GGUF tensors of one weight of a layer."""
    stem, _, suffix = name.rpartition(".")
    if suffix not in ("weight", "bias"):
        stem, suffix = name, "weight"
    is_gpt_oss = family.architecture == "gpt-oss"
    if stem.endswith("experts.gate_up_proj"):
        rows = tensor.transpose(-1, -2) if is_gpt_oss else tensor
        half = rows.shape[-2] // 2
        pairs = (rows[:, ::2], rows[:, 1::2]) if is_gpt_oss else (rows[:, :half], rows[:, half:])
        yield from zip(("ffn_gate_exps.weight", "ffn_up_exps.weight"), pairs, strict=True)
    elif stem.endswith("experts.gate_up_proj_bias"):
        yield from (("ffn_gate_exps.bias", tensor[:, ::2]), ("ffn_up_exps.bias", tensor[:, 1::2]))
    elif stem.endswith("experts.down_proj_bias"):
        yield "ffn_down_exps.bias", tensor
    elif stem.endswith("experts.down_proj") and is_gpt_oss:
        yield "ffn_down_exps.weight", tensor.transpose(-1, -2)
    elif stem == "shared_mlp.input_linear":
        half = tensor.shape[0] // 2
        yield from (("ffn_gate_shexp.weight", tensor[:half]), ("ffn_up_shexp.weight", tensor[half:]))
    elif stem == "self_attn.kv_b_proj":
        by_head = tensor.view(config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim, -1)
        key, value = by_head.split([config.qk_nope_head_dim, config.v_head_dim], 1)
        yield from (("attn_k_b.weight", key.transpose(1, 2)), ("attn_v_b.weight", value))
    elif stem == "post_attention_layernorm" and is_gpt_oss:
        yield "post_attention_norm.weight", tensor
    elif stem == "mlp.shared_expert_gate":
        yield "ffn_gate_inp_shexp.weight", tensor.flatten()
    elif stem == "mlp.gate.e_score_correction_bias":
        yield "exp_probs_b.bias", tensor
    elif stem in ("self_attn.q_proj", "self_attn.k_proj") and family.permutes:
        heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
        yield f"{IN_LAYER[stem]}.{suffix}", _by_pairs(tensor, heads)
    elif stem in IN_LAYER:
        yield f"{IN_LAYER[stem]}.{suffix}", tensor
    else:
        raise ModelError(f"weight '{name}' has no name in GGUF's {family.architecture}: the model can't be exported")


def _by_pairs(tensor: "Tensor", heads: int) -> "Tensor":
    """Rows of each head in the order in which llama.cpp rotates them: in neighbouring pairs."""
    return tensor.view(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _add_settings(writer: Any, config: Any, family: GGUFFamily) -> None:
    """Sizes, norms, rotation and experts, which all families have."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    is_latent = getattr(config, "kv_lora_rank", None) is not None
    writer.add_head_count_kv(1 if is_latent else config.num_key_value_heads)
    if not is_latent and getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    experts = next(
        value
        for value in (getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
        if value
    )
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    _add_rotation(writer, config.rope_parameters)
    family.settings(writer, config)


def _add_rotation(writer: Any, rotation: dict[str, Any]) -> None:
    """The rotary embedding of positions.

    Raises:
        ModelError: a kind of scaling that is not supported.
    """
    from gguf import RopeScalingType

    kind = rotation.get("rope_type", "default")
    writer.add_rope_freq_base(rotation["rope_theta"])
    if kind == "default":
        return
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rotation["factor"])
    elif kind == "yarn" and "mscale_all_dim" not in rotation:
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rotation["factor"])
        writer.add_rope_scaling_orig_ctx_len(rotation["original_max_position_embeddings"])
        for name, add in (
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rotation.get(name) is not None:
                add(rotation[name])
    else:
        raise ModelError(f"its rope scaling '{kind}' is not supported: only default, linear and plain yarn are")
