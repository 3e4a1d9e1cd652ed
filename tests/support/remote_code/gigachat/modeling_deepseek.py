"""Re-created code of a checkpoint: GigaChat-20B-A3B, which names DeepSeek-MoE's code.

Llama's layers, whose feed-forward network is a mixture from the second layer on. The gate is a bare weight, and returns
indices before weights; each expert is a module of its own.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
)

from .configuration_deepseek import DeepseekConfig


class DeepseekMLP(nn.Module):
    def __init__(self, config, intermediate_size):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoEGate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.n_routed_experts = config.n_routed_experts
        self.scoring_func = config.scoring_func
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, hidden_states):
        logits = F.linear(hidden_states.view(-1, hidden_states.shape[-1]), self.weight, None)
        if self.scoring_func != "softmax":
            raise NotImplementedError(f"no scoring function {self.scoring_func}")
        scores = logits.softmax(dim=-1)
        topk_weight, topk_idx = torch.topk(scores, k=self.top_k, dim=-1, sorted=False)
        if self.top_k > 1 and self.norm_topk_prob:
            topk_weight = topk_weight / (topk_weight.sum(dim=-1, keepdim=True) + 1e-20)
        return topk_idx, topk_weight, None  # the auxiliary loss, which only training has


class DeepseekMoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        width = config.moe_intermediate_size
        self.experts = nn.ModuleList(DeepseekMLP(config, width) for _ in range(config.n_routed_experts))
        self.gate = MoEGate(config)
        self.shared_experts = DeepseekMLP(config, width * config.n_shared_experts)

    def forward(self, hidden_states):
        topk_idx, topk_weight, _ = self.gate(hidden_states)
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        return self.moe_infer(flat, topk_idx, topk_weight).view_as(hidden_states) + self.shared_experts(hidden_states)

    @torch.no_grad()
    def moe_infer(self, x, topk_idx, topk_weight):
        """Runs each expert once, on all tokens that chose it."""
        cache = torch.zeros_like(x)
        flat, weights = topk_idx.flatten(), topk_weight.reshape(-1, 1)
        order = flat.argsort()
        ends = flat.bincount(minlength=len(self.experts)).cumsum(0).tolist()
        for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if start < end:
                places = order[start:end]
                tokens = places // self.num_experts_per_tok
                out = self.experts[number](x[tokens]) * weights[places]
                cache.index_add_(0, tokens, out.to(cache.dtype))
        return cache


class DeepseekDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        if layer_idx >= config.first_k_dense_replace and layer_idx % config.moe_layer_freq == 0:
            self.mlp = DeepseekMoE(config)


class DeepseekPreTrainedModel(LlamaPreTrainedModel):
    config_class = DeepseekConfig


class DeepseekModel(DeepseekPreTrainedModel, LlamaModel):
    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(DeepseekDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()


class DeepseekForCausalLM(DeepseekPreTrainedModel, LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model = DeepseekModel(config)
        self.post_init()
