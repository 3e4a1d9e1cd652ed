"""Texts of llama.cpp that are dropped or steered anew while others go on, and a server on a GGUF file."""

from dataclasses import replace

import httpx
import pytest
import torch

from tests.support import tiny_ggufs

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make llamacpp")
pytest.importorskip("numba", reason="numba is not installed: make llamacpp")

from steermoe.engines.llamacpp.engine import LlamaCppEngine
from steermoe.engines.llamacpp.sampler import TokenSampler
from steermoe.engines.request import PenalisedSampling, Request, Sampling
from steermoe.steering.plans import SteeringPlan
from steermoe.vectors.vector import SteeringVector

GREEDY = Sampling(max_new_tokens=20, min_new_tokens=20, do_sample=False)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """8-bit products are sums of whole numbers: equal to the bit, however many rows are computed together."""
    file = tiny_ggufs.write(tiny_ggufs.build("mixtral"), tmp_path_factory.mktemp("gguf"), "q8_0")
    made = LlamaCppEngine(str(file))
    yield made
    made.close()


@pytest.fixture(scope="module")
def plan(engine):
    weights = torch.zeros(len(engine.shape.layers), engine.shape.num_experts)
    weights[:, 1] = 1.0
    vector = SteeringVector("sport", None, engine.shape.layers, weights=weights)
    return SteeringPlan(vector, 20.0, "additive")


def run(engine, requests, act):
    decoder = engine.decoder(4, 128)
    done = {}
    try:
        decoder.start(requests, [engine.encode(one) for one in requests], on_token=lambda row, text: act(decoder, row))
        while len(decoder):
            done |= {completion.request: completion for completion in decoder.step()}
    finally:
        decoder.close()
    return [done[one] for one in requests]


def test_a_dropped_row_ends_and_the_others_are_what_they_are_alone(engine):
    requests = [Request(text, None, GREEDY) for text in ("Once upon", "A dog", "The cat is", "It", "x", "y")]
    expected = [engine.generate([one])[0] for one in requests]
    dropped = {requests[1]: 5, requests[4]: 1}

    def act(decoder, row):
        if len(row.new) == dropped.get(row.request):
            decoder.drop(row.request)

    done = run(engine, requests, act)
    assert [one.finish_reason for one in done] == ["length", "interrupted", "length", "length", "interrupted", "length"]
    for one, alone in zip(done, expected, strict=True):
        assert one.token_ids == alone.token_ids[: dropped.get(one.request)]


def test_a_waiting_text_can_be_dropped(engine):
    requests = [Request(text, None, GREEDY) for text in ("a", "b", "c", "d", "e")]

    def act(decoder, row):
        if row.request is requests[0] and len(row.new) == 2:
            decoder.drop(requests[4])

    done = run(engine, requests, act)
    assert (done[4].token_ids, done[4].finish_reason) == ((), "interrupted")


def test_a_text_is_steered_anew_from_the_next_token_on(engine, plan):
    changed, kept = Request("Once upon", None, GREEDY), Request("A dog", plan, GREEDY)
    expected = engine.generate([Request("Once upon", replace(plan, schedule="after:9"), GREEDY)])[0]
    beside = engine.generate([kept])[0]
    assert expected.token_ids != engine.generate([changed])[0].token_ids

    def act(decoder, row):
        if row.request is changed and len(row.new) == 10:
            decoder.steer(changed, plan)

    done = run(engine, [changed, kept], act)
    assert [one.token_ids for one in done] == [expected.token_ids, beside.token_ids]


def test_penalties_are_those_of_transformers():
    import numpy as np

    from steermoe.engines.hf.sampling import warp

    sampling = PenalisedSampling(do_sample=False, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.5)
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0))
    context = [5, 5, 1, 2, 2]
    expected = warp(logits[None], [sampling], [3], torch.tensor([0]), lambda row: torch.tensor(context))[0]
    np.testing.assert_allclose(TokenSampler(sampling, [0]).warp(logits.numpy(), context, 3), expected, rtol=1e-6)


def test_scores_are_log_probabilities(engine):
    (done,) = run(engine, [Request("Once upon", None, GREEDY, logprobs=2)], lambda decoder, row: None)
    assert len(done.scores) == 20
    assert all(score.logprob == score.top[0][1] <= 0 for score in done.scores)
    assert tuple(score.top[0][0] for score in done.scores) == done.token_ids


def test_a_server(engine, tmp_path):
    pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'steermoe[serve]'")
    from concurrent.futures import ThreadPoolExecutor

    from steermoe.serving.live import Limits
    from tests.support import served

    served.write_vectors(tmp_path / "vectors", engine.shape)
    names = [engine.name, *(f"{engine.name}:{domain}" for domain in served.DOMAINS)]

    def ask(number):
        body = {"model": names[number % 9], "prompt": "A dog", "max_tokens": 12, "seed": number, "temperature": 1.1}
        return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]

    with served.running(engine, tmp_path / "vectors", Limits(rows=4, tokens=128)) as server:
        alone = [ask(number) for number in range(18)]
        with ThreadPoolExecutor(18) as pool:
            assert list(pool.map(ask, range(18))) == alone
        assert len(set(alone)) > 9
        body = {"model": engine.name, "input": ["A goal!", "The pan is hot."]}
        data = httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=60).json()["data"]
        assert [len(one["embedding"]) for one in data] == [len(engine.shape.layers) * engine.shape.num_experts] * 2
        assert ask(3) == alone[3]
