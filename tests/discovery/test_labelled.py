"""Routing embeddings of texts and the vectors built from them, on the tiny model."""

import pytest
import torch

from steermoe.discovery.labelled import routing_embeddings, vector_from_texts
from steermoe.errors import VectorError
from steermoe.routing.recording import record_routing

TEXTS = ["A goal!", "The team ran and ran until it rained.", "Two words", "x"]


def test_padded_batches_equal_texts_one_by_one(tiny_model):
    together, tokens = routing_embeddings(tiny_model, TEXTS, batch_tokens=40)
    alone = torch.cat([routing_embeddings(tiny_model, [text])[0] for text in TEXTS])
    assert torch.allclose(together, alone)
    assert tokens.tolist() == [len(text) for text in TEXTS]


def test_embeddings_are_what_the_routers_chose(tiny_model):
    ids = torch.tensor([tiny_model.tokenizer(TEXTS[1])["input_ids"]])
    with torch.no_grad(), record_routing(tiny_model.model) as record:
        tiny_model.model(input_ids=ids)
    embeddings, _ = routing_embeddings(tiny_model, [TEXTS[1]])
    assert torch.equal(embeddings, record.frequency())
    assert torch.allclose(embeddings.sum(-1), torch.ones(1, 3))


def test_only_the_first_tokens_are_read(tiny_model):
    cut, tokens = routing_embeddings(tiny_model, [TEXTS[1]], max_tokens=5)
    assert torch.equal(cut, routing_embeddings(tiny_model, [TEXTS[1][:5]])[0])
    assert tokens.tolist() == [5]


def test_vector_is_the_mean_with_its_provenance(tiny_model):
    vector = vector_from_texts(tiny_model, "sport", TEXTS, threshold=2.0, keywords=["goal"])
    embeddings, tokens = routing_embeddings(tiny_model, TEXTS)
    assert torch.allclose(vector.frequency, embeddings.mean(0))
    assert torch.equal(vector.experts > 0, vector.frequency > 2 / 8)
    assert vector.info.texts == 4
    assert vector.info.tokens == int(tokens.sum())
    assert vector.info.model == "tiny-mixtral"
    assert vector.layers == (0, 1, 2)


@pytest.mark.parametrize(("texts", "message"), [([], "no texts"), (["a", ""], "text 1 has no tokens")])
def test_empty_input_is_named(tiny_model, texts, message):
    with pytest.raises(VectorError, match=message):
        routing_embeddings(tiny_model, texts)
