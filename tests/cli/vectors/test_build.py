"""`vectors build` and `vectors mix` on the tiny checkpoint: files, lists, refusals."""

import json
import shutil

import pytest

from steermoe.vectors import file, library
from steermoe.vectors.mixing import mix
from steermoe.vectors.vector import VectorInfo


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
    assert file.read_vector(path).weights is not None
    result = run("generate", "Hi", "--model", tiny_checkpoint, *force.split(), *ban.split(), "--max-new-tokens", "3")
    assert result.code == 0, result.err
    (record,) = json.loads(run(*arguments, "--min-difference", "0.02", "--lists", "2", "--force", "--json").out)
    assert force == " ".join(f"--force {e['layer']}:{e['expert']}" for e in record["force"])


@pytest.fixture
def labelled(texts):
    """One file with texts of three labels."""
    records = [("Sport", "A goal!"), ("food", "Salt and a pan."), ("law", "0123456789"), ("law", "(1) (2)")]
    lines = [json.dumps({"text": text, "kind": kind}) for kind, text in records]
    (texts / "all.jsonl").write_text("\n".join([*lines, "{broken"]))
    return texts


def test_build_takes_the_records_of_a_label(run, tiny_checkpoint, labelled):
    arguments = ["vectors", "build", "--texts", "sport=all.jsonl", "--label-field", "kind", "--model", tiny_checkpoint]
    result = run(*arguments, "--texts", "law=all.jsonl", "--threshold", "1.1")
    assert result.code == 0, result.err
    assert [library.load_vector(domain).info.texts for domain in ("sport", "law")] == [1, 2]
    assert result.err.count("skipped all.jsonl:5: is not JSON") == 1
    (record,) = json.loads(
        run(*arguments, "--against", "all.jsonl", "--min-difference", "0.02", "--force", "--json").out
    )
    assert record["texts"] == 1
    missing = run("vectors", "build", "--texts", "chess=all.jsonl", "--label-field", "kind", "--model", "none")
    assert "no text whose 'kind' is 'chess', there are 'Sport', 'food', 'law'" in missing.err
    names = [argument for kind in ("sport", "food", "law") for argument in ("--texts", f"{kind}=all.jsonl")]
    nothing = run("vectors", "build", *names, "--against", "all.jsonl", "--label-field", "kind", "--model", "none")
    assert "has only texts whose 'kind' is sport, food, law" in nothing.err


def test_the_label_field_changes_what_is_contrasted(run, tiny_checkpoint, labelled):
    """The others are those of no domain: a contrast of a file against itself would be nothing."""
    arguments = ["vectors", "build", "--texts", "sport=all.jsonl", "--against", "all.jsonl", "--model", tiny_checkpoint]
    assert "route alike" in run(*arguments).err
    assert run(*arguments, "--label-field", "kind").code == 0


def test_build_reads_any_files_in_any_encoding(run, tiny_checkpoint, texts):
    (texts / "sport" / "a.md").write_bytes("гол".encode("cp1251"))
    arguments = ["vectors", "build", "--texts", "sport=sport", "--texts", "food=food", "--model", tiny_checkpoint]
    arguments += ["--threshold", "0.5", "--force"]
    result = run(*arguments)
    assert "not read in 'sport': 1 of 3 files (1 .md)" in result.err
    result = run(*arguments, "--include", "*.txt", "--include", "*.md", "--encoding", "cp1251")
    assert result.code == 0, result.err
    assert library.load_vector("sport").info.texts == 3


def test_the_folder_is_called_as_the_model(run, tiny_checkpoint, texts, monkeypatch):
    monkeypatch.chdir(tiny_checkpoint)
    arguments = ["--texts", f"sport={texts}/sport", "--threshold", "1.1", "--model", "."]
    try:
        assert run("vectors", "build", *arguments).out == "steering_vectors/tiny-mixtral/sport.safetensors\n"
    finally:
        shutil.rmtree(tiny_checkpoint / "steering_vectors", ignore_errors=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "sport.safetensors"], "give a folder"),
        (["--output", "sport/0.txt"], "sport/0.txt' is no folder that can be written to"),
        (["--output", "sport/0.txt/deeper"], "sport/0.txt' is no folder that can be written to"),
        (["--against", "none"], "no corpus at 'none'"),
        (["--texts", "food="], "write a domain and the path of its texts"),
    ],
)
def test_build_refuses_before_the_model_is_loaded(run, texts, arguments, message):
    result = run("vectors", "build", "--texts", "sport=sport", *arguments, "--model", "no-such-model")
    assert result.code == 1
    assert message in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--texts", "sport"], "write a domain and the path of its texts"),
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


