"""Many clients at once, rude ones among them: texts are what they are alone, and rows are freed when clients go."""

import asyncio
import json
import socket
import time
from pathlib import Path

import httpx
import pytest

from steermoe.engines.request import Request, Sampling
from steermoe.serving.live import Limits
from steermoe.steering.resolver import PlanResolver
from steermoe.steering.spec import SteeringSpec
from tests.support import served
from tests.support.served import DOMAINS

STORIES = ("Once upon a time", "A dog", "The cat is on the mat today", "It", "When they came home, all was quiet.")


@pytest.fixture(scope="module")
def small(tiny_checkpoint, vectors):
    """A server of two rows and a queue of 8."""
    with served.running(served.tiny_engine(tiny_checkpoint), vectors, Limits(rows=2, queued=8)) as running:
        yield running


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def asked(number):
    """Requests that differ in everything: prompt, domain, seed, length, and whether they are streamed."""
    domain = [None, *DOMAINS][number % 9]
    return {
        "model": "tiny-mixtral" if domain is None else f"tiny-mixtral:{domain}",
        "prompt": STORIES[number % len(STORIES)],
        "max_tokens": 4 + number % 7,
        "temperature": 0 if number % 3 == 0 else 1.1,
        "seed": number,
        "stream": number % 2 == 0,
    }


@pytest.fixture(scope="module")
def alone(reference, vectors):
    """What a request gives alone: the only row of a batch of its own."""
    resolver, decoder = PlanResolver(reference.shape, vectors), reference.decoder(1)

    def text(number):
        request = request_of(number, resolver)
        decoder.start([request], [reference.encode(request)])
        while not (done := decoder.step()):
            pass
        return done[0].text

    yield text
    decoder.close()


def request_of(number, resolver):
    body = asked(number)
    domain = body["model"].partition(":")[2]
    plan = resolver.plan(SteeringSpec(domain=(domain,))) if domain else None
    heat = body["temperature"]
    sampling = Sampling(
        max_new_tokens=body["max_tokens"], do_sample=heat > 0, temperature=heat or 1.0, seed=body["seed"]
    )
    return Request(body["prompt"], plan, sampling)


async def text_of(client, url, body):
    if not body["stream"]:
        answer = await client.post(f"{url}/v1/completions", json=body)
        return answer.json()["choices"][0]["text"]
    found = ""
    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                found += json.loads(line[6:])["choices"][0]["text"]
    return found


def test_64_texts_with_9_steerings_are_what_they_are_alone(server, alone):
    async def all_at_once():
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=64)) as client:
            return await asyncio.gather(*(text_of(client, server.url, asked(number)) for number in range(64)))

    texts = asyncio.run(all_at_once())
    assert texts == [alone(number) for number in range(64)]
    assert len(set(texts)) > 32


@pytest.mark.slow
@pytest.mark.default_model
def test_64_texts_of_the_default_model_are_what_they_are_alone():
    """In float32, where a row's numbers depend least on the rows beside it."""
    from steermoe.engines.hf.engine import HFEngine
    from steermoe.models import loading

    engine = HFEngine(loading.load(None, dtype="float32"))
    resolver = PlanResolver(engine.shape)
    bodies = [
        {**asked(number), "model": asked(number)["model"].replace("tiny-mixtral", "smollm2-moe")}
        for number in range(64)
    ]
    decoder, expected = engine.decoder(1), []
    for number in range(64):
        request = request_of(number, resolver)
        decoder.start([request], [engine.encode(request)])
        while not (done := decoder.step()):
            pass
        expected.append(done[0].text)
    decoder.close()

    async def all_at_once(url):
        async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=64)) as client:
            return await asyncio.gather(*(text_of(client, url, body) for body in bodies))

    with served.running(engine, None, Limits(rows=64, tokens=128)) as running:
        assert asyncio.run(all_at_once(running.url)) == expected
    assert len(set(expected)) > 32


