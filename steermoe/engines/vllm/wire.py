"""A plan on its way to vLLM's workers: bytes that hold all of it, vector included, since workers read no files.

Equal plans are equal bytes. No pickle: a safetensors file in memory, with the plan's fields as JSON in its header.
"""

import json
from functools import lru_cache
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from steermoe.errors import SteeringError, VectorError
from steermoe.steering.plans import SteeringPlan
from steermoe.vectors.vector import SteeringVector

WIRE_VERSION = 1
KEY = "steering"
"""The key of a request's steering in `SamplingParams.extra_args`, which is `vllm_xargs` at the server."""

KEPT = 1024


@lru_cache(KEPT)
def pack(plan: SteeringPlan) -> bytes:
    """Everything in a plan that decides what it does."""
    vector = plan.vector
    header = {
        **plan.as_dict(),
        "version": WIRE_VERSION,
        "rows": [] if vector is None else list(vector.layers),
        "strength": float(plan.strength),
        "force": sorted(plan.force),
        "ban": sorted(plan.ban),
    }
    experts = torch.zeros(0, 0) if vector is None else vector.experts.detach().float().cpu().contiguous()
    return save({"experts": experts, "header": torch.frombuffer(bytearray(_json(header)), dtype=torch.uint8)})


@lru_cache(KEPT)
def unpack(data: bytes) -> SteeringPlan:
    """The plan that was packed.

    Raises:
        SteeringError: bytes that `pack` of this version did not write.
    """
    try:
        tensors = load(data)
        header: dict[str, Any] = json.loads(tensors["header"].numpy().tobytes())
        if header.pop("version") != WIRE_VERSION:
            raise SteeringError("the plan was packed by another version of steermoe: install the same one everywhere")
        domain, rows = header.pop("domain"), tuple(header.pop("rows"))
        vector = None if domain is None else SteeringVector(domain, None, rows, weights=tensors["experts"])
        return SteeringPlan(vector, **header)
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, VectorError) as error:
        raise SteeringError(f"a packed plan of {len(data)} bytes can't be read ({error!r})") from error


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
