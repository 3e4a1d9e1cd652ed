"""Describe a model without its weights: family, routers, scoring. Builds it on the meta device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from steermoe.errors import ModelError, UnsupportedModel
from steermoe.models.baking.found import baked_into
from steermoe.models.checkpoint import _auto_class, _locate, _why_not_loaded, _why_not_run
from steermoe.models.gguf.header import is_moe, read_gguf, read_header
from steermoe.models.needs import WIDTHS, cache_bytes, weight_bytes
from steermoe.models.stored import local_folder, stored_fingerprint
from steermoe.models.template import added_tokens, chat_template, has_tokenizer, think_tags
from steermoe.routing.architectures import PYTHON_ONLY
from steermoe.routing.routers import Router, find_routers, gates_of, scoring, shape_of
from steermoe.routing.shape import RoutingShape

GATING = {1: "softmax", 2: "sigmoid", 3: "softmax"}
"""GGUF's numbers for how a router turns logits into weights; by 3 only those of the chosen experts."""


@dataclass(frozen=True)
class ModelDescription:
    """What steermoe knows about a checkpoint: sizes of the whole model, and of the part that would be steered.

    Attributes:
        shape: its name, its architecture, and its routers: none if it can't be steered.
        scoring: how the router turns logits into weights, "softmax" or "sigmoid"; "" if a GGUF file does not say.
        shared_experts: whether every token also passes through a shared expert.
        parameters: of the whole model, including all experts that have weights.
        memory: bytes of the weights by type; of a GGUF file also "file", as llama.cpp runs it.
        cache: bytes of the attention cache for 1,000 tokens in bfloat16; None if it is of another kind.
        tokenizer: whether it has one; None if its files are not on this machine.
        template: its chat template; None if it has none, or none is known.
        thinking: the texts between which it thinks; None if it has none, or none are known.
        baked: what `steermoe models bake` put into it, as `baked_into`.
    """

    shape: RoutingShape
    model_class: str
    layers: int | None
    scoring: str
    shared_experts: bool
    router_class: str
    parameters: int
    reason: str
    memory: dict[str, int] = field(default_factory=dict)
    cache: int | None = None
    tokenizer: bool | None = None
    template: str | None = None
    thinking: tuple[str, str] | None = None
    baked: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return self.shape.name

    @property
    def steerable(self) -> bool:
        return bool(self.shape.routers)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Decoder layers that have a router."""
        return self.shape.layers

    @property
    def experts(self) -> tuple[int, ...]:
        """Of each router; several values if layers differ."""
        return tuple(sorted({router.num_experts for router in self.shape.routers}))

    @property
    def top_k(self) -> tuple[int, ...]:
        """Of each router; several values if layers differ."""
        return tuple(sorted({router.top_k for router in self.shape.routers}))

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "architecture": self.shape.architecture,
            "model_class": self.model_class,
            "layers": self.layers,
            "moe_layers": self.moe_layers,
            "experts": self.experts,
            "top_k": self.top_k,
            "scoring": self.scoring,
            "shared_experts": self.shared_experts,
            "router_class": self.router_class,
            "parameters": self.parameters,
            "steerable": self.steerable,
            "reason": self.reason,
            "fingerprint": self.shape.fingerprint,
            "memory": self.memory,
            "cache_per_1000_tokens": self.cache,
            "tokenizer": self.tokenizer,
            "chat_template": self.template is not None,
            "think_tags": self.thinking,
            "baked": self.baked,
        }


def describe(model: str | Path | None = None, *, trust_remote_code: bool = False) -> ModelDescription:
    """Describe a checkpoint of any size from its configuration alone: no weights are loaded.

    Raises:
        ModelError: there is no such checkpoint, or no model can be built from its configuration.
    """
    name, where, extra = _locate(model)
    source = Path(where) / extra.get("gguf_file", "")
    try:
        found = _describe(name, where, extra, trust_remote_code)
    except ModelError:
        if "gguf_file" in extra and is_moe(source):
            return _describe_gguf(source)
        raise
    return found if found.steerable or "gguf_file" not in extra or not is_moe(source) else _describe_gguf(source)


def built_empty(name: str, where: str, extra: dict[str, str], trust_remote_code: bool) -> tuple[Any, Any]:
    """A checkpoint's configuration, and its model on the meta device; arguments as `_locate` returns them.

    Raises:
        ModelError: transformers can't build it.
    """
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, **extra)
        with torch.device("meta"):
            return config, (_auto_class(config) or AutoModel).from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged checkpoint can make transformers raise anything
        raise ModelError(_why_not_loaded(name, error, where)) from error


def stored_shape(name: str, built: Any, routers: Sequence[Router], source: Path) -> RoutingShape:
    """The shape of a checkpoint, from the model that was built of it without weights."""
    return RoutingShape(
        name,
        (built.config.model_type,),
        tuple(router.shape for router in routers),
        fingerprint=stored_fingerprint(source, gates_of(routers)),
    )


def _describe(name: str, where: str, extra: dict[str, str], trust_remote_code: bool) -> ModelDescription:
    """What transformers makes of a checkpoint; arguments as `_locate` returns them."""
    config, built = built_empty(name, where, extra, trust_remote_code)
    text = config.get_text_config()
    try:
        routers, reason = find_routers(built), "its routers' logits are changed before top-k"
    except UnsupportedModel as error:
        routers, reason = [], str(error)
    source = Path(where) / extra.get("gguf_file", "")
    memory = weight_bytes(built, steerable=bool(routers))
    if "gguf_file" in extra:
        memory["file"] = source.stat().st_size
    tokenizer, template, thinking = _of_tokenizer(source)
    if routers and (wrong := _why_not_run(config)):
        reason = f"{PYTHON_ONLY}: {wrong}"
    return ModelDescription(
        shape=stored_shape(name, built, routers, source),
        model_class=type(built).__name__,
        layers=getattr(text, "num_hidden_layers", None),
        scoring=scoring(routers[0].module, text) if routers else "",
        shared_experts=any("shared_expert" in n or "shared_mlp" in n for n, _ in built.named_modules()),
        router_class=type(routers[0].module).__name__ if routers else "",
        parameters=sum(parameter.numel() for parameter in built.parameters()) - _unused(built, routers),
        reason=reason,
        memory=memory,
        cache=cache_bytes(text),
        tokenizer=tokenizer,
        template=template,
        thinking=thinking,
        baked=baked_into(source if "gguf_file" in extra else local_folder(source) or source),
    )


def _describe_gguf(source: Path) -> ModelDescription:
    """A GGUF file of a Mixture-of-Experts model that transformers can't build, or builds without its experts."""
    metadata, tensors = read_header(source)
    file = read_gguf(source)
    layers, gating = (metadata.get(f"{file.architecture}.{key}") for key in ("block_count", "expert_gating_func"))
    tokenizer, template, thinking = _of_tokenizer(source)
    return ModelDescription(
        shape=file.shape,
        model_class=f"{file.architecture}, of llama.cpp",
        layers=layers if isinstance(layers, int) else None,
        scoring=GATING.get(gating, "") if isinstance(gating, int) else "",
        shared_experts=any("_shexp" in name for name in tensors),
        router_class="ffn_gate_inp",
        parameters=sum(map(math.prod, tensors.values())),
        reason="its routers' logits are changed before top-k, in llama.cpp only",
        memory={"file": source.stat().st_size},
        cache=file.cache_numbers * 1000 * WIDTHS["bfloat16"] or None,
        tokenizer=tokenizer,
        template=template,
        thinking=thinking,
        baked=baked_into(source),
    )


