"""Tiny random models of every MoE family of transformers, built from their configurations; nothing is downloaded.

A configuration takes from SIZES whatever it has a field for, then its family's entry in QUIRKS. A family that is not in
QUIRKS, such as one that a newer transformers adds, is tried with the sizes alone. The class to build is found in the
family's module.
"""

import copy
import importlib
import inspect
import re
from types import SimpleNamespace, UnionType
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

HIDDEN = 64
LAYERS = 2
EXPERTS = 8
TOP_K = 2
VOCABULARY = 128
FIRST_WORD = 3
"""The tokens below are padding, begin and end."""

SIZES: dict[str, Any] = {
    # the stack
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "d_model": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_layers": LAYERS,
    "n_layers": LAYERS,
    "max_position_embeddings": 256,
    "max_seq_len": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size_per_layer_input": 0,
    # attention
    "num_attention_heads": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "kv_channels": 16,
    "sliding_window": 16,
    "global_head_dim": 16,
    "num_global_key_value_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "swa_v_head_dim": 16,
    # latent attention and its indexers
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "qk_head_dim": 32,
    "v_head_dim": 16,
    "index_topk": 32,  # more than a test has tokens: scores tie at 0, and chance decides which one is dropped
    "index_n_heads": 2,
    "index_head_dim": 32,
    # recurrent layers
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_dt_rank": 8,
    "mamba_expand": 2,
    "ssm_state_size": 16,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    # feed-forward layers and experts
    "intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "ffn_hidden_size": 96,
    "expert_ffn_hidden_size": 48,
    "expert_intermediate_size": 48,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "share_expert_dim": 48,
    "moe_hidden_size": 48,
    "dense_intermediate_size": 96,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "top_k_experts": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "zero_expert_num": 2,
    "norm_topk_prob": True,
    "router_hidden_size": 32,
    # every layer routes
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "moe_layer_start_index": 0,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "mlp_layer_types": ["sparse"] * LAYERS,
    "num_nextn_predict_layers": 0,
}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0}
LINEAR_THEN_FULL = {"layer_types": ["linear_attention", "full_attention"]}
"""Hybrids put their first full attention beyond layer 2, but without one their cache does not know its length."""

QUIRKS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": LINEAR_THEN_FULL,
    # sizes are in two sub-configurations; the attention reads a rope_theta that is not declared there
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10_000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K},
    },
    # its own names for layer kinds; a hash-routed layer first, as in the real models, which must not be steered
    "deepseek_v4": {"num_hidden_layers": 3, "mlp_layer_types": ["hash_moe", "moe", "moe"]},
    # dense by default; product keys need a square number of experts
    "doge": {"is_moe": True, "num_experts": 16},
    # text and vision experts have separate sizes; the three parts of the rotation must fill half a head
    "ernie4_5_vl_moe": {"moe_intermediate_size": [48, 32], "rope_parameters": ROPE | {"mrope_section": [3, 3, 2]}},
    # dense by default
    "gemma4": {"enable_moe_block": True},
    # like ernie4_5_vl_moe, and by default only a part of each head is rotated
    "glm4v_moe": {"rope_parameters": ROPE | {"mrope_section": [2, 3, 3], "partial_rotary_factor": 1.0}},
    # refuses rotation
    "glm5_next": LINEAR_THEN_FULL | {"qk_rope_head_dim": 0, "qk_head_dim": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    # periods instead of a list of layers; the defaults leave every second layer dense
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0},
    "kimi_linear": LINEAR_THEN_FULL,
    # the list of layer kinds has no default
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    # latent attention, but the rotation is still sized by head_dim
    "longcat_flash": {"head_dim": 16},
    # encoder-decoder with its own names; routes every second layer
    "nllb_moe": {
        "encoder_layers": LAYERS,
        "decoder_layers": LAYERS,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "decoder_start_token_id": 2,
    },
    "qwen3_5_moe": LINEAR_THEN_FULL,
    "qwen3_next": LINEAR_THEN_FULL,
    # its own names for the indexer
    "qwen4_exp": LINEAR_THEN_FULL
    | {
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "indexer_head_dim": 32,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
    },
    # encoder-decoder with its own names
    "switch_transformers": {
        "d_ff": 96,
        "d_kv": 16,
        "num_heads": 4,
        "num_decoder_layers": LAYERS,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "decoder_start_token_id": 0,
    },
    # refuses any other top-k
    "zaya": {"num_experts_per_tok": 1},
}

MODEL_ENDINGS = ("ForCausalLM", "ForConditionalGeneration", "TextModel", "Model")
"""Which of a family's classes to build, best first. Vision families often have no text model with a head."""
NOT_BUILT = re.compile(r"Vision|Talker|PreTrained")
ROUTING_FIELDS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "ffn_config"}
CORRECTION = re.compile(r"correction_bias$|expert_bias$")
"""Names of the biases that change which experts are chosen, but not their weights."""


def model_class(family: str) -> type[PreTrainedModel]:
    """The class to build: the family's text model whose configuration mentions experts.

    Raises:
        LookupError: it has none.
    """
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    classes = [
        kind
        for name, kind in vars(module).items()
        if isinstance(kind, type)
        and issubclass(kind, PreTrainedModel)
        and kind.__module__ == module.__name__
        and not NOT_BUILT.search(name)
        and any(ROUTING_FIELDS & _fields(config) for config in _config_classes(kind))
    ]
    for ending in MODEL_ENDINGS:
        for kind in classes:
            if kind.__name__.endswith(ending):
                return kind
    raise LookupError(f"no class of {family} has a configuration with {', '.join(sorted(ROUTING_FIELDS))}")


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """The family's configuration, tiny."""
    kind = next(config for config in _config_classes(model_class(family)) if ROUTING_FIELDS & _fields(config))
    fields = _fields(kind)
    values = {name: value for name, value in SIZES.items() if name in fields}
    for name, field in (getattr(kind, "attribute_map", None) or {}).items():
        if name in SIZES and name not in fields and field not in SIZES:  # a common name for a field with another name
            values[field] = SIZES[name]
    if "kv_lora_rank" in fields:  # latent attention has a key for every head, and heads sized by their parts
        values["num_key_value_heads"] = values["num_attention_heads"]
        values.pop("head_dim", None)
    return kind(**copy.deepcopy(values | QUIRKS.get(family, {}) | overrides))


