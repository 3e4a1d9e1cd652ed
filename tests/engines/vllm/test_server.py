"""`steermoe serve` as clients see it: the openai package, plain HTTP, clients that disconnect and clients that err."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from steermoe.engines.request import Request
from steermoe.steering.resolver import PlanResolver
from steermoe.steering.spec import SteeringSpec
from steermoe.vectors.file import write_vector
from tests.support.vllm_engines import PROMPTS, greedy, vector, write_checkpoint

openai = pytest.importorskip("openai", reason="the openai package is not installed: make test-vllm")
ollama = pytest.importorskip("ollama", reason="the ollama package is not installed: make test-vllm")

KEY = "a-key"
START_SECONDS = 150
TOKENS = 24
NO_END = {"ignore_eos": True}


class Server:
    """A running server and what is known about it."""

    def __init__(self, url, folder, reference):
        self.url, self.folder, self.reference = url, folder, reference
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60)

    def complete(self, model, prompt=PROMPTS[0], steering=None, at_top=None):
        """A greedy text."""
        extra = {**NO_END, "return_token_ids": True}
        if steering is not None:
            extra["vllm_xargs"] = {"steering": json.dumps(steering)}
        if at_top is not None:
            extra["steering"] = at_top
        made = self.client.completions.create(
            model=model, prompt=prompt, max_tokens=TOKENS, temperature=0, extra_body=extra
        )
        return made.choices[0]

    def tokens(self, model, prompt=PROMPTS[0], steering=None, at_top=None):
        """Its tokens: random bytes are not always text."""
        return tuple(self.complete(model, prompt, steering, at_top).token_ids)

    def expected(self, domains, prompt=PROMPTS[0], **fields):
        """The same tokens by the hf engine."""
        plan = PlanResolver(self.reference.shape, self.folder).plan(SteeringSpec(domains, **fields))
        return self.reference.generate([Request(prompt, plan, greedy(TOKENS))])[0].token_ids

    def post(self, path, body, key=KEY, kind="application/json"):
        """Status and answer of a request that no client library has checked."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": kind, "Authorization": f"Bearer {key}"}
        asked = urllib.request.Request(f"{self.url}{path}", data, headers)
        try:
            with urllib.request.urlopen(asked, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("server")
    reference = write_checkpoint("mixtral", root / "tiny")
    vectors = root / "vectors"
    for domain, raised in (("sport", (1, 3)), ("food", (6,))):
        write_vector(vector(reference.loaded.model, *raised, domain=domain), vectors / "tiny" / f"{domain}.safetensors")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "steermoe.cli.app", "serve", root / "tiny", "--engine", "vllm"]
    command += [
        "--port",
        port,
        "--api-key",
        KEY,
        "--vectors",
        vectors,
        "--dtype",
        "float32",
        "--eager",
        "--",
        "--max-model-len",
        128,
    ]
    command += ["--kv-cache-memory-bytes", 1 << 26, "--max-num-seqs", 32]
    log = (root / "log").open("w")
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    process = subprocess.Popen([*map(str, command)], stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, root / "log")
        yield Server(f"http://127.0.0.1:{port}", vectors, reference)
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        log.close()


def wait_for(url, process, log):
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.5)
    pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")


def test_names_steer_as_fields_do_and_as_the_hf_engine_does(server):
    texts = {
        "tiny": [],
        "tiny:sport": ["sport"],
        "tiny:food": ["food"],
        "tiny:sport=0.7,food=0.4": ["sport=0.7", "food=0.4"],
        "tiny:sport=-1": ["sport=-1"],
    }
    found = {name: server.tokens(name) for name in texts}
    assert found == {name: server.expected(domains) for name, domains in texts.items()}
    assert len(set(found.values())) == len(texts)
    for name, domains in texts.items():
        if domains:
            assert server.tokens("tiny", steering={"domain": domains}) == found[name]
    assert server.tokens("tiny", at_top={"domain": ["sport"]}) == server.expected(["sport"])


