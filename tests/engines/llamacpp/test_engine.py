"""The llama.cpp engine on a tiny GGUF: as the transformers engine on the same weights, alone and side by side."""

from dataclasses import replace

import pytest
import torch

from tests.support import steering_models, tiny_ggufs

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make llamacpp")
pytest.importorskip("numba", reason="numba is not installed: make llamacpp")

from steermoe.discovery.embed_corpus import embedder
from steermoe.discovery.embedder import EmbeddingOptions
from steermoe.discovery.labelled import vector_from_texts
from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.llamacpp.engine import LlamaCppEngine
from steermoe.engines.request import Request, Sampling
from steermoe.errors import CompatibilityError, CorpusError, GenerationError, ModelError, SteeringError
from steermoe.steering.plans import SteeringPlan
from steermoe.vectors.vector import SteeringVector

GREEDY = Sampling(max_new_tokens=10, min_new_tokens=10, do_sample=False)
SAMPLED = Sampling(max_new_tokens=12, min_new_tokens=12, temperature=1.0, seed=5)
PROMPT = "Once upon a time the dog ran in"


@pytest.fixture(scope="module")
def loaded():
    return tiny_ggufs.build("mixtral")


@pytest.fixture(scope="module")
def path(loaded, tmp_path_factory):
    return tiny_ggufs.write(loaded, tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module", params=["graph", "pieces"])
def engine(request, path):
    engine = LlamaCppEngine(str(path), reach=request.param, cache="f32")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def hf(loaded):
    return HFEngine(loaded)


def plan(*experts, **fields):
    frequency = torch.full((tiny_ggufs.LAYERS, tiny_ggufs.EXPERTS), 0.1 / tiny_ggufs.EXPERTS)
    frequency[:, list(experts)] += 0.9 / len(experts)
    vector = SteeringVector("sport", frequency, tuple(range(tiny_ggufs.LAYERS)), threshold=1.0)
    return SteeringPlan(vector, **{"strength": 5.0, **fields})


PLANS = {
    "unsteered": None,
    "default": plan(1, 5),
    "additive": plan(1, 5, formula="additive"),
    "zero_max_scaled": plan(1, 5, formula="zero_max_scaled"),
    "max_scaled, paper": plan(2, formula="max_scaled", scale="paper"),
    "away": plan(0, 1, 2, strength=-4.0),
    "all positions": plan(3, positions="all"),
    "prompt": plan(3, positions="prompt"),
    "decay": plan(6, schedule="decay:4"),
    "window": plan(6, schedule="window:2-5"),
    "one layer": plan(4, layers=(1, 1)),
    "lists": SteeringPlan(force=((0, 3),), ban=((1, 0), (1, 7))),
}


@pytest.mark.parametrize("name", PLANS)
def test_as_the_transformers_engine(engine, hf, name):
    requests = [Request(PROMPT, PLANS[name], GREEDY), Request("in the an", PLANS[name], replace(SAMPLED, seed=7))]
    ours = [engine.generate([request], record=True)[0] for request in requests]
    theirs = [hf.generate([request], record=True)[0] for request in requests]
    for own, other in zip(ours, theirs, strict=True):
        assert own.token_ids == other.token_ids
        assert own.text == other.text
        assert (own.prompt_tokens, own.finish_reason) == (other.prompt_tokens, other.finish_reason)
        torch.testing.assert_close(own.frequency, other.frequency)
        assert (own.report is None) == (other.report is None)
        if own.report is not None:
            assert own.report.tokens_seen == other.report.tokens_seen
            assert own.report.tokens_steered == other.report.tokens_steered
            if name not in ("all positions", "prompt"):  # there the last layer computes only wanted tokens here
                assert own.report.vector_share == pytest.approx(other.report.vector_share)


def test_steering_changes_the_text(engine):
    texts = {name: engine.generate([Request(PROMPT, each, GREEDY)])[0].token_ids for name, each in PLANS.items()}
    assert len(set(texts.values())) >= len(PLANS) - 3


def test_a_text_does_not_depend_on_its_neighbours(engine):
    requests = [
        Request(PROMPT, None, SAMPLED),
        Request("A dog", PLANS["default"], replace(SAMPLED, max_new_tokens=20, repetition_penalty=1.5)),
        Request("The cat is", PLANS["additive"], replace(SAMPLED, top_k=9, seed=6)),
        Request("It", PLANS["default"], replace(GREEDY, max_new_tokens=5, min_new_tokens=0)),
        Request("x", None, Sampling(max_new_tokens=1, seed=3)),
        Request("in the", PLANS["lists"], GREEDY),
    ]
    together = engine.generate(requests, record=True)
    assert [done.request for done in together] == requests
    for request, done in zip(requests, together, strict=True):
        (alone,) = engine.generate([request], record=True)
        assert (done.token_ids, done.text, done.finish_reason) == (alone.token_ids, alone.text, alone.finish_reason)
        if alone.frequency is None:
            assert done.frequency is None
        else:
            torch.testing.assert_close(done.frequency, alone.frequency)


def test_more_requests_than_rows_follow_as_there_is_room(engine, monkeypatch):
    monkeypatch.setattr("steermoe.engines.llamacpp.engine.MOST_ROWS", 2)
    requests = [Request(PROMPT, PLANS["default"], replace(SAMPLED, seed=seed)) for seed in range(5)]
    together = engine.generate(requests, record=True)
    for request, done in zip(requests, together, strict=True):
        (alone,) = engine.generate([request], record=True)
        assert done.token_ids == alone.token_ids
        torch.testing.assert_close(done.frequency, alone.frequency)  # counted for the right one, whoever had its place
    assert len({done.token_ids for done in together}) == 5
    assert {(done.seconds, done.report) for done in together} == {(together[0].seconds, together[0].report)}


def test_prompts_longer_than_a_call(engine, hf, monkeypatch):
    request = Request("the dog and " * 8, PLANS["all positions"], GREEDY)
    (whole,) = engine.generate([request], record=True)
    monkeypatch.setattr("steermoe.engines.llamacpp.rows.CALL_TOKENS", 16)
    (parts,) = engine.generate([request], record=True)
    assert parts.token_ids == whole.token_ids == hf.generate([request])[0].token_ids
    assert parts.report.tokens_seen == whole.report.tokens_seen


def test_other_plans_from_call_to_call(engine):
    def tokens(each):
        return engine.generate([Request(PROMPT, each, GREEDY)])[0].token_ids

    first, other, plain = tokens(PLANS["default"]), tokens(PLANS["away"]), tokens(None)
    assert tokens(PLANS["default"]) == first != other
    assert tokens(None) == plain != first


def test_both_ways_to_the_logits_agree(path):
    texts = {}
    for reach in ("graph", "pieces"):
        engine = LlamaCppEngine(str(path), reach=reach)
        texts[reach] = [
            engine.generate([Request(PROMPT, each, SAMPLED)], record=True)[0].token_ids for each in PLANS.values()
        ]
    assert texts["graph"] == texts["pieces"]


@pytest.mark.parametrize("prompt", [PROMPT, "the cat", "é €", "</s>", " a\n"])
@pytest.mark.parametrize("seed", range(3))
def test_streamed_text_is_the_final_text(engine, prompt, seed):
    pieces: list[str] = []
    (done,) = engine.generate([Request(prompt, sampling=replace(SAMPLED, seed=seed))], on_text=pieces.append)
    assert "".join(pieces) == done.text != ""


@pytest.mark.parametrize("text", ["the cat in an inn", "é € 日本 🐈", "</s> then <pad>", " a\n\n b", "don't 123"])
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_tokens_as_transformers_has_them(text, kind, tmp_path):
    tokenizer = tiny_ggufs.byte_tokenizer() if kind == "bytes" else tiny_ggufs.piece_tokenizer()
    loaded = tiny_ggufs.build("mixtral", tokenizer)
    engine = LlamaCppEngine(str(tiny_ggufs.write(loaded, tmp_path)))
    assert engine.tokenizer.encode(text) == tokenizer(text, split_special_tokens=True)["input_ids"]
    assert engine.tokenizer.ends == {2}


def test_end_of_text(engine):
    (usual,) = engine.generate([Request(PROMPT, sampling=GREEDY)])
    end = usual.token_ids[3]
    ends, engine.tokenizer.ends = engine.tokenizer.ends, {end, 2}
    try:
        free = replace(GREEDY, min_new_tokens=0)
        short, long = engine.generate([Request(PROMPT, sampling=free), Request(PROMPT, sampling=GREEDY)])
    finally:
        engine.tokenizer.ends = ends
    assert (short.finish_reason, short.token_ids) == ("stop", usual.token_ids[: usual.token_ids.index(end)])
    assert (long.finish_reason, long.new_tokens) == ("length", 10)


@pytest.mark.parametrize("prompt", ["", " ", "\n\t"])
def test_empty_prompt(engine, prompt):
    with pytest.raises(GenerationError, match="the prompt is empty"):
        engine.generate([Request(PROMPT), Request(prompt)])


def test_prompt_too_long(engine):
    with pytest.raises(GenerationError, match=r"the prompt has \d+ tokens and 120 more .* 256: shorten"):
        engine.generate([Request("x" * 200)])


def test_no_requests_and_several_streams(engine):
    assert engine.generate([]) == []
    with pytest.raises(GenerationError, match="one request at a time, not for 2"):
        engine.generate([Request(PROMPT)] * 2, on_text=print)


def test_an_interrupted_text_leaves_nothing(engine):
    def stop(piece):
        raise KeyboardInterrupt

    (usual,) = engine.generate([Request(PROMPT, sampling=GREEDY)])
    with pytest.raises(KeyboardInterrupt):
        engine.generate([Request(PROMPT, PLANS["default"], SAMPLED)], on_text=stop, record=True)
    assert engine.generate([Request(PROMPT, sampling=GREEDY)])[0].token_ids == usual.token_ids


# ---- recording ----


@pytest.mark.parametrize("tokens", ["all", "last"])
def test_routing_embeddings_as_by_transformers(engine, loaded, tokens):
    texts = ["the dog ran in", "An inn.", "", "x" * 90]
    options = EmbeddingOptions(tokens=tokens, max_tokens=64)
    with embedder(loaded, options) as theirs, embedder(engine, options) as ours:
        wanted, found = theirs.texts(texts), ours.texts(texts)
        assert ours.shape == theirs.shape
    assert torch.equal(wanted.tokens, found.tokens)
    keep = wanted.tokens > 0
    torch.testing.assert_close(found.frequency[keep], wanted.frequency[keep])


def test_a_vector_built_from_texts(engine, loaded):
    texts = ["the dog ran in", "An inn, the dog.", "in an inn"]
    ours, theirs = vector_from_texts(engine, "dogs", texts), vector_from_texts(loaded, "dogs", texts)
    torch.testing.assert_close(ours.frequency, theirs.frequency)
    assert (ours.layers, ours.info.architecture, ours.info.top_k) == ((0, 1), "mixtral", 2)
    assert engine.generate([Request(PROMPT, SteeringPlan(ours.with_threshold(1.0)), GREEDY)])[0].report.tokens_steered


@pytest.mark.parametrize("options", [{"hidden": True}, {"features": "probabilities"}, {"both": True}])
def test_what_only_transformers_records(engine, options):
    with pytest.raises(CorpusError, match="use --engine hf"), embedder(engine, EmbeddingOptions(**options)):
        pass


# ---- what can go wrong ----


def test_a_vector_of_another_model(engine, make_vector):
    with pytest.raises(CompatibilityError, match="has 3x8 experts"):
        engine.generate([Request(PROMPT, SteeringPlan(make_vector(), 4.0), GREEDY)])


def test_steering_that_did_not_happen_is_an_error(path):
    engine = LlamaCppEngine(str(path), reach="pieces")
    engine.state._set("kind", 1)  # as if the architecture called its logits otherwise
    with pytest.raises(SteeringError, match=r"2 of 2 routers were to be steered but llama.cpp computed no node"):
        engine.generate([Request(PROMPT, PLANS["default"], GREEDY)])


def test_a_damaged_file(path, tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ModelError, match=r"bad.gguf' is not a GGUF file or is cut off"):
        LlamaCppEngine(str(bad))
    bad.write_bytes(path.read_bytes().replace(b"output_norm.weight", b"output_nase.weight"))
    with pytest.raises(ModelError, match=r"llama.cpp can't load '.*bad.gguf': "):
        LlamaCppEngine(str(bad))


def test_engines_of_one_process_do_not_disturb_each_other(path, tmp_path):
    other_model = tiny_ggufs.build("olmoe")
    one = LlamaCppEngine(str(path), cache="f32")
    other = LlamaCppEngine(str(tiny_ggufs.write(other_model, tmp_path)), cache="f32")
    request = Request(PROMPT, PLANS["default"], GREEDY)
    first = one.generate([request])[0].token_ids
    (second,) = other.generate([request])
    assert one.generate([request])[0].token_ids == first
    assert second.token_ids == HFEngine(other_model).generate([request])[0].token_ids
    assert steering_models.traces(other_model.model) == []
