"""vLLM's answers in Ollama's form, whatever pieces they come in; tests/engines/vllm/test_server.py has the server."""

import asyncio
import json

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'steermoe[serve]'")

from steermoe.engines.messages import Chat, conversation
from steermoe.engines.request import Sampling
from steermoe.serving.ollama import Form, Wanted
from steermoe.serving.steering import Asked
from steermoe.serving.vllm import Answer

CHAT = Chat(conversation("Hi"), "Hi", (1,), ("<think>", "</think>"), is_thinking=False, special=("<|end|>",))
USAGE = {"prompt_tokens": 3, "completion_tokens": 7}


def answer_of(parts, *, streams, prompt=CHAT, status=200, is_chat=True):
    """(status, body) that the client gets for what vLLM sends."""
    sent = []

    async def send(message):
        sent.append(message)

    async def run():
        wanted = Wanted(Asked(None, True), prompt, Sampling(), (), streams, Form(is_chat, "tiny:latest"))
        answer = Answer(wanted, {"type": "http"}, None, send)
        await answer({"type": "http.response.start", "status": status, "headers": []})
        for part in parts:
            await answer({"type": "http.response.body", "body": part, "more_body": True})
        await answer({"type": "http.response.body", "body": b"", "more_body": False})

    asyncio.run(run())
    assert [message["type"] for message in sent].count("http.response.start") == 1
    assert [bool(message.get("more_body")) for message in sent][-1] is False
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


def event(content):
    return b"data: " + (content if isinstance(content, bytes) else json.dumps(content).encode()) + b"\n\n"


def piece(text, reason=None):
    return event({"choices": [{"index": 0, "text": text, "finish_reason": reason}]})


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_stream_cut_anywhere(size):
    texts = [piece("<thi"), piece("nk>why"), piece("</think>"), piece("Hello, "), piece("you.<|end|>", "stop")]
    whole = b"".join([*texts, event({"choices": [], "usage": USAGE}), event(b"[DONE]")])
    _, body = answer_of([whole[i : i + size] for i in range(0, len(whole), size)], streams=True)
    *parts, last = [json.loads(line) for line in body.splitlines()]
    assert "".join(part["message"].get("thinking", "") for part in parts) == "why"
    assert "".join(part["message"]["content"] for part in parts) == "Hello, you."
    assert {part["model"] for part in parts} == {"tiny:latest"}
    assert [part["done"] for part in parts] == [False] * len(parts)
    assert (last["done"], last["done_reason"], last["prompt_eval_count"], last["eval_count"]) == (True, "stop", 3, 7)


def test_a_whole_answer():
    content = {"choices": [{"index": 0, "text": "<think>why</think>Hello.", "finish_reason": "length"}], "usage": USAGE}
    data = json.dumps(content).encode()
    status, body = answer_of([data[:20], data[20:]], streams=False)
    made = json.loads(body)
    assert (status, made["message"]) == (200, {"role": "assistant", "content": "Hello.", "thinking": "why"})
    assert (made["done_reason"], made["eval_count"]) == ("length", 7)
    _, body = answer_of([data], streams=False, prompt="Hi", is_chat=False)
    assert json.loads(body)["response"] == "<think>why</think>Hello."


def test_an_error_in_a_stream_is_its_last_line():
    _, body = answer_of([piece("Hel"), event({"error": {"message": "out of\nmemory"}}), event(b"[DONE]")], streams=True)
    assert json.loads(body.splitlines()[-1]) == {"error": "out of memory"}
    assert b'"done":true' not in body


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("sent", "told"),
    [(b'{"error":{"message":"too\\nlong"}}', "too long"), (b'{"error":"no"}', "no"), (b"", "vLLM's server failed")],
)
def test_an_error_instead_of_an_answer_keeps_its_status(sent, told, streams):
    status, body = answer_of([sent], streams=streams, status=503)
    assert (status, json.loads(body)) == (503, {"error": told})
