"""OpenAI's protocol with OpenAI's own client: texts, chats, streams, log-probabilities, steering, errors."""

import base64
import json

import httpx
import numpy as np
import openai
import pytest

from steermoe.engines.request import Request, Sampling
from steermoe.steering.resolver import PlanResolver
from steermoe.steering.spec import SteeringSpec
from tests.support.served import DOMAINS

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def alone(reference, vectors):
    """The text of a request alone, without a server."""
    resolver = PlanResolver(reference.shape, vectors)

    def text(prompt=PROMPT, domain=None, chat=None, **sampling):
        plan = None if domain is None else resolver.plan(SteeringSpec(domain=(domain,)))
        sampling = {"max_new_tokens": 12, "do_sample": False, **sampling}
        made = None if chat is None else reference.chat(chat)
        return reference.generate([Request(prompt, plan, Sampling(**sampling), chat=made)])[0]

    return text


def complete(client, model="tiny-mixtral", **more):
    more = {"max_tokens": 12, "temperature": 0, "prompt": PROMPT, **more}
    return client.completions.create(model=model, **more)


def test_models(client):
    assert [card.id for card in client.models.list()] == ["tiny-mixtral", *(f"tiny-mixtral:{one}" for one in DOMAINS)]


def test_a_completion(client, alone):
    made, expected = complete(client), alone()
    assert made.choices[0].text == expected.text
    assert made.choices[0].finish_reason == expected.finish_reason
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (expected.prompt_tokens, expected.new_tokens)


ASKING = [
    ("tiny-mixtral:sport", {}),
    ("tiny-mixtral", {"steering": "sport"}),
    ("tiny-mixtral", {"steering": {"domain": "sport"}}),
    ("tiny-mixtral", {"steering": '{"domain": ["sport"]}'}),
    ("tiny-mixtral", {"vllm_xargs": {"steering": '{"domain": "sport"}'}}),
]


@pytest.mark.parametrize(("model", "extra"), ASKING)
def test_all_ways_to_ask_for_steering(client, alone, model, extra):
    made = complete(client, model, extra_body=extra)
    assert made.choices[0].text == alone(domain="sport").text != alone().text
    assert made.model == "tiny-mixtral"


def test_sampling_is_that_of_the_engine(client, alone):
    made = complete(client, "tiny-mixtral:law", temperature=0.9, top_p=0.8, seed=5)
    expected = alone(domain="law", do_sample=True, temperature=0.9, top_p=0.8, seed=5)
    assert made.choices[0].text == expected.text
    made = complete(client, temperature=1, seed=5, extra_body={"min_p": 1})
    expected = alone(do_sample=True, temperature=1.0, min_p=1.0, seed=5)
    assert made.choices[0].text == expected.text != alone(do_sample=True, temperature=1.0, seed=5).text
    again = complete(client, temperature=2.0), complete(client, temperature=2.0)
    assert again[0].choices[0].text != again[1].choices[0].text  # without a seed, each has its own


def test_several_texts_of_several_prompts(client, alone):
    made = complete(client, prompt=[PROMPT, "A dog"], n=2, temperature=1, seed=7)
    texts = [
        alone(prompt, do_sample=True, temperature=1.0, seed=seed).text
        for prompt in (PROMPT, "A dog")
        for seed in (7, 8)
    ]
    assert [choice.text for choice in made.choices] == texts
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    assert made.usage.prompt_tokens == len(PROMPT) + len("A dog")


def test_a_stream_is_the_same_text(client, alone):
    events = list(complete(client, "tiny-mixtral:food", stream=True, stream_options={"include_usage": True}))
    expected = alone(domain="food")
    assert "".join(event.choices[0].text for event in events[:-1]) == expected.text
    assert events[-2].choices[0].finish_reason == "length"
    assert events[-1].choices == []
    assert events[-1].usage.completion_tokens == expected.new_tokens
    assert len(events) > 4


def test_streams_of_several_texts(client):
    asked = {"n": 3, "temperature": 1, "seed": 1}
    texts = ["", "", ""]
    for event in complete(client, stream=True, **asked):
        texts[event.choices[0].index] += event.choices[0].text
    assert texts == [choice.text for choice in complete(client, **asked).choices]


def test_stop_texts(client, alone):
    whole = alone(max_new_tokens=30).text
    stop = whole[9:12]
    expected = whole[: whole.index(stop)]
    made = complete(client, max_tokens=30, stop=[stop, "never in it"])
    assert (made.choices[0].text, made.choices[0].finish_reason) == (expected, "stop")
    assert made.usage.completion_tokens < 30
    streamed = list(complete(client, max_tokens=30, stop=stop, stream=True))
    assert "".join(event.choices[0].text for event in streamed) == expected
    assert streamed[-1].choices[0].finish_reason == "stop"


