"""`--engine` and `models export --gguf` on the command line."""

import json

import pytest
from gguf import GGUFReader

from steermoe.engines import auto
from steermoe.errors import ModelError
from steermoe.vectors.file import write_vector
from steermoe.vectors.vector import SteeringVector, VectorInfo
from tests.support import tiny_ggufs

SHORT = ("--max-new-tokens", "6")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    return tiny_ggufs.write(tiny_ggufs.build("mixtral"), tmp_path_factory.mktemp("gguf"))


@pytest.fixture
def vectors(bare_search_path, make_vector):
    """In ./steering_vectors: `sport`, which fits the file, and `other`, which fits another model."""
    fits = make_vector(layers=range(2))
    write_vector(fits, bare_search_path / "steering_vectors" / "tiny" / "sport.safetensors")
    write_vector(make_vector("other"), bare_search_path / "steering_vectors" / "tiny" / "other.safetensors")
    assert isinstance(fits, SteeringVector)
    assert fits.info != VectorInfo()
    return bare_search_path


def without(*missing):
    return lambda name: None if name in missing else object()


# ---- choosing an engine ----


def test_choice(gguf, tmp_path, monkeypatch):
    monkeypatch.setattr(auto, "find_spec", without())
    dense = tmp_path / "dense.gguf"
    dense.write_bytes(b"GGUF")
    assert auto.choose_engine(gguf) == "llamacpp"
    assert auto.choose_engine(gguf, "hf") == "hf"
    assert auto.choose_engine(None) == auto.choose_engine("folder") == auto.choose_engine(dense) == "hf"
    monkeypatch.setattr(auto, "find_spec", without("llama_cpp"))
    assert auto.choose_engine(gguf) == "hf"


def test_choices_that_are_refused(gguf, monkeypatch):
    monkeypatch.setattr(auto, "find_spec", without("llama_cpp", "numba"))
    with pytest.raises(ModelError, match=r"needs llama_cpp and numba: pip install 'steermoe\[llamacpp\]'"):
        auto.choose_engine(gguf, "llamacpp")
    for model in (None, "folder"):
        with pytest.raises(ModelError, match=r"runs .gguf files, not '(smollm2-moe|folder)'"):
            auto.choose_engine(model, "llamacpp")


def test_without_the_extra_transformers_runs_a_gguf(run, gguf, vectors, monkeypatch):
    monkeypatch.setattr(auto, "find_spec", without("llama_cpp"))
    known = tiny_ggufs.write(tiny_ggufs.build("qwen3_moe", moe_intermediate_size=768, head_dim=128), vectors)
    result = run("generate", "A dog.", "-m", known, "--json", *SHORT)
    assert result.code == 0, result.err
    assert json.loads(result.out)["new_tokens"] <= 6
    result = run("generate", "A dog.", "-m", gguf, *SHORT)  # transformers mistakes mixtral's files for dense llamas
    assert (result.code, result.out) == (1, "")
    assert "llama.cpp can run it: pip install 'steermoe[llamacpp]'" in result.err
    result = run("generate", "x", "-m", gguf, "--engine", "llamacpp")
    assert (result.code, result.out) == (1, "")
    assert "pip install 'steermoe[llamacpp]'" in result.err
    assert result.err.count("\n") == 1


# ---- export ----


def test_export(run, tiny_checkpoint, bare_search_path):
    result = run("models", "export", tiny_checkpoint, "--gguf", "f32")
    assert result.code == 1  # its tokenizer has no merges
    assert "no merges" in result.err
    folder = bare_search_path / "model"
    loaded = tiny_ggufs.build("granitemoeshared")
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    result = run("models", "export", folder, "--gguf", "q8_0")
    assert (result.code, result.out) == (0, "model-q8_0.gguf\n")
    assert len(GGUFReader(bare_search_path / "model-q8_0.gguf").tensors) > 10
    record = json.loads(run("models", "export", folder, "--gguf", "bf16", "-o", "x.gguf", "--json").out)
    assert record["bytes"] == (bare_search_path / "x.gguf").stat().st_size
    assert (record["quantization"], record["path"]) == ("bf16", "x.gguf")


def test_export_refuses(run, bare_search_path):
    folder = bare_search_path / "model"
    loaded = tiny_ggufs.build("phimoe")
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    result = run("models", "export", folder, "--gguf", "q4_1")
    assert (result.code, result.out) == (1, "")
    assert "is phimoe: steermoe exports" in result.err
    assert result.err.count("\n") == 1


# ---- with llama.cpp ----

llama = pytest.mark.skipif(
    auto.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed: make llamacpp"
)


@llama
def test_generate_and_compare(run, gguf, vectors):
    plain = run("generate", "A dog.", "-m", gguf, "--json", *SHORT)
    steered = run("generate", "A dog.", "-d", "sport", "-m", gguf, "--engine", "llamacpp", *SHORT)
    assert plain.code == steered.code == 0, plain.err + steered.err
    assert json.loads(plain.out)["model"] == "tiny-mixtral-f32"
    assert steered.out.startswith("A dog.")
    assert "steered 5 of 11 tokens" in steered.err
    assert run("generate", "A dog.", "-d", "sport", "-m", gguf, "--stream", *SHORT).out == steered.out
    compared = run("compare", "A dog.", "-d", "sport", "-m", gguf, "--json", *SHORT)
    records = [json.loads(line) for line in compared.out.splitlines()]
    assert [record["domain"] for record in records] == [None, "sport"]
    assert records[1]["vector_shares"]["sport"] > records[0]["vector_shares"]["sport"]


@llama
def test_embed_and_build(run, gguf, vectors):
    (vectors / "texts").mkdir()
    for name in ("a", "b"):
        (vectors / "texts" / f"{name}.txt").write_text("the dog ran in an inn")
    result = run("embed", "texts", "-o", "emb", "-m", gguf, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["texts"] == 2
    result = run("vectors", "build", "--texts", "dogs=texts", "--threshold", "1", "-m", gguf)
    assert result.code == 0, result.err
    assert run("generate", "A dog.", "-d", "dogs", "-m", gguf, *SHORT).code == 0
    assert run("embed", "texts", "-o", "emb2", "-m", gguf, "--hidden").err.count("use --engine hf") == 1


@llama
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-d", "other"), "has 3x8 experts"),
        (("-d", "sport", "--layers", "7-9"), "hold no router"),
        (("--ban", "0:99"), "does not exist"),
        (("-d", "sport", "--max-new-tokens", "1"), "would reach none of 1 new tokens"),
        (("-d", "sport", "--strength", "1e39"), "strength 1e+39 is out of range"),
        (("--dtype", "bfloat16"), "belong to --engine hf"),
    ],
)
def test_wrong_input_is_one_clear_line(run, gguf, vectors, arguments, message):
    result = run("generate", "x", "-m", gguf, *arguments)
    assert (result.code, result.out) == (1, "")
    assert message in result.err
    assert result.err.strip().count("\n") == 0


@llama
def test_bad_and_dense_files_are_one_clear_line(run, gguf, vectors):
    bad = vectors / "bad.gguf"
    bad.write_bytes(gguf.read_bytes()[:-4000])
    result = run("generate", "x", "-m", bad, "--engine", "llamacpp")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "is cut off (it has" in result.err
    bad.write_bytes(b"text")
    result = run("generate", "x", "-m", bad, "--engine", "llamacpp")
    assert "is not a GGUF file or is cut off" in result.err
    result = run("generate", "x", "-m", "no.gguf", "--engine", "llamacpp")
    assert "no GGUF file 'no.gguf'" in result.err
