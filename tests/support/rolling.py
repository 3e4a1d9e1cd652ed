"""Requests of every kind for tiny models, and a loop that feeds them to a decoder as rows come and go."""

import functools
from dataclasses import replace

from steermoe.engines.request import Request, Sampling
from tests.support import steering_models as tiny
from tests.support import tiny_models

STORIES = ("Once upon a time", "A dog", "The cat is on the mat today", "It", "x", "When they came home, all was quiet.")


@functools.cache
def build(family):
    return tiny.build(family) if family in tiny.CAUSAL else tiny_models.build(family, vocab_size=tiny.VOCABULARY)


def plans_for(model):
    return [
        None,
        tiny.plan_for_experts(model, 1, 5),
        tiny.plan_for_experts(model, 2, formula="additive", schedule="decay:5"),
        tiny.plan_for_experts(model, 3, formula="max_scaled", schedule="window:2-4", strength=9.0),
        tiny.plan_for_experts(model, 4, positions="all"),
        tiny.plan_for_experts(model, 6, positions="prompt", strength=-3.0),
        tiny.plan_for_experts(model, 1, ban=((0, 2),), force=((1, 3),)),
        tiny.plan_for_experts(model, 2, positions="last-prompt", schedule="first:3"),
        tiny.plan_for_experts(model, 3, positions="answer", schedule="after:1", think_tags=("m", "a")),
    ]


def requests_for(model, plans=None, count=14):
    """Rows of every kind: plans that differ in all ways, several positions and schedules, greedy and sampled."""
    plans = plans_for(model) if plans is None else plans
    samplings = [
        Sampling(max_new_tokens=9, do_sample=False),
        Sampling(max_new_tokens=14, temperature=1.0, seed=5, min_new_tokens=14),
        Sampling(max_new_tokens=5, top_p=0.8, repetition_penalty=1.4, seed=6),
        Sampling(max_new_tokens=1, seed=7),
        Sampling(max_new_tokens=11, top_k=9, seed=8, temperature=1.3),
    ]
    asked = [(plans[i % len(plans)], replace(samplings[i % len(samplings)], seed=i)) for i in range(count)]
    return [Request(STORIES[i % len(STORIES)], _reached(*one), one[1]) for i, one in enumerate(asked)]


def _reached(plan, sampling):
    """A plan that steers a text of that length: of one token, only the prompt can be steered."""
    if plan is None or plan.steers(1, sampling.max_new_tokens - 1):
        return plan
    return replace(plan, positions="all")


def roll(decoder, engine, requests, rows):
    """All completions, with at most `rows` rows at once; new ones begin as soon as there is room."""
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