def build(
    family: str,
    experts_implementation: str = "eager",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """A model of the family with random weights, the same ones for the same seed, ready to run."""
    config = tiny_config(family, **overrides)
    kind = model_class(family)
    if kind._can_set_experts_implementation():
        config._experts_implementation = experts_implementation
    torch.manual_seed(seed)
    model = kind._from_config(config, dtype=dtype).eval()
    _randomise(model, seed)
    return model


def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Randomise all weights: many families start routers and biases at 0, where all experts tie."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor, scale: float) -> Tensor:
        return (torch.randn(like.shape, generator=generator) * scale).to(like.dtype)

    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("tid2eid"):  # a hash router's table: the experts of every token, all different
                rows = [torch.randperm(EXPERTS, generator=generator)[: tensor.shape[1]] for _ in range(len(tensor))]
                tensor.copy_(torch.stack(rows))
            elif CORRECTION.search(name):
                tensor.copy_(noise(tensor, 0.05))
            elif isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                if tensor.dim() >= 2:
                    tensor.copy_(noise(tensor, tensor.shape[-1] ** -0.5))
                elif "bias" in name and "balancing" not in name:
                    tensor.copy_(noise(tensor, 0.02))


def tokens(model: nn.Module, rows: int = 1, length: int = 9, seed: int = 3) -> dict[str, Tensor]:
    """Random inputs; for an encoder-decoder, also as many tokens for the decoder."""
    generator = torch.Generator().manual_seed(seed)
    names = ["input_ids"] + ["decoder_input_ids"] * bool(model.config.is_encoder_decoder)
    return {name: torch.randint(FIRST_WORD, VOCABULARY, (rows, length), generator=generator) for name in names}


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The logits [B, S, V] of one uncached call; the last hidden states [B, S, H] of a model without a head."""
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs = inputs | {"use_cache": False}
    output = model(**inputs)
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits


def _config_classes(kind: type[PreTrainedModel]) -> list[type[PreTrainedConfig]]:
    """Most models name one configuration; a base class of several models names a union."""
    config = kind.config_class
    options = get_args(config) if isinstance(config, UnionType) else (config,)
    return [option for option in options if isinstance(option, type)]


def _fields(config: type) -> set[str]:
    names = set(inspect.signature(config.__init__).parameters)  # type: ignore[misc]
    return names.union(*(getattr(kind, "__annotations__", {}) for kind in config.__mro__))


# ---- models that are not in transformers ----


class MoEGate(nn.Module):
    """The gate of DeepSeek-MoE's remote code, which GigaChat uses: a bare weight, and indices before weights."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = TOP_K
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN) * HIDDEN**-0.5)

    def logits(self, hidden_TH: Tensor) -> Tensor:
        return F.linear(hidden_TH, self.weight, None)

    def forward(self, hidden_BSH: Tensor) -> tuple[Tensor, Tensor, None]:
        probabilities = self.logits(hidden_BSH.flatten(0, -2)).softmax(-1)
        weights, indices = probabilities.topk(self.top_k, sorted=False)
        return indices, weights / weights.sum(-1, keepdim=True), None  # no auxiliary loss outside of training


class StandInBlock(nn.Module):
    """Experts behind a gate that returns (indices, weights, ...) or, in older remote code, only logits."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.top_k = TOP_K
        self.gate = gate
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS))
        self.shared_expert = nn.Linear(HIDDEN, HIDDEN)
        self.shared_expert_gate = nn.Linear(HIDDEN, 1)

    def route(self, hidden_BSH: Tensor) -> tuple[Tensor, Tensor]:
        output = self.gate(hidden_BSH)
        if isinstance(output, tuple):
            return output[0], output[1]
        weights, indices = output.flatten(0, -2).softmax(-1).topk(self.top_k)
        return indices, weights

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        indices, weights = self.route(hidden_BSH)
        flat = hidden_BSH.flatten(0, -2)
        all_TNH = torch.stack([expert(flat) for expert in self.experts], 1)
        chosen_TKH = all_TNH.take_along_dim(indices[..., None], 1)
        mixed = (chosen_TKH * weights[..., None]).sum(1).view_as(hidden_BSH)
        return mixed + self.shared_expert_gate(hidden_BSH).sigmoid() * self.shared_expert(hidden_BSH)


class StandInModel(nn.Module):
    """A stack of mixture-of-experts blocks without attention: what remote code looks like to steermoe."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            model_type="stand_in", num_experts=EXPERTS, num_experts_per_tok=TOP_K, is_encoder_decoder=False
        )
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": block}) for block in blocks)
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = hidden + layer["mlp"](F.layer_norm(hidden, (HIDDEN,)))
        return SimpleNamespace(logits=self.head(hidden))


def stand_in(make_gate: Any, make_block: Any = StandInBlock) -> StandInModel:
    """Two blocks around what `make_gate()` returns."""
    torch.manual_seed(0)
    return StandInModel([make_block(make_gate()) for _ in range(LAYERS)]).eval()
