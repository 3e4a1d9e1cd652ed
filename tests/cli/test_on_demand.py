"""The commands that build what a model lacks: `generate`, `compare`, `batch`, `calibrate`, `vectors build`."""

import json
import os

import pytest

from steermoe.cli import on_demand
from steermoe.cli.loading import ModelOptions
from steermoe.cli.on_demand import warn_of_script
from steermoe.cli.options import DEFAULT_PROMPT, VectorOptions, read_prompt
from steermoe.discovery import packaged, packaged_vectors
from steermoe.evaluation import provision
from steermoe.models.description import describe
from steermoe.routing.shape import RoutingShape
from steermoe.steering.spec import SteeringSpec

SHORT = ("--max-new-tokens", "6")


@pytest.fixture
def few_texts(monkeypatch, bare_search_path, tmp_path):
    """A few packaged texts of each domain, and folders of the test's own; returns where vectors are kept."""
    monkeypatch.setattr(packaged, "TEXTS", 2)
    monkeypatch.setattr(packaged, "NEUTRAL_TEXTS", 2)
    monkeypatch.setattr(packaged_vectors, "MAX_TOKENS", 60)
    monkeypatch.setattr(provision, "CALIBRATION_TEXTS", 2)
    monkeypatch.setenv("STEERMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "user-data" / "steermoe" / "steering_vectors"


def kept(folder):
    return sorted(f"{path.parent.name}/{path.stem}" for path in folder.rglob("*.safetensors"))


def test_generate_builds_once(run, few_texts, tiny_checkpoint):
    arguments = ("generate", "A dog", "-d", "sport", "--model", tiny_checkpoint, *SHORT)
    first = run(*arguments)
    assert first.code == 0, first.err
    assert "tiny-mixtral has no vector of 'sport': building those of 8 domains from 18 English texts" in first.err
    assert "a guess" not in first.err
    assert len(kept(few_texts)) == 8
    second = run(*arguments)
    assert second.out == first.out
    assert "building" not in second.err
    other = run("compare", "A dog", "-d", "food", "--model", tiny_checkpoint, "--json", *SHORT)
    assert other.code == 0, other.err
    assert "'food' of tiny-mixtral: measuring how strong it may be" in other.err
    assert len([json.loads(line) for line in other.out.splitlines()]) == 2


def test_serve_builds_before_it_listens(run, few_texts, tiny_checkpoint, monkeypatch):
    app = pytest.importorskip("steermoe.serving.app", reason="fastapi is not installed: pip install 'steermoe[serve]'")
    served = []
    monkeypatch.setattr(app, "run", lambda engine, resolver, limits, *_, **__: served.append((resolver, limits)))
    result = run("serve", tiny_checkpoint, "--build", "sport", "--rows", 3, "--queue", 5)
    assert result.code == 0, result.err
    assert "tiny-mixtral has no vector of 'sport'" in result.err
    ((resolver, limits),) = served
    assert "sport" in resolver.domains()
    assert resolver.plan(SteeringSpec(domain=("sport",))).vector.domain == "sport"
    assert (limits.rows, limits.queued) == (3, 5)


def test_the_prompt_or_an_option_chooses_the_language(run, few_texts, tiny_checkpoint):
    found = run("generate", "Пёс Барни", "-d", "sport", "--model", tiny_checkpoint, *SHORT)
    assert "from 18 Russian texts" in found.err
    assert all(name.split("/")[0].endswith("-ru") for name in kept(few_texts))
    assert "trained on English" not in found.err
    assert read_prompt(None, "ru") == packaged.openings("ru")[0]
    assert read_prompt(None, "both") == read_prompt(None) == DEFAULT_PROMPT


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("generate", "A dog", "--chat"), "has no chat template"),
        (("compare", "A dog", "--chat"), "has no chat template"),
        (("chat",), "has no chat template"),
        (("batch", "prompts.txt", "-o", "stories.jsonl", "--chat"), "has no chat template"),
        (("generate", "A dog", "--positions", "answer"), "but this model has none"),
        (("batch", "prompts.txt", "-o", "stories.jsonl", "--positions", "answer"), "but this model has none"),
    ],
)
def test_nothing_is_built_for_what_the_model_cannot_do(
    run, few_texts, tiny_checkpoint, tmp_path, monkeypatch, arguments, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("A dog\n", encoding="utf-8")
    found = run(*arguments, "-d", "sport", "--model", tiny_checkpoint, *SHORT)
    assert (found.code, found.out) == (1, "")
    assert said in found.err
    assert found.err.count("\n") == 1
    assert not kept(few_texts)


def test_no_build_refuses(run, few_texts, tiny_checkpoint):
    found = run("generate", "A dog", "-d", "sport", "--no-build", "--model", tiny_checkpoint)
    assert found.code == 1
    assert found.err.count("\n") == 1
    assert "no vector 'sport'" in found.err
    assert "without --no-build that happens now" in found.err
    assert not kept(few_texts)


def test_other_topics_name_what_there_is(run, few_texts, tiny_checkpoint):
    found = run("generate", "A dog", "-d", "chess", "--model", tiny_checkpoint)
    assert found.code == 1
    assert found.err.count("\n") == 1
    for said in ("no vector 'chess'", "biology, food, law", "--topic", "steermoe vectors build"):
        assert said in found.err


def test_batch_builds_before_the_first_story(run, few_texts, tiny_checkpoint, tmp_path):
    lines = [{"prompt": "Пёс жил у реки.", "domains": ["law", "food"]}, {"prompt": "Кот", "domain": "none"}, {"bad": 1}]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    found = run("batch", prompts, "-o", tmp_path / "stories.jsonl", "--model", tiny_checkpoint, *SHORT)
    assert found.code == 0, found.err
    assert "no vector of 'law', 'food': building" in found.err
    assert "from 18 Russian texts" in found.err
    records = [json.loads(line) for line in (tmp_path / "stories.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(str(record["domain"]) for record in records) == ["None", "food", "law"]


def test_calibrate_builds_first(run, few_texts, tiny_checkpoint):
    found = run("calibrate", "-d", "law", "--model", tiny_checkpoint, "--texts", "2", "--json")
    assert found.code == 0, found.err
    (record,) = json.loads(found.out)
    assert record["domain"] == "law"
    assert record["path"].endswith("law.safetensors")
    assert "then calibrating" not in found.err


def test_vectors_build_without_texts(run, few_texts, tiny_checkpoint, bare_search_path):
    found = run("vectors", "build", "--model", tiny_checkpoint, "--language", "both", "--json")
    assert found.code == 0, found.err
    records = json.loads(found.out)
    assert [record["domain"] for record in records] == list(packaged.DOMAINS)
    assert (bare_search_path / "steering_vectors" / "tiny-mixtral" / "sport.safetensors").is_file()
    assert not kept(few_texts)
    again = run("vectors", "build", "--model", tiny_checkpoint)
    assert (again.code, "--force" in again.err) == (1, True)


@pytest.mark.parametrize("rule", ["steermoe", "dsmoe"])
def test_vectors_build_by_the_rule_of_another_paper(run, few_texts, tiny_checkpoint, rule):
    found = run("vectors", "build", "--model", tiny_checkpoint, "--rule", rule, "--language", "ru", "--json")
    assert found.code == 0, found.err
    records = json.loads(found.out)
    assert [record["domain"] for record in records] == list(packaged.DOMAINS)
    assert all((record["texts"], record["licence"]) == (2, "Apache-2.0") for record in records)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--threshold", "2"], "--threshold needs texts of your own"),
        (["--against", "x"], "--against needs texts of your own"),
        (["--label-field", "x"], "--label-field needs texts of your own"),
        (["--max-tokens", "9"], "--max-tokens needs texts of your own"),
        (["--texts", "a=b", "--language", "ru"], "--language chooses among the packaged texts"),
    ],
)
def test_options_without_effect_are_refused(run, few_texts, tiny_checkpoint, arguments, said):
    found = run("vectors", "build", "--model", tiny_checkpoint, *arguments)
    assert found.code == 2
    assert said in " ".join(found.err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("name", "text", "warns"),
    [
        ("smollm2-moe", "Пёс", True),
        ("smollm2-moe-q8_0", "犬が川", True),
        ("smollm2-moe", "A dog", False),
        ("smollm2-moe", "", False),
        ("other", "Пёс", False),
    ],
)
def test_the_default_model_warns_of_other_scripts(name, text, warns, capsys):
    warn_of_script(RoutingShape(name, (), ()), text)
    said = capsys.readouterr().err
    assert said.count("\n") == warns
    assert ("trained on English" in said) == warns


def test_vllm_gets_its_vectors_from_transformers(few_texts, tiny_checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(ModelOptions, "chosen", "vllm")
    monkeypatch.delenv("VLLM_WORKER_MULTIPROCESSING_METHOD", raising=False)
    model, vectors = ModelOptions(str(tiny_checkpoint), "vllm"), VectorOptions()
    wanted = on_demand.wish(vectors, ["sport"])
    assert on_demand.before_opening(model, VectorOptions(no_build=True), wanted) == {}
    assert not kept(few_texts)
    found = on_demand.before_opening(model, vectors, wanted)
    assert "vLLM can't record routing: tiny-mixtral is loaded in transformers first" in capsys.readouterr().err
    assert os.environ["VLLM_WORKER_MULTIPROCESSING_METHOD"] == "spawn"
    assert [path.is_file() for path in found.values()] == [True]
    monkeypatch.setattr(ModelOptions, "load", None)
    assert on_demand.before_opening(model, vectors, wanted) == found
    assert capsys.readouterr().err == ""
    shape = describe(tiny_checkpoint).shape
    assert vectors.resolver(shape, found).plan(SteeringSpec(domain=("sport",))).strength > 0
