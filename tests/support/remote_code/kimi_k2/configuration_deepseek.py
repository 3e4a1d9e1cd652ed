"""Re-created code of a checkpoint: the configuration of Kimi K2, which names DeepSeek-V3's code."""

from huggingface_hub.dataclasses import strict
from transformers import DeepseekV3Config as Config


@strict
class DeepseekV3Config(Config):
    """DeepSeek-V3's, under the model type of Kimi K2, with what it says about the gate."""

    model_type = "kimi_k2"

    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    moe_layer_freq: int = 1
    ep_size: int = 1
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
