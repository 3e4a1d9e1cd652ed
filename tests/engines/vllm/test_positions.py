"""Positions that follow tags in vLLM: the texts of the hf engine, in chunks, preempted, compiled, cached."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.request import Request
from steermoe.engines.vllm.engine import VLLMEngine
from steermoe.errors import SteeringError
from steermoe.models.loading import LoadedModel
from steermoe.steering.plans import SteeringPlan
from tests.support import tagged_models
from tests.support.tiny_models import build
from tests.support.vllm_engines import OPTIONS, SIZES, all_at_once, end, greedy, one_by_one, write_checkpoint


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The hf engine on a tiny chat model, and its folder."""
    folder = tmp_path_factory.mktemp("vllm") / "mixtral"
    model = build("mixtral", **{**SIZES, "vocab_size": 320, "tie_word_embeddings": False, "sliding_window": None})
    tagged_models.talkative(model)
    tokenizer = tagged_models.chat_tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return HFEngine(LoadedModel(folder.name, model, tokenizer)), str(folder)


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


def requests_for(engine, tokens=24):
    return tagged_models.requests(list(tagged_models.plans_of_every_position(engine.shape).values()), tokens)


def test_texts_and_reports_of_the_hf_engine(reference, start):
    engine = start(max_num_batched_tokens=32)  # prompts in chunks, beside rows that are at other places
    asked = requests_for(engine)
    theirs, ours = reference[0].generate(asked), engine.generate(asked)
    assert [done.token_ids for done in ours] == [done.token_ids for done in theirs]
    assert [done.missed for done in ours] == [done.missed for done in theirs]
    (alone,), (other,) = engine.generate(asked[30:31]), reference[0].generate(asked[30:31])
    assert alone.report == other.report
    shared = all_at_once(engine, asked)  # now the prefix cache has all of it
    assert shared == [done.token_ids for done in theirs]


def test_the_prefix_cache_keeps_apart_what_was_steered_differently(reference, start):
    """Equal texts up to a closing tag, after which one plan steers and the other does not."""
    engine = start(block_size=32)
    sport = tagged_models.plans_of_every_position(engine.shape)["answer"]
    prompt = "<think>" + "It rained all night, and the old bus was late again. " * 2
    plans = [None, sport, SteeringPlan(sport.vector, 4.0, positions="thinking"), SteeringPlan(sport.vector, 4.0)]
    asked = [Request(prompt[:60], plan, greedy(60)) for plan in plans]
    expected = one_by_one(reference[0], asked)
    assert len(set(expected)) > 2
    for _ in range(2):
        assert one_by_one(engine, asked) == expected
    longer = [
        Request(prompt[:60] + reference[0].loaded.tokenizer.decode(tokens[:40]), request.plan, greedy(20))
        for tokens, request in zip(expected, asked, strict=True)
    ]
    assert one_by_one(engine, longer) == one_by_one(reference[0], longer)


def test_preempted_texts_go_on_as_they_were(reference, start):
    engine = start(kv_cache_memory_bytes=1 << 20, block_size=32, enable_prefix_caching=False)
    asked = requests_for(engine, tokens=70)[::3]
    completions = engine.generate(asked)
    assert [completion.token_ids for completion in completions] == one_by_one(reference[0], asked)
    needed = sum(completion.prompt_tokens + completion.new_tokens - 1 for completion in completions)
    assert completions[0].report.tokens_seen > needed, "nothing was preempted: the test shows nothing"


def test_a_request_in_json(reference, start):
    """As a client of the server writes it."""
    from vllm import SamplingParams, TokensPrompt

    engine = start()
    spec = {"ban": ["0:1", "1:2"], "positions": "answer", "schedule": "first:9"}
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, extra_args={"steering": spec})
    plan = SteeringPlan(ban=((0, 1), (1, 2)), positions="answer", schedule="first:9")
    asked = tagged_models.requests([plan])
    found = []
    for number, request in enumerate(asked):
        prompt = TokensPrompt(prompt_token_ids=engine.encode(request))
        engine._vllm.add_request(str(number), prompt, params)
        while engine._vllm.has_unfinished_requests():
            outputs = engine._vllm.step()
        found.append(tuple(outputs[0].outputs[0].token_ids))
    assert found == one_by_one(reference[0], asked)
    assert engine.report().tokens_steered > 0


@pytest.mark.slow
def test_compiled_code(reference, start):
    engine = start(compiled=True)
    asked = requests_for(engine)
    assert all_at_once(engine, asked) == one_by_one(reference[0], asked)


def test_a_model_without_tags(tmp_path):
    write_checkpoint("mixtral", tmp_path / "plain")
    engine = VLLMEngine(str(tmp_path / "plain"), **OPTIONS)
    try:
        with pytest.raises(SteeringError, match="this model has none: name them with --think-tags"):
            engine.generate([Request("x", SteeringPlan(ban=((0, 0),), positions="answer"), greedy())])
    finally:
        end(engine)
