"""What the tests of vLLM share: tiny checkpoints that its kernels support, plans of every kind, and engines."""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.request import Request, Sampling
from steermoe.formulas import FORMULAS, SCALES
from steermoe.models.loading import LoadedModel
from steermoe.routing.routers import shape_of
from steermoe.routing.shape import RoutingShape
from steermoe.steering.plans import SteeringPlan
from steermoe.vectors.mixing import mix
from steermoe.vectors.vector import SteeringVector
from tests.support.steering_models import byte_tokenizer
from tests.support.tiny_models import build

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,  # vLLM's attention on a CPU needs 32 or more
    "intermediate_size": 64,
    "tie_word_embeddings": True,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"sliding_window": None},
    "qwen3_moe": {"moe_intermediate_size": 64},
    "qwen2_moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    "granitemoeshared": {"shared_intermediate_size": 64},
    "glm4_moe": {"moe_intermediate_size": 64, "tie_word_embeddings": False},  # vLLM leaves a tied head uninitialised
    "gpt_oss": {"tie_word_embeddings": False},
}
"""With the sizes that differ from SIZES."""

OPTIONS: dict[str, Any] = {"dtype": "float32", "kv_cache_memory_bytes": 1 << 26, "max_model_len": 128, "max_texts": 32}
"""For an engine on a tiny model."""

PROMPTS = ("A dog ran home.", "It rained all night", "Two sisters met at the old station.")


def write_checkpoint(
    family: str, folder: Path, change: Callable[[nn.Module], None] | None = None, **overrides: Any
) -> HFEngine:
    """A random model of the family in a folder, perhaps changed, with a byte tokenizer; returns its hf engine."""
    model = build(family, **{**SIZES, **FAMILIES.get(family, {}), **overrides})
    if change is not None:
        change(model)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return HFEngine(LoadedModel(folder.name, model, tokenizer))


def vector(model: nn.Module | RoutingShape, *raised: int, domain: str = "sport") -> SteeringVector:
    """Frequencies that differ from layer to layer: the raised experts, shifted by one per layer, get most of it."""
    shape = shape_of(model)
    experts = shape.routers[0].num_experts
    frequency = torch.full((len(shape.routers), experts), 0.2 / experts)
    for row in range(len(shape.routers)):
        for rank, expert in enumerate(raised):
            frequency[row, (expert + row) % experts] += 0.8 * (rank + 1) / sum(range(1, len(raised) + 1))
    return SteeringVector(domain, frequency, shape.layers, threshold=1.0)


def plans_of_every_kind(model: nn.Module | RoutingShape) -> dict[str, SteeringPlan | None]:
    """Everything that a plan can contain; None for an unsteered text."""
    sport, food = vector(model, 1, 3), vector(model, 6, domain="food")
    layers = shape_of(model).layers
    first, last = layers[0], layers[-1]
    return {
        "unsteered": None,
        **{f"{f}-{s}": SteeringPlan(sport, 3.0, f, s) for f in FORMULAS for s in SCALES},
        "prompt": SteeringPlan(sport, 3.0, positions="prompt"),
        "all": SteeringPlan(food, 3.0, "additive", positions="all"),
        "decay": SteeringPlan(food, 4.0, schedule="decay:6"),
        "window": SteeringPlan(sport, 4.0, schedule="window:2-7", positions="all"),
        "layers": SteeringPlan(sport, 3.0, layers=(last, last)),
        "away": SteeringPlan(sport, -3.0, "zero_max_scaled"),
        "mixed": SteeringPlan(mix([(sport, 0.7), (food, 0.6)]), 3.0),
        "forced": SteeringPlan(force=((first, 2), (last, 5))),
        "banned": SteeringPlan(ban=((first, 0), (first, 1), (last, 4)), positions="all"),
        "everything": SteeringPlan(
            food, 2.0, "additive", schedule="decay:9", layers=(first, last), force=((first, 7),), ban=((last, 3),)
        ),
    }


def greedy(tokens: int = 12) -> Sampling:
    """Nothing ends a text early."""
    return Sampling(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


def requests(plans: Sequence[SteeringPlan | None], tokens: int = 12) -> list[Request]:
    """One request per plan; prompts take turns."""
    return [Request(PROMPTS[i % len(PROMPTS)], plan, greedy(tokens)) for i, plan in enumerate(plans)]


def one_by_one(engine: Any, asked: Sequence[Request]) -> list[tuple[int, ...]]:
    """The tokens of each request, each generated alone."""
    return [engine.generate([request])[0].token_ids for request in asked]


def all_at_once(engine: Any, asked: Sequence[Request]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in engine.generate(asked)]


def end(engine: Any) -> None:
    """Close an engine and free its resources, so that the next one starts with a clean vLLM."""
    from vllm.distributed import cleanup_dist_env_and_memory

    engine.close()
    gc.collect()
    cleanup_dist_env_and_memory()
