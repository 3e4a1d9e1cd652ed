"""The routers of a model: find them, change their logits, read which experts they chose.

With `architectures.py`, the only file that knows architectures.

In transformers a router is a module that turns hidden states into (logits, weights, indices); the block uses the
weights and indices and ignores the logits. So the logits must be changed inside the router's forward, after its one
linear map and before whatever the architecture does next: softmax or sigmoid, bias correction, groups, top-k.

Shapes: T tokens, W columns of a router's logits, k experts chosen per token.
"""

import functools
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from steermoe.errors import SteeringError, UnsupportedModel
from steermoe.routing.architectures import (
    HASH_REASON,
    LAYER_NUMBER,
    LEAST_COUNTS,
    LINEAR_GATE,
    NO_COUNTS,
    NO_LISTS,
    NO_ROUTER_REASONS,
    NOT_A_ROUTER,
    ROUTER_CLASS,
)
from steermoe.routing.fingerprint import fingerprint, places
from steermoe.routing.shape import RouterShape, RoutingShape, name_of
from steermoe.routing.weights import numbers_of

PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Types of weights whose numbers are what they say."""


@dataclass(frozen=True, eq=False)
class Router:
    """One router of a model.

    Attributes:
        name: module path within the model.
        layer: decoder layer index; in an encoder-decoder the decoder's layers are numbered after the encoder's.
        module: the module itself.
        num_experts: experts it can choose from (what expert vectors have columns for).
        width: columns of its logits; some routers have extra columns for shared experts.
        top_k: experts chosen per token.
        blanks, no_counts: as in `RouterShape`.
        stack: which of the model's stacks it belongs to.
    """

    name: str
    layer: int
    module: nn.Module
    num_experts: int
    width: int
    top_k: int
    stack: Literal["encoder", "decoder"] = "decoder"
    blanks: int = 0
    no_counts: str = ""

    @property
    def shape(self) -> RouterShape:
        reason = NO_LISTS.get(type(self.module).__name__, "")
        return RouterShape(
            self.layer,
            self.num_experts,
            self.width,
            self.top_k,
            self.blanks,
            reason,
            self.no_counts,
            LEAST_COUNTS.get(type(self.module).__name__, 1),
            _most(self.module, self.num_experts),
        )


class CountOwner(NamedTuple):
    """Where a router keeps the number of experts that it chooses.

    Attributes:
        module: the router, whose forward reads the number.
        place: the attribute with the number, or that of a configuration and the number's name in it.
    """

    module: nn.Module
    place: tuple[str, ...]


def find_routers(model: nn.Module) -> list[Router]:
    """The text routers of a model in the order of its layers.

    Raises:
        UnsupportedModel: there are none; the message says why, if known.
    """
    modules = dict(model.named_modules())
    unused = _unused_copies(modules)
    used = {name: module for name, module in modules.items() if not f"{name}.".startswith(unused)}
    recorded = _recorded_router_classes(model)
    names = [
        name
        for name, module in used.items()
        if _is_router(name, module, recorded) and not _inside_attention(name) and "vision" not in name
    ]
    if not names:
        names = [name for name, module in used.items() if _is_linear_gate(name, module, model)]
    encoder_layers = 1 + max((_layer_number(n) for n in names if _stack(n) == "encoder"), default=-1)
    routers = []
    for name in names:
        module = modules[name]
        _, (width, _) = _logits_weight(module)
        parent = modules[_parent(name)]
        stack = _stack(name)
        is_after_encoder = stack == "decoder" and encoder_layers > 0
        routers.append(
            Router(
                name=name,
                layer=_layer_number(name) + (encoder_layers if is_after_encoder else 0),
                module=module,
                num_experts=_choosable(module, width),
                width=width,
                top_k=_top_k(module, parent, model),
                stack=stack,
                blanks=_blanks(module, model),
                no_counts=_no_counts(module, parent),
            )
        )
    if not routers:
        raise UnsupportedModel(f"{type(model).__name__} has no router to steer: {_why_not(model)}")
    routers.sort(key=lambda router: router.layer)
    for one, other in pairwise(routers):
        if one.layer == other.layer:
            raise UnsupportedModel(
                f"{type(model).__name__} has two routers in layer {one.layer}, '{one.name}' and '{other.name}', and "
                "nothing says which one is used: take one out, or merge the adapter that brought it"
            )
    return routers


def _unused_copies(modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Prefixes of the names of modules that PEFT keeps beside the one in use, where it trains a copy of a module."""
    unused = []
    for name, wrapper in modules.items():
        parts: Any = wrapper
        copies = vars(wrapper).get("_modules", {}).get("modules_to_save")
        if not isinstance(copies, nn.ModuleDict) or not hasattr(wrapper, "original_module"):
            continue
        active = getattr(parts, "active_adapter", ())
        wanted = [active] if isinstance(active, str) else list(active or ())
        is_off = bool(getattr(parts, "_disable_adapters", False))
        in_use = None if is_off else next((adapter for adapter in wanted if adapter in copies), None)
        unused += [f"{name}.modules_to_save.{adapter}." for adapter in copies if adapter != in_use]
        unused += [] if in_use is None else [f"{name}.original_module."]
    return tuple(unused)


