"""Routing embeddings in batches and on disk: exact with padding, resumable, stopped after the last router."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch

from steermoe.discovery.embed_corpus import embed_corpus, embedder
from steermoe.discovery.embedder import EmbeddingOptions
from steermoe.discovery.embedder_hf import batches
from steermoe.discovery.store import EmbeddingStore, Text
from steermoe.errors import CorpusError
from steermoe.models.loading import LoadedModel
from steermoe.routing.recording import record_routing
from tests.support import steering_models, tiny_models

TEXTS = ["A goal!", "The team ran and ran until it rained.", "Two words", "x", "Salt, pepper and a pan."]
FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe", "granitemoeshared", "llama4", "qwen3_next"]


def corpus(count=len(TEXTS)):
    return [Text(f"t{n}", TEXTS[n % len(TEXTS)] + " again" * (n // len(TEXTS)), f"label{n % 2}") for n in range(count)]


@pytest.mark.parametrize("options", [{}, {"features": "probabilities"}, {"tokens": "last"}, {"hidden": True}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_batched_equals_one_by_one(family, options):
    loaded = steering_models.loaded(tiny_models.build(family, vocab_size=300), steering_models.byte_tokenizer())
    with embedder(loaded, EmbeddingOptions(**options)) as embed:
        together = embed.texts(TEXTS)
        alone = [embed.texts([text]) for text in TEXTS]
    assert torch.allclose(together.frequency, torch.cat([one.frequency for one in alone]), atol=1e-5)
    assert torch.allclose(together.frequency.sum(-1), torch.ones(()), atol=1e-5)
    if options.get("hidden"):
        assert torch.allclose(together.hidden, torch.cat([one.hidden for one in alone]), atol=1e-4)


def test_equals_what_a_recorded_forward_pass_chooses(tiny_model):
    ids = torch.tensor([tiny_model.tokenizer(TEXTS[1])["input_ids"]])
    with torch.no_grad(), record_routing(tiny_model.model.base_model) as record:
        states = tiny_model.model.base_model(input_ids=ids).last_hidden_state
    with embedder(tiny_model, EmbeddingOptions(hidden=True)) as embed:
        embedded = embed.texts([TEXTS[1]])
    assert torch.equal(embedded.frequency, record.frequency())
    assert torch.allclose(embedded.hidden, states.mean(1), atol=1e-5)


def test_last_token_is_the_last_real_one(tiny_model):
    with embedder(tiny_model, EmbeddingOptions(tokens="last")) as embed:
        embedded = embed.texts(TEXTS)
    top_k = tiny_model.model.config.num_experts_per_tok
    assert set(embedded.frequency.unique().tolist()) == {0.0, 1 / top_k}
    ids = torch.tensor([tiny_model.tokenizer(TEXTS[1])["input_ids"]])
    with torch.no_grad(), record_routing(tiny_model.model) as record:
        record.restrict(torch.arange(ids.shape[1])[None] == ids.shape[1] - 1)
        tiny_model.model(input_ids=ids)
    assert torch.equal(embedded.frequency[1], record.frequency()[0])


def test_nothing_after_the_last_router_runs(tiny_model):
    ran = []
    layer = tiny_model.model.model.layers[-1]
    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: ran.append(name))
        for name, module in (
            ("head", tiny_model.model.lm_head),
            ("experts", layer.mlp.experts),
            ("gate", layer.mlp.gate),
        )
    ]
    with embedder(tiny_model) as embed:
        embed.texts(TEXTS)
    for hook in hooks:
        hook.remove()
    assert set(ran) == {"gate"}
    assert not tiny_model.model.model.layers[-1].mlp.gate._forward_hooks


@pytest.mark.parametrize("tokens", [1, 9, 10**6])
def test_batches_stay_within_their_size_and_lose_nothing(tokens):
    lengths = [5, 3, 9, 1, 4, 4]
    order = sorted(range(6), key=lengths.__getitem__)
    cut = list(batches(order, lengths, tokens))
    assert [i for batch in cut for i in batch] == order
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= tokens for batch in cut)


def test_a_corpus_on_disk_loads_with_numpy_and_pandas(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("steermoe.discovery.embed_corpus.SHARD_TEXTS", 3)
    seen = []
    store, skipped = embed_corpus(
        tiny_model,
        [*corpus(5), Text("empty", "")],
        tmp_path / "emb",
        EmbeddingOptions(hidden=True),
        progress=lambda texts, tokens: seen.append((texts, tokens)),
    )
    assert skipped == ["empty"]
    assert store.meta.complete
    assert store.meta.texts == 5
    matrix = np.concatenate([np.load(path) for path in sorted((tmp_path / "emb").glob("embeddings-*.npy"))])
    table = pd.concat([pd.read_json(path, lines=True) for path in sorted((tmp_path / "emb").glob("texts-*.jsonl"))])
    assert matrix.shape == (5, 3, 8)
    assert list(table["id"]) == ["t0", "t1", "t2", "t3", "t4"]
    assert list(table["tokens"]) == [len(text) for text in TEXTS]
    assert sum(tokens for _, tokens in seen) == sum(map(len, TEXTS))
    loaded = EmbeddingStore.open(tmp_path / "emb").load()
    assert np.array_equal(loaded.frequency, matrix)
    assert loaded.labels == ["label0", "label1", "label0", "label1", "label0"]
    assert loaded.features().shape == (5, 3 * 8 + 16)


def test_finished_shards_are_not_computed_again(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("steermoe.discovery.embed_corpus.SHARD_TEXTS", 2)
    embed_corpus(tiny_model, corpus(5), tmp_path / "whole")
    embed_corpus(tiny_model, corpus(5), tmp_path / "emb")
    (tmp_path / "emb" / "texts-00001.jsonl").unlink()  # as if killed before the shard was complete
    tokens = []
    embed_corpus(tiny_model, corpus(5), tmp_path / "emb", progress=lambda texts, count: tokens.append(count))
    assert sum(tokens) == len(TEXTS[2]) + len(TEXTS[3])
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "emb" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([Text("other", "text")], {}, "another corpus"),
        (corpus(2), {}, "more texts than the corpus"),
        (corpus(5), {"max_tokens": 7}, "made with max_tokens 512, not 7"),
    ],
)
def test_embeddings_of_something_else_are_not_resumed(tiny_model, tmp_path, monkeypatch, texts, options, message):
    monkeypatch.setattr("steermoe.discovery.embed_corpus.SHARD_TEXTS", 2)
    embed_corpus(tiny_model, corpus(5), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CorpusError, match=message):
        embed_corpus(tiny_model, texts, tmp_path, EmbeddingOptions(**options))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


KILLED = """
import sys, torch
torch.set_num_threads(1)
from steermoe.discovery import embed_corpus
from steermoe.discovery.store import Text
from steermoe.models import loading
embed_corpus.SHARD_TEXTS = 8
texts = [Text(f"t{n}", f"text number {n} " * (1 + n % 7)) for n in range(400)]
embed_corpus.embed_corpus(loading.load(sys.argv[1], dtype="float32"), texts, sys.argv[2])
"""


def test_kill_loses_nothing_and_repeats_nothing(tiny_checkpoint, tmp_path):
    command = [sys.executable, "-c", KILLED, str(tiny_checkpoint)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "emb"
    process = subprocess.Popen([*command, str(folder)], env=environment)
    deadline = time.monotonic() + 60
    while not (folder / "texts-00003.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not EmbeddingStore.open(folder).meta.complete
    subprocess.run([*command, str(folder)], env=environment, check=True)
    subprocess.run([*command, str(tmp_path / "whole")], env=environment, check=True)
    resumed, whole = EmbeddingStore.open(folder).load(), EmbeddingStore.open(tmp_path / "whole").load()
    assert [text.id for text in resumed.texts] == [f"t{n}" for n in range(400)]
    assert np.array_equal(resumed.frequency, whole.frequency)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "make them with"), ("{", "damaged"), ('{"format_version": 9}', "version 9"), ("[]", "damaged")],
)
def test_a_folder_that_is_not_a_store(tmp_path, content, message):
    if content is not None:
        (tmp_path / "meta.json").write_text(content)
    with pytest.raises(CorpusError, match=message):
        EmbeddingStore.open(tmp_path)


def test_cut_off_texts_are_reported(tiny_model, tmp_path):
    embed_corpus(tiny_model, corpus(3), tmp_path)
    path = tmp_path / "texts-00000.jsonl"
    lines = path.read_text().splitlines()
    assert json.loads(lines[0])["text"] == TEXTS[0]
    path.write_text("\n".join(lines[:2]) + "\n")
    with pytest.raises(CorpusError, match="2 texts and 3 embeddings"):
        EmbeddingStore.open(tmp_path).load()


@pytest.mark.parametrize("field", ["max_tokens", "batch_tokens"])
def test_options_below_one_are_rejected(field):
    with pytest.raises(CorpusError, match=f"{field} is 0"):
        EmbeddingOptions(**{field: 0})


def test_loaded_model_is_usable_afterwards(tiny_model: LoadedModel):
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = tiny_model.model(input_ids=ids).logits
        with embedder(tiny_model) as embed:
            embed.texts(TEXTS)
        assert torch.equal(tiny_model.model(input_ids=ids).logits, before)
