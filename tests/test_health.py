"""Routing health: load, probability mass and balance loss of each router."""

import math

import pytest
import torch

from steermoe.discovery.health import layer_health, routing_health
from steermoe.errors import CorpusError
from steermoe.plots import draw_health
from steermoe.recording import record_routing
from tests import steering_models, tiny_models

TEXTS = ["A goal!", "The team ran and ran until it rained.", "x"]


def test_balance_is_one_and_collapse_is_n():
    even = torch.full((4,), 0.25)
    balanced = layer_health(0, even, even, top_k=1)
    assert balanced.balance_loss == pytest.approx(1)
    assert balanced.evenness == pytest.approx(1)
    assert balanced.entropy == pytest.approx(math.log(4))
    one = torch.tensor([0.0, 1.0, 0.0, 0.0])
    collapsed = layer_health(3, one, one, top_k=1)
    assert collapsed.balance_loss == pytest.approx(4)
    assert collapsed.evenness == pytest.approx(0, abs=1e-9)
    assert collapsed.never == (0, 2, 3)
    assert collapsed.always == (1,)
    assert collapsed.busiest == 1


def test_always_used_means_every_token_not_the_whole_load():
    load = torch.tensor([0.5, 0.3, 0.2])  # of two choices a token, the first fell on expert 0 each time
    assert layer_health(0, load, load, top_k=2).always == (0,)
    assert layer_health(0, load, load, top_k=1).always == ()


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "olmoe", "qwen3_moe"])
def test_every_token_counts_the_same(family):
    model = tiny_models.build(family, vocab_size=300)
    loaded = steering_models.loaded(model, steering_models.byte_tokenizer())
    health = routing_health(loaded, TEXTS)
    counts, sums = 0, 0
    for text in TEXTS:
        ids = torch.tensor([loaded.tokenizer(text)["input_ids"]])
        with torch.no_grad(), record_routing(model, probabilities=True) as record:
            model(input_ids=ids)
        counts, sums = counts + record.counts[0].double(), sums + record.probability_sums[0]
    load, probability = counts / counts.sum(-1, keepdim=True), sums / sums.sum(-1, keepdim=True)
    for number, layer in enumerate(health.layers):
        assert torch.allclose(torch.tensor(layer.load).double(), load[number], atol=1e-5)
        assert torch.allclose(torch.tensor(layer.probability).double(), probability[number], atol=1e-5)
        expected = load.shape[1] * (load[number] * probability[number]).sum()
        assert layer.balance_loss == pytest.approx(float(expected), abs=1e-4)
    assert health.tokens == sum(map(len, TEXTS))


def test_no_tokens_is_an_error(tiny_model):
    with pytest.raises(CorpusError, match="no text has any tokens"):
        routing_health(tiny_model, [""])


def test_inspect_tells_and_draws(run, tiny_checkpoint, tmp_path):
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    (tmp_path / "texts" / "empty.txt").write_text("")
    picture = tmp_path / "load.png"
    result = run("models", "inspect", tiny_checkpoint, "--texts", tmp_path / "texts", "--png", picture)
    assert result.code == 0
    assert "balance loss" in result.out
    assert "left out: empty.txt: is empty" in result.err
    assert picture.read_bytes().startswith(b"\x89PNG")
    as_json = run("models", "inspect", tiny_checkpoint, "--texts", tmp_path / "texts", "--json")
    assert '"tokens": 45' in as_json.out


def test_png_without_texts_is_an_error(run, tiny_checkpoint, tmp_path):
    result = run("models", "inspect", tiny_checkpoint, "--png", tmp_path / "load.png")
    assert result.code == 1
    assert "pass --texts CORPUS too" in result.err


def test_picture_of_many_experts(tiny_model, tmp_path):
    from dataclasses import replace

    health = routing_health(tiny_model, TEXTS)
    wide = replace(health.layers[0], load=(1 / 256,) * 256)
    draw_health(replace(health, layers=tuple(replace(wide, layer=n) for n in range(60))), tmp_path / "wide.png")
    assert (tmp_path / "wide.png").stat().st_size > 10_000
