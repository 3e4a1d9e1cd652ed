"""`steermoe batch` on a tiny checkpoint: output, exit codes, pipes, Ctrl-C, kill -9, full devices."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from steermoe.vectors.file import write_vector
from steermoe.vectors.vector import VectorInfo

SHORT = ("--max-new-tokens", "6")


@pytest.fixture
def vectors(bare_search_path, make_vector):
    """`sport` and `food` for the tiny model, in ./steering_vectors, and prompts in p.txt."""
    for domain in ("sport", "food"):
        write_vector(make_vector(domain), bare_search_path / "steering_vectors" / "tiny" / f"{domain}.safetensors")
    Path("p.txt").write_text("A dog.\nIt rained.\n")
    return bare_search_path


def stories(path="s.jsonl"):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_prompts_times_domains_times_samples(run, tiny_checkpoint, vectors):
    options = ["-d", "sport", "-d", "none", "-d", "sport=0.7+food=0.3", "--samples", "2", "-m", tiny_checkpoint, *SHORT]
    result = run("batch", "p.txt", "-o", "s.jsonl", *options)
    assert result.code == 0, result.err
    assert result.out == "12 stories in s.jsonl, 12 of them new\n"
    assert "tokens" in result.err
    generated = {(s["prompt"], s["domain"], s["seed"]) for s in stories()}
    assert generated == {
        (prompt, domain, seed)
        for prompt in ("A dog.", "It rained.")
        for domain in ("sport", None, "sport=0.7+food=0.3")
        for seed in (0, 1)
    }
    again = run("batch", "p.txt", "-o", "s.jsonl", *options, "--json", "--ordered")
    assert "12 of 12 stories are already in 's.jsonl'" in again.err
    record = json.loads(again.out)
    assert (record["output"], record["stories"], record["new"], record["already"]) == ("s.jsonl", 12, 0, 12)
    assert [s["line"] for s in stories()] == [1] * 6 + [2] * 6


def test_a_line_has_every_parameter(run, tiny_checkpoint, vectors):
    options = ["-d", "sport", "--strength", "2", "--schedule", "decay:9", "--ban", "0:3", "-m", tiny_checkpoint, *SHORT]
    assert run("batch", "p.txt", "-o", "s.jsonl", *options).code == 0
    generated = json.loads(run("generate", "A dog.", *options, "--json").out)
    (story,) = (s for s in stories() if s["prompt"] == "A dog.")
    assert {name: story[name] for name in generated.keys() - {"seconds", "steering"}} == {
        name: value for name, value in generated.items() if name not in ("seconds", "steering")
    }
    assert (story["line"], story["sample"], story["ban"], story["force"]) == (1, 0, ["0:3"], [])


def test_strengths_that_are_a_guess_or_too_large_are_said(run, tiny_checkpoint, vectors, make_vector):
    known = {"model": "tiny-mixtral", "architecture": "mixtral", "top_k": 2}
    measured = {"strength": 4.0, "safe_range": (0.0, 5.0), "formula": "max_scaled", "scale": "magnitude"}
    for domain, info in (("war", VectorInfo(**known)), ("law", VectorInfo(**known, **measured))):
        write_vector(make_vector(domain, info=info), vectors / "steering_vectors" / "tiny" / f"{domain}.safetensors")
    lines = [{"prompt": "A dog.", "domain": "law", "strength": 9}, {"prompt": "It.", "domain": "war"}]
    Path("w.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[1] | {"seed": 5}]))
    result = run("batch", "w.jsonl", "-o", "w_stories.jsonl", "-m", tiny_checkpoint, *SHORT)
    assert result.code == 0, result.err
    assert result.err.count("'war' is not calibrated: strength 8 is a guess") == 1
    assert "strength 9 is outside 0 to 5" in result.err


def test_bad_lines(run, tiny_checkpoint, vectors):
    bad = ["nonsense", '{"prompt": 1}', '{"prompt": "x", "domain": "nosuch"}', "[]", '{"a\\u001b[31m": 1}', "{}"]
    Path("p.jsonl").write_text("\n".join(['{"prompt": "A dog."}', *bad, '{"prompt": "It rained."}']))
    result = run("batch", "p.jsonl", "-o", "s.jsonl", "--errors", "bad.jsonl", "-m", tiny_checkpoint, *SHORT)
    assert result.code == 0
    assert result.out == "2 stories in s.jsonl, 2 of them new\n"
    assert "steermoe: skipped line 2: is not JSON" in result.err
    assert "line 7" not in result.err
    assert "6 lines were skipped in total" in result.err
    assert "\x1b" not in result.err
    assert [error["line"] for error in stories("bad.jsonl")] == [2, 3, 4, 5, 6, 7]
    assert [story["line"] for story in sorted(stories(), key=lambda s: s["line"])] == [1, 8]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["missing.txt", "-o", "s.jsonl"], 1, "can't read the prompts 'missing.txt': No such file"),
        (["p.txt", "-o", "no/s.jsonl"], 1, "can't write 'no/s.jsonl': No such file"),
        (["p.txt", "-o", "p.txt"], 1, "would overwrite the prompts"),
        (["p.txt", "-o", "s.jsonl", "--errors", "s.jsonl"], 1, "would overwrite the stories"),
        (["p.txt", "-o", "/dev/full", *SHORT], 1, "can't write '/dev/full': No space left on device"),
        (["p.txt", "-o", "s.jsonl", "--errors", "no/x"], 1, "can't write the errors to 'no/x'"),
        (["p.txt", "-o", "s.jsonl", "--samples", "0"], 1, "samples 0 is out of range"),
        (["p.txt", "-o", "s.jsonl", "--samples", "9000000000000"], 1, "samples 9000000000000 is out of range"),
        (["p.txt", "-o", "s.jsonl", "--strength", "1e39", "-d", "sport"], 1, "strength 1e+39 is out of range"),
        (["p.txt", "-o", "s.jsonl", "-d", "sport=1e300"], 1, "the weight 1e+300 is out of range"),
        (["p.txt", "-o", "s.jsonl", "--temperature", "0"], 1, "temperature 0.0 is out of range"),
        (["p.txt", "-o", "s.jsonl", "--seed", "-1"], 1, "seed -1 is out of range"),
        (["p.txt", "-o", "s.jsonl", "-d", "nosuch"], 1, "no vector 'nosuch'"),
        (["p.txt", "-o", "s.jsonl", "--ban", "0:99"], 1, "does not exist"),
        (["p.txt", "-o", "s.jsonl", "--schedule", "later", "-d", "sport"], 1, "schedule 'later' is unknown"),
        (["p.txt", "-o", "s.jsonl", "--batch-size", "0"], 2, "--batch-size"),
        (["p.txt"], 2, "--output"),
        (["-o", "s.jsonl"], 2, "PROMPTS"),
    ],
)
def test_wrong_input_is_one_clear_line(run, tiny_checkpoint, vectors, arguments, code, message):
    result = run("batch", *arguments, "-m", tiny_checkpoint)
    assert result.code == code
    assert result.out == ""
    assert message in result.err
    assert "Traceback" not in result.err
    if code == 1:
        assert result.err.strip().count("\n") == 0
    assert not Path("s.jsonl").exists()
    assert Path("p.txt").read_text() == "A dog.\nIt rained.\n"


@pytest.mark.parametrize(
    ("options", "reason"),
    [(["--max-new-tokens", "100000"], "shorten the prompt"), (["-d", "sport", "--max-new-tokens", "1"], "would reach")],
)
def test_no_story_at_all_is_an_error(run, tiny_checkpoint, vectors, options, reason):
    result = run("batch", "p.txt", "-o", "s.jsonl", "--errors", "bad.jsonl", "-m", tiny_checkpoint, *options)
    assert result.code == 1
    assert result.out == "0 stories in s.jsonl, 0 of them new\n"
    assert result.err.splitlines()[-1].startswith("steermoe: no story could be generated")
    assert reason in result.err
    assert [reason in error["error"] for error in stories("bad.jsonl")] == [True, True]


def test_other_settings_with_the_same_file(run, tiny_checkpoint, vectors):
    command = ("batch", "p.txt", "-o", "s.jsonl", "-m", tiny_checkpoint)
    run(*command, *SHORT)
    result = run(*command, "--max-new-tokens", "5")
    assert (result.code, result.out) == (1, "")
    assert (
        "holds 2 stories that this run does not ask for (line 1 was generated with max_new_tokens 6, not 5)"
        in result.err
    )
    assert run(*command, "--max-new-tokens", "5", "--keep").out == "2 stories in s.jsonl, 2 of them new\n"
    assert len(stories()) == 4


def test_the_guide_s_commands_run(run, tiny_checkpoint, vectors, make_vector):
    """The commands of docs/batch.md, in order, do what the guide says."""
    for domain in ("law", "space"):
        write_vector(make_vector(domain), vectors / "steering_vectors" / "tiny" / f"{domain}.safetensors")
    guide = (Path(__file__).parents[2] / "docs" / "batch.md").read_text(encoding="utf-8")
    results = []
    for block in re.findall(r"^```console\n(.*?)^```", guide, flags=re.DOTALL | re.MULTILINE):
        for part in re.split(r"^(?=steermoe )|(?<=\n)(?=head|cat bad)", block, flags=re.MULTILINE):
            if part.startswith("steermoe "):
                results.append(run(*shlex.split(part.removesuffix("|| true\n"))[1:], "-m", tiny_checkpoint))
            elif part:
                subprocess.run(["bash", "-ec", part], check=True, capture_output=True)
    assert [result.code for result in results] == [0, 0, 0, 1]
    assert results[0].out == "12 stories in stories.jsonl, 12 of them new\n"
    assert results[2].out == "18 stories in stories.jsonl, 6 of them new\n"
    assert "generated with max_new_tokens 40, not 30" in results[3].err
    assert [(error["line"], "temprature" in error["error"]) for error in stories("bad.jsonl")] == [(4, True)]
    assert sorted(story["line"] for story in stories("letters.jsonl")) == [1, 1, 1, 1, 2, 3]


def command_line(tiny_checkpoint, *arguments):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "steermoe.cli.app", "batch", *arguments, "-m", str(tiny_checkpoint)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def wait_for_stories(process, count):
    while process.poll() is None and (
        not Path("s.jsonl").exists() or len(Path("s.jsonl").read_bytes().splitlines()) < count
    ):
        time.sleep(0.005)


def test_ctrl_c_then_a_kill_then_the_rest_from_a_pipe(run, tiny_checkpoint, vectors, monkeypatch):
    prompts = "".join(f"It was day {i}.\n" for i in range(120))
    Path("p.txt").write_text(prompts)
    options = ("-o", "s.jsonl", "--max-new-tokens", "60", "-d", "sport")
    process = command_line(tiny_checkpoint, "p.txt", *options, "--batch-size", "2")
    wait_for_stories(process, 3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert out == ""
    assert "the stories so far are in 's.jsonl'; run again to resume" in err
    assert "interrupted" in err
    assert "Traceback" not in err
    first = len(stories())
    assert 3 <= first < 120
    process = command_line(tiny_checkpoint, "p.txt", *options, "--batch-size", "2")
    wait_for_stories(process, first + 3)
    process.kill()
    process.communicate(timeout=300)
    second = Path("s.jsonl").read_bytes().count(b"\n")
    assert first + 3 <= second < 120
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(prompts.encode())))
    result = run("batch", "-", *options, "--json", "-m", tiny_checkpoint)
    assert result.code == 0, result.err
    summary = json.loads(result.out)
    assert summary["stories"] == 120
    assert summary["already"] in (second, second + 1)
    assert len({story["job"] for story in stories()}) == len(stories()) == 120
    assert "\x1b" not in result.out + result.err
