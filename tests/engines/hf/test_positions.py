"""Positions that follow tags: every decoder steers the tokens that the text says, alone and among others."""

import pytest
import torch

from steermoe.engines.decoding import complete
from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.hf.static import StaticDecoder
from tests.support import chat_models
from tests.support.rolling import roll


@pytest.fixture(scope="module")
def engine():
    return HFEngine(chat_models.build())


@pytest.fixture(scope="module")
def plans(engine):
    return chat_models.plans_of_every_position(engine.shape)


@pytest.fixture(scope="module")
def alone(engine, plans):
    """Requests of all plans and prompts, each with what it gives alone."""
    requests = chat_models.requests(list(plans.values()), tokens=18)[::2]
    return [(request, engine.generate([request])[0]) for request in requests]


def wanted(plan, places):
    """How many of the tokens that the model reads a plan steers, by the tests' own reading of a text."""
    inside = {"thinking", "answer", "tool-calls"}
    first = places.index(next(place for place in places if place != "prompt"))
    count, steered = 0, 0
    for number, place in enumerate(places[:-1]):
        if plan.positions in inside:
            is_meant, at = place == plan.positions, count
        elif plan.positions == "all" and number < first:
            is_meant, at = True, -1
        else:
            at = number - first + (plan.positions == "last-prompt")
            is_meant = at >= 0 and place not in ("call tag", "tool-calls")
        count += is_meant
        steered += is_meant and float(plan.schedule.factor(torch.tensor([at]))[0]) > 0
    return steered


def test_each_plan_steers_the_tokens_that_the_text_says(engine, alone):
    seen = set()
    for request, done in alone:
        plan = request.plan
        if plan is None or plan.think_tags is not None:
            continue
        places = chat_models.places(done, engine.encode(request), engine.loaded.tokenizer)
        seen |= set(places[:-1])
        steered = wanted(plan, places)
        assert done.report.tokens_steered == steered
        assert bool(done.missed) == (steered == 0)
    assert seen == {"prompt", "tag", "call tag", "thinking", "answer", "tool-calls"}


def test_positions_change_texts(alone):
    texts = {}
    for request, done in alone:
        texts.setdefault(request.prompt, set()).add(done.token_ids)
    assert all(len(found) >= 5 for found in texts.values())


@pytest.mark.parametrize("rows", [3, 16])
def test_rows_that_come_and_go(engine, alone, rows):
    decoder = engine.decoder(rows)
    try:
        together = roll(decoder, engine, [request for request, _ in alone], rows)
        report = decoder.report()
    finally:
        decoder.close()
    assert [done.token_ids for done in together] == [single.token_ids for _, single in alone]
    assert [done.missed for done in together] == [single.missed for _, single in alone]
    assert report.tokens_steered == sum(single.report.tokens_steered for _, single in alone if single.report)


def test_one_static_batch(engine, alone):
    requests = [request for request, _ in alone]
    decoder = StaticDecoder(engine.loaded, engine.end_tokens())
    together = complete(decoder, requests, [engine.encode(request) for request in requests])
    assert [done.token_ids for done in together] == [single.token_ids for _, single in alone]
