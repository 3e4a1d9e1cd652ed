"""Positions that follow tags on a model that is steered directly: what its rows have read decides."""

import pytest
import torch

from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.text import HFEncoder
from steermoe.errors import SteeringError
from steermoe.steering.handle import attach, steer
from steermoe.steering.tags import ModelTags
from tests.support import tagged_models
from tests.support.steering_models import continued, left_padded, step_by_step, traces

TOKENS = 16
POSITIONS = ("thinking", "answer", "tool-calls", "generated", "last-prompt")


@pytest.fixture(scope="module")
def loaded():
    return tagged_models.build()


@pytest.fixture(scope="module")
def plans(loaded):
    found = tagged_models.plans_of_every_position(loaded.model)
    return [found[name] for name in POSITIONS]


@pytest.fixture(scope="module")
def expected(loaded, plans):
    """What the engine writes for each plan and prompt."""
    done = HFEngine(loaded).generate(tagged_models.requests(plans, TOKENS))
    return [list(one.token_ids) for one in done]


def prompts(loaded):
    return [torch.tensor([HFEncoder(loaded.tokenizer).encode(text)]) for text in tagged_models.PROMPTS]


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate(loaded, plans, expected, use_cache):
    batch = left_padded(prompts(loaded))
    rows = [plan for plan in plans for _ in tagged_models.PROMPTS]
    batch = {name: tensor.repeat(len(plans), 1) for name, tensor in batch.items()}
    with steer(loaded.model, rows=rows, tokenizer=loaded.tokenizer):
        found = continued(loaded.model, batch.pop("input_ids"), TOKENS, use_cache=use_cache, **batch)
    assert found == expected
    assert traces(loaded.model) == []


def test_direct_calls(loaded, plans, expected):
    ids = prompts(loaded)[1]
    with steer(loaded.model, rows=[plans[1]], tokenizer=loaded.tokenizer) as handle:
        logits = step_by_step(loaded.model, handle, ids, TOKENS)
    assert [int(one.argmax()) for one in logits] == expected[len(tagged_models.PROMPTS) + 1]


def test_another_plan_half_way_reads_the_text_again(loaded, plans):
    """What was read before, under a plan that follows other tags, counts for the next one."""
    ids = prompts(loaded)[1]
    thinking, answer = plans[:2]
    with steer(loaded.model, rows=[answer], tokenizer=loaded.tokenizer) as handle:

        def change(number):
            handle.set(answer if number < 8 else thinking)

        logits = step_by_step(loaded.model, handle, ids, TOKENS, change)
        report = handle.report()
    tokens = [int(one.argmax()) for one in logits]
    segments = [ModelTags.of_tokenizer(loaded.tokenizer).segments(plan, ids.shape[1]) for plan in (answer, thinking)]
    for one in segments:
        one.read([*ids[0].tolist(), *tokens[:-1]])
    places = [
        number >= 0 for number in segments[0].numbers[: ids.shape[1] + 7] + segments[1].numbers[ids.shape[1] + 7 :]
    ]
    assert report.tokens_steered == sum(places) > 0


def test_without_the_tokenizer(loaded, plans):
    with pytest.raises(SteeringError, match=r"positions thinking follows .* pass tokenizer="):
        attach(loaded.model, plans[0])
    handle = attach(loaded.model, plans[3])
    with pytest.raises(SteeringError, match=r"positions answer follows .* pass tokenizer="):
        handle.set(positions="answer")
    handle.remove()
    assert traces(loaded.model) == []


def test_calls_whose_text_is_not_known(loaded, plans):
    ids = prompts(loaded)[0]
    handle = attach(loaded.model, plans[1], tokenizer=loaded.tokenizer)
    try:
        with pytest.raises(SteeringError, match="beam search"):
            continued(loaded.model, ids, 4, num_beams=2)
        with torch.no_grad():
            cache = loaded.model(input_ids=ids, use_cache=True).past_key_values
            embeds = loaded.model.get_input_embeddings()(ids[:, :1])
            with pytest.raises(SteeringError, match="passes no input_ids"):
                loaded.model(inputs_embeds=embeds, past_key_values=cache)
    finally:
        handle.remove()
    with torch.no_grad():
        cache = loaded.model(input_ids=ids, use_cache=True).past_key_values
        handle = attach(loaded.model, plans[1], tokenizer=loaded.tokenizer)
        try:
            with pytest.raises(SteeringError, match="were not read under this steering"):
                loaded.model(input_ids=ids[:, :1], past_key_values=cache)
        finally:
            handle.remove()
