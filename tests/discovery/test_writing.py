"""What a model is asked, what it writes, what is left out, and what an interruption costs."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from steermoe.discovery import writing
from steermoe.discovery.writing import (
    Ask,
    Writing,
    Written,
    asks_about,
    check_topic,
    engine_of,
    fault_of,
    kinds_of,
    other_subjects,
    style_of,
    usable,
    work_folder,
    write,
)
from steermoe.engines.hf.engine import HFEngine
from steermoe.errors import GenerationError, VectorError
from steermoe.models.default.spec import DOMAINS
from steermoe.routing.recording import record_routing

SHORT = Writing(texts=3, new_tokens=12)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("STEERMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("language", ["en", "ru"])
def test_requests_are_of_many_kinds(language):
    kinds, subjects = kinds_of(language), other_subjects(language)
    assert len(kinds) >= 12
    assert len(subjects) == len(set(subjects)) == 32
    for style in ("ask", "open"):
        assert len({kind[style] for kind in kinds}) == len(kinds)
        assert all(kind[style].count("{topic}") == 1 for kind in kinds)
        assert all(("а" in kind[style]) == (language == "ru") for kind in kinds)
    assert not {word for subject in subjects for word in subject.split()} & set(DOMAINS)


def test_asks_go_through_kinds_and_subjects():
    about = asks_about("{x} and \\1", Writing(texts=14, seed=5), "chat", "en")
    assert [ask.seed for ask in about] == list(range(5, 19))
    assert about[0].words == about[12].words == kinds_of("en")[0]["ask"].replace("{topic}", "{x} and \\1")
    others = asks_about(None, Writing(texts=32), "openings", "en")
    assert all(subject in ask.words for subject, ask in zip(other_subjects("en"), others, strict=True))
    both = asks_about("cats", Writing(texts=4), "chat", "both")
    expected = [kinds_of(language)[place]["ask"] for place in (0, 1) for language in ("en", "ru")]
    assert [ask.words for ask in both] == [kind.replace("{topic}", "cats") for kind in expected]


def test_topics_are_checked():
    assert check_topic(" pirates \n at  sea ") == "pirates at sea"
    for topic, said in (
        ("", "is empty"),
        (" -- ", "has no letters"),
        ("x" * 201, "at most 200"),
        ("a\x1b[1m", "printed"),
    ):
        with pytest.raises(VectorError, match=said):
            check_topic(topic)


@pytest.mark.parametrize(
    ("text", "tokens", "fault"),
    [
        ("The ship sailed on.", range(10), ""),
        ("", [], "empty"),
        ("... !!! ...", range(10), "empty"),
        ("No.", range(3), "empty"),
        ("and and and and", [4] * 20, "loop"),
        ("I'm sorry, but I can't help with that.", range(12), "refusal"),
        ("Sorry, I am not able to write this.", range(12), "refusal"),
        ("I cannot write about that topic.", range(12), "refusal"),
        ("As an AI language model, I have no opinion.", range(12), "refusal"),
        ("К сожалению, я не могу помочь с этим.", range(12), "refusal"),
        ("I'm sorry that the letter is late, dear Anna.", range(12), ""),
        ("I can see the harbour from here.", range(12), ""),
    ],
)
def test_faults(text, tokens, fault):
    assert fault_of(text, list(tokens)) == fault


def test_what_is_of_use():
    ask, row = Ask("openings", "", 0), torch.full((2, 3), 1 / 3)
    good = Written(ask, "words", 9, "", row)
    bad = [replace(good, fault=fault) for fault in ("loop", "loop", "empty")]
    assert usable([good], "x", "m") == ([good], "")
    found, remark = usable([good, *bad], "'x'", "m")
    assert found == [good]
    assert remark == "3 of 4 texts about 'x' are left out (1 empty, 2 repeat themselves)"
    with pytest.raises(VectorError, match=r"m wrote nothing about 'x' that is of use \(1 empty, 2 repeat"):
        usable(bad, "'x'", "m")


def test_routing_is_that_of_the_written_tokens_alone(tiny_model):
    """Against one forward pass over request and text; the model does not read the last token."""
    asks = asks_about("pirates at sea", SHORT, "openings", "en")
    for ask, one in zip(asks, write(tiny_model, asks, SHORT), strict=True):
        prompt = tiny_model.tokenizer(ask.words)["input_ids"]
        request = writing._request(tiny_model, ask, SHORT)
        (completion,) = HFEngine(tiny_model, False).generate([request])
        assert completion.text.strip() == one.text
        new = list(completion.token_ids)
        with record_routing(tiny_model.model, "all") as record, torch.inference_mode():
            tiny_model.model(torch.tensor([prompt + new[:-1]]))
            whole = record.counts[0].clone()
            record.reset()
            tiny_model.model(torch.tensor([prompt]))
            own = whole - record.counts[0]
        assert torch.allclose(one.frequency, own / own.sum(-1, keepdim=True), atol=1e-6)


def test_texts_are_kept_and_resumed(tiny_model, monkeypatch, cache):
    monkeypatch.setattr(writing, "ROWS", 2)
    asks = asks_about("pirates at sea", replace(SHORT, texts=5), "openings", "en")
    whole = write(tiny_model, asks, SHORT)
    assert [one.ask for one in whole] == asks
    folder = work_folder(tiny_model, asks, SHORT)
    parts = sorted(folder.glob("*.safetensors"))
    assert [path.name[:4] for path in parts] == ["0000", "0002", "0004"]

    calls = []
    generate = HFEngine.generate

    def counted(self, requests, **options):
        calls.append(len(requests))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, requests, **options)

    monkeypatch.setattr(HFEngine, "generate", counted)
    parts[0].write_bytes(b"damaged")
    parts[2].unlink()
    with pytest.raises(KeyboardInterrupt):
        write(tiny_model, asks, SHORT)
    done = []
    again = write(tiny_model, asks, SHORT, lambda texts, tokens: done.append(texts))
    assert calls == [2, 1, 1]
    assert done == [2, 2, 1]
    for one, other in zip(whole, again, strict=True):
        assert (one.text, one.tokens, one.fault) == (other.text, other.tokens, other.fault)
        assert torch.equal(one.frequency, other.frequency)
    assert work_folder(tiny_model, asks, replace(SHORT, new_tokens=13)) != folder


def test_a_chat_template_is_used_where_there_is_one(tiny_model, monkeypatch):
    assert style_of(tiny_model) == "openings"
    template = "{% for m in messages %}<eos>{{ m.role }}:{{ m.content }}{{ '!' if add_generation_prompt }}{% endfor %}"
    monkeypatch.setattr(tiny_model.tokenizer, "chat_template", template)
    assert style_of(tiny_model) == "chat"
    engine = engine_of(tiny_model)
    request = writing._request(engine, Ask("chat", "Write <eos>!", 7), SHORT)
    assert request.prompt == "Write <eos>!"
    assert request.chat.text == "<eos>user:Write <eos>!!"
    assert request.sampling.seed == 7
    tokens = engine.encode(request)
    assert tokens[0] == tiny_model.tokenizer.eos_token_id
    assert tiny_model.tokenizer.eos_token_id not in tokens[1:], "a topic's text stays text"
    monkeypatch.setattr(tiny_model.tokenizer, "chat_template", "{{ raise_exception('no users') }}")
    with pytest.raises(GenerationError, match=r"can't render these messages: no users.*; or build the vector from"):
        writing._request(engine_of(tiny_model), Ask("chat", "Write!", 7), SHORT)


def test_other_engines_write_themselves():
    engine = SimpleNamespace()
    assert engine_of(engine) is engine
    assert style_of(SimpleNamespace(tokenizer=SimpleNamespace())) == "openings"
