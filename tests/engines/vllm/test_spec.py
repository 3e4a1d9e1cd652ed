"""What users of vLLM write, and the packed plans that come of it; needs no vLLM."""

import json
from types import SimpleNamespace

import pytest
import torch

from steermoe.engines.vllm.spec import NO_COUNTS, packed, resolver_for
from steermoe.engines.vllm.wire import pack, unpack
from steermoe.errors import CompatibilityError, SteeringError, SteerMoEError, VectorNotFound
from steermoe.steering.asked import spec_of_name
from steermoe.steering.plans import Schedule, SteeringPlan
from steermoe.steering.resolver import PlanResolver
from steermoe.vectors.file import write_vector


@pytest.fixture
def resolver(tiny_model, make_vector, bare_search_path):
    for domain in ("sport", "food"):
        write_vector(make_vector(domain), bare_search_path / "steering_vectors" / "tiny" / f"{domain}.safetensors")
    return PlanResolver(tiny_model.shape, watch=True, names_only=True)


def test_a_packed_plan_comes_back_whole(make_vector):
    vector = make_vector()
    plan = SteeringPlan(
        vector, -2.5, "additive", "paper", "all", "decay:7", layers=(0, 1), force=((1, 2),), ban=((2, 3), (0, 1))
    )
    again = unpack(pack(plan))
    assert again.vector is not None
    assert torch.equal(again.vector.experts, vector.experts)
    for name in ("strength", "formula", "scale", "positions", "schedule", "layers", "force"):
        assert getattr(again, name) == getattr(plan, name)
    assert set(again.ban) == set(plan.ban)
    assert pack(again) == pack(plan)
    assert unpack(pack(SteeringPlan(ban=((0, 1),)))).vector is None


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\x00" * 64, pack(SteeringPlan(ban=((0, 1),)))[:-3]])
def test_other_bytes_are_refused(data):
    with pytest.raises(SteeringError, match="can't be read"):
        unpack(data)


def test_plans_that_differ_are_different_bytes(make_vector):
    vector = make_vector()
    plans = [
        SteeringPlan(vector, 2.0),
        SteeringPlan(vector, 2.1),
        SteeringPlan(vector, 2.0, "additive"),
        SteeringPlan(vector, 2.0, positions="all"),
        SteeringPlan(vector, 2.0, schedule=Schedule.parse("decay:3")),
        SteeringPlan(make_vector(threshold=0.1), 2.0),
    ]
    assert len({pack(plan) for plan in plans}) == len(plans)


def test_a_spec_says_what_the_options_say(resolver):
    spec = {
        "domain": "sport",
        "strength": 3,
        "formula": "additive",
        "scale": "paper",
        "positions": "all",
        "schedule": "window:1-4",
        "layers": [0, 1],
        "force": ["1:2"],
        "ban": [[2, 5]],
    }
    data = packed(resolver, json.dumps(spec))
    assert data == packed(resolver, spec) == packed(resolver, data)
    plan = unpack(data)
    assert (plan.strength, plan.formula, plan.scale, plan.positions) == (3.0, "additive", "paper", "all")
    assert (str(plan.schedule), plan.layers, plan.force, plan.ban) == ("window:1-4", (0, 1), ((1, 2),), ((2, 5),))
    assert unpack(packed(resolver, {"domain": "sport"})).strength == 4.0  # the vector's own


@pytest.mark.parametrize("domain", ["sport=0.7+food=0.3", {"sport": 0.7, "food": 0.3}, ["sport=0.7", "food=0.3"]])
def test_mixtures(resolver, domain, make_vector):
    experts = unpack(packed(resolver, {"domain": domain})).vector.experts
    assert torch.allclose(experts, make_vector().experts)  # both vectors are alike, the weights add up to 1


def test_strength_0_is_no_steering(resolver):
    assert packed(resolver, {"domain": "sport", "strength": 0}) is None