def _unused(built: Any, routers: Sequence[Router]) -> int:
    """Parameters that only transformers has: longcat's experts that do nothing have rows in its tensors of experts."""
    unused = 0
    for router in routers:
        block = built.get_submodule(router.name.rpartition(".")[0])
        for weight in block.experts.parameters(recurse=False) if router.blanks and hasattr(block, "experts") else ():
            if len(weight) == router.num_experts:
                unused += weight[: router.blanks].numel()
    return unused


def _of_tokenizer(source: Path) -> tuple[bool | None, str | None, tuple[str, str] | None]:
    """Whether a checkpoint has a tokenizer, its chat template, and the texts between which it thinks."""
    if source.suffix == ".gguf":
        template = chat_template(source)
        return True, template, think_tags(template, ())
    folder = local_folder(source)
    if folder is None:
        return None, None, None
    template = chat_template(folder)
    return has_tokenizer(folder), template, think_tags(template, added_tokens(folder))


def shape_of_config(model_config: Any) -> RoutingShape:
    """The shape of a model that vLLM runs, read from the model that transformers builds from its configuration.

    Raises:
        UnsupportedModel: transformers can't build it, or it has no routers.
    """
    from transformers import AutoModelForCausalLM

    config = model_config.hf_config
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=model_config.trust_remote_code)
    except Exception as error:  # a foreign configuration can make transformers raise anything
        raise UnsupportedModel(
            f"transformers can't build '{model_config.model}' ({' '.join(str(error).split())[:200]}): steermoe reads "
            "its routers from there"
        ) from error
    shape = shape_of(model)
    return replace(shape, fingerprint=stored_fingerprint(model_config.model, gates_of(find_routers(model))))