def test_every_field_of_a_plan(server):
    spec = {"strength": 3, "formula": "additive", "positions": "all", "schedule": "decay:20", "layers": "0-1"}
    found = server.tokens("tiny", steering={"domain": "sport", "force": ["1:2"], "ban": ["0:5"], **spec})
    expected = server.expected(["sport"], force=["1:2"], ban=["0:5"], **{**spec, "strength": 3.0})
    assert found == expected != server.expected(["sport"])


def test_models_are_listed_with_their_domains(server):
    listed = {model.id for model in server.client.models.list()}
    assert listed == {"tiny", "tiny:food", "tiny:sport"}


def test_a_domain_that_comes_while_it_serves(server):
    assert server.post("/v1/completions", {"model": "tiny:music", "prompt": "x"})[0] == 400
    own = vector(server.reference.loaded.model, 0, 2, domain="music")
    write_vector(own, server.folder / "tiny" / "music.safetensors")
    try:
        assert server.tokens("tiny:music") == server.expected(["music"])
        assert "tiny:music" in {model.id for model in server.client.models.list()}
        write_vector(vector(server.reference.loaded.model, 5, domain="music"), server.folder / "tiny/music.safetensors")
        assert server.tokens("tiny:music") == server.expected(["music"])
    finally:
        (server.folder / "tiny" / "music.safetensors").unlink(missing_ok=True)


def test_streams_say_what_whole_answers_say(server):
    for name in ("tiny", "tiny:sport"):
        stream = server.client.completions.create(
            model=name, prompt=PROMPTS[0], max_tokens=TOKENS, temperature=0, stream=True, extra_body=NO_END
        )
        pieces = [event.choices[0].text for event in stream]
        assert len(pieces) > 2
        assert "".join(pieces) == server.complete(name).text


def test_chat(server):
    def answer(model, **fields):
        return server.client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": PROMPTS[1]}],
            max_tokens=TOKENS,
            temperature=0,
            extra_body=NO_END,
            **fields,
        )

    plain, steered = (answer(name).choices[0].message.content for name in ("tiny", "tiny:sport"))
    assert plain != steered
    streamed = [event.choices[0].delta.content or "" for event in answer("tiny:sport", stream=True)]
    assert "".join(streamed) == steered


def test_32_requests_at_once_each_under_its_own_steering(server):
    names = ["tiny", "tiny:sport", "tiny:food", "tiny:sport=0.5,food=0.5"]
    asked = [(names[i % 4], PROMPTS[i % 3]) for i in range(32)]
    alone = {one: server.tokens(*one) for one in set(asked)}
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda one: server.tokens(*one), asked))
    assert together == [alone[one] for one in asked]


