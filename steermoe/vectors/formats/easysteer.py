"""EasySteer's JSON for its algorithm `moe_router`: for each layer, the experts to activate or deactivate.

The shape is that of `replications/steermoe/*.json` and of `load_from_path` of the algorithm in
github.com/ZJU-REAL/EasySteer and its fork of vLLM:
{"layer_configs": {"7": {"mode": "deactivate", "expert_ids": [30, 25]}, "9": {"activate_ids": [12]}}}.
Layers are decoder layers. Nothing in it says how many experts a layer has.
"""

import json
from collections.abc import Sequence
from typing import Any

from steermoe.errors import VectorError, shown
from steermoe.vectors.formats.cells import Cells, toggled
from steermoe.vectors.formats.content import number, numbered, whole_number
from steermoe.vectors.vector import SteeringVector

KEY = "layer_configs"
MODES = {"boost": "activate", "soft_hard": "activate", "steermoe": "activate", "suppress": "deactivate"}
"""Older names of modes."""
LAMBDA = 0.5
"""What EasySteer takes if a layer of mode `soft` names no lambda."""


def read_easysteer(name: str, content: Any) -> Cells:
    """The experts of such a file, as SteerMoE's rule steers them, or with their lambdas as weights.

    Args:
        name: the file, for messages.
        content: its JSON.

    Raises:
        VectorError: it has another shape, or modes that no weight of an expert stands for.
    """
    layers = content.get(KEY) if isinstance(content, dict) else None
    if not isinstance(layers, dict) or not layers:
        raise VectorError(f"'{name}' has no layers: expected {{\"{KEY}\": {{LAYER: ...}}}}, as EasySteer writes it")
    activate: dict[int, list[int]] = {}
    deactivate: dict[int, list[int]] = {}
    soft: dict[tuple[int, int], float] = {}
    for layer, config in numbered(name, layers, "a layer").items():
        if not isinstance(config, dict):
            raise VectorError(f"'{name}': layer {layer} is {shown(config)}, expected an object with expert_ids")
        mode = config.get("mode", "activate")
        mode = MODES.get(mode, mode) if isinstance(mode, str) else mode
        own = _experts(name, layer, config, "expert_ids")
        if mode == "soft":
            weight = number(name, config.get("lambda", LAMBDA), f"lambda of layer {layer}")
            soft |= {(layer, expert): weight for expert in own}
        elif mode in ("activate", "deactivate"):
            more, less = (_experts(name, layer, config, f"{kind}_ids") for kind in ("activate", "deactivate"))
            activate[layer] = more + (own if mode == "activate" else [])
            deactivate[layer] = less + (own if mode == "deactivate" else [])
        else:
            raise VectorError(
                f"'{name}': layer {layer} has mode {shown(mode)}, which depends on the token or on chance: expected "
                "activate, deactivate or soft"
            )
    if soft and activate:
        raise VectorError(
            f"'{name}' has layers of mode soft and others that activate or deactivate, which one strength can't serve: "
            "put them into two files"
        )
    return Cells(soft, tuple(sorted({layer for layer, _ in soft}))) if soft else toggled(activate, deactivate)


def _experts(name: str, layer: int, config: dict[str, Any], key: str) -> list[int]:
    experts = config.get(key) or []
    if not isinstance(experts, list):
        raise VectorError(f"'{name}': {key} of layer {layer} is {shown(experts)}, expected a list of experts")
    return [whole_number(name, expert, f"an expert in {key} of layer {layer}") for expert in experts]


def write_easysteer(vector: SteeringVector, most: int | None) -> tuple[bytes, int]:
    """Such a file for a vector: its experts with weights above 0 are activated, those below 0 deactivated.

    Args:
        vector: the vector; how large its weights are is lost.
        most: activate at most this many experts of a layer, those with the largest weights; None for all.

    Returns:
        the file's content, and how many experts were left out.
    """
    layers: dict[str, dict[str, Any]] = {}
    left_out = 0
    for layer, weights in vector.chosen().items():
        raised = sorted((expert for expert in weights if weights[expert] > 0), key=lambda expert: -weights[expert])
        kept: Sequence[int] = raised[:most]
        left_out += len(raised) - len(kept)
        lowered = [expert for expert in weights if weights[expert] < 0]
        if kept and lowered:
            config = {"mode": "activate", "activate_ids": sorted(kept), "deactivate_ids": lowered}
        else:
            config = {"mode": "activate" if kept else "deactivate", "expert_ids": sorted(kept) or lowered}
        if kept or lowered:
            layers[str(layer)] = config
    return f"{json.dumps({KEY: layers}, indent=2)}\n".encode(), left_out
