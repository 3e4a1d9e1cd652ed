"""Batches on a tiny model: the same text in every batch, kills, interruptions, full disks, too little memory."""

import json
import os
import random
import resource
import signal
import subprocess
import time
import traceback
import warnings
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steermoe.batch import output as output_module
from steermoe.batch import worker
from steermoe.batch.batch import Batch, BatchOptions, BatchSummary
from steermoe.batch.jobs import BatchSettings, PromptFile
from steermoe.batch.output import ErrorFile, StoryFile
from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.hf.rolling import RollingDecoder
from steermoe.engines.request import Completion, Request, Sampling
from steermoe.errors import BatchError
from steermoe.steering.resolver import PlanResolver
from steermoe.steering.spec import SteeringSpec
from steermoe.vectors.file import write_vector
from tests.support import steering_models as tiny

SHORT = Sampling(max_new_tokens=6, temperature=1.0)
PROMPTS = ["A dog.", "It rained all night and nobody slept.", "x", "Far away,", "The cat is on the mat."]


@pytest.fixture(scope="module")
def loaded():
    return tiny.loaded(tiny.build("mixtral"))


@pytest.fixture
def place(bare_search_path, loaded):
    """An empty folder to work in, with vectors for `sport` and `food`."""
    for domain, expert in (("sport", 1), ("food", 5)):
        vector = tiny.vector_for(loaded.model, expert, domain=domain)
        write_vector(vector, bare_search_path / "steering_vectors" / "tiny" / f"{domain}.safetensors")
    return bare_search_path


def settings(*domains: str, samples: int = 1, steering: SteeringSpec | None = None, **sampling) -> BatchSettings:
    return BatchSettings(steering or SteeringSpec(), domains or ("",), replace(SHORT, **sampling), samples)


def run_batch(
    loaded, prompts: str | Path, output="s.jsonl", wanted: BatchSettings | None = None, **options
) -> BatchSummary:
    """A whole batch, from lines or a file of them."""
    run = {name: options.pop(name) for name in ("ordered", "progress") if name in options}
    overwrite, errors = options.pop("overwrite", False), options.pop("errors", None)
    if isinstance(prompts, str):
        Path("p.jsonl" if prompts.startswith("{") else "p.txt").write_text(prompts)
        prompts = Path("p.jsonl" if prompts.startswith("{") else "p.txt")
    with (
        closing(PromptFile(prompts)) as source,
        StoryFile(Path(output), overwrite) as stories,
        closing(ErrorFile(errors)) as left_out,
    ):
        options = BatchOptions(errors=left_out, **options)
        batch = Batch(HFEngine(loaded), source, wanted or settings(), stories, options)
        batch.prepare()
        summary = batch.run(**run)
    assert tiny.traces(loaded.model) == []
    return summary


