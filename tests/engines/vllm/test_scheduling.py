"""Whatever vLLM does with requests, no text changes: in chunks, preempted, compiled, beside others, cached."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from steermoe.engines.request import Request
from steermoe.engines.vllm.engine import VLLMEngine
from steermoe.steering.plans import SteeringPlan
from tests.support.vllm_engines import (
    OPTIONS,
    PROMPTS,
    all_at_once,
    end,
    greedy,
    one_by_one,
    plans_of_every_kind,
    requests,
    vector,
    write_checkpoint,
)

LONG = "The old bus was late again, and so they walked along the river until the lamps came on over the bridge."
"""As many tokens as characters: several blocks of keys and values, and several chunks."""

PLAIN = """
import json, sys
from vllm import LLM, SamplingParams, TokensPrompt
folder, prompts = json.loads(sys.argv[1])
model = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=128, kv_cache_memory_bytes=1 << 26)
params = SamplingParams(temperature=0, max_tokens=12, min_tokens=12, ignore_eos=True, detokenize=False)
made = model.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], params, use_tqdm=False)
print("TOKENS", json.dumps([list(one.outputs[0].token_ids) for one in made]))
"""


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The hf engine on a tiny Qwen2-MoE with a shared expert, and its folder."""
    folder = tmp_path_factory.mktemp("vllm") / "qwen2_moe"
    return write_checkpoint("qwen2_moe", folder), str(folder)


@pytest.fixture
def start(reference):
    """Starts vLLM engines on it, and ends them."""
    started = []

    def start(**options):
        started.append(VLLMEngine(reference[1], **{**OPTIONS, **options}))
        return started[-1]

    yield start
    for engine in started:
        end(engine)


def long_requests(plans, tokens=12):
    return [Request(LONG[i:], plan, greedy(tokens)) for i, plan in enumerate(plans)]


def test_chunked_prompts(reference, start):
    engine = start(max_num_batched_tokens=32, max_texts=16)
    asked = long_requests(plans_of_every_kind(engine.shape).values())
    assert all_at_once(engine, asked) == one_by_one(reference[0], asked)


def test_preempted_texts_go_on_as_they_were(reference, start):
    engine = start(kv_cache_memory_bytes=1 << 20, block_size=32, enable_prefix_caching=False)
    plans = plans_of_every_kind(engine.shape).values()
    asked = [Request(LONG[i : i + 30], plan, greedy(70)) for i, plan in enumerate(plans)]
    completions = engine.generate(asked)
    assert [completion.token_ids for completion in completions] == one_by_one(reference[0], asked)
    needed = sum(completion.prompt_tokens + completion.new_tokens - 1 for completion in completions)
    assert completions[0].report.tokens_seen > needed, "nothing was preempted: the test shows nothing"


def test_compiled_code(reference, start):
    engine = start(compiled=True)
    asked = requests(list(plans_of_every_kind(engine.shape).values()))
    assert all_at_once(engine, asked) == one_by_one(reference[0], asked)
    assert engine.generate(asked[1:2])[0].report.tokens_steered == 11


def test_unsteered_texts_beside_steered_ones_are_those_of_vllm_without_steermoe(reference, start):
    engine = start()
    plans = plans_of_every_kind(engine.shape)
    mixed = [plan for steered in plans.values() for plan in (steered, None)]
    asked = requests(mixed)
    found = [tokens for tokens, plan in zip(all_at_once(engine, asked), mixed, strict=True) if plan is None]
    prompts = [engine.encode(request) for request in asked if request.plan is None]
    environment = os.environ | {"VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, json.dumps([reference[1], prompts])],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("TOKENS"))
    assert found == [tuple(tokens) for tokens in json.loads(line.removeprefix("TOKENS"))]


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
def test_the_prefix_cache_is_shared_by_equal_steering_alone(start, positions):
    engine = start(block_size=32)
    sport, food = vector(engine.shape, 1, 3), vector(engine.shape, 6)
    plans = [SteeringPlan(sport, 3.0, positions=positions), SteeringPlan(food, 3.0, positions=positions), None]

    def generated(plan, prompt=LONG):
        """Tokens of the text, and how many tokens were computed."""
        (completion,) = engine.generate([Request(prompt, plan, greedy(20))])
        return completion.token_ids, engine.report().tokens_seen if plan is None else completion.report.tokens_seen

    def cold(plan, prompt=LONG):
        assert engine._vllm.reset_prefix_cache()
        return generated(plan, prompt)

    alone = [cold(plan) for plan in plans]
    assert len({tokens for tokens, _ in alone}) == len(plans)
    assert engine._vllm.reset_prefix_cache()
    after_others = [generated(plan) for plan in plans]
    assert [tokens for tokens, _ in after_others] == [tokens for tokens, _ in alone]
    if positions == "generated":  # all of them left the prompt alone, so they may share it
        assert after_others[1][1] < alone[1][1]
    else:
        assert after_others[1][1] == alone[1][1]
    again = [generated(plan) for plan in plans]
    assert [tokens for tokens, _ in again] == [tokens for tokens, _ in alone]
    assert all(few < all_ for (_, few), (_, all_) in zip(again, alone, strict=True)), "equal steering must share"


def test_what_was_generated_under_steering_is_no_prompt_of_others(start):
    """A conversation continues: its steered first answer is now prompt, which `generated` leaves alone."""
    engine = start(block_size=32)
    plan = SteeringPlan(vector(engine.shape, 1, 3), 3.0)
    opening = Request(LONG[:64], plan, greedy(40))
    (first,) = engine.generate([opening])
    longer = engine.encode(opening) + list(first.token_ids)

    def continued(own):
        decoder = engine.decoder()
        decoder.start([Request("x", own, greedy(8))], [longer])
        done = []
        while len(decoder):
            done += decoder.step()
        return done[0].token_ids

    warm = [continued(own) for own in (plan, None)]
    cold = []
    for own in (plan, None):
        assert engine._vllm.reset_prefix_cache()
        cold.append(continued(own))
    assert warm == cold


def test_texts_come_in_pieces(start):
    engine = start()
    plan = plans_of_every_kind(engine.shape)["all"]
    pieces: list[str] = []
    (completion,) = engine.generate([Request(PROMPTS[0], plan, greedy(30))], on_text=pieces.append)
    assert "".join(pieces) == completion.text
    assert len(pieces) > 2


def test_more_plans_than_slots(reference, start):
    engine = start(max_texts=4)
    sport = vector(engine.shape, 1, 3)
    asked = requests([SteeringPlan(sport, 0.5 * strength, "additive") for strength in range(1, 20)])
    assert all_at_once(engine, asked) == one_by_one(reference[0], asked)