def test_logprobs_of_completions(client):
    asked = {"logprobs": 3, "max_tokens": 5}
    scores = complete(client, **asked).choices[0].logprobs
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == 5
    assert all(
        logprob == max(top.values()) for logprob, top in zip(scores.token_logprobs, scores.top_logprobs, strict=True)
    )
    assert scores.text_offset == [0, *np.cumsum(list(map(len, scores.tokens)))[:-1]]
    streamed = [event.choices[0].logprobs for event in complete(client, stream=True, **asked)]
    assert [logprob for one in streamed if one for logprob in one.token_logprobs] == scores.token_logprobs
    assert [place for one in streamed if one for place in one.text_offset] == scores.text_offset


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def test_a_chat(client, alone):
    from steermoe.engines.messages import Message

    messages = [Message(one["role"], one["content"]) for one in CHAT]
    expected = alone(domain="space", chat=messages, max_new_tokens=10)
    asked = {"model": "tiny-mixtral:space", "messages": CHAT, "max_completion_tokens": 10, "temperature": 0}
    made = client.chat.completions.create(**asked)
    assert (made.choices[0].message.content, made.choices[0].message.role) == (expected.text, "assistant")
    events = list(client.chat.completions.create(stream=True, **asked))
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events) == expected.text
    assert events[-1].choices[0].finish_reason == "length"


def test_logprobs_of_chats(client):
    asked = {"messages": CHAT, "max_tokens": 4, "logprobs": True, "top_logprobs": 2, "temperature": 0}
    content = client.chat.completions.create(model="tiny-mixtral", **asked).choices[0].logprobs.content
    assert len(content) == 4
    assert all(one.logprob == one.top_logprobs[0].logprob and len(one.top_logprobs) == 2 for one in content)
    events = client.chat.completions.create(model="tiny-mixtral", stream=True, **asked)
    streamed = [one for event in events if event.choices[0].logprobs for one in event.choices[0].logprobs.content]
    assert [one.logprob for one in streamed] == [one.logprob for one in content]


def test_content_in_parts(client):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    texts = []
    for content in ("Hello", parts):
        messages = [{"role": "user", "content": content}]
        made = client.chat.completions.create(model="tiny-mixtral", messages=messages, max_tokens=8, temperature=0)
        texts.append(made.choices[0].message.content)
    assert texts[0] == texts[1]


def test_penalties_change_the_text(client):
    plain = complete(client, max_tokens=40).choices[0].text
    penalised = complete(client, max_tokens=40, frequency_penalty=2, presence_penalty=2).choices[0].text
    assert len(set(penalised)) > len(set(plain))


def test_embeddings_are_routing_embeddings(client, reference):
    from steermoe.discovery.embed_corpus import embedder

    texts = ["A goal!", "The pan is hot."]
    with embedder(reference.loaded) as embed:
        expected = embed.texts(texts).frequency.flatten(1).numpy()
    made = client.embeddings.create(model="tiny-mixtral", input=texts)  # the client asks for base64
    np.testing.assert_array_equal(np.array([one.embedding for one in made.data], dtype=np.float32), expected)
    assert made.usage.prompt_tokens == sum(map(len, texts))


def test_traces_and_routed_experts(client):
    made = complete(client, "tiny-mixtral:sport", extra_body={"trace": True, "return_routed_experts": True})
    choice = made.choices[0]
    chosen = np.array(choice.trace["chosen"], dtype=np.int32)
    assert chosen.shape == (12, 3, 2)  # tokens, layers, top-k; the model does not read the last token
    assert (chosen[:-1] >= 0).all()
    np.testing.assert_array_equal(
        np.frombuffer(base64.b64decode(choice.routed_experts), "<i4").reshape(12, 3, 2), chosen
    )
    assert (chosen != np.array(choice.trace["unsteered"])).any()
    assert choice.trace["strength"][:-1] == [8.0] * 11
    (*_, last) = complete(client, "tiny-mixtral:sport", stream=True, extra_body={"return_routed_experts": True})
    assert last.choices[0].routed_experts == choice.routed_experts
    assert not hasattr(last.choices[0], "trace")


