"""Published models with their own configurations: names, layers, experts and scoring as they are, widths tiny.

A configuration is what the model's repository has in its config.json, apart from settings of the tokenizer. For models
that bring their own code, `remote_code/` has it re-created: the modules' names, and how their routers compute, are the
published ones.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from steermoe.models import loading
from steermoe.models.loading import LoadedModel
from tests.support import steering_models as steering

CODE = Path(__file__).parent / "remote_code"
CORRECTION_SCALE = 0.05
"""Of random correction biases."""


@dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
        name: of its repository, without the owner.
        config: its configuration.
        tiny: what a tiny model of it changes: widths, never numbers of layers and experts.
        code: the folder of its re-created code; "" if transformers has the model.
        layers: those with a router.
        experts, blanks, top_k: of each router; `blanks` of `experts` do nothing.
        scoring: how logits become scores.
        router: the class of its routers.
        shared_experts: whether every token also passes through a shared expert.
        parameters: of the whole model, in billions.
        scale, normalises: what its router does with the weights of the chosen experts.
        wide_logits: whether its logits are computed in float32, whatever the weights are.
    """

    name: str
    config: dict[str, Any]
    tiny: dict[str, Any]
    code: str
    layers: range
    experts: int
    top_k: int
    scoring: str
    router: str
    parameters: float
    blanks: int = 0
    shared_experts: bool = True
    scale: float = 1.0
    normalises: bool = False
    wide_logits: bool = True


TINY = {"vocab_size": steering.VOCABULARY, "hidden_size": 16}
TINY_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
TINY_LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
TINY_MIXTURE = {"intermediate_size": 8, "moe_intermediate_size": 8}
TINY_LONGCAT = TINY | TINY_LATENT | {
    "num_attention_heads": 2,
    "head_dim": 8,
    "q_lora_rank": 8,
    "ffn_hidden_size": 8,
    "expert_ffn_hidden_size": 4,
}  # fmt: skip


def own_code(config: str, model: str, base: str = "deepseek") -> dict[str, str]:
    """`auto_map`: the classes of a checkpoint's code."""
    return {
        "AutoConfig": f"configuration_{base}.{config}",
        "AutoModel": f"modeling_{base}.{model}Model",
        "AutoModelForCausalLM": f"modeling_{base}.{model}ForCausalLM",
    }


