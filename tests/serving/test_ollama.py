"""Ollama's protocol with Ollama's own client."""

import httpx
import ollama
import pytest

PROMPT = "Once upon a time"
GREEDY = {"temperature": 0, "num_predict": 30}


@pytest.fixture(scope="module")
def client(server):
    made = ollama.Client(host=server.url)
    yield made
    made._client.close()


@pytest.fixture(scope="module")
def completed(server):
    """The text that OpenAI's protocol gives."""

    def text(path="completions", **body):
        body = {"model": "tiny-mixtral", "temperature": 0, "max_tokens": 30, **body}
        choice = httpx.post(f"{server.url}/v1/{path}", json=body).json()["choices"][0]
        return choice["text"] if "text" in choice else choice["message"]["content"]

    return text


def test_tags(client):
    assert [one.model for one in client.list().models][:2] == ["tiny-mixtral", "tiny-mixtral:biology"]


@pytest.mark.parametrize("name", ["tiny-mixtral", "tiny-mixtral:latest", "tiny-mixtral:law"])
def test_show(client, name):
    shown = client.show(name)
    assert shown.capabilities == ["completion"]
    assert (shown.details.family, shown.details.quantization_level) == ("mixtral", "float32")
    assert shown.modelinfo["general.architecture"] == "mixtral"
    assert shown.modelinfo["mixtral.context_length"] == 256
    assert shown.modelinfo["mixtral.expert_used_count"] < shown.modelinfo["mixtral.expert_count"]


def test_show_of_what_is_not_served(client, server):
    for name, status in (("gpt", 404), ("tiny-mixtral:cooking", 400)):
        with pytest.raises(ollama.ResponseError) as failed:
            client.show(name)
        assert failed.value.status_code == status
    answer = httpx.post(f"{server.url}/api/show", json={})
    assert (answer.status_code, answer.json()["error"]) == (
        400,
        "field 'model' is None, expected a name such as 'tiny-mixtral'",
    )


@pytest.mark.parametrize("name", ["tiny-mixtral", "tiny-mixtral:latest", "tiny-mixtral:law"])
def test_generate_continues_raw_prompts(client, completed, name):
    made = client.generate(name, PROMPT, raw=True, options=GREEDY)
    assert made.response == completed(prompt=PROMPT, model=name)
    assert (made.done, made.done_reason, made.eval_count, made.prompt_eval_count) == (True, "length", 30, len(PROMPT))
    assert made.model == name


def test_generate_answers_by_the_chat_template(client, completed):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    made = client.generate("tiny-mixtral", PROMPT, system="Be brief.", options=GREEDY)
    assert made.response == completed("chat/completions", messages=messages)


def test_streams(client, completed):
    parts = list(client.generate("tiny-mixtral:food", PROMPT, raw=True, stream=True, options=GREEDY))
    assert "".join(part.response for part in parts) == completed(prompt=PROMPT, model="tiny-mixtral:food")
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert len(parts) > 4


def test_chat(client, completed, server):
    messages = [{"role": "user", "content": "Hello"}]
    expected = completed("chat/completions", messages=messages, model="tiny-mixtral:space")
    steered = {**GREEDY, "steering": {"domain": "space"}}
    assert client.chat("tiny-mixtral:law", messages, options=GREEDY).message.content != expected
    parts = client.chat("tiny-mixtral:space", messages, stream=True, options=GREEDY)
    assert "".join(part.message.content for part in parts) == expected
    body = {"model": "tiny-mixtral", "messages": messages, "options": steered, "stream": False}
    assert httpx.post(f"{server.url}/api/chat", json=body).json()["message"]["content"] == expected


def test_stop_and_seed(client):
    whole = client.generate("tiny-mixtral", PROMPT, raw=True, options={"seed": 4, "num_predict": 20}).response
    assert client.generate("tiny-mixtral", PROMPT, raw=True, options={"seed": 4, "num_predict": 20}).response == whole
    stop = whole[5:8]
    ended = client.generate("tiny-mixtral", PROMPT, raw=True, options={"seed": 4, "num_predict": 20, "stop": [stop]})
    assert (ended.response, ended.done_reason) == (whole[: whole.index(stop)], "stop")


def test_min_p_leaves_the_likeliest_token(client):
    hot = {"temperature": 50, "num_predict": 12, "seed": 4, "top_k": 0, "top_p": 1}
    least, plain = (
        client.generate("tiny-mixtral", PROMPT, raw=True, options=options).response
        for options in ({**hot, "min_p": 1}, hot)
    )
    greedy = client.generate("tiny-mixtral", PROMPT, raw=True, options={**GREEDY, "num_predict": 12}).response
    assert least == greedy != plain


BAD = [
    ({"options": {"min_p": 2}}, "field 'options.min_p' is 2, expected a number from 0 to 1"),
    ({"options": {"mirostat": 2}}, "field 'options.mirostat' is not supported"),
    ({"options": {"num_predict": 0}}, "field 'options.num_predict' is 0, expected a whole number from 1 to 255"),
    ({"options": {"warmth": 1}}, "field 'options.warmth' is unknown"),
    ({"options": {"steering": "cooking"}}, "steering: no vector 'cooking'"),
    ({"options": 7}, "field 'options' is 7, expected an object"),
    ({"prompt": ""}, "field 'prompt' is '', expected a text"),
    ({"format": "json"}, "field 'format' is not supported"),
    ({"images": ["x"]}, "field 'images' is not supported"),
    ({"model": "llama"}, "model 'llama' is not served here"),
    ({"system": "x", "raw": True}, "field 'system' needs a chat template"),
    ({"prompt": "x" * 300}, "256"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_whatever_is_wrong_is_named(server, wrong, message):
    answer = httpx.post(f"{server.url}/api/generate", json={"model": "tiny-mixtral", "prompt": PROMPT, **wrong})
    assert answer.status_code == (404 if "llama" in str(wrong) else 400)
    assert message in answer.json()["error"]


def test_an_error_reaches_the_client(client):
    with pytest.raises(ollama.ResponseError, match="no vector 'cooking'"):
        client.generate("tiny-mixtral:cooking", PROMPT)
