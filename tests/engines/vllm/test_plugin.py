"""What the plugin refuses: other versions of vLLM, models and layers that can't be steered, requests it can't read."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

import torch
import vllm
from transformers import LlamaConfig, LlamaForCausalLM
from vllm.exceptions import VLLMValidationError

from steermoe.engines.vllm import plugin
from steermoe.engines.vllm.engine import VLLMEngine
from steermoe.engines.vllm.launch import cpus_of
from steermoe.engines.vllm.selection import TRIAL_TOKENS
from steermoe.engines.vllm.wire import pack
from steermoe.errors import ModelError, SteeringError, UnsupportedModel
from steermoe.routing.shape import RouterShape
from steermoe.steering.plans import SteeringPlan
from tests.support.steering_models import byte_tokenizer
from tests.support.vllm_engines import OPTIONS, SIZES, end, requests, vector, write_checkpoint


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm") / "mixtral"
    write_checkpoint("mixtral", folder)
    engine = VLLMEngine(str(folder), **OPTIONS)
    yield engine
    end(engine)


def test_another_version_is_refused_unless_it_is_wanted(monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    with pytest.raises(UnsupportedModel, match=r"vLLM 0\.99\.1 was not tested with steermoe, 0\.32\.\* was"):
        plugin.check_version()
    monkeypatch.setenv(plugin.ANY_VERSION, "1")
    plugin.check_version()


def test_a_method_that_is_missing_is_an_error():
    class Changed:
        pass

    with pytest.raises(UnsupportedModel, match=r"has no .*Changed\.execute_model, which steering needs"):
        plugin._wrap(Changed, "execute_model", lambda method: method)


ROUTER = SimpleNamespace(layer=3, num_experts=8, top_k=2)


def layer(router=None, **config):
    config = {"is_sequence_parallel": False, "num_logical_experts": 8, **config}
    return SimpleNamespace(router=router or SimpleNamespace(top_k=2), moe_config=SimpleNamespace(**config))


class RoutingSimulatorRouter:
    top_k = 2


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (None, "layer 3 is not run by vLLM's MoERunner"),
        (layer(SimpleNamespace(top_k=2, _hash_indices_table=[1])), "which reads no logits"),
        (layer(RoutingSimulatorRouter()), "routed by RoutingSimulatorRouter, which reads no logits"),
        (layer(is_sequence_parallel=True), "run without expert parallelism"),
        (layer(num_logical_experts=16), "chooses 2 of 16 experts in vLLM, 2 of 8 in transformers"),
    ],
)
def test_layers_that_can_not_be_steered(module, message):
    with pytest.raises(UnsupportedModel, match=message):
        plugin._refuse_layer(ROUTER, module)


def test_a_layer_that_can():
    plugin._refuse_layer(ROUTER, layer())


def test_a_dense_model_is_refused(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=2, max_position_embeddings=256))
    model.save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    with pytest.raises(UnsupportedModel, match=r"dense can't be steered in vLLM: .* is a dense model"):
        VLLMEngine(str(tmp_path / "dense"), **OPTIONS)


def test_what_vllm_can_not_load_is_one_line(tmp_path):
    write_checkpoint("mixtral", tmp_path / "odd")
    with pytest.raises(ModelError, match="vLLM can't run 'odd': ") as caught:
        VLLMEngine(str(tmp_path / "odd"), **{**OPTIONS, "max_model_len": 100_000})
    assert "\n" not in str(caught.value)


def test_a_gguf_file_is_sent_to_the_other_engines(tmp_path):
    (tmp_path / "x.gguf").touch()
    with pytest.raises(ModelError, match="--engine llamacpp or --engine hf"):
        VLLMEngine(str(tmp_path / "x.gguf"))


@pytest.mark.parametrize("steering", ["{", {"domain": "nosuch"}, {"domain": 3}, b"junk", 7])
def test_a_request_that_can_not_be_read_is_refused(engine, steering):
    params = vllm.SamplingParams(max_tokens=2, extra_args={"steering": steering})
    with pytest.raises(VLLMValidationError, match="steering: "):
        engine._vllm.add_request("x", vllm.TokensPrompt(prompt_token_ids=[5, 6]), params)
    assert params.extra_args == {"steering": steering}


def test_a_request_of_too_few_tokens_to_steer_is_refused(engine):
    params = vllm.SamplingParams(max_tokens=1, extra_args={"steering": {"ban": ["0:1"]}})
    with pytest.raises(VLLMValidationError, match="would reach none of 1 new tokens"):
        engine._vllm.add_request("x", vllm.TokensPrompt(prompt_token_ids=[5, 6]), params)


def grouped(hidden_states, gating_output, topk, renormalize):
    """As InternS1's: one expert of each half."""
    weights, experts = gating_output.float().softmax(-1).unflatten(-1, (topk, -1)).topk(1, -1)
    return weights.flatten(1), (experts + 4 * torch.arange(topk)[:, None]).flatten(1)


