"""Keys of stories: existing files must be resumed, so no key may ever change."""

import json
from dataclasses import replace

import pytest
import torch

from steermoe.batch.jobs import BatchSettings, Job, PromptFile
from steermoe.batch.keys import StoryKeys
from steermoe.engines.request import Sampling
from steermoe.routing.shape import RouterShape, RoutingShape
from steermoe.steering.resolver import PlanResolver
from steermoe.steering.spec import SteeringSpec
from steermoe.vectors.file import write_vector
from steermoe.vectors.vector import SteeringVector, VectorInfo

SHAPE = RoutingShape("tiny", (), tuple(RouterShape(layer, 8, 8, 2) for layer in range(3)))
GRID = torch.arange(24.0).reshape(3, 8)
LINES = [
    {"prompt": "A dog."},
    {"prompt": "A dog.", "id": "a17", "domain": "sport"},
    {"prompt": "A dog.", "id": 17, "domain": None},
    {"prompt": "It rained.", "domain": {"sport": 0.5, "food": -0.25}, "strength": 3, "formula": "additive"},
    {"prompt": "It rained.", "domain": "sport=0.5+food=-0.25", "scale": "paper", "positions": "all"},
    {"prompt": "x", "domain": "food", "schedule": "decay:5", "layers": "0-1", "strength": -2.5},
    {"prompt": "x", "domain": "food", "schedule": "window:1-4", "layers": 2, "seed": 9, "max_new_tokens": 5},
    {"prompt": "x", "domain": "sport", "min_new_tokens": 2, "do_sample": False, "temperature": 1, "top_p": 0.5},
    {"prompt": "Ünï", "domains": ["sport", "food=2"], "samples": 2, "top_k": 3, "repetition_penalty": 1.5},
]
LISTS = SteeringSpec(force=("0:1", "0:0"), ban=("2:7",))
# As steermoe 0.1.0 computed them: never change these.
PLAIN_KEYS = """9c6d32f201b94029 9d1434122867ee48 bf637f38e6571f93 4474a0772f22280c 7c3b7b03f2b6ab11 38159e30b05e0a35
    20bd5e5927355ed7 9146d57b527025a0 a9f77becfe770a48 972ce517520dbbe2 b92cfcd17c7a8689 541c7aab89f4e393"""
LISTS_KEYS = """68be44d61f51a1c2 68080b7c21f2bc64 2884f0e0e4879185 bf637f38e6571f93 5c37c5a7316c0d2f f2060fc1aa180c6f
    020445dc48409d1e 7a05d3e0bb3e9e51 a956820771dfcb1d aeb91876c0240e72 7209e681c4bd36b3 31150d2ef5451519
    031aecbd2fe98ed9"""

CHAT_KEYS = """9c6d32f201b94029 b3c3d061ebc856ba c34e0b7326d6675d
    ff2b4dcca755d300 80d8589a71f3250e 7d001c771117102e"""


@pytest.fixture
def resolver(bare_search_path):
    for domain, weights in (("sport", GRID / 8), ("food", GRID.flip(1) / 4)):
        vector = SteeringVector(domain, None, (0, 1, 2), weights=weights, info=VectorInfo(strength=4.0))
        write_vector(vector, bare_search_path / "vectors" / f"{domain}.safetensors")
    return PlanResolver(SHAPE, bare_search_path / "vectors")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [(BatchSettings(), PLAIN_KEYS), (BatchSettings(LISTS, ("sport", "")), LISTS_KEYS)],
    ids=["plain", "lists of experts"],
)
def test_keys_never_change(resolver, tmp_path, settings, expected):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)))
    keys, file = StoryKeys("a model of these tests"), PromptFile(path)
    found = [keys.key(job, resolver.plan(job.steering)) for line in file.jobs(settings) for job in line]
    file.close()
    assert found == expected.split()


def test_everything_that_decides_the_text_changes_the_key(resolver):
    """tests/steering/test_fields.py has the fields of plans."""
    job = Job(1, "A dog.", SteeringSpec("sport"), Sampling())
    plan = resolver.plan(job.steering)
    other_vector = replace(plan, vector=replace(plan.vector, weights=plan.vector.weights * 2))
    keys = StoryKeys("a model")
    found = [keys.key(job, one) for one in (None, plan, other_vector)]
    found += [keys.key(replace(job, **{name: "other"}), plan) for name in ("prompt", "id")]
    found += [keys.key(replace(job, special_tokens=True), plan)]
    found += [keys.key(replace(job, sampling=replace(job.sampling, min_p=0.1)), plan)]
    found += [keys.key(replace(job, sampling=replace(job.sampling, seed=1)), plan), StoryKeys("other").key(job, plan)]
    assert len(set(found)) == len(found)
    assert keys.key(replace(job, special_tokens=False), plan) == keys.key(job, plan)
    assert keys.key(replace(job, sampling=replace(job.sampling, min_p=0)), plan) == keys.key(job, plan)
    assert keys.key(job, replace(plan, strength=int(plan.strength))) == keys.key(job, plan)


def test_chats_have_keys_of_their_own(resolver, tmp_path):
    """The same text as a story, as a message, and after other messages or with other thinking."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "A dog."}))
    keys, file = StoryKeys("a model of these tests"), PromptFile(path)
    chats = (
        BatchSettings(),
        BatchSettings(chat=True),
        BatchSettings(chat=True, system=""),
        BatchSettings(chat=True, system="Be brief."),
        BatchSettings(chat=True, thinking=False),
        BatchSettings(special_tokens=True),
    )
    found = [keys.key(job, None) for settings in chats for line in file.jobs(settings) for job in line]
    file.close()
    # As steermoe 0.3.0 computed them: never change these.
    assert found == CHAT_KEYS.split()
