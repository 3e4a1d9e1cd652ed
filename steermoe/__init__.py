"""Steer any Mixture-of-Experts language model toward a domain while it generates, by changing its router's logits.

    import steermoe

    vector = steermoe.load_vector("sport", model=model)
    with steermoe.steer(model, vector, strength=6.0) as steering:
        model.generate(...)
    print(steering.report())

Names are loaded at their first use, so `import steermoe` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steermoe.discovery.labelled import routing_embeddings, vector_from_texts
    from steermoe.engines.hf.engine import HFEngine
    from steermoe.engines.request import Completion, Request, Sampling
    from steermoe.engines.trace import Trace
    from steermoe.errors import SteerMoEError
    from steermoe.evaluation.load_vector import load_vector
    from steermoe.models.default.pull import pull
    from steermoe.models.description import describe
    from steermoe.models.loading import LoadedModel, load
    from steermoe.routing.families import list_families
    from steermoe.routing.recording import record_routing
    from steermoe.routing.routers import find_routers
    from steermoe.steering.detaching import detach
    from steermoe.steering.handle import SteeringHandle, attach, steer
    from steermoe.steering.plans import Schedule, SteeringPlan, plan_for
    from steermoe.steering.report import SteeringReport
    from steermoe.vectors.exporting import export_vector
    from steermoe.vectors.file import read_vector, write_vector
    from steermoe.vectors.importing import import_vector
    from steermoe.vectors.matrix import import_matrix
    from steermoe.vectors.mixing import mix
    from steermoe.vectors.vector import SteeringVector, VectorInfo

__version__ = "0.2.0"

_HOME = {
    "Completion": "engines.request",
    "HFEngine": "engines.hf.engine",
    "LoadedModel": "models.loading",
    "Request": "engines.request",
    "Sampling": "engines.request",
    "Schedule": "steering.plans",
    "SteerMoEError": "errors",
    "SteeringHandle": "steering.handle",
    "SteeringPlan": "steering.plans",
    "SteeringReport": "steering.report",
    "SteeringVector": "vectors.vector",
    "Trace": "engines.trace",
    "VectorInfo": "vectors.vector",
    "attach": "steering.handle",
    "describe": "models.description",
    "detach": "steering.detaching",
    "export_vector": "vectors.exporting",
    "find_routers": "routing.routers",
    "import_matrix": "vectors.matrix",
    "import_vector": "vectors.importing",
    "list_families": "routing.families",
    "load": "models.loading",
    "load_vector": "evaluation.load_vector",
    "mix": "vectors.mixing",
    "plan_for": "steering.plans",
    "pull": "models.default.pull",
    "read_vector": "vectors.file",
    "record_routing": "routing.recording",
    "routing_embeddings": "discovery.labelled",
    "steer": "steering.handle",
    "vector_from_texts": "discovery.labelled",
    "write_vector": "vectors.file",
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
    "Trace",
    "VectorInfo",
    "attach",
    "describe",
    "detach",
    "export_vector",
    "find_routers",
    "import_matrix",
    "import_vector",
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
