"""Re-created code of a checkpoint: LongCat-Flash-Lite.

LongCat-Flash's layers behind embeddings of n-grams: a token's embedding also depends on the tokens before it. The last
of those are kept in a cache of the model's own kind, which its own `generate` makes.
"""

from typing import ClassVar

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.models.longcat_flash.modeling_longcat_flash import (
    LongcatFlashForCausalLM,
    LongcatFlashModel,
    LongcatFlashPreTrainedModel,
)

from .configuration_longcat_ngram import LongcatFlashNgramConfig


class LongcatFlashNgramPreTrainedModel(LongcatFlashPreTrainedModel):
    config_class = LongcatFlashNgramConfig


class NgramCache(DynamicCache):
    """Keys and values, and the last tokens."""

    def __init__(self, config):
        super().__init__()
        self.ngram_context = None
        self.max_context_len = config.emb_neighbor_num - 1

    def update_ngram_context(self, new_tokens):
        known = [] if self.ngram_context is None else [self.ngram_context]
        self.ngram_context = torch.cat([*known, new_tokens], dim=-1)[..., -self.max_context_len :]


class NgramEmbedding(nn.Module):
    """The mean of a token's own embedding and of those of the 2- to n-grams that end at it.

    Each length has k tables, in which an n-gram's row is its number in base V, modulo the table's own size.
    """

    def __init__(self, config, base_embeddings):
        super().__init__()
        self.config = config
        self.word_embeddings = base_embeddings
        self.k, self.n = config.emb_split_num, config.emb_neighbor_num
        tables = self.k * (self.n - 1)
        width = config.hidden_size // tables
        self.sizes = [int(config.ngram_vocab_size_ratio * config.vocab_size + 2 * i + 1) for i in range(tables)]
        self.embedders = nn.ModuleList(nn.Embedding(size, width) for size in self.sizes)
        self.post_projs = nn.ModuleList(nn.Linear(width, config.hidden_size, bias=False) for _ in range(tables))

    def _shift_right_ignore_eos(self, tokens, n):
        """The tokens n places before; 0 where an end token, or the beginning, lies between."""
        shifted = torch.zeros_like(tokens)
        for row, ids in enumerate(tokens.tolist()):
            start = 0
            for place, token in enumerate(ids):
                if place - start >= n:
                    shifted[row, place] = ids[place - n]
                if token == self.config.eos_token_id:
                    start = place + 1
        return shifted

    def forward(self, input_ids, ngram_context=None):
        columns = input_ids.shape[-1]
        context = input_ids if ngram_context is None else torch.cat([ngram_context, input_ids], dim=-1)
        before = [self._shift_right_ignore_eos(context, n) for n in range(1, self.n)]
        x = self.word_embeddings(input_ids)
        for index, size in enumerate(self.sizes):
            ids, power = context, 1
            for shifted in before[: index // self.k + 1]:
                power = power * self.config.vocab_size % size
                ids = ids + shifted * power
            x = x + self.post_projs[index](self.embedders[index]((ids % size)[..., -columns:]))
        return x / (1 + len(self.sizes))


class LongcatFlashNgramModel(LongcatFlashNgramPreTrainedModel, LongcatFlashModel):
    def __init__(self, config):
        super().__init__(config)
        self.ngram_embeddings = NgramEmbedding(config, self.embed_tokens)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ):
        if use_cache and past_key_values is None:
            past_key_values = NgramCache(self.config)
        keeps = isinstance(past_key_values, NgramCache)
        if inputs_embeds is None:
            inputs_embeds = self.ngram_embeddings(input_ids, past_key_values.ngram_context if keeps else None)
        if use_cache and keeps:
            past_key_values.update_ngram_context(input_ids)
        return super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class LongcatFlashNgramForCausalLM(LongcatFlashNgramPreTrainedModel, LongcatFlashForCausalLM):
    _tied_weights_keys: ClassVar = {
        "lm_head.weight": "model.embed_tokens.weight",
        "model.ngram_embeddings.word_embeddings.weight": "model.embed_tokens.weight",
    }

    def __init__(self, config):
        super().__init__(config)
        self.model = LongcatFlashNgramModel(config)
        self.post_init()

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, **kwargs):
        if kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = NgramCache(self.config)
        return super().generate(inputs=inputs, generation_config=generation_config, **kwargs)
