"""Positions that follow tags: every decoder steers the tokens that the text says, alone and among others."""

import pytest

from steermoe.engines.decoding import complete
from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.hf.static import StaticDecoder
from tests.support import tagged_models
from tests.support.rolling import roll


@pytest.fixture(scope="module")
def engine():
    return HFEngine(tagged_models.build())


@pytest.fixture(scope="module")
def plans(engine):
    return tagged_models.plans_of_every_position(engine.shape)


@pytest.fixture(scope="module")
def alone(engine, plans):
    """Requests of all plans and prompts, each with what it gives alone."""
    requests = tagged_models.requests(list(plans.values()), tokens=14)[::2]
    return [(request, engine.generate([request])[0]) for request in requests]


def test_each_plan_steers_the_tokens_that_the_text_says(engine, alone):
    seen = set()
    for request, done in alone:
        plan = request.plan
        if plan is None or plan.think_tags is not None:
            continue
        places = tagged_models.places(done, engine.encode(request), engine.loaded.tokenizer)
        seen |= set(places[:-1])
        steered = tagged_models.steered(plan, places)
        assert done.report.tokens_steered == steered
        assert bool(done.missed) == (steered == 0)
    assert seen == {"prompt", "tag", "call tag", "thinking", "answer", "tool-calls"}


def test_positions_change_texts(alone):
    assert len({(request.prompt, done.token_ids) for request, done in alone}) > 2 * len(tagged_models.PROMPTS)


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
