"""Routing embeddings in batches and on disk: exact with padding, resumable, stopped after the last router."""

import copy
import errno
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch

from steermoe.discovery.corpus import Corpus
from steermoe.discovery.embed_corpus import embed_corpus, embedder
from steermoe.discovery.embedder import EmbeddingOptions
from steermoe.discovery.embedder_hf import batches
from steermoe.discovery.shards import locked
from steermoe.discovery.store import EmbeddingStore, Text
from steermoe.engines.memory import KERNELS
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
    (tmp_path / "emb" / "shard-00001.json").unlink()  # as if killed before the shard was complete
    tokens = []
    embed_corpus(tiny_model, corpus(5), tmp_path / "emb", progress=lambda texts, count: tokens.append(count))
    assert sum(tokens) == len(TEXTS[2]) + len(TEXTS[3])
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "emb" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([Text("other", "text")], {}, "another corpus"),
        (corpus(2), {}, r"more texts than the corpus \(3 of 5"),
        ([*corpus(4), Text("t4", "Salt, pepper and a pot.", "label0")], {}, "the text of 't4' has changed"),
        ([*corpus(4), Text("t4", TEXTS[4], "food")], {}, "the label of 't4' has changed"),
        ([*corpus(6)[:5:-1], Text("t0", "changed")], {}, "the text of 't0' has changed"),
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


def test_kill_loses_nothing_and_repeats_nothing(tiny_checkpoint, tiny_model, tmp_path, monkeypatch):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "emb"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tiny_checkpoint), str(folder)], env=environment)
    deadline = time.monotonic() + 60
    while not (folder / "shard-00003.json").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not EmbeddingStore.open(folder).meta.complete
    monkeypatch.setattr("steermoe.discovery.embed_corpus.SHARD_TEXTS", 8)
    texts = [Text(f"t{n}", f"text number {n} " * (1 + n % 7)) for n in range(400)]
    embed_corpus(tiny_model, texts, folder)
    embed_corpus(tiny_model, texts, tmp_path / "whole")
    resumed, whole = EmbeddingStore.open(folder).load(), EmbeddingStore.open(tmp_path / "whole").load()
    assert [text.id for text in resumed.texts] == [f"t{n}" for n in range(400)]
    assert np.array_equal(resumed.frequency, whole.frequency)


def test_a_corpus_that_grew_is_completed(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("steermoe.discovery.embed_corpus.SHARD_TEXTS", 3)
    embed_corpus(tiny_model, corpus(4), tmp_path / "emb")
    embed_corpus(tiny_model, corpus(6), tmp_path / "whole")
    tokens = []
    grown = [corpus(6)[4], *corpus(4), corpus(6)[5]]  # as if a file were added in front, and one at the end
    store, _ = embed_corpus(tiny_model, grown, tmp_path / "emb", progress=lambda texts, count: tokens.append(count))
    assert sum(tokens) == len(TEXTS[4]) + len(TEXTS[0] + " again")
    assert (store.meta.complete, store.meta.texts) == (True, 6)
    loaded, whole = store.load(), EmbeddingStore.open(tmp_path / "whole").load()
    assert [text.id for text in loaded.texts] == ["t0", "t1", "t2", "t3", "t4", "t5"]
    assert np.array_equal(loaded.frequency, whole.frequency)


def test_memory_is_kept_small_while_a_corpus_is_embedded(tiny_model, tmp_path, monkeypatch):
    limits, returned = [], []
    monkeypatch.setattr("steermoe.discovery.embed_corpus.SHARD_TEXTS", 2)
    monkeypatch.setattr("steermoe.discovery.embed_corpus.TRIM_SHARDS", 2)
    monkeypatch.setattr("steermoe.discovery.embed_corpus.return_freed_memory", lambda: returned.append(len(limits)))
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)

    def note(texts: int, tokens: int) -> None:
        limits.append(os.environ.get("LRU_CACHE_CAPACITY"))

    embed_corpus(tiny_model, [Text(f"t{n}", "text") for n in range(9)], tmp_path, progress=note)
    assert limits == [KERNELS] * 5
    assert returned == [2, 4]
    assert "LRU_CACHE_CAPACITY" not in os.environ


