"""The default engine on tiny models: texts, seeds, neighbours, streaming, limits, and what it refuses."""

from dataclasses import replace

import pytest
import torch

from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.request import Request, Sampling
from steermoe.errors import GenerationError, SteeringError
from steermoe.steering.handle import attach
from tests.support import steering_models as tiny

GREEDY = Sampling(max_new_tokens=8, min_new_tokens=8, do_sample=False)
SAMPLED = Sampling(max_new_tokens=12, min_new_tokens=12, temperature=1.0, seed=5)
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def model():
    return tiny.build("mixtral")


@pytest.fixture(params=["bytes", "words"])
def engine(request, model):
    tokenizer = tiny.byte_tokenizer() if request.param == "bytes" else tiny.word_tokenizer()
    yield HFEngine(tiny.loaded(model, tokenizer))
    assert tiny.traces(model) == []


def test_greedy_equals_generate(engine, model):
    (done,) = engine.generate([Request(PROMPT, sampling=GREEDY)])
    ids = torch.tensor([engine.loaded.tokenizer(PROMPT)["input_ids"]])
    assert [list(done.token_ids)] == tiny.continued(model, ids, 8)
    assert (done.prompt_tokens, done.new_tokens, done.finish_reason) == (ids.shape[1], 8, "length")
    assert done.report is None
    assert done.frequency is None
    assert done.seconds > 0


def test_steered_equals_generate_inside_steering(engine, model):
    plan = tiny.plan_for_experts(model, 1, 5)
    (done,) = engine.generate([Request(PROMPT, plan, GREEDY)])
    handle = attach(model, plan)
    ids = torch.tensor([engine.loaded.tokenizer(PROMPT)["input_ids"]])
    assert [list(done.token_ids)] == tiny.continued(model, ids, 8)
    handle.remove()
    assert done.report == handle.report()
    assert done.report.tokens_steered == 7


def test_memory_is_kept_from_the_first_text_on(model, monkeypatch):
    kept = []
    monkeypatch.setattr("steermoe.engines.hf.engine.keep_freed_memory", lambda: kept.append(True))
    engine = HFEngine(tiny.loaded(model, tiny.byte_tokenizer()))
    engine.fingerprint()
    assert kept == []
    engine.generate([Request(PROMPT, sampling=GREEDY)])
    engine.decoder(2).close()
    assert kept == [True]


def test_seeds(engine):
    def complete(seed: int):
        return engine.generate([Request(PROMPT, sampling=replace(SAMPLED, seed=seed))])[0]

    assert complete(5).text == complete(5).text
    assert len({complete(seed).token_ids for seed in range(4)}) == 4


def test_a_text_does_not_depend_on_its_neighbours(engine, model):
    """Rows of different prompts, plans, lengths and settings: each is as the row alone."""
    plan = tiny.plan_for_experts(model, 1, 5)
    requests = [
        Request(PROMPT, None, SAMPLED),
        Request("A dog", plan, replace(SAMPLED, max_new_tokens=20, temperature=0.8, repetition_penalty=1.5)),
        Request("The cat is", tiny.plan_for_experts(model, 2, formula="additive"), replace(SAMPLED, top_k=9, seed=6)),
        Request("It", plan, replace(GREEDY, max_new_tokens=5, min_new_tokens=0, repetition_penalty=3.0)),
        Request("x", None, Sampling(max_new_tokens=1, seed=3)),
    ]
    together = engine.generate(requests, record=True)
    assert [done.request for done in together] == requests
    for request, done in zip(requests, together, strict=True):
        (alone,) = engine.generate([request], record=True)
        assert (done.token_ids, done.text, done.finish_reason) == (alone.token_ids, alone.text, alone.finish_reason)
        assert done.new_tokens <= request.sampling.max_new_tokens
        if request.sampling.max_new_tokens == 20:  # the longest: nobody feeds its last token on
            torch.testing.assert_close(done.frequency, alone.frequency)


def test_end_of_text(engine, model):
    (usual,) = engine.generate([Request(PROMPT, sampling=GREEDY)])
    end = usual.token_ids[3]
    length = usual.token_ids.index(end)
    ours = model.generation_config
    try:
        model.generation_config = type(ours)(eos_token_id=[end, tiny.END], pad_token_id=0)
        free = replace(GREEDY, min_new_tokens=0)
        short, long = engine.generate([Request(PROMPT, sampling=free), Request(PROMPT, sampling=GREEDY)])
    finally:
        model.generation_config = ours
    assert (short.finish_reason, short.token_ids) == ("stop", usual.token_ids[:length])
    assert (long.finish_reason, long.new_tokens) == ("length", 8)  # its own minimum, not the batch's smallest
    assert end not in long.token_ids


