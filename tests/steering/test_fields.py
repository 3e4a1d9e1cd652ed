"""Each field of a plan, all the way: option, JSON line, server, plan, vLLM's wire, completion, key of a story.

A new field of `SteeringSpec` is tested here by its own example.
"""

import json
from dataclasses import fields

import pytest
import torch
import typer

from steermoe.batch.jobs import BatchSettings, Job, PromptFile
from steermoe.batch.keys import StoryKeys
from steermoe.cli.app import app
from steermoe.engines.request import LISTS, Completion, Request, Sampling
from steermoe.engines.vllm.wire import pack, unpack
from steermoe.routing.shape import RouterShape, RoutingShape
from steermoe.steering.plans import UNSTEERED, SteeringPlan
from steermoe.steering.resolver import PlanResolver
from steermoe.steering.spec import FIELDS, NAMES, read_spec
from steermoe.vectors.file import write_vector
from steermoe.vectors.vector import SteeringVector

LAYERS, EXPERTS = 30, 16
SHAPE = RoutingShape("of the examples", (), tuple(RouterShape(layer, EXPERTS, EXPERTS, 2) for layer in range(LAYERS)))


@pytest.fixture
def resolver(bare_search_path):
    for number, domain in enumerate(("sport", "food", "law")):
        weights = torch.zeros(LAYERS, EXPERTS)
        weights[:, number] = 0.5
        vector = SteeringVector(domain, None, tuple(range(LAYERS)), weights=weights)
        write_vector(vector, bare_search_path / "vectors" / f"{domain}.safetensors")
    return PlanResolver(SHAPE, bare_search_path / "vectors")


@pytest.mark.parametrize("field", FIELDS, ids=NAMES)
def test_a_field_goes_all_the_way(field, resolver, tmp_path):
    asked = {"domain": "law", field.name: field.metadata["example"]}
    spec = read_spec(json.dumps(asked))
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "x", **asked}))
    file = PromptFile(path)
    assert list(file.jobs(BatchSettings())) == [[Job(1, "x", spec, Sampling())]]
    file.close()

    plain, plan = resolver.plan(read_spec({"domain": "law"})), resolver.plan(spec)
    said = plan.as_dict()
    assert json.loads(json.dumps(said)) == said
    assert said[field.name] != plain.as_dict()[field.name]
    assert unpack(pack(plan)).as_dict() == said
    assert pack(plan) != pack(plain)
    if field.name not in LISTS:
        completion = Completion(Request("x", plan), "y", (1,), 1, "stop", 0.1)
        assert completion.as_dict("tiny")[field.name] == said[field.name]
    keys, job = StoryKeys("a model"), Job(1, "x", spec, Sampling())
    assert keys.key(job, plan) != keys.key(job, plain)


@pytest.mark.parametrize("command", ["generate", "compare", "batch"])
def test_every_field_is_an_option(command):
    found = typer.main.get_command(app).commands[command].params
    options = {option.name: option.opts for option in found}
    for field in FIELDS:
        assert options[field.name] == list(field.metadata["flags"] or [f"--{field.name.replace('_', '-')}"])


def test_specs_and_plans_have_the_same_fields():
    assert [field.name for field in fields(SteeringPlan)] == ["vector", *NAMES[1:]]
    assert set(SteeringPlan(ban=((0, 1),)).as_dict()) == set(NAMES) == set(UNSTEERED)


def test_completions_keep_their_keys_and_their_order():
    found = Completion(Request("x"), "y", (1,), 1, "stop", 0.1).as_dict("tiny")
    before = ["text", "prompt", "model", "domain", "formula", "scale", "strength", "positions", "schedule", "layers"]
    assert list(found)[: len(before)] == before
    assert (found["strength"], found["formula"]) == (0.0, None)
    assert list(found)[-5:] == ["prompt_tokens", "new_tokens", "finish_reason", "seconds", "steering"]