GIGACHAT = Published(
    name="GigaChat-20B-A3B-instruct",
    config={
        "architectures": ["DeepseekForCausalLM"],
        "auto_map": own_code("DeepseekConfig", "Deepseek"),
        "model_type": "deepseek",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "aux_loss_alpha": 0.001,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "first_k_dense_replace": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "moe_intermediate_size": 1792,
        "moe_layer_freq": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1400000.0,
        "scoring_func": "softmax",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    },
    tiny=TINY | TINY_MIXTURE | TINY_HEADS | {"head_dim": 8},
    code="gigachat",
    layers=range(1, 28),
    experts=64,
    top_k=6,
    scoring="softmax",
    router="MoEGate",
    parameters=20.6,
    wide_logits=False,
)
GIGACHAT3 = Published(
    name="GigaChat3-10B-A1.8B",
    config={
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "kv_lora_rank": 512,
        "max_position_embeddings": 262144,
        "moe_intermediate_size": 1280,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 32,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_theta": 100000.0,
        "routed_scaling_factor": 1.0,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "v_head_dim": 192,
        "vocab_size": 128256,
    },
    tiny=TINY | TINY_MIXTURE | TINY_HEADS | TINY_LATENT | {"v_head_dim": 12},
    code="",
    layers=range(1, 26),
    experts=64,
    top_k=4,
    scoring="sigmoid",
    router="DeepseekV3TopkRouter",
    parameters=10.7,
    normalises=True,
)
KIMI_K2 = Published(
    name="Kimi-K2-Instruct",
    config={
        "architectures": ["DeepseekV3ForCausalLM"],
        "auto_map": own_code("DeepseekV3Config", "DeepseekV3"),
        "model_type": "kimi_k2",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "aux_loss_alpha": 0.001,
        "bos_token_id": 163584,
        "eos_token_id": 163585,
        "ep_size": 1,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "initializer_range": 0.02,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 131072,
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 384,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 64,
        "num_nextn_predict_layers": 0,
        "pretraining_tp": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 1.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "v_head_dim": 128,
        "vocab_size": 163840,
    },
    tiny=TINY | TINY_MIXTURE | TINY_HEADS | TINY_LATENT | {"q_lora_rank": 8, "bos_token_id": 1, "eos_token_id": 2},
    code="kimi_k2",
    layers=range(1, 61),
    experts=384,
    top_k=8,
    scoring="sigmoid",
    router="MoEGate",
    parameters=1026,
    scale=2.827,
    normalises=True,
)
LONGCAT = Published(
    name="LongCat-Flash-Chat",
    config={
        "architectures": ["LongcatFlashForCausalLM"],
        "model_type": "longcat_flash",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_method": "MLA",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "expert_ffn_hidden_size": 2048,
        "ffn_hidden_size": 12288,
        "hidden_size": 6144,
        "kv_lora_rank": 512,
        "max_position_embeddings": 131072,
        "mla_scale_kv_lora": True,
        "mla_scale_q_lora": True,
        "moe_topk": 12,
        "n_routed_experts": 512,
        "num_attention_heads": 64,
        "num_layers": 28,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000000.0,
        "routed_scaling_factor": 6.0,
        "router_bias": False,
        "torch_dtype": "bfloat16",
        "v_head_dim": 128,
        "vocab_size": 131072,
        "zero_expert_num": 256,
        "zero_expert_type": "identity",
    },
    tiny=TINY_LONGCAT,
    code="",
    layers=range(28),
    experts=768,
    blanks=256,
    top_k=12,
    scoring="softmax",
    router="LongcatFlashTopkRouter",
    parameters=562,
    shared_experts=False,
    scale=6.0,
)
LONGCAT_LITE = Published(
    name="LongCat-Flash-Lite",
    config=LONGCAT.config
    | {
        "architectures": ["LongcatFlashNgramForCausalLM"],
        "auto_map": own_code("LongcatFlashNgramConfig", "LongcatFlashNgram", "longcat_ngram"),
        "model_type": "longcat_flash_ngram",
        "emb_neighbor_num": 4,
        "emb_split_num": 4,
        "expert_ffn_hidden_size": 1024,
        "ffn_hidden_size": 6144,
        "hidden_size": 3072,
        "max_position_embeddings": 327680,
        "n_routed_experts": 256,
        "ngram_vocab_size_ratio": 78,
        "num_attention_heads": 32,
        "num_layers": 14,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 10.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 32768,
            "type": "yarn",
        },
        "rope_theta": 5000000.0,
        "zero_expert_num": 128,
    },
    tiny=TINY_LONGCAT | {"hidden_size": 24, "ngram_vocab_size_ratio": 3},
    code="longcat_ngram",
    layers=range(14),
    experts=384,
    blanks=128,
    top_k=12,
    scoring="softmax",
    router="LongcatFlashTopkRouter",
    parameters=68.5,
    shared_experts=False,
    scale=6.0,
)
PUBLISHED = {model.name: model for model in (GIGACHAT, GIGACHAT3, KIMI_K2, LONGCAT, LONGCAT_LITE)}


def write_config(model: Published, folder: Path, **changes: Any) -> Path:
    """A folder with a model's configuration and its code."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model.config | changes))
    if model.code:
        shutil.copytree(CODE / model.code, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def build(model: Published, folder: Path) -> PreTrainedModel:
    """The tiny model with random weights, from the configuration and the code in a folder."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=bool(model.code))
    built = AutoModelForCausalLM.from_config(config, trust_remote_code=bool(model.code), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in [*built.named_parameters(), *built.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                weight.copy_(torch.randn(weight.shape, generator=generator) * CORRECTION_SCALE)
            elif isinstance(weight, torch.nn.Parameter) and weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5)
    return built.eval()


def write_tiny(model: Published, folder: Path) -> Path:
    """The configuration of the tiny model, with its code and a tokenizer of bytes."""
    write_config(model, folder, **model.tiny, quantization_config=None)
    steering.byte_tokenizer().save_pretrained(folder)
    return folder


def load(model: Published, folder: Path) -> LoadedModel:
    """The tiny model: what brings its own code is written as a checkpoint and loaded as a user loads it."""
    write_tiny(model, folder)
    built = build(model, folder)
    if not model.code:
        built.generation_config.pad_token_id = steering.PAD
        return LoadedModel(model.name, built, steering.byte_tokenizer())
    text = (folder / "config.json").read_text()
    built.save_pretrained(folder)
    (folder / "config.json").write_text(text)  # as published, not as this transformers writes it
    return loading.load(folder, dtype="float32", trust_remote_code=True)