@pytest.mark.parametrize("rule", ["steermoe", "dsmoe", "safex"])
def test_build_by_the_rule_of_another_paper(run, tiny_checkpoint, texts, rule):
    """Without --texts in `tests/cli/test_on_demand.py`."""
    arguments = ["vectors", "build", "--texts", "sport=sport", "--texts", "food=food", "--model", tiny_checkpoint]
    result = run(*arguments, "--rule", rule, "--experts", "12", "--json")
    assert result.code == 0, result.err
    sport, food = json.loads(result.out)
    assert (sport["domain"], food["domain"]) == ("sport", "food")
    assert f"steermoe vectors build --rule {rule} (" in sport["created_by"]
    assert f"--rule {rule} (" in run("vectors", "show", "sport").out
    vector = library.load_vector("sport")
    assert 0 < int((vector.experts > 0).sum()) <= 12
    result = run("generate", "Hi", "-d", "sport", "--model", tiny_checkpoint, "--max-new-tokens", "3")
    assert result.code == 0, result.err
    assert ("a guess" in result.err) == (rule == "safex")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experts", "5"], "--experts is for another paper's rule"),
        (["--rule", "safex", "--threshold", "2"], "--threshold has no effect on --rule safex"),
        (["--rule", "steermoe", "--lists", "5"], "--lists has no effect on --rule steermoe"),
        (["--rule", "steermoe", "--texts", "sport=sport"], "--rule steermoe compares texts with others"),
        (["--rule", "dsmoe", "--texts", "sport=sport", "--against", "food"], "leave out --against"),
        (["--rule", "dsmoe", "--topic", "pirates"], "--rule dsmoe is for texts that are there"),
        (["--rule", "dsmoe", "--against", "food"], "--against needs texts of your own"),
        (
            ["--rule", "stable", "--texts", "sport=sport", "--against", "food"],
            "--rule stable compares domains with each",
        ),
        (["--rule", "stable", "--lists", "5"], "--lists has no effect on --rule stable: leave it out"),
        (["--rule", "learned", "--threshold", "2"], "--threshold has no effect on --rule learned"),
        (["--rule", "learned", "--experts", "2"], "--experts is for another paper's rule"),
        (["--budget", "0.3"], "--budget is for --rule learned"),
        (["--rule", "dsmoe", "--steps", "3"], "--steps is for --rule learned"),
        (["--rule", "best"], "'best'"),
    ],
)
def test_what_a_rule_can_not_use_is_wrong_usage(run, texts, arguments, message):
    result = run("vectors", "build", *arguments, "--model", "no-such-model")
    assert result.code == 2
    assert message in " ".join(result.err.replace("│", " ").split())


def test_mix_keeps_where_it_comes_from(run, make_vector, bare_search_path):
    folder = bare_search_path / "steering_vectors" / "tiny-mixtral"
    for domain in ("sport", "food"):
        file.write_vector(make_vector(domain), folder / f"{domain}.safetensors")
    result = run("vectors", "mix", "sport=0.7", "food=-0.3", "-o", "picnic")
    assert result.code == 0, result.err
    mixture = file.read_vector(result.out.strip())
    assert mixture.domain == "picnic"
    assert mixture.experts.equal(mix([(make_vector("sport"), 0.7), (make_vector("food"), -0.3)]).experts)
    digest = file.read_header(folder / "sport.safetensors").tensors_sha256[:12]
    assert mixture.info.parts[0] == f"sport=0.7 sha256:{digest}"
    assert mixture.info.created_by == "steermoe vectors mix"
    assert "mixed from" in run("vectors", "show", "picnic").out
    assert "already exists" in run("vectors", "mix", "sport", "-o", "picnic").err
    assert run("vectors", "mix", "sport", "-o", "my/own.safetensors").out == "my/own.safetensors\n"


def test_mixtures_go_to_the_folder_of_their_model(run, make_vector, bare_search_path):
    """Wherever the parts are: here in no model's folder."""
    file.write_vector(make_vector("sport"), bare_search_path / "steering_vectors" / "sport.safetensors")
    file.write_vector(make_vector("food", info=VectorInfo()), bare_search_path / "mine" / "food.safetensors")
    assert run("vectors", "mix", "sport=2", "-o", "much").out == "steering_vectors/tiny-mixtral/much.safetensors\n"
    assert (
        run("vectors", "mix", "mine/food.safetensors", "-o", "meal").out == "steering_vectors/mine/meal.safetensors\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sport=1", "-o", "../x"], "is not allowed"),
        (["none=1", "-o", "x"], "no vector 'none'"),
        (["sport=a", "-o", "x"], "is not a weight"),
        (["sport=0", "-o", "x"], "not all 0"),
    ],
)
def test_mix_refuses(run, make_vector, bare_search_path, arguments, message):
    file.write_vector(make_vector("sport"), bare_search_path / "steering_vectors" / "m" / "sport.safetensors")
    result = run("vectors", "mix", *arguments)
    assert result.code == 1
    assert message in result.err