def _place(name: str) -> str:
    """A module's path without what PEFT adds to it when it trains a copy."""
    return re.sub(r"\.(original_module|modules_to_save\.[^.]+)$", "", name)


def _parent(name: str) -> str:
    return _place(name).rpartition(".")[0]


def _is_router(name: str, module: nn.Module, recorded: tuple[type, ...]) -> bool:
    class_name = type(module).__name__
    matches = ROUTER_CLASS.search(class_name) is not None or isinstance(module, recorded)
    return matches and NOT_A_ROUTER.search(class_name) is None and _has_logits_weight(module)


def _recorded_router_classes(model: nn.Module) -> tuple[type, ...]:
    """The router classes that the model declares for recording router logits."""
    declared = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits", ())
    classes = []
    for entry in declared if isinstance(declared, list | tuple) else (declared,):
        target = getattr(entry, "target_class", entry)
        if isinstance(target, type) and target is not nn.Linear:
            classes.append(target)
    return tuple(classes)


def _has_logits_weight(module: nn.Module) -> bool:
    return _inner_linears(module) != [] or isinstance(getattr(module, "weight", None), Tensor)


def _is_linear_gate(name: str, module: Any, model: nn.Module) -> bool:
    config = _text_config(model)
    counts = {
        getattr(config, key, None)
        for key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    } - {None}
    is_gate = LINEAR_GATE.search(_place(name)) is not None and not _inside_attention(name)
    width = getattr(module, "out_features", 1)
    return is_gate and width in counts and width > 1


def _inside_attention(name: str) -> bool:
    """JetMoe routes its attention heads too; those experts are not feed-forward experts and are left alone."""
    return re.search(r"attention|attn", name) is not None


def _stack(name: str) -> Literal["encoder", "decoder"]:
    return "encoder" if re.match(r"(model\.)?encoder\.", name) else "decoder"


def _layer_number(name: str) -> int:
    match = LAYER_NUMBER.search(name)
    if match is None:
        raise UnsupportedModel(f"can't tell which layer the router '{name}' belongs to")
    return int(match.group(1))


def _inner_linears(module: nn.Module) -> list[Any]:
    """Linear layers below the module, including quantised ones; not the parts inside one, such as a LoRA's."""
    found: list[Any] = []
    for child in module.children():
        found += [child] if hasattr(child, "out_features") else _inner_linears(child)
    return found


def _logits_weight(module: Any) -> tuple[nn.Module, tuple[int, int]]:
    """The module whose weight computes the logits, and that weight's shape (columns of the logits, hidden size)."""
    if hasattr(module, "out_features"):
        return module, (module.out_features, module.in_features)
    linears = _inner_linears(module)
    if linears:
        return linears[-1], (linears[-1].out_features, linears[-1].in_features)
    return module, (module.weight.shape[0], module.weight.shape[1])


def _choosable(module: nn.Module, width: int) -> int:
    """The columns that compete for a place in the top-k: inkling appends its shared experts, which always run."""
    shared = getattr(module, "n_shared_experts", 0) or 0
    if shared and getattr(module, "num_experts", None) == width - shared:
        return width - shared
    return width


def _blanks(module: nn.Module, model: nn.Module) -> int:
    """Columns that compete for a place in the top-k but have no expert."""
    if hasattr(module, "num_router_classes"):  # zaya: the last one skips the layer
        return 1
    return getattr(_text_config(model), "zero_expert_num", 0) or 0


