"""The plans that jobs ask for, each made once, and the key by which a story is known again."""

import hashlib
import json
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from steermoe.batch.jobs import Job
from steermoe.engines.engine import Engine
from steermoe.steering.banks import check_plan
from steermoe.steering.plans import Schedule, SteeringPlan, plan_for
from steermoe.steering.spec import NO_DOMAIN, Steering, parse_domain, parse_expert, parse_layers
from steermoe.vectors.library import load_vector
from steermoe.vectors.mixing import mix
from steermoe.vectors.vector import SteeringVector

KEPT_VECTORS, KEPT_PLANS = 64, 1024


class PlanBook:
    """Looks vectors up and makes plans of them; a plan that many jobs share is one object.

    Args:
        vectors: a folder to search first.
    """

    def __init__(self, engine: Engine, vectors: Path | None = None) -> None:
        self._shape = engine.shape
        self._folder = vectors
        self._fingerprint = engine.fingerprint()
        self.plan = lru_cache(KEPT_PLANS)(self._plan)
        self._vector = lru_cache(KEPT_VECTORS)(self._find_vector)
        self._check = lru_cache(KEPT_PLANS)(self._check_fits)

    def _plan(self, steering: Steering) -> SteeringPlan | None:
        """The plan, or None for an unsteered story.

        Raises:
            SteerMoEError: anything in it that can't be read, found, or fitted to the model.
        """
        forced, banned = tuple(map(parse_expert, steering.force)), tuple(map(parse_expert, steering.ban))
        fields: dict[str, Any] = {
            "positions": steering.positions,
            "schedule": Schedule.parse(steering.schedule),
            "layers": None if steering.layers is None else parse_layers(steering.layers),
            "force": forced,
            "ban": banned,
            "formula": steering.formula,
            "scale": steering.scale,
        }
        if steering.domain == NO_DOMAIN or not (steering.domain or forced or banned):
            return None
        vector = self._vector(steering.domain)[0] if steering.domain else None
        plan = plan_for(vector, steering.strength, **fields)
        self._check(replace(steering, strength=None, formula=None, scale=None, positions="generated"))
        return plan

    def _find_vector(self, domain: str) -> tuple[SteeringVector, str]:
        """A vector or mixture, and a hash of what it does."""
        is_file = domain.endswith(".safetensors") and Path(domain).is_file()
        parts = [parse_domain(part) for part in ([domain] if is_file else domain.split("+"))]
        vector = mix([(load_vector(name, self._shape, folder=self._folder), weight) for name, weight in parts])
        digest = hashlib.sha256(vector.experts.detach().float().cpu().contiguous().numpy().tobytes())
        digest.update(repr(vector.layers).encode())
        return vector, digest.hexdigest()

    def _check_fits(self, steering: Steering) -> None:
        """Such as layers that hold no router; whatever the strength, once for all."""
        vector = self._vector(steering.domain)[0] if steering.domain else None
        layers = None if steering.layers is None else parse_layers(steering.layers)
        force, ban = tuple(map(parse_expert, steering.force)), tuple(map(parse_expert, steering.ban))
        check_plan(self._shape, SteeringPlan(vector, 1.0, layers=layers, force=force, ban=ban))

    def key(self, job: Job) -> str:
        """16 hexadecimal digits of a hash of everything that decides a story's text, and of its id."""
        plan = self.plan(job.steering)
        steering = None
        if plan is not None:
            steering = [
                *((plan.vector.domain, self._vector(job.steering.domain)[1]) if plan.vector is not None else ()),
                float(plan.strength),
                *(plan.formula, plan.scale, plan.positions, str(plan.schedule)),
                *(plan.layers, plan.force, plan.ban),
            ]
        sampling = {name: float(value) for name, value in asdict(job.sampling).items() if name != "seed"}
        content = [self._fingerprint, job.prompt, job.id, steering, sampling, job.sampling.seed]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