def test_texts_without_tokens_are_known_too(tiny_model, tmp_path, monkeypatch):
    texts = [Text("empty", ""), *corpus(2)]
    assert embed_corpus(tiny_model, texts, tmp_path)[1] == ["empty"]
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert embed_corpus(tiny_model, iter(texts), tmp_path)[1] == []
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    with pytest.raises(CorpusError, match="the text of 'empty' has changed"):
        embed_corpus(tiny_model, [Text("empty", "no more"), *corpus(2)], tmp_path)


def test_a_corpus_without_any_text(tiny_model, tmp_path):
    store, _ = embed_corpus(tiny_model, [], tmp_path / "none")
    with pytest.raises(CorpusError, match="contains no embeddings yet"):
        store.load()
    store, skipped = embed_corpus(tiny_model, [Text("empty", "")], tmp_path / "emb", EmbeddingOptions(hidden=True))
    assert (skipped, len(store.load())) == (["empty"], 0)


def test_texts_of_one_id_are_all_embedded(tiny_model, tmp_path):
    texts = [Text("same", "one"), Text("same", "two"), Text("same", "one")]
    for _ in range(2):
        store, _ = embed_corpus(tiny_model, texts, tmp_path)
        assert [text.text for text in store.load().texts] == ["one", "two", "one"]


def test_an_interruption_loses_no_batch(tiny_model, tmp_path, monkeypatch):
    """Also within a shard, and the numbers are those of a run without one."""
    monkeypatch.setattr("steermoe.discovery.embed_corpus.FLUSH_SECONDS", 0)
    options = EmbeddingOptions(batch_tokens=40, hidden=True)
    embed_corpus(tiny_model, corpus(12), tmp_path / "whole", options)
    seen = []

    def interrupt(texts, tokens):
        seen.append(tokens)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_corpus(tiny_model, corpus(12), tmp_path / "emb", options, progress=interrupt)
    assert (tmp_path / "emb" / "unfinished.npz").is_file()
    assert not (tmp_path / "emb" / "shard-00000.json").exists()
    left = sum(len(text.text) for text in corpus(12)) - sum(seen)
    again = []
    embed_corpus(tiny_model, corpus(12), tmp_path / "emb", options, progress=lambda texts, count: again.append(count))
    assert sum(again) == left
    assert {path.name: path.read_bytes() for path in (tmp_path / "emb").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()
    }


@pytest.mark.parametrize("content", [b"", b"PK", b"0" * 64 + b"PK", None])
def test_a_damaged_unfinished_file_is_made_again(tiny_model, tmp_path, monkeypatch, content):
    from steermoe.discovery.shards import Unfinished, identity

    (tmp_path / "emb").mkdir()
    if content is None:  # sound, of other texts
        other = Unfinished(tmp_path / "emb")
        other.rows[identity(Text("t0", "other"))] = 3, np.ones((3, 8), np.float32), None
        other.write()
    else:
        (tmp_path / "emb" / "unfinished.npz").write_bytes(content)
    store, _ = embed_corpus(tiny_model, corpus(3), tmp_path / "emb")
    embed_corpus(tiny_model, corpus(3), tmp_path / "whole")
    assert np.array_equal(store.load().frequency, EmbeddingStore.open(tmp_path / "whole").load().frequency)
    assert not (tmp_path / "emb" / "unfinished.npz").exists()


