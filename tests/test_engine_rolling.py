"""Continuous batching: rows that come and go give the texts that they give alone, whatever the cache is made of."""

import functools
from dataclasses import replace

import pytest
import steering_models as tiny
import tiny_models

from steermoe.engines.base import Request, Sampling
from steermoe.engines.hf import HFEngine
from steermoe.engines.rolling import RollingDecoder, decoder_for

FAMILIES = ("mixtral", "qwen3_moe", "granitemoeshared", "gpt_oss", "deepseek_v3")
STORIES = ("Once upon a time", "A dog", "The cat is on the mat today", "It", "x", "When they came home, all was quiet.")


@functools.cache
def build(family):
    return tiny.build(family) if family in tiny.CAUSAL else tiny_models.build(family, vocab_size=tiny.VOCABULARY)


@functools.cache
def alone(family):
    """The requests of a family's model, each with what `generate` gives for it by itself."""
    engine = HFEngine(tiny.loaded(build(family)))
    return [(request, engine.generate([request])[0]) for request in requests_for(build(family))]


def requests_for(model, count=14):
    """Rows of every kind: plans that differ in all ways, several positions and schedules, greedy and sampled."""
    plans = [
        None,
        tiny.plan_for_experts(model, 1, 5),
        tiny.plan_for_experts(model, 2, formula="additive", schedule="decay:5"),
        tiny.plan_for_experts(model, 3, formula="max_scaled", schedule="window:2-4", strength=9.0),
        tiny.plan_for_experts(model, 4, positions="all"),
        tiny.plan_for_experts(model, 6, positions="prompt", strength=-3.0),
        tiny.plan_for_experts(model, 1, ban=((0, 2),), force=((1, 3),)),
    ]
    samplings = [
        Sampling(max_new_tokens=9, do_sample=False),
        Sampling(max_new_tokens=14, temperature=1.0, seed=5, min_new_tokens=14),
        Sampling(max_new_tokens=5, top_p=0.8, repetition_penalty=1.4, seed=6),
        Sampling(max_new_tokens=1, seed=7),
        Sampling(max_new_tokens=11, top_k=9, seed=8, temperature=1.3),
    ]
    return [
        Request(STORIES[i % len(STORIES)], plans[i % len(plans)], replace(samplings[i % len(samplings)], seed=i))
        for i in range(count)
    ]


def roll(decoder, engine, requests, rows):
    """All completions, with at most so many rows at once; new ones begin as soon as there is room."""
    waiting, done = list(requests), {}
    while waiting or len(decoder):
        room = min(rows - len(decoder), len(waiting))
        if room:
            decoder.start(waiting[:room], [engine.encode(request) for request in waiting[:room]])
            waiting = waiting[room:]
        for completion in decoder.step():
            assert completion.request not in done
            done[completion.request] = completion
    return [done[request] for request in requests]


@pytest.mark.parametrize("rows", [1, 3, 5, 14])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_text_is_what_it_is_alone(family, rows):
    model = build(family)
    engine = HFEngine(tiny.loaded(model))
    expected = alone(family)
    decoder = decoder_for(engine)
    assert isinstance(decoder, RollingDecoder)
    try:
        together = roll(decoder, engine, [request for request, _ in expected], rows)
    finally:
        decoder.close()
    assert tiny.traces(model) == []
    for (request, single), done in zip(expected, together, strict=True):
        assert done.request is request
        assert done.token_ids == single.token_ids
        assert (done.text, done.finish_reason) == (single.text, single.finish_reason)
        assert (done.prompt_tokens, done.new_tokens) == (single.prompt_tokens, single.new_tokens)
