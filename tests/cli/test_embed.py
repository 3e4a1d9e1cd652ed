"""`steermoe embed` on the tiny checkpoint."""

import io
import json
import sys

import pytest

from steermoe.discovery.store import EmbeddingStore


def test_bad_records_are_reported_and_the_rest_is_embedded(run, tiny_checkpoint, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"body": "A goal!", "kind": "sport"}\nbroken\n{"body": "A pan.", "kind": "food"}\n')
    options = ["--text-field", "body", "--label-field", "kind", "--model", tiny_checkpoint, "--max-tokens", "4"]
    result = run("embed", path, "-o", tmp_path / "emb", *options)
    assert result.code == 0, result.err
    assert result.out == f"{tmp_path / 'emb'}\n"
    assert "skipped texts.jsonl:2: is not JSON" in result.err
    embedded = EmbeddingStore.open(tmp_path / "emb").load()
    assert embedded.labels == ["sport", "food"]
    assert embedded.tokens.tolist() == [4, 4]
    again = json.loads(run("embed", path, "-o", tmp_path / "emb", *options, "--json").out)
    assert again["complete"]
    assert again["texts"] == 2
    assert again["left_out"] == 1
    other = run("embed", path, "-o", tmp_path / "emb", *options[:-1], "5")
    assert other.code == 1
    assert "made with max_tokens 4, not 5" in other.err


def test_the_corpus_is_checked_before_the_model(run, tmp_path):
    result = run("embed", tmp_path / "none", "-o", tmp_path / "emb", "--model", tmp_path / "no-model")
    assert result.code == 1
    assert "no corpus at" in result.err


def jsonl(path, texts, label="sport"):
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text in texts))
    return path


def test_a_corpus_that_grew_is_embedded_to_its_end(run, tiny_checkpoint, tmp_path):
    corpus, emb = tmp_path / "corpus", tmp_path / "emb"
    corpus.mkdir()
    jsonl(corpus / "c.jsonl", ["A goal!", "A match."])
    arguments = ["embed", corpus, "-o", emb, "--model", tiny_checkpoint, "--json"]
    assert json.loads(run(*arguments).out)["texts"] == 2
    jsonl(corpus / "c.jsonl", ["A goal!", "A match.", "A race."])
    assert json.loads(run(*arguments).out)["texts"] == 3
    (corpus / "a.txt").write_text("A pan.")
    assert json.loads(run(*arguments).out)["texts"] == 4
    loaded = EmbeddingStore.open(emb).load()
    assert sorted(text.id for text in loaded.texts) == ["a.txt", "c.jsonl:1", "c.jsonl:2", "c.jsonl:3"]
    jsonl(corpus / "c.jsonl", ["A gaol!", "A match.", "A race."])  # as long as before
    edited = run(*arguments)
    assert (edited.code, edited.err.count("\n")) == (1, 1)
    assert "the text of 'c.jsonl:1' has changed since it was embedded" in edited.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--label-field", "label"], "made with label_field none, not label"),
        (["--dtype", "bfloat16"], "made with dtype float32, not bfloat16"),
        (["--tokens", "last"], "made with tokens all, not last"),
    ],
)
def test_other_options_on_an_existing_folder_are_refused(run, tiny_checkpoint, tmp_path, options, message):
    corpus = jsonl(tmp_path / "c.jsonl", ["A goal!", "A match."])
    arguments = ["embed", corpus, "-o", tmp_path / "emb", "--model", tiny_checkpoint]
    dtype = [] if "--dtype" in options else ["--dtype", "float32"]
    assert run(*arguments, "--dtype", "float32").code == 0
    result = run(*arguments, *options, *dtype)
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
    assert message in result.err


def test_files_that_are_not_read_are_reported(run, tiny_checkpoint, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in ("a.txt", "b.py", "c.py", "d.md"):
        (corpus / name).write_text("text")
    arguments = ["embed", corpus, "--model", tiny_checkpoint, "-o"]
    result = run(*arguments, corpus / "emb")  # within the corpus
    assert result.code == 0, result.err
    line = f"steermoe: not read in '{corpus}': 3 of 4 files (2 .py, 1 .md); --include '*.ENDING' reads others\n"
    assert result.err == line
    assert run(*arguments, corpus / "emb").err == line
    source = run(*arguments, corpus / "source", "--include", "*.py", "--include", "*.md", "--json")
    record = json.loads(source.out)
    assert (record["texts"], record["not_read"]) == (3, {".txt": 1})


def test_embeddings_have_a_folder_of_their_own(run, tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("text")
    arguments = ["embed", tmp_path / "corpus", "--model", tmp_path / "no-model", "-o"]
    assert "would be written among the texts" in run(*arguments, tmp_path / "corpus").err
    assert "is a file: name a folder" in run(*arguments, tmp_path / "corpus" / "a.txt").err


def test_stdin_packed_files_and_nested_labels(run, tiny_checkpoint, tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    content = json.dumps({"text": "A goal!", "meta": {"set": "sport"}}).encode()
    (tmp_path / "p.jsonl.zst").write_bytes(pyarrow.compress(content, codec="zstd", asbytes=True))
    options = ["--model", tiny_checkpoint, "--label-field", "meta.set", "-o"]
    for number, source in enumerate([tmp_path / "p.jsonl.zst", "-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        result = run("embed", source, *options, tmp_path / str(number))
        assert result.code == 0, result.err
        assert EmbeddingStore.open(tmp_path / str(number)).load().labels == ["sport"]


@pytest.mark.parametrize("option", ["--max-tokens", "--batch-tokens"])
def test_huge_numbers_are_one_line(run, tmp_path, option):
    result = run("embed", tmp_path, "-o", tmp_path / "emb", "--model", tmp_path / "no-model", option, str(2**70))
    assert result.code == 2
    assert option in result.err
    assert "2147483647" in result.err


def test_a_folder_of_an_earlier_version_is_resumed_with_a_word(run, tiny_checkpoint, tmp_path):
    corpus, emb = jsonl(tmp_path / "c.jsonl", ["A goal!", "A match."]), tmp_path / "emb"
    arguments = ["embed", corpus, "-o", emb, "--model", tiny_checkpoint]
    run(*arguments)
    meta = json.loads((emb / "meta.json").read_text())
    for name in ("fingerprint", "dtype", "text_field", "label_field", "shards", "shards_sha256", "routers", "sha256"):
        del meta[name]
    (emb / "meta.json").write_text(json.dumps({**meta, "format_version": 1}))
    (emb / "shard-00000.json").unlink()
    jsonl(corpus, ["A goal!", "A match.", "A race."])
    result = run(*arguments)
    assert result.code == 0, result.err
    assert "was begun by an earlier version: it has no hashes" in result.err
    store = EmbeddingStore.open(emb)
    assert (store.version, store.meta.texts, len(store.load())) == (1, 3, 3)
    used = run("vectors", "discover", emb, "-o", tmp_path / "report").err
    assert "was written by an earlier version: it has no hashes, so damage may go unnoticed" in used