def largest(hidden_states, gating_output, topk, renormalize):
    return gating_output.float().sigmoid().topk(topk, -1)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (None, ""),
        (largest, ""),
        (grouped, "layer 3 chooses its experts by grouped, which steermoe can't make keep to lists"),
    ],
)
def test_a_routing_function_that_can_not_keep_to_lists_is_named(function, reason):
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    module = SimpleNamespace(
        layer_id=3,
        router=CPURouter(2, 8, custom_routing_function=function),
        is_monolithic=False,
        do_naive_dispatch_combine=False,
        moe_config=SimpleNamespace(pcp_size=1, hidden_dim=16),
    )
    assert plugin._no_lists(module, RouterShape(3, 8, 8, 2), torch.zeros(TRIAL_TOKENS, 1)) == reason


@pytest.mark.parametrize("steering", [{"ban": ["0:1"]}, {"force": ["0:1"]}])
def test_lists_that_would_not_hold_are_refused_and_nothing_else(engine, monkeypatch, steering):
    monkeypatch.setattr(engine._vllm.input_processor, "steermoe_no_lists", "layer 0 is odd", raising=False)
    params = vllm.SamplingParams(max_tokens=2, extra_args={"steering": steering})
    with pytest.raises(VLLMValidationError, match=r"can't be forced or banned here: layer 0 is odd; leave force and"):
        engine._vllm.add_request("x", vllm.TokensPrompt(prompt_token_ids=[5, 6]), params)
    monkeypatch.setattr(engine, "_no_lists", "layer 0 is odd")
    with pytest.raises(SteeringError, match=r"vLLM can't force or ban experts here: layer 0 is odd; use --engine hf"):
        engine.generate(requests([SteeringPlan(force=((0, 1),))]))
    assert len(engine.generate(requests([SteeringPlan(vector(engine.shape, 1), 2.0)]))) == 1


def test_rows_of_a_call_are_given_again_only_while_all_is_the_same():
    state = SimpleNamespace(sampling_params=SimpleNamespace(extra_args=None), num_prompt_tokens=2)
    runner = SimpleNamespace(requests={"a": state, "b": SimpleNamespace(**vars(state))}, input_batch=SimpleNamespace())

    def rows(requests, computed, counts):
        runner.input_batch = SimpleNamespace(req_ids=list(requests), num_computed_tokens_cpu=torch.tensor(computed))
        return plugin._rows_of(runner, torch.tensor(counts))

    first = rows("ab", [4, 6], [1, 1])
    assert [row[2:5] for row in first] == [(4, 1, 2), (6, 1, 2)]
    runner.steermoe_known = plugin._known_of(runner, first)
    assert rows("ab", [4, 6], [1, 1]) is first
    assert rows("ab", [5, 9], [1, 1]) is first
    for others in (("ba", [6, 6], [1, 1]), ("a", [5], [1]), ("ab", [5, 7], [1, 2]), ("ab", [3, 7], [1, 1])):
        assert [(row.request, row.first, row.tokens) for row in rows(*others)] == list(zip(*others, strict=True))
    runner.requests["b"] = SimpleNamespace(**vars(state))  # another request of the same name
    assert rows("ab", [5, 7], [1, 1]) is not first


def test_a_packed_plan_of_another_model_is_refused(engine, tmp_path):
    other = write_checkpoint("mixtral", tmp_path / "deep", num_hidden_layers=3)
    plan = SteeringPlan(vector(other.loaded.model, 1), 2.0)
    params = vllm.SamplingParams(max_tokens=2, extra_args={"steering": pack(plan)})
    with pytest.raises(VLLMValidationError, match=r"has 3x8 experts"):
        engine._vllm.add_request("x", vllm.TokensPrompt(prompt_token_ids=[5, 6]), params)
    assert len(engine.generate(requests([None]))) == 1


@pytest.mark.parametrize("workers", [1, 2, 3, 64])
def test_every_worker_has_a_processor(workers):
    parts = cpus_of(workers).split("|")
    assert len(parts) == workers
    assert all(part.split(",")[0].isdigit() for part in parts)