def _top_k(module: Any, parent: Any, model: nn.Module) -> int:
    for owner in (module, parent):
        if isinstance(getattr(owner, "top_k", None), int):
            return owner.top_k
    if match := re.search(r"Top(\d+)Router$", type(module).__name__):
        return int(match.group(1))
    config = _text_config(model)
    for key in ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k"):
        if isinstance(getattr(config, key, None), int):
            return getattr(config, key)
    raise UnsupportedModel(f"can't tell how many experts {type(module).__name__} chooses for a token")


NOTE = "_steermoe_counts"
"""The attribute of a router that says how many experts the tokens of its last call got, where that was not its own
number: one for all, or one for each [T]."""
COUNTS_IN_CONFIG = ("top_k_experts",)
"""Names of the number in configurations that routers read while they run."""


def count_owner(model: nn.Module, router: Router) -> CountOwner | None:
    """Where a router keeps the number of experts that it chooses; None if it has none that could be changed."""
    return None if router.no_counts else _count_owner(router.module, model.get_submodule(_parent(router.name)))


def _count_owner(module: Any, parent: Any) -> CountOwner | None:
    if type(parent).__name__.startswith("Mxfp4"):  # its kernel chooses
        return None
    if type(vars(module).get("top_k")) is int:
        return CountOwner(module, ("top_k",))
    kind: Any = type(module)
    for name in COUNTS_IN_CONFIG:
        if f"config.{name}" in _source(kind) and type(getattr(module.config, name, None)) is int:
            return CountOwner(module, ("config", name))
    return None


def _no_counts(module: nn.Module, parent: nn.Module) -> str:
    """Why a router can't choose another number of experts; "" if it can."""
    if reason := NO_COUNTS.get(type(module).__name__):
        return reason
    return "" if _count_owner(module, parent) else f"{type(module).__name__} keeps no number that could be changed"