def test_the_checkpoints_own_sampling_is_not_used(engine, model):
    (usual,) = engine.generate([Request(PROMPT, sampling=SAMPLED)])
    ours = model.generation_config
    try:
        model.generation_config = type(ours)(
            eos_token_id=tiny.END,
            repetition_penalty=9.0,
            no_repeat_ngram_size=1,
            suppress_tokens=list(range(100, 300)),
            temperature=0.01,
            do_sample=True,
            max_length=3,
        )
        kept = model.generation_config
        (other,) = engine.generate([Request(PROMPT, sampling=SAMPLED)])
        assert model.generation_config is kept
    finally:
        model.generation_config = ours
    assert other.token_ids == usual.token_ids


@pytest.mark.parametrize("prompt", [PROMPT, "the cat", "é €", "</s>", " a\n"])
@pytest.mark.parametrize("seed", range(3))
def test_streamed_text_is_the_final_text(engine, prompt, seed):
    pieces: list[str] = []
    (done,) = engine.generate([Request(prompt, sampling=replace(SAMPLED, seed=seed))], on_text=pieces.append)
    assert "".join(pieces) == done.text != ""
    assert all(pieces)


def test_special_tokens_in_a_prompt_stay_text(engine):
    ids = engine.encode(Request("</s> then <pad><s>"))
    assert not {tiny.PAD, tiny.BEGIN, tiny.END} & set(ids)
    assert engine.loaded.tokenizer.decode(ids, skip_special_tokens=True) == "</s> then <pad><s>"


@pytest.mark.parametrize("prompt", ["", " ", "\n\t"])
def test_empty_prompt(engine, prompt):
    with pytest.raises(GenerationError, match="the prompt is empty"):
        engine.generate([Request(PROMPT), Request(prompt)])


def test_prompt_too_long(engine):
    with pytest.raises(GenerationError, match=r"the prompt has \d+ tokens and 120 more .* 256: shorten"):
        engine.generate([Request("x" * 200)])
    fits = 256 - len(engine.encode(Request("x")))
    assert engine.encode(Request("x", sampling=Sampling(max_new_tokens=fits)))
    with pytest.raises(GenerationError, match="lower --max-new-tokens"):
        engine.encode(Request("x", sampling=Sampling(max_new_tokens=fits + 1)))


def test_no_requests_and_several_streams(engine):
    assert engine.generate([]) == []
    with pytest.raises(GenerationError, match="one request at a time, not for 2"):
        engine.generate([Request(PROMPT)] * 2, on_text=print)


def test_recorded_frequency(engine, model):
    (done,) = engine.generate([Request(PROMPT, tiny.plan_for_experts(model, 1, 5, strength=9.0), GREEDY)], record=True)
    assert done.frequency[:, [1, 5]].tolist() == [[0.5, 0.5]] * tiny.LAYERS
    first, second = engine.generate([Request("x", sampling=Sampling(max_new_tokens=1)), Request(PROMPT)], record=True)
    assert second.frequency is not None
    (single,) = engine.generate([Request("x", sampling=Sampling(max_new_tokens=1))], record=True)
    assert single.frequency is None  # its one token is never fed to the model
    assert first.new_tokens <= 1


def test_as_dict(engine, model):
    plan = tiny.plan_for_experts(model, 1, layers=(0, 1), schedule="decay:9")
    steered, plain = engine.generate([Request(PROMPT, plan, GREEDY), Request("A", None, GREEDY)])
    record = steered.as_dict("tiny")
    assert record["domain"] == "sport"
    assert (record["schedule"], record["layers"], record["strength"]) == ("decay:9", [0, 1], 5.0)
    assert record["steering"] == steered.report.as_dict()
    assert (plain.as_dict("tiny")["domain"], plain.as_dict("tiny")["strength"]) == (None, 0.0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError])
def test_an_interrupted_text_leaves_nothing(engine, model, error):
    """Ctrl-C, or a reader of the stream that went away, in the middle of generating."""

    def stop(piece: str) -> None:
        raise error

    config = model.generation_config
    with pytest.raises(error):
        engine.generate([Request(PROMPT, tiny.plan_for_experts(model, 1), SAMPLED)], on_text=stop, record=True)
    assert tiny.traces(model) == []
    assert model.generation_config is config
    engine.generate([Request(PROMPT, tiny.plan_for_experts(model, 1), GREEDY)])  # and works again


def test_steering_that_did_not_happen_is_an_error(engine, model, monkeypatch):
    monkeypatch.setattr("steermoe.steering.handle.intercept", lambda *_: lambda: None)
    with pytest.raises(SteeringError, match="2 of 2 routers"):
        engine.generate([Request(PROMPT, tiny.plan_for_experts(model, 1), GREEDY)])
