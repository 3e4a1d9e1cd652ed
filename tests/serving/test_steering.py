"""The server's default steering, which changes while texts are generated."""

import threading
import time
from concurrent.futures import Future

import httpx
import pytest

from steermoe.serving.steering import Asked

PROMPT = "Once upon a time"


@pytest.fixture
def url(server):
    yield server.url
    assert httpx.post(f"{server.url}/v1/steering", json={"steering": None}).status_code == 200


def complete(url, **body):
    body = {"model": "tiny-mixtral", "prompt": PROMPT, "max_tokens": 30, "temperature": 0, **body}
    return httpx.post(f"{url}/v1/completions", json=body).json()["choices"][0]


def test_requests_without_steering_follow_the_default(url):
    plain, steered = complete(url)["text"], complete(url, steering="sport")["text"]
    assert plain != steered
    assert httpx.get(f"{url}/v1/steering").json() == {"steering": None, "plan": None}
    set_to = httpx.post(f"{url}/v1/steering", json={"domain": "sport"}).json()
    assert (set_to["plan"]["domain"], set_to["plan"]["strength"], set_to["at_once"]) == ("sport", 8.0, 0)
    assert httpx.get(f"{url}/v1/steering").json()["steering"]["domain"] == ["sport"]
    assert complete(url)["text"] == steered
    assert complete(url, steering="none")["text"] == complete(url, model="tiny-mixtral:none")["text"] == plain
    assert complete(url, steering="law")["text"] == httpx_law(url)
    assert httpx.post(f"{url}/v1/steering", json={"domain": "none"}).json()["plan"] is None
    assert complete(url)["text"] == plain


def httpx_law(url):
    return complete(url, model="tiny-mixtral:law")["text"]


def test_a_text_follows_a_new_default_from_the_next_token_on(url, server):
    """Its beginning is that of the unsteered text; the trace has the token from which on it is steered."""
    tokens = 220
    long = {"max_tokens": tokens, "min_tokens": tokens, "trace": True}
    plain = complete(url, **long)["trace"]["token_ids"]
    running = server.live.submit([request_like(tokens, wait_for_a_change(server.live))])[0]
    service = server.app.state.service
    service.steering.follow([running], Asked(None, follows_default=True))
    seen = 0
    for piece in running:
        seen += len(piece.tokens)
        if seen >= 5:
            break
    answer = httpx.post(f"{url}/v1/steering", json={"domain": "sport"}).json()
    assert (answer["at_once"], answer["refused"]) == (1, [])
    trace = running.result(30).trace
    first = int((trace.strength > 0).argmax())
    assert 5 <= first < tokens - 1
    assert trace.strength[first:-1].tolist() == [8.0] * (tokens - 1 - first)
    assert trace.token_ids[: first + 1].tolist() == plain[: first + 1]
    assert trace.token_ids.tolist() != plain
    assert running.request.plan is None
    assert running.plan.vector.domain == "sport"


def wait_for_a_change(live):
    """Holds the text up at its tenth token until its steering is to be changed, however long that takes."""

    def reached(token):
        deadline = time.monotonic() + 20
        while token.number == 10 and not live._commands and time.monotonic() < deadline:
            time.sleep(0.001)

    return reached


def request_like(tokens, on_trace):
    from steermoe.engines.request import Request, Sampling

    sampling = Sampling(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return Request(PROMPT, None, sampling, False, trace=True, on_trace=on_trace)


@pytest.mark.parametrize(
    "asked", [{"domain": "cooking"}, {"domain": "sport", "strength": 1e40}, {"power": 2}, {"steering": 5}]
)
def test_a_bad_default_changes_nothing(url, asked):
    httpx.post(f"{url}/v1/steering", json={"domain": "food"})
    answer = httpx.post(f"{url}/v1/steering", json=asked)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "steering"
    assert httpx.get(f"{url}/v1/steering").json()["plan"]["domain"] == "food"


def test_a_default_beside_the_field_steering_is_refused(url):
    httpx.post(f"{url}/v1/steering", json={"domain": "food"})
    answer = httpx.post(f"{url}/v1/steering", json={"steering": "sport", "domain": "law"})
    assert answer.status_code == 400
    assert "field 'domain' stands beside 'steering'" in answer.json()["error"]["message"]
    assert httpx.get(f"{url}/v1/steering").json()["plan"]["domain"] == "food"


def test_a_text_that_begins_while_the_default_changes_follows_the_last_one(url, server):
    """`follow` reads the default and steers; a default that is set in between must be the last word."""
    steering = server.app.state.service.steering
    steering.set("sport")
    came = []

    class Beginning:
        is_done = False

        def steer(self, plan):
            if not came:
                other = threading.Thread(target=steering.set, args=("food",))
                threads.append(other)
                other.start()
                other.join(0.3)
            came.append(plan and plan.vector.domain)
            done = Future()
            done.set_result(None)
            return done

    threads = []
    ticket = Beginning()
    steering.follow([ticket], Asked(None, follows_default=True))
    threads[0].join()
    assert came == ["sport", "food"]


def test_a_vector_that_is_added_is_found_at_once(url, vectors, tiny_model, make_vector):
    from steermoe.vectors.file import write_vector

    assert httpx.post(f"{url}/v1/completions", json={"prompt": PROMPT, "model": "tiny-mixtral:pets"}).status_code == 400
    write_vector(make_vector("pets"), vectors / "pets.safetensors")
    try:
        assert (
            httpx.post(f"{url}/v1/completions", json={"prompt": PROMPT, "model": "tiny-mixtral:pets"}).status_code
            == 200
        )
        assert "tiny-mixtral:pets" in [one["id"] for one in httpx.get(f"{url}/v1/models").json()["data"]]
    finally:
        (vectors / "pets.safetensors").unlink()
