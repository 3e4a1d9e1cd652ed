"""Steer any Mixture-of-Experts language model toward a domain while it generates, by changing its router's logits.

    import steermoe

    vector = steermoe.load_vector("sport", model=model)
    with steermoe.steer(model, vector, strength=6.0) as steering:
        model.generate(...)
    print(steering.report())

Names are loaded when they are first used, so that `import steermoe` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steermoe.discovery.building import routing_embeddings, vector_from_texts
    from steermoe.engines.base import Completion, Request, Sampling
    from steermoe.engines.hf import HFEngine
    from steermoe.errors import SteerMoEError
    from steermoe.families import list_families
    from steermoe.library import import_matrix, load_vector, read_vector, write_vector
    from steermoe.models import LoadedModel, describe, load, pull
    from steermoe.recording import record_routing
    from steermoe.routers import find_routers
    from steermoe.steering import Schedule, SteeringHandle, SteeringPlan, SteeringReport, attach, plan_for, steer
    from steermoe.vectors import SteeringVector, VectorInfo, mix

__version__ = "0.1.0"

_HOME = {
    "Completion": "engines.base",
    "HFEngine": "engines.hf",
    "LoadedModel": "models",
    "Request": "engines.base",
    "Sampling": "engines.base",
    "Schedule": "steering",
    "SteerMoEError": "errors",
    "SteeringHandle": "steering",
    "SteeringPlan": "steering",
    "SteeringReport": "steering",
    "SteeringVector": "vectors",
    "VectorInfo": "vectors",
    "attach": "steering",
    "describe": "models",
    "find_routers": "routers",
    "import_matrix": "library",
    "list_families": "families",
    "load": "models",
    "load_vector": "library",
    "mix": "vectors",
    "plan_for": "steering",
    "pull": "models",
    "read_vector": "library",
    "record_routing": "recording",
    "routing_embeddings": "discovery.building",
    "steer": "steering",
    "vector_from_texts": "discovery.building",
    "write_vector": "library",
}

__all__ = [
    "Completion",
    "HFEngine",
    "LoadedModel",
    "Request",
    "Sampling",
    "Schedule",
    "SteerMoEError",
    "SteeringHandle",
    "SteeringPlan",
    "SteeringReport",
    "SteeringVector",
    "VectorInfo",
    "attach",
    "describe",
    "find_routers",
    "import_matrix",
    "list_families",
    "load",
    "load_vector",
    "mix",
    "plan_for",
    "pull",
    "read_vector",
    "record_routing",
    "routing_embeddings",
    "steer",
    "vector_from_texts",
    "write_vector",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'steermoe' has no attribute '{name}'")
    return getattr(import_module(f"steermoe.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
