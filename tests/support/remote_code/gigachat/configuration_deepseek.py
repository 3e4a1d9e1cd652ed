"""Re-created code of a checkpoint: the configuration of GigaChat-20B-A3B, which names DeepSeek-MoE's code."""

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig


@strict
class DeepseekConfig(LlamaConfig):
    """Llama's configuration with that of the experts."""

    model_type = "deepseek"

    moe_intermediate_size: int = 1407
    n_shared_experts: int | None = None
    n_routed_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
