"""`vectors build` and `vectors mix` on the tiny checkpoint: files, lists, refusals."""

import json

import pytest

from steermoe import library
from steermoe.vectors import mix


@pytest.fixture
def texts(bare_search_path):
    """Folders of texts in the working folder."""
    for domain, lines in {"sport": ["A goal!", "The team ran."], "food": ["Salt and a pan.", "bread"]}.items():
        (bare_search_path / domain).mkdir()
        for number, line in enumerate(lines):
            (bare_search_path / domain / f"{number}.txt").write_text(line)
    return bare_search_path


def test_build_writes_a_vector_a_domain(run, tiny_checkpoint, texts):
    arguments = ["vectors", "build", "--texts", "sport=sport", "--texts", "food=food", "--model", tiny_checkpoint]
    result = run(*arguments, "--threshold", "1.1")
    assert result.code == 0, result.err
    paths = result.out.split()
    assert paths == [f"steering_vectors/tiny-mixtral/{domain}.safetensors" for domain in ("sport", "food")]
    vector = library.load_vector("sport")
    assert vector.info.texts == 2
    assert vector.baseline is not None
    again = run(*arguments)
    assert again.code == 1
    assert "pass --force" in again.err
    assert run(*arguments, "--threshold", "1.1", "--force", "--json").code == 0


def test_build_against_tells_lists_that_generate_takes(run, tiny_checkpoint, texts):
    arguments = ["vectors", "build", "--texts", "sport=sport", "--against", "food", "--model", tiny_checkpoint]
    result = run(*arguments, "--min-difference", "0.02", "--lists", "2")
    assert result.code == 0, result.err
    path, force, ban = result.out.splitlines()
    assert library.read_vector(path).weights is not None
    told = run("generate", "Hi", "--model", tiny_checkpoint, *force.split(), *ban.split(), "--max-new-tokens", "3")
    assert told.code == 0, told.err
    (record,) = json.loads(run(*arguments, "--min-difference", "0.02", "--lists", "2", "--force", "--json").out)
    assert force == " ".join(f"--force {e['layer']}:{e['expert']}" for e in record["force"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--texts", "sport"], "write a domain and where its texts are"),
        (["--texts", "Sport=sport"], "domain name 'Sport' is not allowed"),
        (["--texts", "sport=none"], "no corpus at 'none'"),
        (["--texts", "sport=sport", "--texts", "sport=food"], "names a domain twice"),
        (["--texts", "sport=sport", "--threshold", "7.9"], "the largest is"),
    ],
)
def test_build_refuses(run, tiny_checkpoint, texts, arguments, message):
    result = run("vectors", "build", *arguments, "--model", tiny_checkpoint)
    assert result.code == 1
    assert message in result.err
    assert not (texts / "steering_vectors").exists()


def test_mix_keeps_where_it_comes_from(run, make_vector, bare_search_path):
    folder = bare_search_path / "steering_vectors" / "tiny-mixtral"
    for domain in ("sport", "food"):
        library.write_vector(make_vector(domain), folder / f"{domain}.safetensors")
    result = run("vectors", "mix", "sport=0.7", "food=-0.3", "-o", "picnic")
    assert result.code == 0, result.err
    mixture = library.read_vector(result.out.strip())
    assert mixture.domain == "picnic"
    assert mixture.experts.equal(mix([(make_vector("sport"), 0.7), (make_vector("food"), -0.3)]).experts)
    digest = library.read_header(folder / "sport.safetensors").tensors_sha256[:12]
    assert mixture.info.parts[0] == f"sport=0.7 sha256:{digest}"
    assert mixture.info.created_by == "steermoe vectors mix"
    assert "mixed from" in run("vectors", "show", "picnic").out
    assert "is there already" in run("vectors", "mix", "sport", "-o", "picnic").err
    assert run("vectors", "mix", "sport", "-o", "my/own.safetensors").out == "my/own.safetensors\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sport=1", "-o", "../x"], "is not allowed"),
        (["none=1", "-o", "x"], "no vector 'none'"),
        (["sport=a", "-o", "x"], "is no weight"),
        (["sport=0", "-o", "x"], "not all 0"),
    ],
)
def test_mix_refuses(run, make_vector, bare_search_path, arguments, message):
    library.write_vector(make_vector("sport"), bare_search_path / "steering_vectors" / "m" / "sport.safetensors")
    result = run("vectors", "mix", *arguments)
    assert result.code == 1
    assert message in result.err