def test_damaged_shards_are_embedded_again(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("steermoe.discovery.embed_corpus.SHARD_TEXTS", 2)
    embed_corpus(tiny_model, corpus(5), tmp_path / "whole")
    embed_corpus(tiny_model, corpus(5), tmp_path / "emb")
    path = tmp_path / "emb" / "embeddings-00001.npy"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=r"embeddings-00001\.npy' has changed since .*to repair it"):
        EmbeddingStore.open(tmp_path / "emb").load()
    embed_corpus(tiny_model, corpus(5), tmp_path / "emb")
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "emb" / path.name).read_bytes() == path.read_bytes()
    for number in (0, 1):  # fewer shards than before are needed
        (tmp_path / "emb" / f"texts-0000{number}.jsonl").write_text("")
    monkeypatch.setattr("steermoe.discovery.embed_corpus.SHARD_TEXTS", 4)
    store, _ = embed_corpus(tiny_model, corpus(5), tmp_path / "emb")
    assert sorted(text.id for text in store.load().texts) == ["t0", "t1", "t2", "t3", "t4"]


def test_a_file_system_without_locks_is_told(tiny_model, tmp_path, monkeypatch, caplog):
    import fcntl

    def no_locks(fd, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert embed_corpus(tiny_model, corpus(2), tmp_path / "emb")[0].meta.complete
    assert caplog.messages == [f"'{tmp_path / 'emb'}' can't be locked here: make sure that no other run writes to it"]


def test_two_runs_do_not_write_into_one_folder(tiny_model, tmp_path):
    with locked(tmp_path / "emb"), pytest.raises(CorpusError, match="is being written by another run: wait for it"):
        embed_corpus(tiny_model, corpus(2), tmp_path / "emb")
    assert list((tmp_path / "emb").iterdir()) == []
    assert embed_corpus(tiny_model, corpus(2), tmp_path / "emb")[0].meta.complete


def test_what_a_killed_run_left_is_removed(tiny_model, tmp_path):
    for name in (".texts-00000.jsonl.abc_12", ".meta.json.x", ".unfinished.npz.y", ".gitignore", ".texts.backup.old"):
        (tmp_path / name).write_text("")
    embed_corpus(tiny_model, corpus(2), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == [
        ".gitignore",
        ".texts.backup.old",
    ]


def test_all_that_decides_the_numbers_is_recorded(tiny_model, tmp_path):
    """Weights, tokenizer, dtype and fields, with the names that the user sees."""
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "A goal!", "kind": "sport"}\n')
    embed_corpus(tiny_model, Corpus(path), tmp_path / "emb")
    with pytest.raises(CorpusError, match="made with label_field none, not kind"):
        embed_corpus(tiny_model, Corpus(path, label_field="kind"), tmp_path / "emb")
    changed = copy.deepcopy(tiny_model.model)
    with torch.no_grad():
        changed.model.layers[0].mlp.gate.weight += 1
    other = LoadedModel(tiny_model.name, changed, tiny_model.tokenizer)
    with pytest.raises(CorpusError, match="made with engine, weights and tokenizer hf "):
        embed_corpus(other, Corpus(path), tmp_path / "emb")
    half = LoadedModel(tiny_model.name, copy.deepcopy(tiny_model.model).bfloat16(), tiny_model.tokenizer)
    with pytest.raises(CorpusError, match="made with dtype float32, not bfloat16"):
        embed_corpus(half, Corpus(path), tmp_path / "emb")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "make them with"), ("{", "damaged"), ('{"format_version": 9}', "version 9"), ("[]", "damaged")],
)
def test_a_folder_that_is_not_a_store(tmp_path, content, message):
    if content is not None:
        (tmp_path / "meta.json").write_text(content)
    with pytest.raises(CorpusError, match=message):
        EmbeddingStore.open(tmp_path)


@pytest.mark.parametrize("value", [0, 2**31, 2**70])
@pytest.mark.parametrize("field", ["max_tokens", "batch_tokens"])
def test_options_out_of_range_are_rejected(field, value):
    with pytest.raises(CorpusError, match=f"{field} is {value}, expected 1 to 2147483647"):
        EmbeddingOptions(**{field: value})


def test_loaded_model_is_usable_afterwards(tiny_model: LoadedModel):
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = tiny_model.model(input_ids=ids).logits
        with embedder(tiny_model) as embed:
            embed.texts(TEXTS)
        assert torch.equal(tiny_model.model(input_ids=ids).logits, before)
