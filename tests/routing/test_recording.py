"""Counts of chosen experts, checked against the tests' own hooks."""

import pytest
import torch

from steermoe.errors import SteeringError, UnsupportedModel
from steermoe.routing.recording import record_routing
from steermoe.steering.handle import attach, steer
from tests.support import steering_models as tiny

ALL = [*tiny.CAUSAL, "switch"]


@pytest.fixture(scope="module")
def models():
    return {family: tiny.build(family) for family in ALL}


@pytest.fixture
def model(models):
    yield models["mixtral"]
    assert tiny.traces(models["mixtral"]) == []


def count(chosen: torch.Tensor) -> torch.Tensor:
    return chosen.flatten().bincount(minlength=tiny.EXPERTS)


@pytest.mark.parametrize("family", ALL)
def test_counts_equal_hooks(models, family):
    model = models[family]
    with tiny.watched(model) as chosen, record_routing(model) as record:
        tiny.continued(model, tiny.prompt(6), 4)
    assert record.counts.shape == (1, len(chosen), tiny.EXPERTS)
    for layer, calls in enumerate(chosen):
        assert torch.equal(record.counts[0, layer], count(torch.cat(calls)))
    assert record.tokens.tolist() == [6 + 3 + (family == "switch")]  # and the decoder's start
    torch.testing.assert_close(record.frequency().sum(-1), torch.ones(1, len(chosen)))
    assert record.frequency().dtype == torch.float32


@pytest.mark.parametrize("family", tiny.CAUSAL)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_one_by_one(models, family, side):
    model, texts = models[family], [tiny.prompt(n, seed=n) for n in (3, 7, 5)]
    batch = tiny.left_padded(texts)
    if side == "right":
        shifts = [7 - text.shape[1] for text in texts]
        batch = {
            name: torch.stack([row.roll(-s) for row, s in zip(t, shifts, strict=True)]) for name, t in batch.items()
        }
    with torch.no_grad(), record_routing(model) as record:
        model(**batch)
    assert record.tokens.tolist() == [3, 7, 5]
    for row, text in enumerate(texts):
        with torch.no_grad(), record_routing(model) as alone:
            model(input_ids=text)
        assert torch.equal(record.counts[row], alone.counts[0])
        assert torch.equal(record.frequency()[row], alone.frequency()[0])
        assert torch.equal(record.frequency_of(row), alone.frequency()[0])


def test_padded_encoder():
    model, texts = tiny.build("switch"), [tiny.prompt(3), tiny.prompt(6)]
    mask = torch.tensor([[1] * 3 + [0] * 3, [1] * 6])
    ids = torch.cat([torch.nn.functional.pad(text, (0, 6 - text.shape[1])) for text in texts])
    with record_routing(model, "prompt") as record:
        model.generate(ids, attention_mask=mask, max_new_tokens=3)
    assert record.tokens.tolist() == [3 + 1, 6 + 1]
    with record_routing(model, "prompt") as alone:
        model.generate(texts[0], max_new_tokens=3)
    assert torch.equal(record.counts[0], alone.counts[0])


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_positions_of_a_generation_add_up(model, options):
    """Each token counts once, even without a cache, when all are recomputed."""
    batch = tiny.left_padded([tiny.prompt(5), tiny.prompt(3)])
    counts = {}
    for positions, tokens in (("prompt", [5, 3]), ("generated", [3, 3]), ("all", [8, 6])):
        with record_routing(model, positions) as record:
            tiny.continued(model, batch["input_ids"], 4, attention_mask=batch["attention_mask"], **options)
        assert record.tokens.tolist() == tokens
        assert record.counts.sum(-1).tolist() == [[n * tiny.TOP_K] * tiny.LAYERS for n in tokens]
        counts[positions] = record.counts
    assert torch.equal(counts["prompt"] + counts["generated"], counts["all"])
    with record_routing(model, "all") as usual:
        tiny.continued(model, batch["input_ids"], 4, attention_mask=batch["attention_mask"])
    assert torch.equal(counts["all"], usual.counts)


def test_records_what_steering_does(model):
    """The recorder sees the steered choices, whichever of the two came first."""
    vector = tiny.vector_for(model, 1, 5)
    with record_routing(model, "generated") as record, steer(model, vector, 9.0):
        tiny.continued(model, tiny.prompt(5), 5)
    expected = torch.zeros(tiny.EXPERTS)
    expected[[1, 5]] = 0.5
    assert record.frequency()[0].tolist() == [expected.tolist()] * tiny.LAYERS
    with steer(model, vector, 9.0), record_routing(model, "generated") as inside:
        tiny.continued(model, tiny.prompt(5), 5)
    assert torch.equal(inside.counts, record.counts)


def test_calls_add_up_until_reset(model):
    with record_routing(model) as record, torch.no_grad():
        model(input_ids=tiny.prompt(5))
        once = record.counts.clone()
        model(input_ids=tiny.prompt(5))
        assert torch.equal(record.counts, 2 * once)
        with pytest.raises(SteeringError, match=r"1 texts .* 2 rows: call reset\(\)"):
            model(input_ids=tiny.prompt(5, rows=2))
        record.reset()
        assert record.counts is None
        model(input_ids=tiny.prompt(5, rows=2))
        assert record.tokens.tolist() == [5, 5]


def test_nothing_recorded(model):
    with record_routing(model, "generated") as record:
        with pytest.raises(SteeringError, match="run the model inside the block"):
            record.frequency()
        with torch.no_grad():
            model(input_ids=tiny.prompt(5, rows=2))
        with pytest.raises(SteeringError, match=r"text 0: .*'generated'"):
            record.frequency()
    assert record.frequency_of(1) is None


def test_wrong_positions_and_models(model):
    with (
        pytest.raises(SteeringError, match="'answer' is unknown: use generated, prompt, all"),
        record_routing(model, "answer"),
    ):
        pass
    with pytest.raises(UnsupportedModel), record_routing(torch.nn.Linear(2, 2)):
        pass


def test_an_exception_leaves_nothing(model):
    with pytest.raises(KeyError, match="mine"), record_routing(model):
        raise KeyError("mine")
    handle = attach(model, tiny.plan_for_experts(model, 1))
    with pytest.raises(KeyError, match="mine"), record_routing(model):
        raise KeyError("mine")
    handle.remove()
