"""The loop that engines share: rows take tokens until they end, and completions come in the order of their requests."""

from dataclasses import replace

import pytest

from steermoe.engines.decoding import Row, by_prompt, complete, finish, steers_prompt
from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.hf.rolling import RollingDecoder
from steermoe.engines.hf.static import StaticDecoder
from steermoe.engines.request import Completion, Request, Sampling
from steermoe.engines.text import continuation
from steermoe.errors import GenerationError, SteeringError
from tests.support import steering_models as tiny
from tests.support.rolling import plans_for, requests_for

BYTES, WORDS = tiny.byte_tokenizer(), tiny.word_tokenizer()
BOTH = pytest.mark.parametrize("tokenizer", [BYTES, WORDS], ids=["bytes", "words"])
SAMPLED = Sampling(max_new_tokens=12, min_new_tokens=12, temperature=1.0, seed=5)


def row_of(tokenizer, prompt="the", on_text=None, most=200):
    ids = tokenizer(prompt)["input_ids"]
    return Row(Request(prompt, None, Sampling(max_new_tokens=most)), ids, tokenizer, {tiny.END}, None, on_text)


def take_all(row, tokens):
    for token in tokens:
        row.take(token)
    return row


def encoded(engine, requests):
    return [engine.encode(request) for request in requests]


def alone(decoder, engine, request, on_text=None):
    return complete(decoder, [request], encoded(engine, [request]), on_text)


# ---- rows ----


@BOTH
@pytest.mark.parametrize("text", ["the cat the dog", "cat 🐈 €uro é", "日本語"])
def test_words_keep_their_space_and_characters_come_whole(tokenizer, text):
    """A continuation that begins with a new word: its space is kept, which decoding it alone would drop."""
    ids = tokenizer("the")["input_ids"]
    new = tokenizer(f"the {text}")["input_ids"][len(ids) :]
    assert continuation(tokenizer, ids, new) == f" {text}"
    pieces: list[str] = []
    row = take_all(row_of(tokenizer, on_text=pieces.append), [*new, tiny.END])
    assert "".join(pieces) == finish(row).text == f" {text}"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert len(pieces) >= len(set(text)) - 2 or " the" in pieces


@BOTH
def test_a_text_cut_inside_a_character_keeps_those_before(tokenizer):
    """As max_new_tokens may cut it; a row of bytes that ends like this is garbage when it is decoded as a whole."""
    ids = tokenizer("the")["input_ids"]
    new = tokenizer("the日本語")["input_ids"][len(ids) : -1]
    text = continuation(tokenizer, ids, new)
    assert text.rstrip("\N{REPLACEMENT CHARACTER}") == "日本"
    assert text != "日本"
    assert finish(take_all(row_of(tokenizer, most=len(new)), new)).text == text


def test_a_character_that_is_never_complete_is_sent_at_the_end():
    pieces: list[str] = []
    row = row_of(BYTES, "a", pieces.append, most=3)
    euro = BYTES("€")["input_ids"]
    take_all(row, euro[:2])
    assert pieces == []
    row.end("length")
    assert pieces == [finish(row).text] == ["\N{REPLACEMENT CHARACTER}"]


def test_what_ends_a_row():
    stopped = take_all(row_of(BYTES), [80, 81, tiny.END])
    assert (stopped.finish_reason, stopped.new) == ("stop", [80, 81])
    full = take_all(row_of(BYTES, most=2), [80])
    assert full.finish_reason == ""
    full.take(81)
    assert (full.finish_reason, full.new) == ("length", [80, 81])
    full.end("stop")
    assert full.finish_reason == "length"  # the first reason stays
    at_once = take_all(row_of(BYTES, most=1), [tiny.END])
    done = finish(at_once)
    assert (done.finish_reason, done.text, done.token_ids, done.new_tokens) == ("stop", "", (), 0)
    assert done.prompt_tokens == len(at_once.prompt)


def test_prompts_that_are_computed_alike():
    """Steering of generated tokens leaves a prompt alone, so that rows of any such plan may share it."""
    model = tiny.build("mixtral")
    plan, other = tiny.plan_for_experts(model, 1), tiny.plan_for_experts(model, 2)
    everywhere = tiny.plan_for_experts(model, 4, positions="all")
    requests = [
        Request(prompt, own)
        for prompt, own in [("a", None), ("a", plan), ("b", plan), ("a", everywhere), ("a", other), ("a", everywhere)]
    ]
    rows = [Row(request, BYTES(request.prompt)["input_ids"], BYTES, {tiny.END}, None) for request in requests]
    assert by_prompt(rows) == [[rows[0], rows[1], rows[4]], [rows[2]], [rows[3], rows[5]]]


# ---- the loop ----


@pytest.fixture(scope="module")
def model():
    return tiny.build("mixtral")


@pytest.fixture(params=["bytes", "words"])
def engine(request, model):
    yield HFEngine(tiny.loaded(model, BYTES if request.param == "bytes" else WORDS))
    assert tiny.traces(model) == []


@pytest.fixture(params=[RollingDecoder, StaticDecoder])
def decoder(request, engine):
    return request.param(engine.loaded, engine.end_tokens())


