"""Steering as users of vLLM write it, and the packed plan that it becomes.

Imports no vLLM.
"""

import os
from typing import Any

from steermoe.engines.vllm.wire import pack, unpack
from steermoe.errors import UnsupportedModel
from steermoe.models.description import shape_of_config
from steermoe.steering.plans import SteeringPlan
from steermoe.steering.resolver import PlanResolver
from steermoe.steering.spec import read_spec

ANY_MODEL = "STEERMOE_ANY_MODEL"
"""If it is 1 in the environment, vectors that were built for another model of the same shape are taken too."""


NO_COUNTS = "vLLM's kernels choose as many as the model's configuration says, for all texts"
"""Why a text can't have its own number of active experts."""


def resolver_for(model_config: Any, *, names_only: bool = False) -> PlanResolver:
    """What reads the specs of requests to a running vLLM, from vLLM's configuration of its model."""
    any_model = os.environ.get(ANY_MODEL) == "1"
    shape = shape_of_config(model_config).without_counts(NO_COUNTS)
    return PlanResolver(shape, watch=True, names_only=names_only, any_model=any_model)


def packed(resolver: PlanResolver, asked: Any) -> bytes | None:
    """The packed plan of a spec (JSON text, an object, or an already packed plan); None if it does nothing.

    Raises:
        SteerMoEError: something in it can't be read or found, or does not fit the model, or it follows tags that the
            model does not have.
    """
    if isinstance(asked, bytes):
        resolver.check(unpack(asked))
        return asked
    plan = resolver.plan(read_spec(asked))
    return pack(plan, resolver.tags.of(plan)) if plan is not None and plan.does_something else None


def refuse_lists(plan: SteeringPlan, reason: str) -> None:
    """Raise UnsupportedModel for a plan that forces or bans experts where there is a reason against it."""
    if reason and (plan.force or plan.ban):
        raise UnsupportedModel(f"experts can't be forced or banned here: {reason}; leave force and ban out")
