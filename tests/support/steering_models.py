"""Tiny random models, vectors and tokenizers for the tests of steering, recording and generating; all built here."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from steermoe.models.loading import LoadedModel
from steermoe.routing.routers import chosen_experts, find_routers
from steermoe.steering.handle import SteeringHandle
from steermoe.steering.plans import SteeringPlan
from steermoe.vectors.vector import SteeringVector, VectorInfo

PAD, BEGIN, END = 0, 1, 2
VOCABULARY = 300
EXPERTS = 8
LAYERS = 2
TOP_K = 2

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 32,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}

CAUSAL: dict[str, Any] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=EXPERTS)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=EXPERTS, moe_intermediate_size=16, decoder_sparse_step=1)
    ),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **{**SIZES, **LATENT, "head_dim": 8},
            n_routed_experts=EXPERTS,
            n_group=2,
            topk_group=2,
            moe_intermediate_size=16,
            first_k_dense_replace=0,
        )
    ),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=EXPERTS, sliding_window=8)),
}


def build(family: str = "mixtral", seed: int = 0) -> PreTrainedModel:
    """A model whose every weight is random enough for routing to depend on the token."""
    torch.manual_seed(seed)
    model = CAUSAL[family]() if family in CAUSAL else _switch()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + (parameter.dim() == 1))
    model.generation_config.pad_token_id = PAD
    return model.eval()


def _switch() -> PreTrainedModel:
    config = SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=16,
        d_ff=32,
        num_heads=2,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_experts=EXPERTS,
        decoder_start_token_id=PAD,
        pad_token_id=PAD,
        eos_token_id=END,
        expert_capacity=1000,
        dropout_rate=0.0,
    )
    return SwitchTransformersForConditionalGeneration(config)


def vector_for(model: PreTrainedModel, *experts: int, domain: str = "sport") -> SteeringVector:
    """A vector that raises the given experts (0 to EXPERTS - 1) in every layer, by formula (5)."""
    layers = tuple(router.layer for router in find_routers(model))
    frequency = torch.full((len(layers), EXPERTS), 0.1 / EXPERTS)
    frequency[:, list(experts or (1,))] += 0.9 / len(experts or (1,))
    return SteeringVector(domain, frequency, layers, threshold=1.0, info=VectorInfo(formula="zero_max_scaled"))


def plan_for_experts(model: PreTrainedModel, *experts: int, **fields: Any) -> SteeringPlan:
    return SteeringPlan(vector_for(model, *experts), **{"strength": 5.0, "formula": "zero_max_scaled", **fields})


def prompt(length: int = 6, rows: int = 1, seed: int = 3) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[Tensor]) -> dict[str, Tensor]:
    """Prompts [1, S] of different lengths as one batch."""
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0), value=PAD) for row in rows])
    mask = torch.tensor([[0] * (width - row.shape[1]) + [1] * row.shape[1] for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def continued(model: PreTrainedModel, ids: Tensor | None = None, tokens: int = 6, **options: Any) -> list[list[int]]:
    """Greedy tokens after the prompt, one list per row; nothing ends them early."""
    options = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, **options}
    if ids is not None:
        options.setdefault("attention_mask", torch.ones_like(ids))
    out = model.generate(ids, **options)
    return out[:, -tokens:].tolist()


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[list[list[Tensor]]]:
    """Yields, for each router, what it chose in each of its calls, [T, k]; observed by the tests' own hooks."""
    routers = find_routers(model)
    chosen: list[list[Tensor]] = [[] for _ in routers]
    hooks = [
        router.module.register_forward_hook(
            lambda module, args, output, router=router, seen=seen: seen.append(chosen_experts(router, output).clone())
        )
        for router, seen in zip(routers, chosen, strict=True)
    ]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()


def traces(model: PreTrainedModel) -> list[Any]:
    """What steering could leave behind: hooks, and methods set on instances."""
    found: list[Any] = []
    for name, module in model.named_modules():
        found += [(name, hook) for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())]
        found += [(name, own) for own in ("forward", "_old_forward", "generate") if own in vars(module)]
    return found


def step_by_step(
    model: PreTrainedModel, handle: SteeringHandle | None, ids: Tensor, tokens: int, before: Any = None
) -> list[Tensor]:
    """Logits of each of `tokens` decode steps with a cache, called directly; `before(step)` runs between them."""
    from transformers import DynamicCache

    cache, logits, seen = DynamicCache(config=model.config), [], ids
    for number in range(tokens):
        if before is not None:
            before(number)
        with torch.no_grad():
            out = model(input_ids=seen, past_key_values=cache, use_cache=True).logits[:, -1]
        logits.append(out)
        seen = out.argmax(-1, keepdim=True)
    return logits


# ---- tokenizers ----

SPECIAL = ["<pad>", "<s>", "</s>"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, as byte-level BPE writes them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words that begin with a marked space, bytes for the rest, as in sentencepiece: decoding drops the first space."""
    words = {"▁the": "th e", "▁cat": "ca t", "▁dog": "do g"}
    merges, vocabulary = [], [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁thecadogs."]
    vocabulary = list(dict.fromkeys(vocabulary))
    for word, parts in words.items():
        first, last = parts.split()
        merges += [(first[0], first[1]), (first, last), ("▁", first + last)]
        vocabulary += [first, first + last, word]
    tokenizer = Tokenizer(
        models.BPE({token: i for i, token in enumerate(vocabulary)}, merges, byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finished(tokenizer)


def _finished(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2]
    )


def loaded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None) -> LoadedModel:
    return LoadedModel("tiny", model, tokenizer or byte_tokenizer())