def stories(path="s.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def texts(path="s.jsonl") -> dict:
    """The text of each job; checks that none is there twice."""
    found = stories(path)
    assert len({story["job"] for story in found}) == len(found)
    return {story["job"]: (story["text"], story["new_tokens"], story["finish_reason"]) for story in found}


LINES = "\n".join(
    json.dumps({"prompt": prompt, "id": number, **more})
    for number, (prompt, more) in enumerate(
        [
            ("A dog.", {"domains": ["sport", None, {"sport": 0.5, "food": 0.5}], "samples": 2}),
            ("It rained all night and nobody slept.", {"domain": "food", "max_new_tokens": 11, "schedule": "decay:4"}),
            ("x", {"domain": "sport", "positions": "all", "strength": 9, "formula": "additive"}),
            ("Far away,", {"temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3, "seed": 77}),
            ("A dog.", {"do_sample": False, "max_new_tokens": 1}),
        ]
    )
)


def test_each_story_is_what_generate_gives_for_its_record(loaded, place):
    summary = run_batch(loaded, LINES, rows=3)
    assert (summary.stories, summary.new, summary.already) == (10, 10, 0)
    assert summary.tokens == sum(story["new_tokens"] for story in stories())
    assert summary.report.tokens_steered > 0
    engine = HFEngine(loaded)
    resolver = PlanResolver(engine.shape)
    for story in stories():
        assert next(iter(story)) == "job"
        sampling = Sampling(**{name: story[name] for name in Sampling.__dataclass_fields__})
        fields = {n: story[n] for n in ("strength", "formula", "scale", "positions", "schedule")}
        plan = resolver.plan(SteeringSpec(story["domain"], **fields)) if story["domain"] else None
        (alone,) = engine.generate([Request(story["prompt"], plan, sampling)])
        assert (story["text"], story["new_tokens"], story["prompt_tokens"], story["finish_reason"]) == (
            alone.text,
            alone.new_tokens,
            alone.prompt_tokens,
            alone.finish_reason,
        )
        assert story["model"] == "tiny"
    assert Counter(story["line"] for story in stories()) == {1: 6, 2: 1, 3: 1, 4: 1, 5: 1}
    assert [story["id"] for story in stories() if story["line"] == 4] == [3]


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_no_story_depends_on_the_batch(loaded, place, rows):
    run_batch(loaded, LINES, "all.jsonl")
    run_batch(loaded, LINES, rows=rows)
    assert texts() == texts("all.jsonl")
    shuffled = LINES.splitlines()
    random.Random(rows).shuffle(shuffled)
    run_batch(loaded, "\n".join(shuffled[:4]), "part.jsonl", rows=rows)
    assert texts("part.jsonl").items() <= texts("all.jsonl").items()


def test_a_second_run_generates_only_what_is_missing(loaded, place):
    run_batch(loaded, "A dog.\nIt rained.\n", wanted=settings("sport"))
    before = Path("s.jsonl").read_bytes()
    again = run_batch(loaded, "A dog.\nIt rained.\n", wanted=settings("sport"))
    assert (again.stories, again.new, again.already) == (2, 0, 2)
    assert Path("s.jsonl").read_bytes() == before
    more = run_batch(loaded, "It rained.\nA cat.\nA dog.\n", wanted=settings("sport", "none", samples=2))
    assert (more.stories, more.new, more.already) == (12, 10, 2)
    assert Path("s.jsonl").read_bytes().startswith(before)
    run_batch(loaded, "It rained.\nA cat.\nA dog.\n", "fresh.jsonl", wanted=settings("sport", "none", samples=2))
    assert texts() == texts("fresh.jsonl")


@pytest.mark.parametrize(
    ("now", "prompts", "why"),
    [
        (settings("sport", temperature=0.9), "A dog.", "line 1 was generated with temperature 1.0, not 0.9"),
        (settings("sport", max_new_tokens=5), "A dog.", "max_new_tokens 6, not 5"),
        (settings("sport", min_p=0.2), "A dog.", "min_p 0.0, not 0.2"),
        (settings("sport", steering=SteeringSpec(strength=2.0)), "A dog.", "strength 5.0, not 2.0"),
        (settings("sport", steering=SteeringSpec(schedule="decay:3")), "A dog.", "schedule constant, not decay:3"),
        (settings("sport"), "A cat.", "line 1 has another prompt"),
        (settings("food"), "A dog.", "line 1 has another prompt, domain"),
        (settings("sport", seed=1), "A dog.", "line 1 has another prompt, domain, seed"),
    ],
)
def test_other_settings_are_not_mixed_into_a_file(loaded, place, now, prompts, why):
    first = settings("sport", steering=SteeringSpec(strength=5.0))
    now = replace(now, steering=replace(now.steering, strength=now.steering.strength or 5.0))
    run_batch(loaded, "A dog.", wanted=first)
    before = Path("s.jsonl").read_bytes()
    with pytest.raises(BatchError, match=f"holds 1 story that this run does not ask for .*{why}.*--keep.*--overwrite"):
        run_batch(loaded, prompts, wanted=now)
    assert Path("s.jsonl").read_bytes() == before
    assert run_batch(loaded, prompts, wanted=now, keep=True).new == 1
    assert Path("s.jsonl").read_bytes().startswith(before)
    assert len(stories()) == 2
    assert run_batch(loaded, prompts, wanted=now, overwrite=True).new == 1
    assert len(stories()) == 1


def test_special_tokens_of_prompts_are_encoded_on_request(loaded, place):
    as_text, as_tokens = (replace(settings(), special_tokens=special) for special in (False, True))
    run_batch(loaded, "<s>A dog.", wanted=as_text)
    with pytest.raises(BatchError, match="line 1 was generated without --special-tokens"):
        run_batch(loaded, "<s>A dog.", wanted=as_tokens)
    run_batch(loaded, "<s>A dog.", wanted=as_tokens, keep=True)
    found = [(story["prompt_tokens"], story.get("special_tokens", False)) for story in stories()]
    assert found == [(len("<s>A dog."), False), (1 + len("A dog."), True)]
    with pytest.raises(BatchError, match="line 2 was generated with --special-tokens"):
        run_batch(loaded, "<s>A dog.", wanted=as_text)


def test_another_vector_or_model_of_the_same_name_is_noticed(loaded, place):
    run_batch(loaded, "A dog.", wanted=settings("sport"))
    write_vector(tiny.vector_for(loaded.model, 7), place / "steering_vectors" / "tiny" / "sport.safetensors")
    with pytest.raises(BatchError, match="another prompt, domain, seed, vector, model or engine"):
        run_batch(loaded, "A dog.", wanted=settings("sport"))
    run_batch(loaded, "A dog.", overwrite=True)
    with pytest.raises(BatchError, match="another prompt, domain, seed, vector, model or engine"):
        run_batch(tiny.loaded(tiny.build("mixtral", seed=1)), "A dog.")


def test_bad_lines_are_reported_and_skipped_and_the_rest_runs(loaded, place):
    reported = []
    lines = [
        {"prompt": "A dog."},
        {"prompt": "x" * 300, "domains": ["sport", "food"]},
        {"prompt": "x", "domain": "nosuch"},
        {"prompt": "x", "domain": "sport", "layers": "9-11"},
        {"prompt": "x", "domain": "sport", "strength": 1e999},
        {"prompt": "A cat.", "sed": 3},
        {"prompt": "A dog."},
        {"prompt": "A dog.", "id": "again"},
    ]
    content = "\n".join(json.dumps(line) for line in lines).replace("Infinity", "1e999")
    summary = run_batch(loaded, content, errors=Path("bad.jsonl"), on_problem=reported.append)
    assert (summary.stories, summary.lines_left_out, summary.failed) == (2, 5, 2)
    found = {error["line"]: error for error in stories("bad.jsonl")}
    assert len(stories("bad.jsonl")) == len(found) == len(reported) == 6
    expected = {
        2: "the prompt has 300 tokens",
        3: "no vector 'nosuch'",
        4: "hold no router",
        5: "finite number",
        6: "'sed'",
        7: "the same story as an earlier line: give it a seed or an id",
    }
    assert {number: text in found[number]["error"] for number, text in expected.items()} == dict.fromkeys(found, True)
    assert [(story["line"], story["id"]) for story in sorted(stories(), key=lambda s: s["line"])] == [
        (1, None),
        (8, "again"),
    ]
    again = run_batch(loaded, content, errors=Path("bad.jsonl"))
    assert (again.new, again.already, again.lines_left_out) == (0, 2, 5)
    assert len(stories("bad.jsonl")) == 6


def test_a_story_that_no_steering_would_reach_is_named_and_not_written(loaded, place):
    lines = [
        {"prompt": "A dog.", "domain": "sport"},
        {"prompt": "A dog.", "domain": "sport", "max_new_tokens": 1},
        {"prompt": "A dog.", "domain": "sport", "schedule": "window:50-60"},
        {"prompt": "A dog.", "domain": "sport", "max_new_tokens": 1, "positions": "all"},
        {"prompt": "A dog.", "max_new_tokens": 1},
    ]
    summary = run_batch(loaded, "\n".join(map(json.dumps, lines)), errors=Path("bad.jsonl"))
    assert (summary.stories, summary.failed) == (3, 2)
    assert sorted(story["line"] for story in stories()) == [1, 4, 5]
    found = sorted(stories("bad.jsonl"), key=lambda error: error["line"])
    assert [error["line"] for error in found] == [2, 3]
    assert "would reach none of 1 new tokens" in found[0]["error"]
    assert "schedule window:50-60" in found[1]["error"]


def test_a_story_that_ends_before_it_is_steered_is_named(loaded, place, monkeypatch):
    generated = Completion.missed.fget
    monkeypatch.setattr(
        Completion, "missed", property(lambda done: generated(replace(done, finish_reason="stop", token_ids=())))
    )
    lines = [{"prompt": "A dog.", "domain": "sport", "schedule": "window:1-9"}, {"prompt": "A cat."}]
    summary = run_batch(loaded, "\n".join(map(json.dumps, lines)), errors=Path("bad.jsonl"))
    assert (summary.stories, summary.new, summary.failed) == (1, 1, 1)
    assert [error["line"] for error in stories("bad.jsonl")] == [1]
    assert "ended after 0 tokens, before any" in stories("bad.jsonl")[0]["error"]


def test_no_number_of_a_line_ends_the_batch(loaded, place):
    digits = [9 * "9", 20 * "9", 400 * "9", 5000 * "9"]
    bad = [
        *(f'{{"prompt": "x", "domain": {{"sport": {number}}}}}' for number in (*digits, "1e400", "-1e300", "1e-300")),
        *(f'{{"prompt": "x", "domain": "sport={number}"}}' for number in (*digits, "1e400", "1e-300")),
        *(f'{{"prompt": "x", "domain": "sport", "strength": {number}}}' for number in (*digits, "1e39", "-1e400")),
        *(f'{{"prompt": "x", "domain": "sport", "schedule": "decay:{number}"}}' for number in digits[1:]),
        *(f'{{"prompt": "x", "domain": "sport", "schedule": "window:0-{number}"}}' for number in digits[1:]),
        *(f'{{"prompt": "x", "domain": "sport", "layers": "{number}"}}' for number in digits),
        *(f'{{"prompt": "x", "domain": "sport", "layers": [0, {number}]}}' for number in digits[2:]),
        *(f'{{"prompt": "x", "ban": ["0:{number}"]}}' for number in digits),
        *(f'{{"prompt": "x", "ban": [[{number}, 0]]}}' for number in digits),
        *(f'{{"prompt": "x", "samples": {number}}}' for number in (*digits, "9e12", "-1")),
        *(f'{{"prompt": "x", "{name}": {digits[3]}}}' for name in ("seed", "temperature", "top_p", "id", "meta")),
        '{"prompt": "x", "formula": "nosuch"}',
        '{"prompt": "x", "domain": null, "positions": "nosuch"}',
    ]
    reported = []
    summary = run_batch(loaded, "\n".join([*bad, '{"prompt": "A dog."}']), on_problem=reported.append)
    assert (summary.stories, summary.lines_left_out, summary.failed) == (1, len(bad), 0)
    assert [problem.line for problem in reported] == list(range(1, len(bad) + 1))
    assert all(problem.reason.isprintable() and len(problem.reason) <= 500 for problem in reported)


def test_prompts_that_change_meanwhile_are_noticed(loaded, place, monkeypatch):
    monkeypatch.setattr(worker, "WINDOW", 4)

    def shrink(done, tokens):
        Path("p.txt").write_text("A dog.\n")

    prompts = "\n".join(f"{number} dogs{' ran' * 35}" for number in range(1000))
    with pytest.raises(BatchError, match=r"'p.txt' changed while the batch ran: [0-9]+ of 1000 stories"):
        run_batch(loaded, prompts, progress=shrink, wanted=settings(max_new_tokens=1))
    assert 0 < len(stories()) < 1000


@pytest.mark.parametrize("job", ["f" * 17, "9" * 30, "0x1", "-1", "F" * 16])
def test_a_job_that_no_batch_has_written(loaded, place, job):
    Path("s.jsonl").write_text(json.dumps({"job": job}) + "\n")
    with pytest.raises(BatchError, match=r"line 1 of 's.jsonl' is not a story: .*--overwrite"):
        run_batch(loaded, "A dog.")
    assert run_batch(loaded, "A dog.", overwrite=True).new == 1


@pytest.mark.parametrize("content", ["", "\n \n", '{"prompt": 3}\n'])
def test_no_prompts_at_all(loaded, place, content):
    with pytest.raises(BatchError, match="holds no prompts"):
        run_batch(loaded, content)
    assert not Path("s.jsonl").exists()


def test_ordered(loaded, place, monkeypatch):
    wanted = settings("sport", "none", samples=2)
    prompts = "\n".join(PROMPTS * 2 + ["last"])
    run_batch(loaded, prompts, wanted=wanted, rows=3)
    place_of = [(story["line"], story["domain"] is None, story["sample"]) for story in stories()]
    assert place_of != sorted(place_of)
    unordered = texts()
    summary = run_batch(loaded, prompts, wanted=wanted, rows=3, ordered=True)
    assert summary.new == 0
    place_of = [(story["line"], story["domain"] is None, story["sample"]) for story in stories()]
    assert place_of == sorted(place_of)
    assert texts() == unordered


def test_stories_of_one_prompt_share_its_computation(loaded, place, monkeypatch):
    widths = []
    forward = RollingDecoder._forward
    monkeypatch.setattr(
        RollingDecoder,
        "_forward",
        lambda self, tokens, *rest: widths.append(tokens.shape) or forward(self, tokens, *rest),
    )
    run_batch(loaded, "A dog.", wanted=settings("sport", "food", "none", samples=4))
    assert widths[0] == (1, 6)
    assert widths[1] == (12, 1)


def test_rows_are_refilled_while_others_continue(loaded, place, monkeypatch):
    """Lengths that differ much, four rows: far fewer steps than batches of four that wait for their longest."""
    lengths = [40, 3, 3, 3] * 5
    lines = "\n".join(
        json.dumps({"prompt": f"It {i}", "max_new_tokens": n, "min_new_tokens": n}) for i, n in enumerate(lengths)
    )
    steps = []
    step = RollingDecoder.step
    monkeypatch.setattr(RollingDecoder, "step", lambda self: steps.append(len(self)) or step(self))
    run_batch(loaded, lines, rows=4)
    assert len(steps) < 40 * 5 * 0.45
    assert max(steps) == 4


# ---- memory ----


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1234 bytes."),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_batch_that_is_too_large_is_halved_and_continues(loaded, place, monkeypatch, error):
    run_batch(loaded, LINES, "all.jsonl")
    forward, most = RollingDecoder._forward, 3

    def limited(self, tokens, *rest):
        if len(tokens) > most:
            raise error
        return forward(self, tokens, *rest)

    monkeypatch.setattr(RollingDecoder, "_forward", limited)
    summary = run_batch(loaded, LINES, rows=9)
    assert summary.rows == 2
    assert (summary.new, summary.failed) == (10, 0)
    assert texts() == texts("all.jsonl")


def test_a_story_too_large_even_alone_is_skipped(loaded, place, monkeypatch):
    forward = RollingDecoder._forward

    def limited(self, tokens, mask, *rest):
        if mask.shape[1] > 30:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, tokens, mask, *rest)

    monkeypatch.setattr(RollingDecoder, "_forward", limited)
    prompts = "\n".join([f"It {i}" for i in range(40)] + ["x" * 60] + [f"So {i}" for i in range(40)])
    summary = run_batch(loaded, prompts, rows=4, errors=Path("bad.jsonl"))
    assert (summary.new, summary.failed) == (80, 1)
    assert summary.rows == 4  # halved to one row, and back
    assert "not enough memory for this story alone" in stories("bad.jsonl")[0]["error"]
    assert stories("bad.jsonl")[0]["line"] == 41


def test_other_errors_are_not_mistaken_for_too_little_memory(loaded, place, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(RollingDecoder, "_forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_batch(loaded, LINES)
    assert tiny.traces(loaded.model) == []


def test_rows_fit_into_the_memory(loaded, place, monkeypatch):
    from steermoe.engines import memory
    from steermoe.engines.hf import engine

    most = []
    step = RollingDecoder.step
    monkeypatch.setattr(RollingDecoder, "step", lambda self: most.append(len(self)) or step(self))
    row = engine.LOGITS_BYTES * tiny.VOCABULARY + (6 + 6) * (2 * tiny.LAYERS * 2 * 16 * 4)
    monkeypatch.setattr(engine, "free_memory", lambda device: int(3.5 * row / memory.SHARE))
    run_batch(loaded, "A dog.", wanted=settings(samples=10))
    assert max(most) == 3


def test_thousands_of_prompts_take_no_more_memory(loaded, place):
    """5,000 more prompts add their numbers to the memory, not their stories."""
    prompts = Path("many.txt")
    prompts.write_text("".join(f"It {i}\n" for i in range(5_500)))
    used, count = [], 0

    def progress(done, tokens):
        nonlocal count
        count += done
        if count % 500 == 0:
            used.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())

    summary = run_batch(loaded, prompts, wanted=settings(max_new_tokens=2), progress=progress)
    assert summary.new == 5_500
    assert used[-1] - used[0] < 16 << 20
    assert len(texts()) == 5_500


# ---- interruptions and full disks ----


def in_child(work) -> int:
    """A fork of this process, in which torch and the model are ready."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def test_kills_at_random_points_lose_and_double_nothing(loaded, place):
    wanted = settings("sport", "none", samples=3)
    prompts = "\n".join(f"{prompt} {i}" for i in range(4) for prompt in PROMPTS)
    started = time.monotonic()
    run_batch(loaded, prompts, "all.jsonl", wanted=wanted, rows=8)
    whole = time.monotonic() - started
    chance, kills, seen = random.Random(4), 0, [0]
    for _ in range(60):
        child = in_child(lambda: run_batch(loaded, prompts, wanted=wanted, rows=8))
        time.sleep(chance.uniform(0.1, 0.6) * whole)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        content = Path("s.jsonl").read_bytes() if Path("s.jsonl").exists() else b""
        seen.append(content.count(b"\n"))
        assert seen[-1] >= seen[-2]
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        kills += 1
    run_batch(loaded, prompts, wanted=wanted, rows=8)
    assert kills >= 3
    assert texts() == texts("all.jsonl")


def test_a_kill_in_the_middle_of_a_write(loaded, place):
    wanted = settings("sport")
    prompts = "\n".join(PROMPTS)
    run_batch(loaded, prompts, "all.jsonl", wanted=wanted)

    def tear_third():
        write, calls = os.write, []

        def torn(fd, content):
            calls.append(1)
            if len(calls) == 3:
                write(fd, content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return write(fd, content)

        output_module.os.write = torn
        run_batch(loaded, prompts, wanted=wanted, rows=2)

    _, status = os.waitpid(in_child(tear_third), 0)
    assert os.WIFSIGNALED(status)
    content = Path("s.jsonl").read_bytes()
    assert content.count(b"\n") == 2
    assert not content.endswith(b"\n")
    summary = run_batch(loaded, prompts, wanted=wanted)
    assert (summary.already, summary.new) == (2, 3)
    assert texts() == texts("all.jsonl")


def test_interrupted(loaded, place):
    def stop(done, tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_batch(loaded, "\n".join(PROMPTS), progress=stop)
    assert tiny.traces(loaded.model) == []
    assert len(stories()) == 1
    assert run_batch(loaded, "\n".join(PROMPTS)).already == 1


def test_disk_full(loaded, place, tmp_path):
    """A file system of 16 KB, if one can be mounted: stories until it is full, the rest once it is larger."""
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", small]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        prompts, wanted = "\n".join(PROMPTS), settings(samples=20)
        with pytest.raises(BatchError, match=r"No space left on device; the stories in it are complete: make room"):
            run_batch(loaded, prompts, small / "s.jsonl", wanted=wanted)
        written = len(stories(small / "s.jsonl"))
        assert 0 < written < 100
        assert (small / "s.jsonl").read_bytes().endswith(b"\n")
        subprocess.run(["mount", "-o", "remount,size=1m", small], check=True, capture_output=True)
        summary = run_batch(loaded, prompts, small / "s.jsonl", wanted=wanted)
        assert (summary.already, summary.new) == (written, 100 - written)
        assert len(texts(small / "s.jsonl")) == 100
    finally:
        subprocess.run(["umount", small], check=True)


def test_windows_are_sorted_and_joined(loaded, place, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(worker, "WINDOW", 3)
        run_batch(loaded, LINES, rows=2)
    run_batch(loaded, LINES, "all.jsonl")
    assert texts() == texts("all.jsonl")


def test_models_whose_rows_cannot_change_run_batch_by_batch(place):
    from steermoe.engines.hf.static import StaticDecoder
    from tests.support import tiny_models

    loaded = tiny.loaded(tiny_models.build("granitemoehybrid", vocab_size=tiny.VOCABULARY))
    assert isinstance(HFEngine(loaded).decoder(2), StaticDecoder)
    vector = tiny.vector_for(loaded.model, 3, domain="mist")
    write_vector(vector, place / "steering_vectors" / "tiny" / "mist.safetensors")
    wanted = settings("mist", "none", samples=2)
    together = run_batch(loaded, "\n".join(PROMPTS), wanted=wanted)
    assert together.new == 20
    assert together.report.tokens_steered > 0
    run_batch(loaded, "\n".join(PROMPTS), "single.jsonl", wanted=wanted, rows=1)
    assert texts() == texts("single.jsonl")


# ---- other programs ----


def saved_by_sed(path: Path) -> None:
    """As `sed -i` and many editors do: a changed copy takes the name of the file."""
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


@pytest.mark.parametrize(
    "change",
    [saved_by_sed, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])],
    ids=["replaced", "removed", "rewritten"],
)
def test_an_output_that_another_program_changes_ends_the_batch_and_is_resumed(loaded, place, change):
    """Stories never go to a file that is no longer there."""
    whole = run_batch(loaded, "\n".join(PROMPTS), "whole.jsonl").stories
    calls = []

    def meddle(done, tokens):
        calls.append(done)
        if len(calls) == 2:
            change(Path("s.jsonl"))

    with pytest.raises(BatchError, match=r"by another program during the run: leave it alone and run again"):
        run_batch(loaded, "\n".join(PROMPTS), progress=meddle, rows=1)
    run_batch(loaded, "\n".join(PROMPTS))
    assert len(stories()) == whole == len(PROMPTS)
    assert sorted(map(text_of, stories())) == sorted(map(text_of, stories("whole.jsonl")))


def text_of(story: dict) -> tuple[str, str]:
    return (story["job"], story["text"])
