"""Which tokens are prompt, generated, padding or filler, in every decoding method of transformers."""

import pytest
import torch

from steermoe.routing.routers import language_model
from steermoe.routing.tracker import Tracker, Window
from tests.support import steering_models as tiny


@pytest.fixture(scope="module")
def model():
    return tiny.build("mixtral")


def windows_of(model, **call) -> list[Window]:
    """Windows of a generation of 4 tokens; 3 of them are fed."""
    seen: list[Window] = []
    tracker = Tracker(model, seen.append)
    try:
        tiny.continued(model, tokens=4, **call)
    finally:
        tracker.close()
    assert tiny.traces(model) == []
    return seen


def spans(windows: list[Window]) -> list[tuple[int, int, int]]:
    """(first generated index, columns, tokens that count) of each."""
    return [(int(w.generated_index()[0]), w.columns, int(w.tokens)) for w in windows]


DECODED = [(0, 1, 1), (1, 1, 1), (2, 1, 1)]


def test_with_cache(model):
    assert spans(windows_of(model, ids=tiny.prompt(5))) == [(-5, 5, 5), *DECODED]


def test_without_cache_tokens_count_once(model):
    assert spans(windows_of(model, ids=tiny.prompt(5), use_cache=False)) == [
        (-5, 5, 5),
        (-5, 6, 1),
        (-5, 7, 1),
        (-5, 8, 1),
    ]


def test_static_cache(model):
    assert spans(windows_of(model, ids=tiny.prompt(5), cache_implementation="static")) == [(-5, 5, 5), *DECODED]


def test_chunked_prefill(model):
    assert spans(windows_of(model, ids=tiny.prompt(5), prefill_chunk_size=2)) == [
        (-5, 2, 2),
        (-3, 2, 2),
        (-1, 1, 1),
        *DECODED,
    ]


def test_assisted_decoding_feeds_drafts(model):
    """Prompt lookup drafts the 3 that followed 7 8 before, in the same call as the prompt."""
    windows = windows_of(model, ids=torch.tensor([[7, 8, 9, 7, 8]]), prompt_lookup_num_tokens=2)
    assert int(windows[0].generated_index()[0]) == -5
    assert windows[0].columns > 5
    assert all(0 <= int(w.generated_index()[0]) <= 3 for w in windows[1:])


def test_inputs_embeds(model):
    ids = tiny.prompt(5)
    embeds = model.get_input_embeddings()(ids)
    assert spans(windows_of(model, inputs_embeds=embeds)) == [(-5, 5, 5), *DECODED]
    windows = windows_of(model, inputs_embeds=embeds, ids=ids[:, :2], attention_mask=torch.ones(1, 5))
    assert spans(windows)[:2] == [(-5, 5, 5), (0, 1, 1)]


def test_beams_and_return_sequences_repeat_rows(model):
    for options in ({"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}):
        windows = windows_of(model, ids=tiny.prompt(5, rows=2), **options)
        assert spans(windows)[:2] == [(-5, 5, 30), (0, 1, 6)]


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 2}])
@pytest.mark.parametrize("has_mask", [True, False])
def test_padding_does_not_count(model, options, has_mask):
    batch = tiny.left_padded([tiny.prompt(5), tiny.prompt(2)])
    mask = batch["attention_mask"] if has_mask else None
    windows = windows_of(model, ids=batch["input_ids"], attention_mask=mask, **options)
    beams = options.get("num_beams", 1)
    assert [int(w.tokens) for w in windows] == [7 * beams, *[2 * beams] * 3]
    assert windows[0].counted[:: beams or 1].tolist() == [[True] * 5, [False] * 3 + [True] * 2]


def test_filler_of_finished_rows_does_not_count(model):
    ids = tiny.prompt(5, rows=2)
    second = tiny.continued(model, ids, 4)[0][1]  # becomes the end token: row 0 ends there
    seen: list[Window] = []
    tracker = Tracker(model, seen.append)
    model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=4, eos_token_id=second, pad_token_id=0
    )
    tracker.close()
    assert [int(w.tokens) for w in seen] == [10, 2, 1, 1]


def test_cache_of_an_earlier_turn(model):
    """Only new tokens are fed and all before them are prompt, whether all ids are given or only the new ones."""
    from transformers import DynamicCache

    whole = tiny.prompt(7)
    for given in (whole, whole[:, 4:]):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=whole[:, :4], past_key_values=cache)
        windows = windows_of(model, ids=given, past_key_values=cache, attention_mask=torch.ones(1, 7, dtype=torch.long))
        assert spans(windows) == [(-3, 3, 3), *DECODED]


def test_direct_calls(model):
    seen: list[Window] = []
    tracker = Tracker(model, seen.append)
    tiny.step_by_step(model, None, tiny.prompt(4), 3)
    assert spans(seen) == [(-4, 4, 4), (0, 1, 1), (1, 1, 1)]
    seen.clear()
    tracker.prompt_length = 2
    with torch.no_grad():
        model(tiny.prompt(4), torch.tensor([[0, 1, 1, 1]]))  # positional
        model(inputs_embeds=model.get_input_embeddings()(tiny.prompt(4)))
    assert spans(seen) == [(-2, 4, 3), (-2, 4, 4)]
    seen.clear()
    tiny.continued(model, tiny.prompt(5), 2)  # generate knows better, and does not change the number
    assert spans(seen) == [(-5, 5, 5), (0, 1, 1)]
    assert tracker.prompt_length == 2
    tracker.close()


def test_encoder_and_decoder_are_separate_stacks():
    model = tiny.build("switch")
    windows = windows_of(model, ids=tiny.prompt(5))
    assert [(w.stack, *span) for w, span in zip(windows, spans(windows), strict=True)] == [
        ("encoder", -5, 5, 5),
        ("decoder", -1, 1, 1),
        *(("decoder", *span) for span in DECODED),
    ]
    seen: list[Window] = []
    tracker = Tracker(model, seen.append)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    with torch.no_grad():
        model(input_ids=tiny.prompt(5), attention_mask=mask, decoder_input_ids=tiny.prompt(3))
        model(input_ids=tiny.prompt(5), labels=tiny.prompt(4))
    tracker.close()
    assert [(w.stack, w.columns, int(w.tokens)) for w in seen] == [
        ("decoder", 3, 3),
        ("encoder", 5, 3),
        ("decoder", 4, 4),
        ("encoder", 5, 5),
    ]


def test_after_is_called_only_when_the_forward_succeeded(model):
    log: list[str] = []
    tracker = Tracker(model, lambda window: log.append("before"), lambda window: log.append("after"))
    tiny.continued(model, tiny.prompt(3), 1)
    with pytest.raises(IndexError):
        model(torch.tensor([[tiny.VOCABULARY + 5]]))
    tracker.close()
    assert log == ["before", "after", "before"]


def test_close_twice_and_a_failed_start_leave_nothing(model, monkeypatch):
    tracker = Tracker(model, lambda window: None)
    tracker.close()
    tracker.close()
    assert tiny.traces(model) == []
    with monkeypatch.context() as patch:
        patch.setattr("steermoe.routing.tracker.wrap_method", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Tracker(model, lambda window: None)
    assert tiny.traces(model) == []


def test_language_model_looks_through_wrappers(model):
    assert language_model(model) is model
    assert language_model(torch.nn.Sequential(model)) is model
    assert language_model(torch.compile(model, backend="eager")) is model
    plain = torch.nn.Linear(2, 2)
    assert language_model(plain) is plain