BAD = [
    ({"temperature": -1}, "temperature", "field 'temperature' is -1, expected a number from 0 to 100"),
    ({"temperature": "hot"}, "temperature", "expected a number"),
    ({"top_p": 0}, "top_p", "expected a number above 0 to 1"),
    ({"min_p": 1.5}, "min_p", "field 'min_p' is 1.5, expected a number from 0 to 1"),
    ({"max_tokens": 0}, "max_tokens", "expected a whole number from 1 to 255"),
    ({"max_tokens": True}, "max_tokens", "field 'max_tokens' is True"),
    ({"max_tokens": 250}, "prompt", "a text has at most 256 here"),
    ({"n": 0}, "n", "expected a whole number from 1 to 128"),
    ({"n": 10**30}, "n", "expected a whole number"),
    ({"seed": 1.5}, "seed", "expected a whole number"),
    ({"stop": [""]}, "stop", "expected texts of 1 to 1000 characters"),
    ({"stop": ["a"] * 17}, "stop", "a list of 1 to 16 texts"),
    ({"presence_penalty": 3}, "presence_penalty", "expected a number from -2 to 2"),
    ({"prompt": "x" * 300}, "prompt", "shorten the prompt or ask for fewer new tokens"),
    ({"steering": {"domain": "sport", "positions": "answer"}}, "steering", ": name them in the field think_tags"),
    ({"prompt": ""}, "prompt", "the prompt is empty"),
    ({"prompt": [1, 2]}, "prompt", "expected a text, or a list"),
    ({"prompt": "\ud800"}, "prompt", "half a surrogate pair"),
    ({"logprobs": 21}, "logprobs", "from 0 to 20"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "field 'logit_bias' is not supported here"),
    ({"echo": True}, "echo", "not supported"),
    ({"best_of": 2}, "best_of", "not supported"),
    ({"stream": 1}, "stream", "expected true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "only together with stream true"),
    ({"unheard_of": 1}, "unheard_of", "field 'unheard_of' is unknown: the fields are "),
    ({"model": 7}, "model", "expected a name"),
    ({"model": "gpt"}, "model", "model 'gpt' is not served here: the models are tiny-mixtral, "),
    ({"model": "tiny-mixtral:"}, "steering", "names no domain after its colon"),
    ({"model": "tiny-mixtral:cooking"}, "steering", "no vector 'cooking'; there are biology, food"),
    ({"steering": {"domain": "sport", "power": 3}}, "steering", "steering has no field power"),
    ({"steering": "../sport.safetensors"}, "steering", "steering: "),
    ({"steering": "hub:you/pack/sport"}, "steering", "is a place on the Hub: requests name domains"),
    ({"model": "tiny-mixtral:hub:you/pack/sport"}, "steering", "is a place on the Hub: requests name domains"),
    ({"steering": {"domain": "sport", "strength": 1e40}}, "steering", "out of range"),
    ({"steering": {"domain": "sport", "positions": "tool-calls"}}, "steering", "positions tool-calls"),
    ({"steering": {"domain": "sport"}, "max_tokens": 1}, "steering", "it would reach none of 1 new tokens"),
    ({"steering": "sport", "model": "tiny-mixtral:law"}, "steering", "leave one of them out"),
    ({"steering": 5}, "steering", "5 is not a JSON object"),
    ({"vllm_xargs": {"steerng": "sport"}}, "vllm_xargs.steerng", "is unknown: the fields are steering"),
    ({"vllm_xargs": "sport"}, "vllm_xargs", "field 'vllm_xargs' is 'sport', expected an object"),
]


@pytest.mark.parametrize(("wrong", "param", "message"), BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_whatever_is_wrong_is_named(server, wrong, param, message, stream):
    body = {"model": "tiny-mixtral", "prompt": PROMPT, "max_tokens": 4, "stream": stream, **wrong}
    if "stream_options" in wrong:
        body["stream"] = False
    answer = httpx.post(f"{server.url}/v1/completions", content=json.dumps(body))
    assert answer.status_code == (404 if body["model"] == "gpt" else 400)
    error = answer.json()["error"]
    assert (error["param"], error["type"]) == (
        param,
        "not_found_error" if body["model"] == "gpt" else "invalid_request_error",
    )
    assert message in error["message"]
    assert len(error["message"].splitlines()) == 1


BAD_CHATS = [
    ({"messages": []}, "messages", "expected a list of at least one object"),
    ({"messages": [{"role": "cook", "content": "x"}]}, "messages[0].role", "role 'cook' is unknown"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "expected a text"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0].type",
        "nothing else",
    ),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "the last message is of role 'assistant'"),
    ({"messages": [{"role": "user", "content": "x" * 300}]}, "messages", "a text has at most 256 here"),
    ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"top_logprobs": 2}, "top_logprobs", "together with logprobs true"),
    (
        {"chat_template_kwargs": {"enable_thinking": True}},
        "messages",
        "has no switch for thinking: leave thinking out of the request",
    ),
    ({"vllm_xargs": {"steerng": "sport"}}, "vllm_xargs.steerng", "is unknown"),
]


@pytest.mark.parametrize(("wrong", "param", "message"), BAD_CHATS)
def test_whatever_is_wrong_in_a_chat_is_named(server, wrong, param, message):
    body = {"model": "tiny-mixtral", "messages": CHAT, "max_tokens": 4, **wrong}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b'{"n": NaN}', b"[" * 100_000])
def test_bodies_that_are_no_object(server, body):
    answer = httpx.post(f"{server.url}/v1/completions", content=body)
    assert answer.status_code == 400
    assert "the body is" in answer.json()["error"]["message"]


def test_base64_is_float32(server):
    body = {"model": "tiny-mixtral", "input": "A goal!"}
    plain, packed = (
        httpx.post(f"{server.url}/v1/embeddings", json={**body, "encoding_format": form}).json()["data"][0]["embedding"]
        for form in ("float", "base64")
    )
    assert np.frombuffer(base64.b64decode(packed), np.float32).tolist() == plain