def test_clients_that_go_away_free_their_rows(small):
    body = {"model": "tiny-mixtral", "prompt": "A dog", "max_tokens": 200, "min_tokens": 200, "stream": True}
    for is_streamed in (True, False):
        connections = []
        for _ in range(5):
            connection = socket.create_connection(("127.0.0.1", int(small.url.rpartition(":")[2])))
            content = json.dumps({**body, "stream": is_streamed}).encode()
            head = (
                f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n".encode()
            )
            connection.sendall(head + content)
            connections.append(connection)
        wait_until(lambda: small.live.running == 2 and small.live.waiting == 3)
        before = small.live.generated
        for connection in connections:
            connection.close()
        wait_until(lambda: small.live.running == 0 and small.live.waiting == 0)
        assert small.live.generated - before < 5 * 200
    assert small.live.failed == 0


@pytest.mark.parametrize("number", [80, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_flood_to_a_short_queue(small, number):
    """Those there is no room for hear so at once and when to come back; the others get their texts."""
    body = {"model": "tiny-mixtral", "prompt": "A dog", "max_tokens": 24, "temperature": 0}

    async def flood():
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(timeout=60, limits=limits) as client:
            asking = (client.post(f"{small.url}/v1/completions", json=body) for _ in range(number))
            return await asyncio.gather(*asking)

    answers = asyncio.run(flood())
    assert {answer.status_code for answer in answers} == {200, 429}
    assert len({answer.json()["choices"][0]["text"] for answer in answers if answer.status_code == 200}) == 1
    refused = [answer for answer in answers if answer.status_code == 429]
    assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
    assert refused[0].json()["error"]["type"] == "rate_limit_error"
    assert small.live.failed == 0


def test_floods_of_bad_specs_disturb_nobody(server, alone):
    async def flood():
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=16)) as client:
            bad = ({"prompt": "A dog", "steering": {"domain": f"nothing{number}"}} for number in range(60))
            asking = [client.post(f"{server.url}/v1/completions", json=body) for body in bad]
            good = [text_of(client, server.url, asked(number)) for number in range(6)]
            return await asyncio.gather(*asking, *good)

    *refused, a, b, c, d, e, f = asyncio.run(flood())
    assert {answer.status_code for answer in refused} == {400}
    assert [a, b, c, d, e, f] == [alone(number) for number in range(6)]


def test_slow_readers_hold_up_nobody(small):
    """A client that reads nothing has its text generated all the same, and the others theirs."""
    body = {
        "model": "tiny-mixtral",
        "prompt": "A dog",
        "max_tokens": 200,
        "min_tokens": 200,
        "stream": True,
        "logprobs": 20,
    }
    content = json.dumps(body).encode()
    slow = []
    for _ in range(2):
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        one.connect(("127.0.0.1", int(small.url.rpartition(":")[2])))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        one.sendall(head + content)
        slow.append(one)
    wait_until(lambda: small.live.running == 2)
    answer = httpx.post(f"{small.url}/v1/completions", json={"prompt": "It", "max_tokens": 5}, timeout=30)
    assert answer.status_code == 200
    wait_until(lambda: small.live.running == 0)
    for one in slow:
        one.close()


def test_a_body_of_50_megabytes(small):
    content = b'{"prompt": "' + b"x" * (50 << 20) + b'"}'
    try:
        answer = httpx.post(f"{small.url}/v1/completions", content=content, timeout=60)
        assert answer.status_code == 413
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        pass  # the server hung up before the body was sent
    assert httpx.post(f"{small.url}/v1/completions", json={"prompt": "It", "max_tokens": 2}).status_code == 200


@pytest.mark.slow
def test_memory_stays_flat_over_2000_requests(server):
    import resource

    async def some(first, number):
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=32)) as client:
            await asyncio.gather(*(text_of(client, server.url, asked(i)) for i in range(first, first + number)))

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    asyncio.run(some(0, 400))
    before = resident()
    for first in range(400, 2400, 200):
        asyncio.run(some(first, 200))
    assert resident() - before < 24 << 20
