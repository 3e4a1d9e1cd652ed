"""`steermoe embed` on the tiny checkpoint."""

import json

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
