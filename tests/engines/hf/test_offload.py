"""A model whose weights accelerate has moved to memory or disk, the embeddings among them."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload

from steermoe.discovery.embed_corpus import embedder
from steermoe.discovery.embedder import EmbeddingOptions
from steermoe.engines.decoding import complete
from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.hf.rolling import RollingDecoder
from steermoe.engines.request import Request, Sampling
from steermoe.evaluation.teacher_forcing import TeacherForcing
from steermoe.routing.weights import weights_of
from tests.support import steering_models as tiny

CPU = torch.device("cpu")


@pytest.fixture(params=["memory", "disk"])
def pair(request, tmp_path):
    """The same model twice, the second time with its weights elsewhere."""
    here, away = tiny.build("mixtral"), tiny.build("mixtral")
    if request.param == "memory":
        cpu_offload(away, execution_device=CPU)
    else:
        disk_offload(away, str(tmp_path), execution_device=CPU)
    assert next(away.parameters()).is_meta
    return tiny.loaded(here), tiny.loaded(away)


def test_it_has_the_fingerprint_and_the_device_of_the_model(pair):
    here, away = map(HFEngine, pair)
    assert away.fingerprint() == here.fingerprint()
    assert away.shape.fingerprint == here.shape.fingerprint != ""
    assert pair[1].device == CPU
    assert away.most_rows == here.most_rows
    assert away.room().row_bytes == here.room().row_bytes
    assert away.compiled_steps() is None
    for (name, weight), (other, same) in zip(weights_of(pair[1].model), pair[0].model.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(weight, same)


def test_its_texts_are_those_of_the_model(pair):
    requests = [
        Request(text, tiny.plan_for_experts(pair[0].model, 1), Sampling(5, seed=seed))
        for seed, text in enumerate(["The dog", "A cat ran"])
    ]
    tokens = []
    for loaded in pair:
        engine = HFEngine(loaded)
        ids = [engine.encode(request) for request in requests]
        tokens.append([done.token_ids for done in engine.generate(requests)])
        decoder = RollingDecoder(loaded, engine.end_tokens())
        tokens.append([done.token_ids for done in complete(decoder, requests, ids)])
        decoder.close()
    assert tokens == [tokens[0]] * 4


def test_texts_are_embedded_and_measured(pair):
    texts = ["The dog ran home in the rain.", "It was late."]
    embedded, kept = [], []
    for loaded in pair:
        with embedder(loaded, EmbeddingOptions()) as embed:
            embedded.append(embed.texts(texts).frequency)
        kept.append(TeacherForcing(loaded, texts, prompt_tokens=2).tokens)
    assert torch.equal(*embedded)
    assert kept[0] == kept[1]
