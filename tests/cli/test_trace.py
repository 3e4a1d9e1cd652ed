"""`--trace` of `generate`, `compare` and `batch`, and `generate --show-routing`, on a tiny checkpoint."""

import io
import json
import re

import pytest
from rich.console import Console

from steermoe.cli.terminal import routing
from steermoe.engines.trace import Trace

SHORT = ("--max-new-tokens", "6")


def test_generate_writes_a_trace_and_the_same_text(run, tiny_checkpoint, vectors):
    usual = ("generate", "A dog.", "-d", "sport", "-m", tiny_checkpoint, *SHORT)
    plain = run(*usual)
    traced = run(*usual, "--trace", "t.json")
    assert (traced.code, traced.out) == (0, plain.out)
    read = json.loads((vectors / "t.json").read_text())
    (text,) = read["texts"]
    assert text["text"] == json.loads(run(*usual, "--json").out)["text"]
    assert text["strength"] is not None
    assert Trace.from_dict(text["trace"]).text == text["text"]
    assert run(*usual, "--trace", "t.html", "--json").code == 0
    assert "<steermoe-trace" in (vectors / "t.html").read_text()


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_a_trace_is_replaced_only_if_asked(run, tiny_checkpoint, vectors, command):
    usual = (command, "A dog.", "-d", "sport", "-m", tiny_checkpoint, *SHORT, "--trace", "t.json")
    (vectors / "t.json").write_text("mine")
    refused = run(*usual)
    assert (refused.code, refused.out) == (1, "")
    assert "'t.json' already exists: pass --overwrite to replace it, or name another file" in refused.err
    assert (vectors / "t.json").read_text() == "mine"
    assert run(*usual, "--overwrite").code == 0
    assert json.loads((vectors / "t.json").read_text())["texts"]


def test_compare_writes_all_texts(run, tiny_checkpoint, vectors):
    usual = ("compare", "A dog.", "-d", "sport", "-d", "food", "-m", tiny_checkpoint, "--json", *SHORT)
    plain, traced = run(*usual), run(*usual, "--trace", "t.html")
    assert traced.code == 0
    assert [{**json.loads(line), "seconds": 0} for line in traced.out.splitlines()] == [
        {**json.loads(line), "seconds": 0} for line in plain.out.splitlines()
    ]
    assert (vectors / "t.html").read_text().count("<steermoe-trace data") == 3


def test_batch_writes_a_file_for_each_new_story(run, tiny_checkpoint, vectors):
    (vectors / "p.txt").write_text("A dog.\nA cat.\n")
    usual = ("batch", "p.txt", "-d", "sport", "-d", "none", "-m", tiny_checkpoint, *SHORT)
    assert run(*usual, "-o", "plain.jsonl").code == 0
    assert run(*usual, "-o", "s.jsonl", "--trace", "traces/here").code == 0
    stories = [json.loads(line) for line in (vectors / "s.jsonl").read_text().splitlines()]
    plain = [json.loads(line) for line in (vectors / "plain.jsonl").read_text().splitlines()]
    assert [{**one, "seconds": 0} for one in stories] == [{**one, "seconds": 0} for one in plain]
    files = list((vectors / "traces" / "here").iterdir())
    assert {file.name for file in files} == {f"{story['job']}.json" for story in stories}
    for story in stories:
        read = json.loads((vectors / "traces" / "here" / f"{story['job']}.json").read_text())
        trace = Trace.from_dict(read.pop("trace"))
        assert trace.text == story["text"]
        assert [domain.name for domain in trace.domains] == ([] if story["domain"] is None else ["sport"])
        assert {name: read[name] for name in story} == story
    again = run(*usual, "-o", "s.jsonl", "--trace", "more")
    assert "they get no trace: write to another file, or --overwrite" in " ".join(again.err.split())
    assert again.code == 0
    assert list((vectors / "more").iterdir()) == []


@pytest.mark.parametrize(
    ("command", "code", "part"),
    [
        (("generate", "x", "--trace", "t.txt"), 2, "neither .html nor .json"),
        (("compare", "x", "--trace", "t"), 2, "neither .html nor .json"),
        (("generate", "x", "--trace", "no/t.html"), 1, "there is no folder 'no'"),
        (("generate", "x", "--trace", "t.html", "--engine", "vllm"), 1, "use --engine hf, or llamacpp"),
        (("generate", "x", "--show-routing", "--json"), 2, "leave one of them out"),
        (("batch", "p.txt", "-o", "s.jsonl", "--trace", "t", "--ray", "local"), 1, "leave it out, or --ray"),
        (("batch", "p.txt", "-o", "s.jsonl", "--trace", "t", "--engine", "vllm"), 1, "use --engine hf, or llamacpp"),
    ],
)
def test_what_can_not_be_fails_before_a_model_is_loaded(run, vectors, command, code, part):
    (vectors / "p.txt").write_text("x\n")
    result = run(*command, "--model", "/nowhere")
    assert (result.code, result.out) == (code, "")
    assert part in " ".join(result.err.replace("\u2502", " ").split())


@pytest.mark.parametrize("how", [(), ("--stream",), ("--no-stream",)])
def test_a_pipe_gets_the_text_without_colours(run, tiny_checkpoint, vectors, how):
    usual = ("generate", "A dog.", "-d", "sport", "-m", tiny_checkpoint, *SHORT)
    result = run(*usual, "--show-routing", *how)
    assert (result.code, result.out) == (0, run(*usual).out)
    assert "share of each token's places, without and with steering: sport " in result.err
    assert "no colours" in run("generate", "A dog.", "-m", tiny_checkpoint, *SHORT, "--show-routing").err


@pytest.mark.parametrize("how", ["--stream", "--no-stream"])
def test_a_terminal_shows_shares_as_colours_and_no_color_none(run, tiny_checkpoint, vectors, monkeypatch, how):
    usual = ("generate", "A dog.", "-d", "sport", "-m", tiny_checkpoint, "--max-new-tokens", "40", "--seed", "1")
    plain = run(*usual).out
    stream = io.StringIO()
    monkeypatch.setattr(
        routing, "out", Console(file=stream, force_terminal=True, color_system="truecolor", width=20, markup=False)
    )
    run(*usual, "--show-routing", how)
    shown = stream.getvalue()
    assert shown.count("\x1b[38;2;16;16;16;48;2;") >= 2
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown) == plain
    monkeypatch.setattr(routing, "out", Console(file=stream, force_terminal=True, no_color=True))
    assert run(*usual, "--show-routing", how).out == plain
