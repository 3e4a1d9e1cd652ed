"""Tiny random models, which need no download: tokens of several families under plans, and compiled steps of one."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from golden_cases.commands import batch_cases, generate_cases
from golden_cases.running import Cases, answers, report_of, tensor_hash
from golden_cases.tables import FORMULAS, SCALES, STEERINGS

FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {},
    "Qwen3Moe": {"num_experts": 8, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
    "Olmoe": {"num_experts": 8},
    "GptOss": {"num_local_experts": 8, "sliding_window": 8},
    "GraniteMoeShared": {"num_local_experts": 8, "shared_intermediate_size": 32},
    "Glm4Moe": {"n_routed_experts": 8, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_hidden_layers": 3},
    "DeepseekV3": {
        **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
        **{"head_dim": 8, "n_routed_experts": 8, "n_group": 2, "topk_group": 2, "moe_intermediate_size": 16},
        "first_k_dense_replace": 0,
    },
}
SIZES: dict[str, Any] = {
    **{"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16},
    **{"num_key_value_heads": 2, "intermediate_size": 32, "num_experts_per_tok": 2, "max_position_embeddings": 256},
    **{"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0},
}


def tiny(gguf: Path | None) -> Cases:
    for family in FAMILIES:
        model = build(family)
        plans = plans_for(model)
        yield f"{family}, rows", partial(steered, model, [None, *plans.values()])
        for name, plan in plans.items():
            yield f"{family}, {name}", partial(steered, model, [plan])


def build(family: str) -> Any:
    """A model of the family whose random weights make routing depend on the token."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape) * scale + (parameter.dim() == 1))
            if name.endswith("router.bias"):  # all logits below 0, where the scales differ
                parameter.sub_(9)
    return model.eval()


def vector_for(model: Any, domain: str, seed: int) -> Any:
    import torch

    import steermoe

    layers = tuple(router.layer for router in steermoe.find_routers(model))
    frequency = (2 * torch.randn(len(layers), 8, generator=torch.Generator().manual_seed(seed))).softmax(-1)
    return steermoe.SteeringVector(domain, frequency, layers, threshold=1.0)


def plans_for(model: Any) -> dict[str, Any]:
    from steermoe import mix, plan_for

    sport, food = vector_for(model, "sport", 1), vector_for(model, "food", 2)
    first, last = sport.layers[0], sport.layers[-1]
    return {
        **{f"{f} {s}": plan_for(sport, 3.0, formula=f, scale=s) for f in FORMULAS for s in SCALES},
        "prompt": plan_for(food, 3.0, positions="prompt"),
        "decay": plan_for(food, -4.0, schedule="decay:6", positions="all"),
        "window": plan_for(mix([(sport, 0.7), (food, 0.6)]), 4.0, schedule="window:2-7"),
        "lists": plan_for(None, force=[(first, 2), (last, 5)], ban=[(last, 1)]),
        "layers": plan_for(sport, 3.0, layers=(last, last), force=[(last, 7)]),
    }


def steered(model: Any, plans: list[Any]) -> dict[str, Any]:
    """Greedy tokens of a row a plan, and the logits of the same tokens read again in one call."""
    import torch

    import steermoe

    prompts = torch.randint(1, SIZES["vocab_size"], (len(plans), 6), generator=torch.Generator().manual_seed(3))
    greedy = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    with steermoe.steer(model, rows=plans) as handle, steermoe.record_routing(model, "all") as routing:
        tokens = model.generate(prompts, attention_mask=torch.ones_like(prompts), **greedy)
        report, counts = report_of(handle.report()), tensor_hash(routing.counts)
        handle.set(prompt_length=6)
        with torch.no_grad():
            logits = model(tokens).logits
    return {"tokens": tokens.tolist(), "report": report, "counts": counts, "logits": logits.abs().sum().item()}


# ---- compiled steps ----

COMPILED = {name: fields for name, fields in STEERINGS.items() if not {"layers", "force", "ban"} & fields.keys()}
COMPILED |= {
    "lists": {"force": ["0:1"], "ban": ["1:2", "1:3"]},
    "everything": {
        **{"domain": "space=0.8+food=0.2", "strength": 6.0, "formula": "additive", "schedule": "decay:16"},
        **{"positions": "all", "layers": "1-1", "force": ["1:3"], "ban": ["0:7"]},
    },
}


def compiled(gguf: Path | None) -> Cases:
    """A checkpoint whose steps are compiled here and now, into a cache of their own."""
    import steermoe

    model = build("Mixtral")
    write_checkpoint(model, Path("tiny"))
    for number, name in enumerate(("sport", "food", "law", "space", "medicine")):
        steermoe.write_vector(vector_for(model, name, number), Path("steering_vectors/tiny") / f"{name}.safetensors")
    common = ["--model", "tiny", "--dtype", "float32"]
    before = os.environ.get("STEERMOE_CACHE")
    os.environ["STEERMOE_CACHE"] = "cache"
    try:
        yield "are faster", are_faster
        yield from generate_cases(*common, steerings=COMPILED)
        yield from batch_cases(*common, steerings=COMPILED)
    finally:
        os.environ.pop("STEERMOE_CACHE")
        os.environ |= {"STEERMOE_CACHE": before} if before else {}


def are_faster() -> dict[str, bool]:
    """Whether each step will be used; others must run only after this."""
    (steps,) = answers("models", "compile", "tiny", "--dtype", "float32")
    kept = [json.loads(file.read_text()) for file in Path("cache").rglob("facts.json")]
    assert len(kept) == len(steps)
    return {step["kind"]: step["speedup"] > 1 for step in steps}


def write_checkpoint(model: Any, folder: Path) -> None:
    """The model with a tokenizer of a token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    model.save_pretrained(folder)
