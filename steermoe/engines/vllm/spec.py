"""Steering as users of vLLM write it, in JSON or a model name, and the packed plan that it becomes.

Imports no vLLM.
"""

import os
from typing import Any

from steermoe.engines.vllm.wire import pack, unpack
from steermoe.errors import SteeringError
from steermoe.models.description import shape_of_config
from steermoe.steering.limits import quoted
from steermoe.steering.resolver import PlanResolver
from steermoe.steering.spec import read_spec

ANY_MODEL = "STEERMOE_ANY_MODEL"
"""If it is 1 in the environment, vectors that were built for another model of the same shape are taken too."""


def resolver_for(model_config: Any, *, names_only: bool = False) -> PlanResolver:
    """What reads the specs of requests to a running vLLM, from vLLM's configuration of its model."""
    any_model = os.environ.get(ANY_MODEL) == "1"
    return PlanResolver(shape_of_config(model_config), watch=True, names_only=names_only, any_model=any_model)


def packed(resolver: PlanResolver, asked: Any) -> bytes | None:
    """The packed plan of a spec (JSON text, an object, or an already packed plan); None if it does nothing.

    Raises:
        SteerMoEError: something in it can't be read or found, or does not fit the model.
    """
    if isinstance(asked, bytes):
        resolver.check(unpack(asked))
        return asked
    plan = resolver.plan(read_spec(asked))
    return pack(plan) if plan is not None and plan.does_something else None


def spec_of_name(name: str, served: list[str]) -> tuple[str, dict[str, Any]] | None:
    """The served model and the spec of a name such as "smollm2-moe:sport=4,food=1"; None if it names no steering.

    A weight is what it is for `--domain`: the share in a mixture, or with one domain a multiple of its own strength.

    Raises:
        SteeringError: the name ends at the colon, or a domain is missing.
    """
    for base in sorted(served, key=len, reverse=True):
        if name.startswith(f"{base}:") and name not in served:
            domains = [part.strip() for part in name[len(base) + 1 :].split(",")]
            if not all(domains):
                raise SteeringError(
                    f"model '{quoted(name)}' names no domain after its colon: write, for example, {base}:sport"
                )
            return base, {"domain": domains}
    return None