def _most(module: Any, experts: int) -> int:
    """How many experts a router could choose that leaves out all but some groups of them; 0 if it leaves out none."""
    groups = next((value for name in ("num_group", "n_group") if type(value := getattr(module, name, None)) is int), 1)
    kept = getattr(module, "topk_group", None)
    return kept * (experts // groups) if groups > 1 and type(kept) is int and kept < groups else 0


@functools.lru_cache(64)
def _source(kind: Any) -> str:
    """The code of a class; looking it up takes long in a large file."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _why_not(model: nn.Module) -> str:
    model_type = getattr(_text_config(model), "model_type", "")
    if model_type in NO_ROUTER_REASONS:
        return NO_ROUTER_REASONS[model_type]
    if any("Hash" in type(module).__name__ for module in model.modules()):
        return HASH_REASON
    return "it is a dense model; steermoe steers mixtures of experts"


def module_that_routes(model: nn.Module, router: Router) -> nn.Module:
    """The module whose forward computes the router's logits: the router, or an MXFP4 block, which reads its weight."""
    parent = model.get_submodule(_parent(router.name))
    return parent if type(parent).__name__.startswith("Mxfp4") else router.module


def chosen_experts(router: Router, output: Any, top_k: int | None = None) -> Tensor:
    """The experts that a router chose, [T, k], read from what its forward returned.

    Args:
        router: the router.
        output: what it returned.
        top_k: k, if it is known; by default the most that a token of the router's last call got (see `NOTE`). Where a
            token got fewer, the places that are left hold a number beyond the router's columns.
    """
    counts = vars(router.module).get(NOTE) if top_k is None else None
    if counts is None:
        return _chosen(router, output, router.top_k if top_k is None else top_k)
    if isinstance(counts, int):
        return _chosen(router, output, counts)
    chosen_TK = _chosen(router, output, int(counts.max()))
    counted_TK = torch.arange(chosen_TK.shape[1]) < counts[:, None]
    return chosen_TK.where(counted_TK.to(chosen_TK.device, non_blocking=True), router.width)


def _chosen(router: Router, output: Any, top_k: int) -> Tensor:
    parts = output if isinstance(output, tuple | list) else (output,)
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if top_k < router.width:
        for position, tensor in enumerate(tensors):
            is_integer = not tensor.is_floating_point() and tensor.dtype != torch.bool
            if is_integer and tensor.dim() >= 2 and tensor.shape[-1] == top_k:
                flat = tensor if tensor.dim() == 2 else tensor.flatten(0, -2)
                return _unmask_skipped(router, flat, tensors[position - 1] if position else None)
    for tensor in tensors:  # logits, or weights that are zero for all but the chosen
        if tensor.is_floating_point() and tensor.dim() >= 2 and tensor.shape[-1] in (router.num_experts, router.width):
            return tensor.flatten(0, -2)[:, : router.num_experts].topk(top_k, -1).indices
    raise SteeringError(f"can't read the chosen experts from what {type(router.module).__name__} returns")


def _unmask_skipped(router: Router, indices: Tensor, weights: Tensor | None) -> Tensor:
    """Zaya returns expert 0 with weight 0 where it chose its last column, the skip; restore that column's index."""
    if not hasattr(router.module, "num_router_classes") or weights is None:
        return indices
    return torch.where(weights.flatten(0, -2) == 0, router.width - 1, indices)


def scoring(router: Any, config: Any) -> str:
    """How a router turns logits into scores: as the configuration says, else as its source code does.

    One of "softmax", "sigmoid" and "sqrtsoftplus"; "unknown" if neither says.
    """
    for key in ("scoring_func", "expert_selection_fn"):
        if getattr(config, key, None) in ("softmax", "sigmoid", "sqrtsoftplus"):
            return getattr(config, key)
    try:
        source = inspect.getsource(type(router))
    except (OSError, TypeError):
        return "unknown"
    code = re.sub(r"#.*", "", source)  # comments say what it is not: "sigmoid instead of softmax"
    found = [word for word in ("sigmoid", "softmax") if word in code]
    return found[0] if len(found) == 1 else "unknown" if not found else "/".join(found)


# ---- shape ----


def shape_of(
    model: nn.Module | RoutingShape, routers: Sequence[Router] | None = None, *, sizes_only: bool = False
) -> RoutingShape:
    """The shape of a transformers model; a shape is returned as it is.

    Args:
        model: the model, or a shape.
        routers: the model's routers, if they have been found already.
        sizes_only: leave out the fingerprint, for which some weights are read.

    Raises:
        UnsupportedModel: the model has no routers, or none that steermoe knows.
    """
    if isinstance(model, RoutingShape):
        return model
    config = getattr(model, "config", None)
    name = getattr(config, "name_or_path", "")
    architecture = getattr(config, "model_type", "")
    found = routers or find_routers(language_model(model))
    return RoutingShape(
        name_of(Path(name or type(model).__name__)),
        (architecture,) if architecture else (),
        tuple(router.shape for router in found),
        () if name else ("",),
        "" if sizes_only else fingerprint_of(found),
    )


@dataclass(frozen=True)
class Gate:
    """Where the weight of a router's gate is.

    Attributes:
        name: of the parameter in the model.
        shape: [W, H], columns of the logits and hidden size.
    """

    name: str
    shape: tuple[int, int]

    @property
    def layer(self) -> int:
        """The number in its name; not always that of the decoder layer, see `Router`."""
        return _layer_number(self.name)


def gates_of(routers: Sequence[Router]) -> tuple[Gate, ...]:
    """The gate of each router."""
    gates = []
    for router in routers:
        module, shape = _logits_weight(router.module)
        inner = next(name for name, one in router.module.named_modules() if one is module)
        gates.append(Gate(".".join(filter(None, (_place(router.name), inner, "weight"))), shape))
    return tuple(gates)


def fingerprint_of(routers: Sequence[Router]) -> str:
    """The fingerprint of a model's routers; "" if the numbers of a gate are unknown, as of a quantised one."""
    gates = []
    for router in routers:
        module, shape = _logits_weight(router.module)
        parameter: Any = getattr(module, "weight", None)
        if not isinstance(parameter, Tensor) or tuple(parameter.shape) != shape or parameter.dtype not in PLAIN:
            return ""
        weight = numbers_of(module, "weight", parameter)
        if weight.is_meta or type(weight) not in (Tensor, nn.Parameter):
            return ""
        wanted = torch.tensor(places(weight.numel()), device=weight.device)
        gates.append((shape, weight.flatten()[wanted].float().tolist()))
    return fingerprint(gates)


def language_model(model: nn.Module) -> nn.Module:
    """The transformers model inside any wrappers around it: torch.compile, PEFT, data parallel and the like."""
    from transformers import PreTrainedModel

    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)
