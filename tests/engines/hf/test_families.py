"""Models that are not plain causal ones: with images, and encoder-decoders. They generate from text alone."""

from importlib.metadata import version

import pytest
import torch

from steermoe.discovery.embed_corpus import embedder
from steermoe.discovery.embedder import EmbeddingOptions
from steermoe.engines.decoding import complete
from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.hf.static import StaticDecoder
from steermoe.engines.request import Request, Sampling
from steermoe.errors import SteeringError, UnsupportedModel
from steermoe.evaluation.teacher_forcing import TeacherForcing
from steermoe.models import loading
from steermoe.models.description import describe
from steermoe.routing.families import list_families
from steermoe.routing.routers import find_routers
from steermoe.steering.plans import SteeringPlan
from tests.support import steering_models as steering
from tests.support import tiny_models as tiny

PROMPTS = ["The dog ran.", "A cat"]
GREEDY = Sampling(6, do_sample=False)
FAMILIES = ("mistral4", "aria", "switch_transformers", "nllb_moe")


@pytest.fixture(params=FAMILIES)
def checkpoint(request, tmp_path, monkeypatch):
    """A folder with a tiny model of the family and a tokenizer of bytes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from steermoe.models.checkpoint import _auto_class

    monkeypatch.setitem(tiny.SIZES, "vocab_size", steering.VOCABULARY)
    config = tiny.tiny_config(request.param)
    whole = CONFIG_MAPPING[config.model_type.removesuffix("_text")] if request.param == "aria" else type(config)
    if whole is not type(config):
        small = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
        config = whole(text_config=config.to_dict(), vision_config=small)
    torch.manual_seed(0)
    model = _auto_class(config).from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape) * 0.3)
    model.generation_config.eos_token_id = steering.END
    model.generation_config.pad_token_id = steering.PAD
    folder = tmp_path / request.param
    model.save_pretrained(folder)
    steering.byte_tokenizer().save_pretrained(folder)
    return folder


def test_it_is_loaded_and_generates_from_text(checkpoint):
    loaded = loading.load(checkpoint, dtype="float32")
    engine = HFEngine(loaded)
    expert = max(router.layer for router in find_routers(loaded.model)), 0
    description = describe(checkpoint)
    assert (description.steerable, description.model_class) == (True, type(loaded.model).__name__)
    assert "Python only" not in description.reason

    requests = [Request(prompt, sampling=GREEDY) for prompt in PROMPTS]
    ids = [engine.encode(request) for request in requests]
    alone = [engine.generate([request])[0].token_ids for request in requests]
    for prompt, tokens in zip(ids, alone, strict=True):
        inputs = torch.tensor([prompt])
        output = loaded.model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=6, do_sample=False
        )
        start = 1 if loaded.model.config.is_encoder_decoder else len(prompt)
        assert [token for token in output[0, start:].tolist() if token != steering.END] == list(tokens)
    assert [done.token_ids for done in engine.generate(requests)] == alone
    decoder = engine.decoder(2)
    assert [done.token_ids for done in complete(decoder, requests, ids)] == alone
    decoder.close()
    assert engine.room().rows(10) >= 1

    plan = SteeringPlan(ban=(expert,), positions="all")
    if loaded.shape.routers[-1].no_lists:
        with pytest.raises(SteeringError, match="can't be forced or banned"):
            engine.generate([Request(PROMPTS[0], plan, GREEDY)])
        plan = steering.plan_for_experts(loaded.model, 1, positions="all")
    (done,) = engine.generate([Request(PROMPTS[0], plan, GREEDY)], record=True)
    assert done.report.tokens_steered > 0
    assert len(done.token_ids) <= 6


def test_its_texts_are_embedded(checkpoint):
    loaded = loading.load(checkpoint, dtype="float32")
    with embedder(loaded, EmbeddingOptions()) as embed:
        frequency = embed.texts(PROMPTS).frequency
    assert frequency.shape == (2, len(loaded.shape.routers), loaded.shape.num_experts)
    assert torch.allclose(frequency.sum(-1), torch.ones(()))


def test_streamed_and_limited_texts_of_an_encoder_decoder():
    model = steering.build("switch")
    engine = HFEngine(steering.loaded(model))
    pieces: list[str] = []
    for length in (1, 3):
        pieces.clear()
        sampling = Sampling(length, min_new_tokens=length, seed=1, repetition_penalty=1.3)
        (done,) = engine.generate([Request("The dog ran.", sampling=sampling)], on_text=pieces.append)
        assert (done.new_tokens, "".join(pieces)) == (length, done.text)
    requests = [Request("a", sampling=Sampling(2, 2, seed=2)), Request("bcd", sampling=Sampling(5, 5, seed=3))]
    decoder = StaticDecoder(engine.loaded, engine.end_tokens())
    together = complete(decoder, requests, [engine.encode(request) for request in requests])
    assert [done.new_tokens for done in together] == [2, 5]
    assert [done.token_ids for done in together] == [engine.generate([one])[0].token_ids for one in requests]


def test_likelihoods_need_a_model_that_continues_texts():
    with pytest.raises(UnsupportedModel, match="tiny is an encoder-decoder"):
        TeacherForcing(steering.loaded(steering.build("switch")), ["some text that is long enough"])


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("openai_privacy_filter", "transformers has no class for it that continues a text"),
        ("diffusion_gemma", "by diffusion"),
    ],
)
def test_a_family_that_continues_no_text_is_said_to(tmp_path, family, reason):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    listed = next(one for one in list_families() if one.family == family)
    assert listed.steerable
    assert "in Python only, the commands can't run it" in listed.reason
    assert reason in listed.reason
    config = tiny.tiny_config(family)
    if family == "diffusion_gemma" and version("transformers").startswith("5.19."):
        pytest.skip("transformers 5.19 builds none without images")
    if type(config) is not CONFIG_MAPPING[family]:
        config = CONFIG_MAPPING[family](text_config=config.to_dict())
    config.save_pretrained(tmp_path / "it")
    description = describe(tmp_path / "it")
    assert "in Python only" in description.reason
    assert reason in description.reason
    with pytest.raises(UnsupportedModel, match=f"'it' .* can't be run by steermoe: .*{reason}"):
        loading.load(tmp_path / "it")
