"""What is known of a model without its weights: family, routers, how they score. Builds it on the meta device."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from steermoe.errors import ModelError, UnsupportedModel
from steermoe.models.checkpoint import _locate, _why_not_loaded
from steermoe.vectors.vector import VectorInfo

if TYPE_CHECKING:
    from steermoe.vectors.vector import SteeringVector


@dataclass(frozen=True)
class ModelDescription:
    """What steermoe sees of a checkpoint: counts of the whole model, and of what would be steered.

    Attributes:
        scoring: how the router turns logits into weights, "softmax" or "sigmoid".
        shared_experts: whether every token also passes a shared expert.
        moe_layers: decoder layers that have a router.
        experts, top_k: of each router; several values where layers differ.
        parameters: of the whole model, all experts counted.
    """

    name: str
    architecture: str
    model_class: str
    layers: int | None
    moe_layers: tuple[int, ...]
    experts: tuple[int, ...]
    top_k: tuple[int, ...]
    scoring: str
    shared_experts: bool
    router_class: str
    parameters: int
    steerable: bool
    reason: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def vector_info(self) -> VectorInfo:
        """What a vector for this model says of it."""
        top_k = self.top_k[0] if len(self.top_k) == 1 else None
        return VectorInfo(model=self.name, architecture=self.architecture, top_k=top_k)

    def check_fits(self, vector: "SteeringVector") -> None:
        """As `SteeringVector.check_fits`, without loading the model."""
        vector.check_fits(self.moe_layers, self.experts, self.name, self.architecture)


def describe(model: str | Path | None = None, *, trust_remote_code: bool = False) -> ModelDescription:
    """Describe a checkpoint from its configuration alone, whatever its size: no weights are loaded.

    Raises:
        ModelError: there is no such checkpoint, or its configuration can't be built.
    """
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from steermoe.routing.routers import find_routers, scoring

    name, where, extra = _locate(model)
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, **extra)
        causal = type(config) in AutoModelForCausalLM._model_mapping or trust_remote_code
        factory = AutoModelForCausalLM if causal else AutoModel
        with torch.device("meta"):
            built = factory.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged checkpoint can make transformers raise anything
        raise ModelError(_why_not_loaded(name, error)) from error
    text = config.get_text_config()
    try:
        routers, reason = find_routers(built), "its routers' logits are changed before top-k"
    except UnsupportedModel as error:
        routers, reason = [], str(error)
    return ModelDescription(
        name=name,
        architecture=built.config.model_type,
        model_class=type(built).__name__,
        layers=getattr(text, "num_hidden_layers", None),
        moe_layers=tuple(router.layer for router in routers),
        experts=tuple(sorted({router.num_experts for router in routers})),
        top_k=tuple(sorted({router.top_k for router in routers})),
        scoring=scoring(routers[0].module, text) if routers else "",
        shared_experts=any("shared_expert" in n or "shared_mlp" in n for n, _ in built.named_modules()),
        router_class=type(routers[0].module).__name__ if routers else "",
        parameters=sum(parameter.numel() for parameter in built.parameters()),
        steerable=bool(routers),
        reason=reason,
    )


def skeleton_of(model_config: Any) -> nn.Module:
    """A model of vLLM as transformers builds it, without its weights: what vectors and plans are held against.

    Raises:
        UnsupportedModel: transformers can't build it.
    """
    from transformers import AutoModelForCausalLM

    config = model_config.hf_config
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=model_config.trust_remote_code)
    except Exception as error:  # a foreign configuration can make transformers raise anything
        raise UnsupportedModel(
            f"transformers can't build '{model_config.model}' ({' '.join(str(error).split())[:200]}): steermoe reads "
            "its routers from there"
        ) from error