def test_completions_come_in_the_order_of_their_requests(engine, model, decoder):
    """Rows end at different times; the same request twice is two completions."""
    requests = requests_for(model)
    requests = [*requests, requests[3], requests[0]]
    done = complete(decoder, requests, encoded(engine, requests))
    assert [one.request for one in done] == requests
    assert len({one.new_tokens for one in done}) > 2
    assert (done[-1].token_ids, done[-2].token_ids) == (done[0].token_ids, done[3].token_ids)
    assert [one.token_ids for one in done] == [engine.generate([request])[0].token_ids for request in requests]
    assert {one.seconds for one in done} == {done[0].seconds}
    assert {one.report for one in done} == {done[0].report}
    assert done[0].report.tokens_steered > 0


def test_without_steering_there_is_no_report(engine, decoder):
    (done,) = alone(decoder, engine, Request("A dog", None, SAMPLED))
    assert done.report is None


def test_equal_prompts_are_read_once(engine, model, monkeypatch):
    shapes = []
    forward = RollingDecoder._forward

    def counted(self, tokens, *rest):
        shapes.append(tuple(tokens.shape))
        return forward(self, tokens, *rest)

    monkeypatch.setattr(RollingDecoder, "_forward", counted)
    plans = plans_for(model)  # of which three steer the prompt itself, or some of it
    requests = [Request("A dog", plan, replace(SAMPLED, seed=seed)) for seed, plan in enumerate([*plans, *plans])]
    complete(engine.decoder(len(requests)), requests, encoded(engine, requests))
    steering = {plan for plan in plans if steers_prompt(plan)}
    assert shapes[0] == (1 + len(steering), len(engine.encode(requests[0])))
    assert shapes[1] == (len(requests), 1)


@pytest.mark.parametrize("prompt", ["Once upon a time", "the cat", "é €", "</s>", " a\n"])
def test_streamed_text_is_the_final_text(engine, decoder, prompt):
    pieces: list[str] = []
    (done,) = alone(decoder, engine, Request(prompt, None, SAMPLED), pieces.append)
    assert "".join(pieces) == done.text != ""
    assert all(pieces)


def test_no_requests_and_several_streams(engine, decoder):
    assert complete(decoder, [], []) == []
    with pytest.raises(GenerationError, match="one request at a time, not for 2"):
        complete(decoder, [Request("A dog")] * 2, encoded(engine, [Request("A dog")] * 2), print)
    assert len(decoder) == 0


@pytest.mark.parametrize(
    ("prompt", "message"), [(" ", "the prompt is empty"), ("x" * 300, "the context of tiny is 256: shorten the prompt")]
)
def test_a_prompt_that_can_not_be_run_stops_all_before_they_begin(engine, monkeypatch, prompt, message):
    monkeypatch.setattr(StaticDecoder, "start", lambda *_: pytest.fail("nothing is to begin"))
    with pytest.raises(GenerationError, match=message):
        engine.generate([Request("A dog"), Request(prompt)])


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError])
def test_an_interrupted_text_leaves_nothing(engine, model, decoder, error):
    """Ctrl-C, or a reader of the stream that went away, in the middle of a text."""

    def stop(piece: str) -> None:
        raise error

    with pytest.raises(error):
        alone(decoder, engine, Request("A dog", tiny.plan_for_experts(model, 1), SAMPLED), stop)
    assert len(decoder) == 0
    assert tiny.traces(model) == []


def test_steering_that_would_reach_no_token_is_refused_before_anything_runs():
    loaded = tiny.loaded(tiny.build("mixtral"))
    engine = HFEngine(loaded)
    short, plan = Sampling(max_new_tokens=1), tiny.plan_for_experts(loaded.model, 1)
    windowed = replace(plan, schedule="window:50-60")
    for asked in (Request("the", plan, short), Request("the", windowed, Sampling(max_new_tokens=10))):
        with pytest.raises(SteeringError, match=r"would reach none of [0-9]+ new tokens.*positions generated"):
            engine.generate([asked, asked])
        assert len(engine.generate([asked, Request("the", plan, SAMPLED)])) == 2  # as in Python: some is steered
    for other in (None, replace(plan, strength=0.0), replace(plan, positions="all"), replace(plan, positions="prompt")):
        (done,) = engine.generate([Request("the", other, short)])
        assert done.missed == ""


@pytest.mark.parametrize(
    ("schedule", "tokens", "reason", "is_missed"),
    [
        ("constant", 0, "stop", True),
        ("constant", 1, "stop", False),
        ("constant", 1, "length", True),
        ("window:3-9", 3, "stop", True),
        ("window:3-9", 4, "stop", False),
        ("window:3-9", 4, "length", True),
    ],
)
def test_a_completion_knows_whether_it_was_steered(schedule, tokens, reason, is_missed):
    plan = replace(tiny.plan_for_experts(tiny.build("mixtral"), 1), schedule=schedule)
    done = Completion(Request("the", plan), "", (5,) * tokens, 3, reason, 0.1)
    assert bool(done.missed) == is_missed
    assert not is_missed or f"ended after {tokens} tokens" in done.missed
    assert replace(done, request=Request("the")).missed == ""
    assert replace(done, request=Request("the", replace(plan, positions="all"))).missed == ""
