"""Re-created code of a checkpoint: Kimi K2, which names DeepSeek-V3's code.

Its gate computes logits in float32, returns indices before weights, and leaves out groups by a score of 0. The
attention is that of transformers. All experts of a layer are one module here, where the checkpoint has one for each:
23,040 modules of three layers would take minutes to make.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

from .configuration_deepseek import DeepseekV3Config


class MoEGate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.n_routed_experts = config.n_routed_experts
        self.routed_scaling_factor = config.routed_scaling_factor
        self.scoring_func, self.topk_method = config.scoring_func, config.topk_method
        self.n_group, self.topk_group = config.n_group, config.topk_group
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias = nn.Parameter(torch.zeros(config.n_routed_experts))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, hidden_states):
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        logits = F.linear(flat.type(torch.float32), self.weight.type(torch.float32), None)
        if (self.scoring_func, self.topk_method) != ("sigmoid", "noaux_tc"):
            raise NotImplementedError(f"no gate with {self.scoring_func} and {self.topk_method}")
        scores = logits.sigmoid()
        for_choice = scores + self.e_score_correction_bias.unsqueeze(0)
        group_scores = for_choice.view(len(flat), self.n_group, -1).topk(2, dim=-1)[0].sum(dim=-1)
        group_idx = torch.topk(group_scores, k=self.topk_group, dim=-1, sorted=False)[1]
        group_mask = torch.zeros_like(group_scores).scatter_(1, group_idx, 1)
        score_mask = group_mask.repeat_interleave(self.n_routed_experts // self.n_group, dim=1)
        tmp_scores = for_choice.masked_fill(~score_mask.bool(), 0.0)
        topk_idx = torch.topk(tmp_scores, k=self.top_k, dim=-1, sorted=False)[1]
        topk_weight = scores.gather(1, topk_idx)
        if self.top_k > 1 and self.norm_topk_prob:
            topk_weight = topk_weight / (topk_weight.sum(dim=-1, keepdim=True) + 1e-20)
        return topk_idx, topk_weight * self.routed_scaling_factor


class DeepseekV3MoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.experts = deepseek.DeepseekV3Experts(config)
        self.gate = MoEGate(config)
        self.shared_experts = deepseek.DeepseekV3MLP(config, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, hidden_states):
        topk_idx, topk_weight = self.gate(hidden_states)
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        chosen = self.experts(flat, topk_idx, topk_weight.type(flat.dtype))
        return chosen.view_as(hidden_states) + self.shared_experts(hidden_states)


class DeepseekV3DecoderLayer(deepseek.DeepseekV3DecoderLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        if layer_idx >= config.first_k_dense_replace and layer_idx % config.moe_layer_freq == 0:
            self.mlp = DeepseekV3MoE(config)


class DeepseekV3PreTrainedModel(deepseek.DeepseekV3PreTrainedModel):
    config_class = DeepseekV3Config


class DeepseekV3Model(DeepseekV3PreTrainedModel, deepseek.DeepseekV3Model):
    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(DeepseekV3DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()


class DeepseekV3ForCausalLM(DeepseekV3PreTrainedModel, deepseek.DeepseekV3ForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model = DeepseekV3Model(config)
        self.post_init()
