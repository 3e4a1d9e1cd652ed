"""Int8 weights, on request: a quarter of float32's memory, and a quarter of the memory traffic per token.

Every row of a weight gets its own scale from its largest number; activations keep their type. Routers and embeddings
are not quantised, since a router that is slightly off chooses other experts (docs/speed.md says what int8 costs).

Shapes: N rows and K columns of a weight, E experts, S chosen ones.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from steermoe.errors import ModelError, reason
from steermoe.routing.routers import find_routers

Quantization = Literal["int8"]
LARGEST = 127


class Int8Linear(nn.Module):
    """A linear layer with weights [N, K] in int8 and scales [N] in the type of the activations."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = quantize(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        out = torch._weight_int8pack_mm(x.reshape(-1, self.in_features), self.weight, self.scale)
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias


class Int8Experts(nn.Module):
    """The weights of all experts of a layer, [E, *, *], in int8; indexing them returns numbers of the original type."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        weight, scale = quantize(weights.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def __getitem__(self, experts: Any) -> Tensor:
        return self.weight[experts].to(self.scale.dtype) * self.scale[experts][..., None]


def quantize(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers [..., K] as int8 and a scale [...] whose product is as close to them as possible."""
    exact = weights.float()
    scale = (exact.abs().amax(-1) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (exact / scale[..., None]).round().to(torch.int8), scale.to(weights.dtype)


@torch.inference_mode()
def quantize_model(model: Any) -> None:
    """Change a model's linear layers and experts to int8, in place.

    Raises:
        ModelError: the model is not on the CPU, is quantised already, or does not run afterwards.
    """
    name = type(model).__name__
    if model.device.type != "cpu":
        raise ModelError(f"--quantize int8 is for CPUs: {name} is on '{model.device.type}'")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ModelError(f"{name} is quantised already: leave --quantize out")
    linears, experts = _targets(model)
    for parent, child_name, linear in linears:
        setattr(parent, child_name, Int8Linear(linear))
    for module in experts:
        _quantize_experts(module)
    try:
        model.set_experts_implementation("eager")
        model(input_ids=torch.zeros(1, 2, dtype=torch.long))
    except Exception as error:  # a model's own code may raise anything for weights that are not tensors
        raise ModelError(f"{name} does not run in int8: {type(error).__name__}: {reason(error)}") from error


def is_quantized(model: Any) -> bool:
    """Whether a model has weights of fewer bits than its checkpoint's, which give no gradients."""
    quantizer = getattr(model, "hf_quantizer", None)
    keeps_them = quantizer is not None and not getattr(quantizer.quantization_config, "dequantize", False)
    return keeps_them or any(isinstance(module, Int8Linear | Int8Experts) for module in model.modules())


def _targets(model: nn.Module) -> tuple[list[tuple[nn.Module, str, nn.Linear]], list[nn.Module]]:
    """What becomes int8: linear layers, with the modules and the names that they have there, and modules of experts."""
    routing = {id(module) for router in find_routers(model) for module in router.module.modules()}
    modules = [module for module in model.modules() if id(module) not in routing]
    linears = [
        (module, name, child)
        for module in modules
        for name, child in module.named_children()
        if type(child) is nn.Linear and id(child) not in routing
    ]
    experts = [m for m in modules if hasattr(m, "_apply_gate") or type(m).__name__.endswith("Experts")]
    return linears, experts


def int8_bytes(model: nn.Module, width: int) -> int:
    """What the weights of a model would take in int8, also of one on the meta device.

    Args:
        model: a model that is not quantised, with routers.
        width: bytes of each number that stays as it is, and of each scale.
    """
    linears, experts = _targets(model)
    small = {(id(linear), "weight"): linear.weight for _, _, linear in linears}
    small |= {
        (id(m), name): each for m in experts for name, each in m.named_parameters(recurse=False) if each.dim() == 3
    }
    kept = {
        id(parameter): parameter.numel()
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if (id(module), name) not in small
    }
    quantised = sum(weight.numel() + weight.numel() // weight.shape[-1] * width for weight in small.values())
    return quantised + sum(kept.values()) * width


def _quantize_experts(module: nn.Module) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.dim() == 3:
            delattr(module, name)
            setattr(module, name, Int8Experts(parameter))
