"""The whole way from texts to vectors, unchanged on checkpoints of five families on disk."""

import json

import pytest

from steermoe.models import loading
from steermoe.steering.handle import steer
from steermoe.vectors import library
from tests.support import steering_models, tiny_models

FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe"]
ALPHABETS = {"low": "abcdefgh", "high": "STUVWXYZ", "digits": "0123456789"}


@pytest.fixture
def corpus(tmp_path):
    """Texts of three kinds that share no letters: their bytes are different tokens, so any router separates them."""
    path = tmp_path / "texts.jsonl"
    with path.open("w") as file:
        for kind, letters in ALPHABETS.items():
            for number in range(14):
                words = [letters[(number + i) % len(letters) :][:3] * (1 + i % 2) for i in range(12)]
                file.write(json.dumps({"text": " ".join(words), "kind": kind}) + "\n")
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_embed_discover_steer(run, corpus, tmp_path, family):
    checkpoint = tmp_path / family
    model = tiny_models.build(family, vocab_size=300)
    model.save_pretrained(checkpoint)
    steering_models.byte_tokenizer().save_pretrained(checkpoint)
    embedded = run("embed", corpus, "-o", tmp_path / "emb", "--label-field", "kind", "--model", checkpoint)
    assert embedded.code == 0, embedded.err
    report = tmp_path / "report"
    found = run(
        "vectors", "discover", tmp_path / "emb", "-o", report, "--threshold", "1.1", "--other-seeds", "0", "--json"
    )
    assert found.code == 0, found.err
    record = json.loads(found.out)
    assert record["texts"] == 42
    assert record["clusters"]
    paths = sorted((report / "vectors").glob("*.safetensors"))
    assert paths
    loaded = loading.load(checkpoint)
    for path in paths:
        vector = library.load_vector(path, loaded.model)
        assert vector.info.architecture == family
        with steer(loaded.model, vector, strength=6.0) as steering:
            loaded.model.generate(**loaded.tokenizer("abc", return_tensors="pt"), max_new_tokens=3, do_sample=False)
        assert steering.report().tokens_steered > 0
