"""Bodies of requests: whatever a client sends, vLLM gets a body that steers as asked, or the client gets a reason."""

import json

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

import torch
from hypothesis import given
from hypothesis import strategies as st

from steermoe.engines.vllm.server import LIMITS, steered_body
from steermoe.engines.vllm.spec import packed
from steermoe.errors import SteeringError, SteerMoEError
from steermoe.steering.resolver import PlanResolver
from steermoe.vectors.file import write_vector
from steermoe.vectors.vector import SteeringVector

text = st.text(max_size=8)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)
name = st.sampled_from(["tiny", "tiny:sport", "tiny:sport=1e300", "tiny:sport=-2", "tiny:", "other:sport"]) | anything
steering = (
    st.sampled_from(['{"domain": "sport"}', '{"domain": "sport", "schedule": "window:5-9"}', "{", "7"]) | anything
)
bodies = st.fixed_dictionaries(
    {},
    optional={
        "model": name,
        "vllm_xargs": st.dictionaries(st.just("steering") | text, steering, max_size=2) | anything,
        "extra_body": anything,
        "steering": anything,
        "use_beam_search": st.booleans() | anything,
        **dict.fromkeys(LIMITS, st.integers(-1, 12) | anything),
    },
)


@pytest.fixture(scope="module")
def resolver(tmp_path_factory, tiny_model):
    folder, shape = tmp_path_factory.mktemp("vectors"), tiny_model.shape
    weights = torch.full((len(shape.layers), shape.num_experts), 0.5)
    write_vector(SteeringVector("sport", None, shape.layers, weights=weights), folder / "sport.safetensors")
    return PlanResolver(shape, folder, watch=True, names_only=True)


def check_message(error):
    assert "\n" not in str(error)
    assert len(str(error)) < 1000


@pytest.mark.fuzz
@given(
    body=bodies.map(lambda body: json.dumps(body).encode())
    | st.binary(max_size=40)
    | anything.map(repr).map(str.encode)
)
def test_any_body(resolver, body):
    try:
        changed = steered_body(body, ["tiny"], resolver)
    except SteerMoEError as error:
        check_message(error)
        return
    if changed != body:
        asked = json.loads(changed)
        assert asked["model"] == json.loads(body).get("model") or asked["model"] == "tiny"
        packed(resolver, asked["vllm_xargs"]["steering"])


@pytest.mark.parametrize("limit", LIMITS)
def test_too_few_tokens_to_steer(resolver, limit):
    def ask(most, **more):
        return steered_body(json.dumps({"model": "tiny:sport", limit: most, **more}).encode(), ["tiny"], resolver)

    with pytest.raises(SteeringError, match="would reach none of 1 new tokens"):
        ask(1)
    for most in (2, None, 0, "1"):
        assert json.loads(ask(most))["model"] == "tiny"
    everywhere = {"vllm_xargs": {"steering": '{"domain": "sport", "positions": "all"}'}}
    assert json.loads(ask(1, **everywhere, model="tiny"))[limit] == 1
