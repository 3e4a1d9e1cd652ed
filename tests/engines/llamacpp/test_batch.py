"""Batches in llama.cpp on a tiny GGUF: the same text in any batch, interruptions, a cache that is too small."""

import json
import random
import re
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support import tiny_ggufs

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make llamacpp")
pytest.importorskip("numba", reason="numba is not installed: make llamacpp")

import llama_cpp

from steermoe.batch.batch import Batch, BatchOptions
from steermoe.batch.jobs import BatchSettings, PromptFile
from steermoe.batch.output import StoryFile
from steermoe.engines.llamacpp.context import Context
from steermoe.engines.llamacpp.engine import CELL_STEP, LlamaCppEngine
from steermoe.engines.request import Request, Sampling
from steermoe.errors import BatchError
from steermoe.steering.resolver import PlanResolver
from steermoe.steering.spec import SteeringSpec
from steermoe.vectors.file import write_vector
from steermoe.vectors.vector import SteeringVector

SETTINGS = BatchSettings(SteeringSpec(), ("",), Sampling(max_new_tokens=6, temperature=1.0), 1)
LINES = "\n".join(
    json.dumps({"prompt": prompt, "id": number, **more})
    for number, (prompt, more) in enumerate(
        [
            ("A dog.", {"domains": ["sport", None, {"sport": 0.5, "food": 0.5}], "samples": 2}),
            ("It rained all night and nobody slept.", {"domain": "food", "max_new_tokens": 11, "schedule": "decay:4"}),
            ("x", {"domain": "sport", "positions": "all", "strength": 9, "formula": "additive"}),
            ("A dog.", {"domain": "food", "positions": "prompt", "seed": 3}),
            ("Far away,", {"temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3, "seed": 77}),
            ("A dog.", {"do_sample": False, "max_new_tokens": 1}),
        ]
    )
)
STORIES = 11


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """8-bit products are sums of whole numbers: equal to the bit, however many rows are computed together."""
    return tiny_ggufs.write(tiny_ggufs.build("mixtral"), tmp_path_factory.mktemp("gguf"), "q8_0")


@pytest.fixture(scope="module")
def engine(file):
    engine = LlamaCppEngine(str(file))
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def place(bare_search_path):
    """An empty folder to work in, with vectors for `sport` and `food`."""
    for expert, domain in ((1, "sport"), (5, "food")):
        frequency = torch.full((2, tiny_ggufs.EXPERTS), 0.1 / tiny_ggufs.EXPERTS)
        frequency[:, expert] += 0.9
        vector = SteeringVector(domain, frequency, (0, 1), threshold=1.0)
        write_vector(vector, bare_search_path / "steering_vectors" / "tiny" / f"{domain}.safetensors")
    return bare_search_path


def run_batch(
    engine, lines: str = LINES, output="s.jsonl", settings=SETTINGS, progress=lambda stories, tokens: None, **more
):
    prompts = Path("p.jsonl")
    prompts.write_text(lines)
    with closing(PromptFile(prompts)) as source, StoryFile(Path(output), False) as stories:
        batch = Batch(engine, source, settings, stories, BatchOptions(**more))
        batch.prepare()
        return batch.run(progress or (lambda stories, tokens: None))


def stories(path="s.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def texts(path="s.jsonl") -> dict:
    found = stories(path)
    assert len({story["job"] for story in found}) == len(found)
    return {story["job"]: (story["text"], story["new_tokens"], story["finish_reason"]) for story in found}


def test_each_story_is_what_generate_gives_for_its_record(engine):
    summary = run_batch(engine, rows=3)
    assert (summary.stories, summary.new, summary.already, summary.failed) == (STORIES, STORIES, 0, 0)
    assert summary.report.tokens_steered > 0
    assert 0 < summary.report.vector_share < 1
    resolver = PlanResolver(engine.shape)
    for story in stories():
        sampling = Sampling(**{name: story[name] for name in Sampling.__dataclass_fields__})
        fields = {n: story[n] for n in ("strength", "formula", "scale", "positions", "schedule")}
        plan = resolver.plan(SteeringSpec(story["domain"] or (), **fields))
        (alone,) = engine.generate([Request(story["prompt"], plan, sampling)])
        assert (story["text"], story["new_tokens"], story["prompt_tokens"], story["finish_reason"]) == (
            alone.text,
            alone.new_tokens,
            alone.prompt_tokens,
            alone.finish_reason,
        )
        assert (story["model"], story["dtype"]) == ("tiny-mixtral-q8_0", "q8_0")
    assert Counter(story["line"] for story in stories()) == {1: 6, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1}


def test_steering_is_each_rows_own(engine):
    lines = "\n".join(
        json.dumps({"prompt": "A dog.", "domain": name, "strength": 9}) for name in ("sport", "food", None)
    )
    run_batch(engine, lines, settings=replace(SETTINGS, sampling=Sampling(max_new_tokens=20, do_sample=False)))
    assert len({story["text"] for story in stories()}) == 3


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_no_story_depends_on_the_batch(engine, rows):
    run_batch(engine, output="all.jsonl")
    run_batch(engine, rows=rows)
    assert texts() == texts("all.jsonl")
    shuffled = LINES.splitlines()
    random.Random(rows).shuffle(shuffled)
    run_batch(engine, "\n".join(shuffled), "shuffled.jsonl", rows=rows)
    assert Counter(texts("shuffled.jsonl").values()) == Counter(texts().values())


@pytest.mark.parametrize("after", [1, 4, 10])
def test_an_interrupted_batch_resumes(engine, after):
    run_batch(engine, output="all.jsonl")
    written = 0

    def progress(done, tokens):
        nonlocal written
        written += done
        if written == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_batch(engine, rows=3, progress=progress)
    with Path("s.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"job": "torn')
    summary = run_batch(engine, rows=3)
    assert (summary.already, summary.new) == (after, STORIES - after)
    assert texts() == texts("all.jsonl")


def test_a_cache_that_is_too_small_for_what_comes_grows(tmp_path, monkeypatch):
    """Rows wait while others fill it, and it is made larger when they are done."""
    monkeypatch.setattr("steermoe.batch.worker.WINDOW", 4)  # the longest are first only among this many
    sizes, most = [], []
    make, forward = Context.__init__, Context.forward

    def watched(self, model, texts, cells, *rest):
        sizes.append(cells)
        make(self, model, texts, cells, *rest)

    def counted(self, tokens, positions, texts, wanted):
        most.append(len(set(texts)))
        forward(self, tokens, positions, texts, wanted)

    monkeypatch.setattr(Context, "__init__", watched)
    monkeypatch.setattr(Context, "forward", counted)
    lines = [json.dumps({"prompt": "A dog.", "seed": seed}) for seed in range(40)]
    lines += [json.dumps({"prompt": "It rained. " * 8, "seed": seed, "max_new_tokens": 200}) for seed in range(12)]
    path = tiny_ggufs.write(tiny_ggufs.build("mixtral", max_position_embeddings=1024), tmp_path, "q8_0")
    fresh = LlamaCppEngine(str(path))
    summary = run_batch(fresh, "\n".join(lines), rows=8)
    assert summary.new == 52
    assert (len(sizes), sizes[0]) == (2, CELL_STEP)
    assert sizes[1] == 2 * CELL_STEP
    assert max(most) == 8
    run_batch(fresh, "\n".join(lines), "alone.jsonl", rows=1)
    assert texts() == texts("alone.jsonl")


def test_stories_of_one_prompt_share_its_computation(engine, monkeypatch):
    read = []
    forward = Context.forward

    def counted(self, tokens, positions, texts, wanted):
        read.extend(place for place in positions if place == 0)
        forward(self, tokens, positions, texts, wanted)

    monkeypatch.setattr(Context, "forward", counted)
    lines = "\n".join(
        json.dumps({"prompt": "A dog.", "domains": ["sport", "food", None], "samples": 3, "positions": positions})
        for positions in ("generated", "all")
    )
    run_batch(engine, lines, rows=18)
    assert len(read) == 1 + 2  # unsteered prompts once, and once for each plan that steers them
    alone = LlamaCppEngine(str(engine.file.path))
    run_batch(alone, lines, "alone.jsonl", rows=1)
    assert texts() == texts("alone.jsonl")


def test_a_cache_that_does_not_fit_is_halved(engine, monkeypatch):
    lines = "\n".join(json.dumps({"prompt": "A dog.", "seed": seed, "max_new_tokens": 100}) for seed in range(16))
    run_batch(engine, lines, "all.jsonl")
    make = llama_cpp.llama_init_from_model
    asked = []

    def limited(model, params):
        asked.append(params.n_ctx)
        return make(model, params) if params.n_ctx <= 5 * CELL_STEP else None

    monkeypatch.setattr(llama_cpp, "llama_init_from_model", limited)
    fresh = LlamaCppEngine(str(engine.file.path))
    summary = run_batch(fresh, lines, rows=16)
    assert (summary.new, summary.failed, summary.rows) == (16, 0, 4)
    assert max(asked) == 16 * CELL_STEP
    assert texts() == texts("all.jsonl")


def test_rows_fit_into_the_memory(engine, monkeypatch):
    monkeypatch.setattr("steermoe.engines.llamacpp.engine.free_memory", lambda device: 1 << 20)
    room = engine.room()
    heads, width = 2, 16  # of keys and values, in each of two layers, 2 bytes a number
    assert room.token_bytes == 2 * heads * (width + width) * 2
    assert room.rows(100) == (1 << 19) // (16 * engine.tokenizer.size + 100 * room.token_bytes)


def test_another_quantization_is_another_story(engine, file, tmp_path):
    run_batch(engine)
    other = tiny_ggufs.write(tiny_ggufs.build("mixtral"), tmp_path, "bf16").rename(tmp_path / file.name)
    quantized = LlamaCppEngine(str(other))
    assert (engine.dtype, quantized.dtype) == ("q8_0", "bf16")
    with pytest.raises(BatchError, match=r"holds 11 stories .* was generated with dtype q8_0, not bf16"):
        run_batch(quantized)
    assert run_batch(LlamaCppEngine(str(file))).new == 0  # the same file again


def test_on_the_command_line(run, file):
    Path("p.txt").write_text("A dog.\nThe cat is here.\n")
    command = ("batch", "p.txt", "-o", "s.jsonl", "-d", "sport", "-d", "none", "--max-new-tokens", "6", "-m", file)
    result = run(*command, "--json")
    assert result.code == 0, result.err
    summary = json.loads(result.out)
    assert (summary["stories"], summary["new"], summary["steering"]["tokens_steered"]) == (4, 4, 10)
    found = {(story["prompt"], story["domain"]): story["text"] for story in stories()}
    single = run("generate", "A dog.", "-d", "sport", "--max-new-tokens", "6", "-m", file, "--json")
    assert json.loads(single.out)["text"] == found["A dog.", "sport"]
    again = run(*command, "--samples", "2", "--engine", "llamacpp")
    assert re.search(r"^8 stories in s.jsonl, 4 of them new$", again.out, re.MULTILINE)
    wrong = run(*command, "--dtype", "float32")
    assert (wrong.code, wrong.err.count("\n")) == (1, 1)
    assert "belong to --engine hf" in wrong.err
