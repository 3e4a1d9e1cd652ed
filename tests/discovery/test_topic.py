"""Vectors of topics: their names, their numbers, and the files beside them."""

import json

import pytest
import torch

from steermoe.discovery import topic as topics
from steermoe.discovery.topic import (
    CREATED_BY,
    SMOOTHING,
    baseline_of,
    build_topics,
    count_texts,
    domain_of,
    drop_work,
    kept_name,
    write_texts,
)
from steermoe.discovery.writing import Ask, Writing, Written, work_folder, write
from steermoe.errors import VectorError
from steermoe.vectors.file import check_domain_name, read_vector, write_vector

SHORT = Writing(texts=6, new_tokens=24)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("STEERMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("topic", "name"),
    [
        ("pirates at sea", "pirates-at-sea"),
        ("  Pirates,  at Sea! ", "pirates-at-sea"),
        ("Пираты в море", "пираты-в-море"),
        ("海賊", "海賊"),
        ("C++", "c"),
        ("the 1920s", "the-1920s"),
        ("_x_ and -y-", "x-and-y"),
        ("../../etc", "etc"),
        ("ships " * 30, "ships-" * 9 + "ships"),
        ("x" * 150, "x" * 60),
    ],
)
def test_names(topic, name):
    assert domain_of(topic) == name
    assert check_domain_name(name) == name


def test_kept_names_differ():
    assert kept_name("Pirates at sea") == kept_name("pirates  at sea") == "pirates-at-sea"
    assert len({kept_name(topic) for topic in ("C", "C++", "C#")}) == 3
    assert kept_name("sport") != "sport"
    assert kept_name("sport").startswith("sport-")
    assert check_domain_name(kept_name("〇")).startswith("topic-")


def test_a_topic_without_letters_needs_a_name():
    with pytest.raises(VectorError, match="has no letters"):
        domain_of("!?")
    with pytest.raises(VectorError, match="give one with --name"):
        domain_of("〇")


def test_vectors_are_contrasts(tiny_model, monkeypatch):
    remarks = []
    made = build_topics(
        tiny_model, {"pirates": "pirates at sea", "море": "пираты в море"}, SHORT, on_remark=remarks.append
    )
    assert [one.vector.domain for one in made] == ["pirates", "море"]
    assert "the ocean" not in made[0].texts[0].ask.words
    assert "pirates at sea" in made[0].texts[0].ask.words
    assert made[1].texts[0].ask.words.startswith("Рассказ")
    for one in made:
        vector, own = one.vector, [text for text in one.texts if not text.fault]
        mean = torch.stack([text.frequency for text in own]).mean(0)
        assert torch.equal(vector.frequency, mean)
        assert vector.relative
        assert vector.experts.any()
        assert vector.info.created_by == CREATED_BY
        assert (vector.info.texts, vector.info.model) == (len(own), "tiny-mixtral")
        assert vector.info.tokens == sum(text.tokens for text in own)
        assert one.topic in vector.info.title
        assert vector.info.strength is None
    again = build_topics(tiny_model, {"pirates": "pirates at sea"}, SHORT)[0].vector
    assert torch.equal(again.experts, made[0].vector.experts)
    assert again.info == made[0].vector.info


def test_the_baseline_is_smoothed():
    rows = torch.tensor([[[1.0, 0, 0, 0]], [[0.5, 0.5, 0, 0]]])
    others = [Written(Ask("chat", "", 0), "text", 9, "", row) for row in rows]
    assert torch.allclose(baseline_of(others), torch.tensor([[0.75, 0.25, 0, 0]]) * (1 - SMOOTHING) + SMOOTHING / 4)


def test_texts_about_other_things_are_shared(tiny_model, monkeypatch):
    asked = []
    monkeypatch.setattr(topics, "write", lambda source, asks, *rest: asked.append(asks) or write(source, asks, *rest))
    build_topics(tiny_model, {"a": "pirates", "b": "robots"}, SHORT)
    assert len(asked) == 3
    assert count_texts(["pirates", "robots"], SHORT) == 3 * SHORT.texts
    assert count_texts(["pirates", "роботы"], SHORT) == 4 * SHORT.texts


def test_files_and_work(tiny_model, tmp_path):
    made = build_topics(tiny_model, {"pirates": "pirates at sea"}, SHORT)
    path = tmp_path / "out" / "pirates.safetensors"
    beside = write_texts(made[0], path)
    write_vector(made[0].vector, path)
    assert read_vector(path).info == made[0].vector.info
    assert beside.name == "pirates.texts.jsonl"
    records = [json.loads(line) for line in beside.read_text(encoding="utf-8").splitlines()]
    assert [record["seed"] for record in records] == list(range(SHORT.texts))
    assert [record["text"] for record in records] == [one.text for one in made[0].texts]
    assert all("pirates at sea" in record["request"] for record in records)
    work = work_folder(tiny_model, [one.ask for one in made[0].texts], SHORT)
    assert work.is_dir()
    drop_work(tiny_model, made, SHORT)
    assert not work.exists()
    assert len(list(work.parent.iterdir())) == 1  # the texts about other things

    (tmp_path / "file").write_text("")
    with pytest.raises(VectorError, match="name another folder"):
        write_texts(made[0], tmp_path / "file" / "pirates.safetensors")
