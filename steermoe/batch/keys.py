"""The key that identifies a story: a hash of everything that decides its text, and of its id.

Files of stories hold keys, so keys must never change. The hashed content grows at its end only, and a field of plans or
of the sampling that was added later is omitted where it has its default.
"""

import hashlib
import json
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from steermoe.batch.jobs import Job
from steermoe.steering.plans import SteeringPlan
from steermoe.vectors.vector import SteeringVector

HASHED = ("strength", "formula", "scale", "positions", "schedule", "layers", "force", "ban")
"""The fields of plans when keys were introduced, in the order in which they are hashed, default or not."""
LATER = {"min_p": 0.0}
"""Fields of the sampling that came later, each with the value that all earlier stories have."""
KEPT_VECTORS, KEPT_PLANS = 64, 1024


class StoryKeys:
    """Keys of stories that one engine generates.

    Args:
        fingerprint: the engine's.
    """

    def __init__(self, fingerprint: str) -> None:
        self._fingerprint = fingerprint
        self._steering = lru_cache(KEPT_PLANS)(self._hashed)
        self._digest = lru_cache(KEPT_VECTORS)(_digest)

    def key(self, job: Job, plan: SteeringPlan | None) -> str:
        """16 hexadecimal digits; `plan` is the resolved steering of the job."""
        given = {name: value for name, value in asdict(job.sampling).items() if LATER.get(name) != value}
        sampling = {name: float(value) for name, value in given.items() if name != "seed"}
        steering = None if plan is None else self._steering(plan)
        content = [self._fingerprint, job.prompt, job.id, steering, sampling, job.sampling.seed]
        if job.messages:
            content.append([[message.as_dict() for message in job.messages], job.thinking])
        content += ["special_tokens"] if job.special_tokens else []
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def _hashed(self, plan: SteeringPlan) -> list[Any]:
        values = {**plan.as_dict(), "strength": float(plan.strength)}
        vector = [] if plan.vector is None else [values["domain"], self._digest(plan.vector)]
        defaults = SteeringPlan(plan.vector, force=plan.force, ban=plan.ban or ((0, 0),)).as_dict()
        later = {
            name: values[name] for name in values if name not in ("domain", *HASHED) and values[name] != defaults[name]
        }
        return [*vector, *(values[name] for name in HASHED), *([later] if later else [])]


def _digest(vector: SteeringVector) -> str:
    """A hash of what a vector does."""
    digest = hashlib.sha256(vector.experts.detach().float().cpu().contiguous().numpy().tobytes())
    digest.update(repr(vector.layers).encode())
    return digest.hexdigest()
