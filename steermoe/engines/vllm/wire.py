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
from steermoe.steering.segments import Tags
from steermoe.vectors.vector import SteeringVector

WIRE_VERSION = 1
TAGS = "tags"
"""The key of a plan's tags in the header."""
KEPT = 1024


@lru_cache(KEPT)
def pack(plan: SteeringPlan, tags: Tags | None = None) -> bytes:
    """Everything that decides what a plan does: all that is in it, and the tags that it follows, if any."""
    vector = plan.vector
    header = {
        **plan.as_dict(),
        "version": WIRE_VERSION,
        "rows": [] if vector is None else list(vector.layers),
        "strength": float(plan.strength),
        "force": sorted(plan.force),
        "ban": sorted(plan.ban),
        **({} if tags is None else {TAGS: tags.as_json()}),
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
        tensors, header = _read(data)
        header.pop(TAGS, None)
        if header.pop("version") != WIRE_VERSION:
            raise SteeringError("the plan was packed by another version of steermoe: install the same one everywhere")
        domain, rows = header.pop("domain"), tuple(header.pop("rows"))
        vector = None if domain is None else SteeringVector(domain, None, rows, weights=tensors["experts"])
        return SteeringPlan(vector, **header)
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, VectorError) as error:
        raise SteeringError(f"a packed plan of {len(data)} bytes can't be read ({error!r})") from error


@lru_cache(KEPT)
def tags_of(data: bytes) -> Tags | None:
    """The tags that were packed with a plan, which `unpack` can read; None if it follows none."""
    _, header = _read(data)
    return Tags.of_json(header[TAGS]) if TAGS in header else None


def _read(data: bytes) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors = load(data)
    return tensors, json.loads(tensors["header"].numpy().tobytes())


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
