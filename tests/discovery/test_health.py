"""Routing health: load, probability mass and balance loss of each router."""

import json
import math
from dataclasses import replace

import pytest
import torch

from steermoe import figures
from steermoe.discovery import health as health_module
from steermoe.discovery.health import draw_health, layer_health, routing_health
from steermoe.errors import CorpusError, ModelError
from steermoe.routing.recording import record_routing
from tests.support import steering_models, tiny_models

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
    assert (balanced.max_to_mean, collapsed.max_to_mean) == (1, 4)


def test_loss_weighs_probability_by_load():
    load, probability = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.2, 0.3, 0.5])
    assert layer_health(0, load, probability, top_k=1).balance_loss == pytest.approx(3 * (0.1 + 0.15))


def test_a_single_expert_is_even():
    only = layer_health(0, torch.ones(1), torch.ones(1), top_k=1)
    assert (only.evenness, only.entropy, only.balance_loss, only.always) == (1, 0, 1, (0,))


def test_always_used_means_every_token_not_the_whole_load():
    load = torch.tensor([0.5, 0.3, 0.2])  # with two choices per token, one was always expert 0
    assert layer_health(0, load, load, top_k=2).always == (0,)
    assert layer_health(0, load, load, top_k=1).always == ()


@pytest.mark.parametrize(
    "family",
    ["mixtral", "deepseek_v3", "gpt_oss", "olmoe", "qwen3_moe", "llama4", "granitemoeshared", "inkling"],
)
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


def test_texts_are_read_once_and_in_parts(tiny_model, monkeypatch):
    whole = routing_health(tiny_model, TEXTS)
    monkeypatch.setattr(health_module, "SHARD_TEXTS", 2)
    seen = []
    parts = routing_health(tiny_model, iter([*TEXTS, ""]), progress=lambda texts, tokens: seen.append((texts, tokens)))
    assert (parts.texts, parts.tokens) == (whole.texts, whole.tokens) == (3, sum(map(len, TEXTS)))
    assert [sum(column) for column in zip(*seen, strict=True)] == [3, whole.tokens]
    for one, other in zip(parts.layers, whole.layers, strict=True):
        assert one.load == pytest.approx(other.load, abs=1e-6)
        assert one.probability == pytest.approx(other.probability, abs=1e-6)


def test_max_tokens(tiny_model):
    assert routing_health(tiny_model, TEXTS, max_tokens=4).tokens == 4 + 4 + 1


def test_as_dict_is_json(tiny_model):
    health = routing_health(tiny_model, TEXTS)
    record = json.loads(json.dumps(health.as_dict(), allow_nan=False))
    assert (record["model"], record["texts"], record["tokens"]) == (health.model, 3, health.tokens)
    assert record["balance_loss"] == health.balance_loss
    for layer, written in zip(health.layers, record["layers"], strict=True):
        assert written["busiest"] == layer.busiest
        assert written["max_to_mean"] == max(layer.load) * 8
        assert written["load"] == list(layer.load)


def test_probabilities_that_are_not_finite():
    loaded = steering_models.loaded(steering_models.build("mixtral"), steering_models.byte_tokenizer())
    with torch.no_grad():
        loaded.model.model.layers[1].mlp.gate.weight[3] = float("nan")
    with pytest.raises(ModelError, match=r"layer 1 gives probabilities that are not finite: .*float32"):
        routing_health(loaded, TEXTS)


def test_no_tokens_is_an_error(tiny_model):
    with pytest.raises(CorpusError, match="no text has any tokens"):
        routing_health(tiny_model, [""])


def test_picture_shows_loads_losses_and_evenness(tiny_model, tmp_path, drawn):
    health = routing_health(tiny_model, TEXTS)
    draw_health(health, tmp_path / "load.png")
    heat, loss, even, _ = drawn[0].axes
    shown = torch.tensor(heat.images[0].get_array())
    assert torch.allclose(shown, 8 * torch.tensor([layer.load for layer in health.layers]).double())
    assert [bar.get_width() for bar in loss.patches] == [layer.balance_loss for layer in health.layers]
    assert [bar.get_width() for bar in even.patches] == [layer.evenness for layer in health.layers]
    assert float(heat.images[0].norm(1.0)) == 0.5  # balance has the colour in the middle
    assert f"{health.tokens:,} tokens of 3 texts" in drawn[0].get_suptitle()


def test_picture_separates_never_used_from_rarely_used(tmp_path, tiny_model, drawn):
    layer = layer_health(0, torch.tensor([0.0, 1e-6, 0.3, 0.7]), torch.full((4,), 0.25), top_k=1)
    fewer = layer_health(1, torch.tensor([0.5, 0.5]), torch.full((2,), 0.5), top_k=1)
    health = replace(routing_health(tiny_model, TEXTS), layers=(layer, fewer))
    draw_health(health, tmp_path / "load.png")
    image = drawn[0].axes[0].images[0]
    colours = image.cmap(image.norm(image.get_array()))
    assert colours[0, 0].tolist() == [0, 0, 0, 1]
    assert colours[0, 1].tolist() != colours[0, 0].tolist()
    assert colours[1, 3].tolist() == pytest.approx([0.827, 0.827, 0.827, 1], abs=1e-2)  # no such expert


@pytest.mark.parametrize(("layers", "experts"), [(1, 2), (30, 18), (60, 256)])
def test_picture_stays_readable(tiny_model, tmp_path, drawn, layers, experts):
    load = torch.linspace(0, 2, experts, dtype=torch.float64)
    wide = layer_health(0, load / load.sum(), torch.full((experts,), 1 / experts), top_k=1)
    health = routing_health(tiny_model, TEXTS)
    health = replace(health, layers=tuple(replace(wide, layer=n) for n in range(layers)))
    draw_health(health, tmp_path / "wide.png")
    figure = drawn[0]
    heat, loss = figure.axes[:2]
    assert (tmp_path / "wide.png").read_bytes().startswith(b"\x89PNG")
    assert len(heat.get_yticks()) <= figures.MAX_TICKS
    box = heat.get_window_extent()
    assert min(box.width / experts, box.height / layers) * figures.DOTS_PER_INCH / figure.dpi >= 3  # pixels
    assert (box.y0, box.y1) == pytest.approx((loss.get_window_extent().y0, loss.get_window_extent().y1))
