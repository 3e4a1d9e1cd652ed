"""Prompts as lines of text and JSON: which stories a line asks for, and what is wrong with a bad line."""

import io
import json
from contextlib import closing
from dataclasses import replace

import pytest

from steermoe.batch import jobs
from steermoe.batch.jobs import BatchSettings, Job, Problem, PromptFile
from steermoe.engines.request import Sampling
from steermoe.errors import BatchError
from steermoe.steering.spec import SteeringSpec


@pytest.fixture
def read(tmp_path):
    """Writes lines to a file and reads them back as jobs and problems."""

    def read(content, settings=None, name="prompts.jsonl", format="auto"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        file = PromptFile(path, format)
        try:
            return list(file.jobs(settings or BatchSettings()))
        finally:
            file.close()

    return read


def only(found) -> Job:
    ((job,),) = found
    return job


def test_lines_of_text(read):
    found = read(b"\xef\xbb\xbfA dog.\r\n\n   \n  {not json}\nlast", name="prompts.txt")
    assert [(job.line, job.prompt) for (job,) in found] == [(1, "A dog."), (4, "  {not json}"), (5, "last")]


@pytest.mark.parametrize(
    ("name", "first", "format", "is_json"),
    [
        ("a.txt", '{"prompt": "x"}', "auto", False),
        ("a.jsonl", "A dog.", "auto", True),
        ("a.ndjson", "A dog.", "auto", True),
        ("a", '{"prompt": "x"}', "auto", True),
        ("a", '\n\n{"prompt": "x"}', "auto", True),
        ("a", "[1]", "auto", False),
        ("a", "{A dog.", "auto", False),
        ("a.txt", '{"prompt": "x"}', "jsonl", True),
        ("a.jsonl", '{"prompt": "x"}', "text", False),
    ],
)
def test_format(tmp_path, name, first, format, is_json):
    (tmp_path / name).write_text(first)
    file = PromptFile(tmp_path / name, format)
    assert file.is_json == is_json
    file.close()


def test_cross_product(read):
    settings = BatchSettings(SteeringSpec(strength=2.0), ("sport", "none"), Sampling(seed=7), samples=2)
    found = read("A dog.\nIt rained.\n", settings, "a.txt")
    generated = [(job.prompt, *job.steering.domain, job.sample, job.sampling.seed) for line in found for job in line]
    assert generated == [
        (prompt, domain, sample, 7 + sample)
        for prompt in ("A dog.", "It rained.")
        for domain in ("sport", "none")
        for sample in (0, 1)
    ]
    assert {job.steering.strength for line in found for job in line} == {2.0}


def test_a_json_line_overrides_every_setting(read):
    line = {
        "prompt": "A dog.",
        "id": "a17",
        "domain": {"sport": 0.7, "food": -1},
        "strength": 3,
        "formula": "additive",
        "scale": "paper",
        "positions": "all",
        "schedule": "decay:5",
        "layers": 2,
        "force": ["0:1", [1, 3]],
        "ban": ["0:2"],
        "seed": 9,
        "max_new_tokens": 5,
        "min_new_tokens": 2,
        "do_sample": False,
        "temperature": 1,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "meta": {"any": ["thing", None]},
    }
    job = only(read(json.dumps(line)))
    assert job == Job(
        line=1,
        prompt="A dog.",
        steering=SteeringSpec(
            ("sport=0.7", "food=-1"), 3, "additive", "paper", "all", "decay:5", "2", ("0:1", "1:3"), ("0:2",)
        ),
        sampling=Sampling(5, 2, False, 1, 0.5, 3, 1.5, 9, min_p=0.1),
        id="a17",
        meta=line["meta"],
    )


def test_null_means_the_options_but_a_null_domain_means_none(read):
    settings = BatchSettings(domains=("sport",), sampling=Sampling(seed=4))
    job = only(read('{"prompt": "x", "id": null, "seed": null, "strength": null, "samples": null}', settings))
    assert job == Job(1, "x", SteeringSpec("sport"), Sampling(seed=4))
    assert only(read('{"prompt": "x", "domain": null}', settings)).steering.domain == ("none",)


@pytest.mark.parametrize("name", ["domain", "domains"])
def test_domains_of_a_line(read, name):
    (line,) = read(json.dumps({"prompt": "x", name: ["sport", None, {"food": 0.5}], "samples": 2}))
    assert [(*job.steering.domain, job.sample) for job in line] == [
        (domain, sample) for domain in ("sport", "none", "food=0.5") for sample in (0, 1)
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("A dog.", "is not JSON"),
        ('{"prompt": "x"', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"prompt": "x", "temperature": NaN}', "NaN is not a number"),
        ("[1]", "is of type list, not a JSON object"),
        ("{}", "no field 'prompt'"),
        ('{"prompt": null}', "no field 'prompt'"),
        ('{"prompt": " \\n"}', "empty prompt"),
        ('{"prompt": 3}', "field 'prompt' is 3, expected text"),
        ('{"prompt": "x", "temprature": 1}', "unknown field 'temprature': use prompt, id, domain"),
        ('{"prompt": "x", "seed": 1.5}', "field 'seed' is 1.5, expected a whole number"),
        ('{"prompt": "x", "seed": true}', "field 'seed' is True"),
        ('{"prompt": "x", "seed": -1}', "seed -1 is out of range"),
        ('{"prompt": "x", "seed": 9223372036854775808}', "too large"),
        ('{"prompt": "x", "max_new_tokens": 0}', "max_new_tokens 0 is out of range"),
        ('{"prompt": "x", "temperature": 0}', "temperature 0 is out of range"),
        ('{"prompt": "x", "samples": 0}', "samples 0 is out of range"),
        ('{"prompt": "x", "samples": 9000000000000}', "samples 9000000000000 is out of range: expected 1 or more, and"),
        ('{"prompt": "x", "domains": ["a", "b"], "samples": 50001}', "at most 100000 stories of a prompt"),
        ('{"prompt": "x", "samples": ' + "9" * 5000 + "}", "is not JSON (999"),
        ('{"prompt": "x", "id": ' + "9" * 40 + "}", "too large"),
        ('{"prompt": "x", "meta": 1e400}', "1e400 is not a finite number"),
        ('{"prompt": "x", "meta": ' + "[" * 101 + "]" * 101 + "}", "more than 100 lists"),
        ('{"prompt": "x", "temperature": 1e-300}', "temperature 1e-300 is out of range"),
        ('{"prompt": "x", "repetition_penalty": 1e300}', "repetition_penalty 1e+300 is out of range"),
        ('{"prompt": "x", "top_k": 9999999999}', "top_k 9999999999 is out of range"),
        ('{"prompt": "x", "min_p": 2}', "min_p 2 is out of range: expected 0 to 1"),
        ('{"prompt": "x", "min_p": "much"}', "min_p"),
        ('{"prompt": "x", "ban": [["a", {}]]}', "field 'ban'"),
        ('{"' + "y" * 5000 + '": 1, "prompt": "x"}', "unknown field 'yyy"),
        ('{"prompt": "x", "a\\u001b\\n": 1}', "unknown field 'a\\x1b\\n'"),
        ('{"prompt": "x", "do_sample": 1}', "expected true or false"),
        ('{"prompt": "x", "strength": "4"}', "field 'strength' is '4', expected a number"),
        ('{"prompt": "x", "layers": [1]}', "field 'layers' is [1], expected text such as 15-29"),
        ('{"prompt": "x", "force": "0:1"}', "field 'force' is '0:1', expected a list such as [\"12:5\"]"),
        ('{"prompt": "x", "id": [1]}', "expected text or a whole number"),
        ('{"prompt": "x", "domain": "a", "domains": ["b"]}', "both 'domain' and 'domains'"),
        ('{"prompt": "x", "domains": "a"}', "field 'domains' is 'a', expected a list"),
        ('{"prompt": "x", "domains": []}', "empty list of domains"),
        ('{"messages": []}', "there are no messages"),
        ('{"messages": "x"}', "field 'messages' is 'x', expected a list such as"),
        ('{"messages": ["x"]}', "messages: 'x' is none; expected role and content"),
        ('{"messages": [{"role": "user", "content": 1}]}', "expected role and content, both text"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "role 'robot' is unknown"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "the last message is of role 'assistant'"),
        ('{"messages": [{"role": "user", "content": " "}]}', "is empty"),
        ('{"messages": [{"role": "user", "content": "x"}], "prompt": "x"}', "both 'prompt' and 'messages'"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half a surrogate pair"),
        ('{"prompt": "x", "domain": ""}', "expected a name"),
        ('{"prompt": "x", "domain": {}}', "expected a name"),
        ('{"prompt": "x", "domain": {"sport": "much"}}', "names and weights"),
        ('{"prompt": "\\ud800"}', "half a surrogate pair"),
        ('{"prompt": "x", "meta": "\\ud800"}', "half a surrogate pair"),
        (b'{"prompt": "\xff"}', "is not UTF-8 (byte 12)"),
    ],
)
def test_bad_lines_have_a_number_and_a_reason_and_the_rest_is_read(read, line, reason):
    content = line if isinstance(line, bytes) else line.encode()
    good, bad, other = read(b'{"prompt": "x"}\n\n' + content + b'\n{"prompt": "y"}\n')
    assert isinstance(bad, Problem)
    assert bad.line == 3
    assert reason in bad.reason
    assert str(bad).startswith("line 3: ")
    assert len(bad.text) <= jobs.KEPT_TEXT
    assert len(bad.reason) <= jobs.KEPT_REASON
    assert bad.reason.isprintable()
    assert (good[0].prompt, other[0].prompt) == ("x", "y")


def test_a_line_that_never_ends_does_not_fill_the_memory(read, monkeypatch):
    monkeypatch.setattr(jobs, "MAX_LINE", 50)
    first, second, third = read("a" * 50 + "\n" + "b" * 170 + "\n" + "c" * 50 + "\n", name="a.txt")
    assert first[0].prompt == "a" * 50
    assert second.reason == "is longer than 50 bytes"
    assert (third[0].line, third[0].prompt) == (3, "c" * 50)


def test_stdin_and_pipes_can_be_read_twice(monkeypatch, tmp_path):
    class Stdin:
        buffer = io.BytesIO(b"A dog.\nIt rained.\n")

    monkeypatch.setattr("sys.stdin", Stdin)
    file = PromptFile("-")
    assert not file.is_json
    assert [list(file.jobs(BatchSettings())) for _ in range(2)] == [
        [[Job(1, "A dog.", SteeringSpec(), Sampling())], [Job(2, "It rained.", SteeringSpec(), Sampling())]]
    ] * 2
    file.close()


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_unreadable_prompts(tmp_path, name):
    with pytest.raises(BatchError, match="can't read the prompts"):
        PromptFile(tmp_path / name)


@pytest.mark.parametrize("samples", [0, 10**5 + 1, 10**30])
def test_samples_out_of_range(samples):
    with pytest.raises(BatchError, match=f"samples {samples}"):
        replace(BatchSettings(), samples=samples)
    with pytest.raises(BatchError, match="samples 50001"):
        BatchSettings(domains=("sport", "food"), samples=50001)


def test_the_most_stories_of_a_line_are_fast(read):
    (line,) = read('{"prompt": "x", "samples": 100000, "meta": ' + "[" * 99 + "]" * 99 + "}")
    assert (len(line), line[-1].sampling.seed) == (100_000, 99_999)


def test_what_a_file_needs(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "Пёс", "domain": "law=0.5+food"},
        {"prompt": "A cat", "domains": ["space", None]},
        {"prompt": "", "domain": "music"},
        {"prompt": "A third"},
        {"prompt": "The last", "domain": "biology"},
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    settings = BatchSettings(SteeringSpec(), ("sport",), Sampling(), 1)
    with closing(PromptFile(path)) as file:
        assert file.needs(settings) == (["sport", "law", "food", "space", "biology"], "Пёс\nA cat\nA third\nThe last")
        assert file.needs(settings, most=3) == (["sport", "law", "food", "space", "biology"], "Пёс")
    text = tmp_path / "prompts.txt"
    text.write_text('One "domain\n\nTwo\nThree\n')
    with closing(PromptFile(text)) as file:
        assert file.needs(settings, most=14) == (["sport"], 'One "domain\nTwo')