LONG_DECAY = json.dumps({"domain": "sport", "schedule": "decay:" + "9" * 30})
LONG_WINDOW = json.dumps({"domain": "sport", "schedule": "window:0-" + "9" * 30})
LONG_LAYERS = json.dumps({"domain": "sport", "layers": "0-" + "9" * 5000})
HUGE = json.dumps({"domain": "sport", "strength": 3.5e38})
HUGER = '{"domain": "sport", "strength": ' + "9" * 5000 + "}"
MANY = json.dumps({"force": ["1:1"] * 100_000})
BAD = [
    ("an unknown domain", {"model": "tiny:nosuch"}, "no vector 'nosuch'; there are food, sport"),
    ("no domain", {"model": "tiny:"}, "names no domain"),
    ("a weight that is none", {"model": "tiny:sport=much"}, "'much' is not a weight"),
    ("a path", {"model": "tiny:/etc/passwd"}, "not allowed"),
    ("no JSON", {"model": "tiny", "vllm_xargs": {"steering": "{"}}, "is not JSON"),
    ("an unknown field", {"model": "tiny", "vllm_xargs": {"steering": '{"domain":"sport","x":1}'}}, "has no field x"),
    ("a number", {"model": "tiny", "vllm_xargs": {"steering": 7}}, "is not a JSON object"),
    (
        "two steerings",
        {"model": "tiny:sport", "vllm_xargs": {"steering": '{"domain":"food"}'}},
        "leave one of them out",
    ),
    (
        "tags that the model does not have",
        {"model": "tiny", "vllm_xargs": {"steering": '{"domain":"sport","positions":"answer"}'}},
        "positions answer follows the tags around a model's thinking",
    ),
    ("a field at the top", {"model": "tiny", "steering": {"domain": "cooking"}}, "no vector 'cooking'"),
    ("a text at the top", {"model": "tiny", "steering": "cooking"}, "no vector 'cooking'"),
    ("two places", {"model": "tiny:sport", "steering": "food"}, "leave one of them out"),
    ("30 digits", {"model": "tiny", "vllm_xargs": {"steering": LONG_DECAY}}, "is too large: expected 0 to 2147483647"),
    ("30 digits in a window", {"model": "tiny", "vllm_xargs": {"steering": LONG_WINDOW}}, "is too large"),
    ("5,000 digits", {"model": "tiny", "vllm_xargs": {"steering": LONG_LAYERS}}, "is too large"),
    ("no float32", {"model": "tiny", "vllm_xargs": {"steering": HUGE}}, "strength 3.5e+38 for 'sport' is out of range"),
    ("no float", {"model": "tiny", "vllm_xargs": {"steering": HUGER}}, "is not JSON (99"),
    ("a huge weight", {"model": "tiny:sport=1e38"}, "the weight 1e+38 is out of range"),
    ("a long name", {"model": "tiny:" + "a" * 100_000}, "a name has at most 4096 characters"),
    ("100,000 experts", {"model": "tiny", "vllm_xargs": {"steering": MANY}}, "100000 experts are too many"),
    ("one token", {"model": "tiny:sport", "max_tokens": 1}, "would reach none of 1 new tokens"),
    ("beam search", {"model": "tiny:sport", "use_beam_search": True, "n": 2}, "beam search can't be steered"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("case", "body", "message"), BAD, ids=[case for case, *_ in BAD])
def test_bad_steering_is_refused_with_400(server, case, body, message, stream):
    for path, text in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        status, answer = server.post(path, {**text, "max_tokens": 2, "stream": stream, **body})
        assert (status, answer["error"]["code"]) == (400, 400)
        assert message in answer["error"]["message"]
        assert str(server.folder) not in answer["error"]["message"]


def test_the_largest_strengths_spoil_no_other_text(server):
    expected = server.tokens("tiny")
    for formula in ("additive", "max_scaled", "zero_max_scaled"):
        for strength in (1e6, -1e6):
            asked = {"domain": "sport", "strength": strength, "formula": formula, "positions": "all"}
            assert len(server.tokens("tiny", steering=asked)) == TOKENS
            assert server.tokens("tiny") == expected
            assert len(server.tokens("tiny:sport", prompt="A")) == TOKENS


def test_no_route_runs_unsteered_or_without_the_key(server):
    body = {"model": "tiny:sport", "prompt": "x", "max_tokens": 4}
    for path in ("/invocations", "/inference/v1/generate", "/generative_scoring"):
        assert server.post(path, body, key="wrong")[0] == 401
        status, answer = server.post(path, body)
        assert status == 404
        assert "is not offered here, where it would run unsteered" in answer["error"]["message"]


def test_a_bad_file_in_the_folder_is_left_out(server):
    bad = server.folder / "tiny" / "bad.safetensors"
    bad.write_bytes(b"nonsense")
    try:
        assert {model.id for model in server.client.models.list()} == {"tiny", "tiny:food", "tiny:sport"}
        status, answer = server.post("/v1/completions", {"model": "tiny:nosuch", "prompt": "x"})
        assert (status, answer["error"]["message"]) == (400, "steering: no vector 'nosuch'; there are food, sport")
        status, answer = server.post("/v1/completions", {"model": "tiny:bad", "prompt": "x"})
        assert (status, str(server.folder) in answer["error"]["message"]) == (400, False)
        assert "the server's log says why" in answer["error"]["message"]
    finally:
        bad.unlink()


def test_the_openai_client_raises_what_it_should(server):
    with pytest.raises(openai.BadRequestError, match="no vector 'nosuch'"):
        server.tokens("tiny:nosuch")
    with pytest.raises(openai.NotFoundError):
        server.tokens("other")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_a_key_is_asked_for_before_anything_is_told(server):
    assert server.post("/v1/completions", {"model": "tiny:nosuch", "prompt": "x"}, key="wrong")[0] == 401


def test_what_is_no_request_is_answered_by_vllm(server):
    expected = server.tokens("tiny")
    for body in (b"", b"nonsense", b"[1]", b'"text"', b"{}", b"[" * 100_000):
        status, _ = server.post("/v1/completions", body)
        assert 400 <= status < 500
    assert server.tokens("tiny") == expected


def test_a_client_that_vanishes_in_the_middle_leaves_the_server_well(server):
    before = server.tokens("tiny:sport")
    for _ in range(4):
        stream = server.client.completions.create(
            model="tiny:sport", prompt="A", max_tokens=110, temperature=0, stream=True, extra_body=NO_END
        )
        next(iter(stream))
        stream.response.close()
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a-key\r\n")
        half.sendall(b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{")
    assert server.tokens("tiny:sport") == before


def test_a_flood_of_bad_requests_beside_good_ones(server):
    expected = server.tokens("tiny:sport")

    def one(number):
        if number % 10 == 0:
            return server.tokens("tiny:sport")
        return server.post("/v1/completions", {"model": f"tiny:no{number}", "prompt": "x"})[0]

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(one, range(300)))
    assert set(answers[::10]) == {expected}
    assert {status for number, status in enumerate(answers) if number % 10} == {400}
    assert server.tokens("tiny:food") == server.expected(["food"])


@pytest.fixture
def ollama_client(server):
    made = ollama.Client(host=server.url, headers={"Authorization": f"Bearer {KEY}"})
    yield made
    made._client.close()


GREEDY = {"temperature": 0, "num_predict": TOKENS}


def test_ollama_says_what_openai_says(server, ollama_client):
    listed = [one.model for one in ollama_client.list().models]
    assert listed == ["tiny", "tiny:food", "tiny:sport"]
    for name in ("tiny:latest", "tiny:sport"):
        model = name.removesuffix(":latest")
        body = {"model": model, "prompt": PROMPTS[0], "max_tokens": TOKENS, "temperature": 0}
        choice = server.post("/v1/completions", body)[1]["choices"][0]
        made = ollama_client.generate(name, PROMPTS[0], raw=True, options=GREEDY)
        assert (made.response, made.model, made.done) == (choice["text"], name, True)
        assert made.done_reason == choice["finish_reason"]
        parts = list(ollama_client.generate(name, PROMPTS[0], raw=True, stream=True, options=GREEDY))
        assert "".join(part.response for part in parts) == choice["text"]
        assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
        assert len(parts) > 4
        counts = (parts[-1].prompt_eval_count, parts[-1].eval_count)
        assert counts == (made.prompt_eval_count, made.eval_count)


def test_ollama_chats_and_steers_by_its_options(server, ollama_client):
    messages = [{"role": "user", "content": PROMPTS[1]}]
    body = {"messages": messages, "max_tokens": TOKENS, "temperature": 0}
    plain, steered = (
        server.post("/v1/chat/completions", {"model": name, **body})[1]["choices"][0]["message"]["content"]
        for name in ("tiny", "tiny:sport")
    )
    assert plain != steered
    assert ollama_client.chat("tiny", messages, options=GREEDY).message.content == plain
    parts = list(ollama_client.chat("tiny:sport", messages, stream=True, options=GREEDY))
    assert "".join(part.message.content for part in parts) == steered
    asked = {"model": "tiny", "messages": messages, "stream": False, "options": {**GREEDY, "steering": "sport"}}
    as_curl_sends = server.post("/api/chat", asked, kind="application/x-www-form-urlencoded")
    assert as_curl_sends[1]["message"]["content"] == steered
    hot = {"temperature": 2, "top_k": 0, "top_p": 1, "min_p": 1, "num_predict": TOKENS}
    assert ollama_client.chat("tiny", messages, options=hot).message.content == plain
    seeded = {"seed": 4, "num_predict": 20}
    whole = ollama_client.generate("tiny", PROMPTS[0], options=seeded).response
    stop = whole[3:5]
    ended = ollama_client.generate("tiny", PROMPTS[0], options={**seeded, "stop": [stop]})
    assert (ended.response, ended.done_reason) == (whole[: whole.index(stop)], "stop")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("wrong", "status", "message"),
    [
        ({"options": {"mirostat": 2}}, 400, "field 'options.mirostat' is not supported"),
        ({"options": {"num_predict": 0}}, 400, "is 0, expected a whole number from 1 to 127"),
        ({"options": {"steering": "cooking"}}, 400, "steering: no vector 'cooking'"),
        ({"model": "tiny:cooking"}, 400, "steering: no vector 'cooking'"),
        ({"model": "tiny:sport", "options": {"num_predict": 1}}, 400, "would reach none of 1 new tokens"),
        ({"model": "llama"}, 404, "model 'llama' is not served here"),
        ({"prompt": "x" * 300, "raw": True}, 400, "the context of tiny is 128"),
    ],
)
def test_what_ollama_asks_wrongly_is_named(server, wrong, status, message, stream):
    found, answer = server.post("/api/generate", {"model": "tiny", "prompt": PROMPTS[0], "stream": stream, **wrong})
    assert found == status
    assert message in answer["error"]


def test_a_default_steers_whoever_names_no_steering(server, ollama_client):
    plain = server.tokens("tiny")
    asked = {"domain": "food", "strength": 3.0, "force": ["1:2"]}
    status, answer = server.post("/v1/steering", asked)
    try:
        assert (status, answer["at_once"], answer["plan"]["domain"]) == (200, 0, "food")
        expected = server.expected(["food"], strength=3.0, force=["1:2"])
        assert server.tokens("tiny") == expected != plain
        assert server.tokens("tiny", at_top="none") == plain
        assert server.tokens("tiny:sport") == server.expected(["sport"])
        made = ollama_client.generate("tiny", PROMPTS[0], raw=True, options=GREEDY).response
        body = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": TOKENS, "temperature": 0}
        assert made == server.post("/v1/completions", {**body, "steering": asked})[1]["choices"][0]["text"]
        assert server.post("/v1/completions", {**body, "max_tokens": 1})[0] == 200
        assert server.post("/v1/completions", {**body, "use_beam_search": True, "n": 2})[0] == 400
        status, answer = server.post("/v1/steering", {"domain": "cooking"})
        assert (status, answer["error"]["param"]) == (400, "steering")
        assert server.tokens("tiny") == expected
    finally:
        status, answer = server.post("/v1/steering", {"steering": None})
    assert (status, answer) == (200, {"steering": None, "plan": None, "at_once": 0, "refused": []})
    assert server.tokens("tiny") == plain


def test_what_only_other_engines_have_is_refused(server):
    body = {"model": "tiny", "prompt": "x", "max_tokens": 2}
    for path, asked in (
        ("/v1/embeddings", {"model": "tiny", "input": "x"}),
        ("/v1/completions", {**body, "trace": True}),
        ("/v1/completions", {**body, "return_routed_experts": True}),
    ):
        status, answer = server.post(path, asked)
        assert status == 400
        assert "serve the model with --engine hf, or llamacpp for a GGUF file" in answer["error"]["message"]
    assert server.post("/v1/completions", {**body, "trace": False, "return_routed_experts": None})[0] == 200