BAD = {
    "not json": "{",
    "a list": "[1]",
    "a number": "7",
    "unknown field": {"domain": "sport", "volume": 11},
    "nothing asked for": {},
    "strength is text": {"domain": "sport", "strength": "4"},
    "strength is true": {"domain": "sport", "strength": True},
    "strength is not finite": '{"domain": "sport", "strength": Infinity}',
    "unknown formula": {"domain": "sport", "formula": "cubic"},
    "unknown positions": {"domain": "sport", "positions": "odd"},
    "unknown schedule": {"domain": "sport", "schedule": "decay:0"},
    "layers that the model has not": {"domain": "sport", "layers": "40-50"},
    "layers are no range": {"domain": "sport", "layers": [2, 1]},
    "an expert that is not there": {"force": ["0:99"]},
    "experts are no list": {"ban": "0:1"},
    "experts forced and banned": {"force": ["0:1"], "ban": ["0:1"]},
    "unknown domain": {"domain": "nosuch"},
    "domain is a path": {"domain": "../../etc/passwd"},
    "domain is a file": {"domain": "/tmp/x.safetensors"},
    "domain is a number": {"domain": 7},
    "weight is no number": {"domain": {"sport": "much"}},
    "weights are 0": {"domain": "sport=0+food=0"},
    "too many domains": {"domain": ["sport"] * 33},
    "deep": '{"domain": ' + "[" * 100_000 + "]" * 100_000 + "}",
}


@pytest.mark.parametrize("case", BAD)
def test_bad_specs_are_refused_in_one_line(resolver, case):
    with pytest.raises(SteerMoEError) as caught:
        packed(resolver, BAD[case])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_files_that_change_are_read_again_and_new_ones_found(resolver, make_vector, bare_search_path):
    before = packed(resolver, {"domain": "sport"})
    with pytest.raises(VectorNotFound):
        packed(resolver, {"domain": "music"})
    folder = bare_search_path / "steering_vectors" / "tiny"
    write_vector(make_vector("music"), folder / "music.safetensors")
    write_vector(make_vector("sport", threshold=0.1), folder / "sport.safetensors")
    assert packed(resolver, {"domain": "music"}) is not None
    assert packed(resolver, {"domain": "sport"}) != before
    assert resolver.domains() == ["food", "music", "sport"]


def test_vectors_of_another_model_are_refused_and_not_listed(resolver, make_vector, bare_search_path):
    write_vector(make_vector("law", range(7)), bare_search_path / "steering_vectors" / "big" / "law.safetensors")
    with pytest.raises(CompatibilityError):
        packed(resolver, {"domain": "law"})
    assert resolver.domains() == ["food", "sport"]


def test_a_path_is_allowed_where_the_user_is_at_the_machine(tiny_model, make_vector, bare_search_path):
    write_vector(make_vector(), bare_search_path / "own.safetensors")
    assert packed(PlanResolver(tiny_model.shape), {"domain": "own.safetensors"}) is not None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tiny", None),
        ("other:sport", None),
        ("tiny:sport", ("tiny", ["sport"])),
        ("tiny:sport=4,food=1", ("tiny", ["sport=4", "food=1"])),
        ("org/m:7b:sport", ("org/m:7b", ["sport"])),
        ("org/m:7b", None),
    ],
)
def test_names_of_models(name, expected):
    found = spec_of_name(name, ["tiny", "org/m:7b"])
    assert found == (None if expected is None else (expected[0], {"domain": expected[1]}))


def test_a_name_that_ends_at_its_colon():
    with pytest.raises(SteeringError, match="names no domain"):
        spec_of_name("tiny:sport,", ["tiny"])


def test_packed_plans_must_fit_too(resolver):
    with pytest.raises(SteeringError, match="does not exist"):
        packed(resolver, pack(SteeringPlan(ban=((0, 99),))))


def test_a_text_can_not_have_its_own_number_of_experts(tiny_model):
    config = SimpleNamespace(hf_config=tiny_model.model.config, trust_remote_code=False, model="tiny")
    resolver = resolver_for(config)
    own = tiny_model.shape.top_k
    with pytest.raises(SteeringError, match=f"can't have {own + 1} active experts: {NO_COUNTS}"):
        packed(resolver, {"active_experts": own + 1})
    assert unpack(packed(resolver, {"active_experts": own})).active_experts == own
