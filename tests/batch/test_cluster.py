"""`steermoe batch --ray` on a cluster of this machine: the same stories, an actor that dies, an interruption."""

import json
import os
import socket
import sys
from pathlib import Path

import pytest

from steermoe.batch import cluster
from steermoe.errors import BatchError
from steermoe.vectors.file import write_vector

NODE = {"CPU": 8.0, "memory": 1e9}
GPU_NODE = {**NODE, "GPU": 4.0}
OPTIONS = ["-d", "sport", "-d", "none", "--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def ray():
    """A cluster of two CPUs that this process is connected to."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'steermoe[ray]'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray.data

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the actors below
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.fixture
def vectors(bare_search_path, make_vector):
    """`sport` for the tiny model, and prompts in p.txt."""
    write_vector(make_vector("sport"), bare_search_path / "steering_vectors" / "tiny" / "sport.safetensors")
    Path("p.txt").write_text("".join(f"It was day {number}.\n" for number in range(12)))
    return bare_search_path


def texts(path):
    """The story of each job; checks that none is there twice."""
    found = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    assert len({story["job"] for story in found}) == len(found)
    return {story["job"]: {name: value for name, value in story.items() if name != "seconds"} for story in found}


class DyingActor(cluster.Actor):
    """Ends its process once, after it has generated a chunk."""

    mark = ""

    def _generate(self, jobs):
        lines = super()._generate(jobs)
        try:
            Path(self.mark).touch(exist_ok=False)
        except FileExistsError:
            return lines
        os._exit(1)


class StrayActor(cluster.Actor):
    """Skips one story of a chunk, and returns the others twice."""

    def _generate(self, jobs):
        return 2 * super()._generate(jobs[1:] or jobs)


class FatalStory(cluster.Actor):
    """Ends its process whenever it gets the story of line 3."""

    def _generate(self, jobs):
        if any(planned.job.line == 3 for planned in jobs):
            os._exit(1)
        return super()._generate(jobs)


class FatalStories(cluster.Actor):
    def _generate(self, jobs):
        os._exit(1)


class BrokenActor(cluster.Actor):
    def _opened(self):
        raise RuntimeError("no such luck\nand more")


class TwoModels(cluster.Actor):
    def __init__(self, open_engine, rows, fingerprint, start):
        super().__init__(open_engine, rows, f"not {fingerprint}", start)


def test_two_actors_generate_what_one_process_generates(ray, run, tiny_checkpoint, vectors):
    plain = run("batch", "p.txt", "-o", "plain.jsonl", *OPTIONS, "--json", "-m", tiny_checkpoint)
    result = run(
        "batch", "p.txt", "-o", "s.jsonl", *OPTIONS, "--ray", "local", "--actors", "2", "--ordered", "--json",
        "--batch-size", "4", "-m", tiny_checkpoint,
    )  # fmt: skip
    assert result.code == 0, result.err
    assert texts("s.jsonl") == texts("plain.jsonl")
    assert [story["line"] for story in texts("s.jsonl").values()] == [n for n in range(1, 13) for _ in range(2)]
    found, expected = json.loads(result.out), json.loads(plain.out)
    assert (found["stories"], found["new"], found["tokens"]) == (24, 24, expected["tokens"])
    assert found["steering"]["tokens_steered"] == expected["steering"]["tokens_steered"]
    assert found["steering"]["vector_share"] == pytest.approx(expected["steering"]["vector_share"])
    assert found["rows"] == 8
    assert ray.is_initialized()


def test_a_prompt_that_is_too_long_is_skipped(ray, run, tiny_checkpoint, vectors):
    Path("p.txt").write_text("A dog.\n" + "long " * 100 + "\n")
    options = ["--errors", "bad.jsonl", "--max-new-tokens", "6", "-m", tiny_checkpoint]
    result = run("batch", "p.txt", "-o", "s.jsonl", "--ray", "local", *options)
    assert (result.code, result.out) == (0, "1 story in s.jsonl, 1 of them new\n")
    (bad,) = map(json.loads, Path("bad.jsonl").read_text().splitlines())
    assert bad["line"] == 2
    assert "256" in bad["error"]


def test_an_actor_that_dies_loses_and_doubles_nothing(ray, run, tiny_checkpoint, vectors, monkeypatch, tmp_path):
    run("batch", "p.txt", "-o", "plain.jsonl", *OPTIONS, "-m", tiny_checkpoint)
    monkeypatch.setattr(DyingActor, "mark", str(tmp_path / "died"))
    monkeypatch.setattr(cluster, "Actor", DyingActor)
    result = run("batch", "p.txt", "-o", "s.jsonl", *OPTIONS, "--ray", "local", "--actors", "2", "-m", tiny_checkpoint)
    assert result.code == 0, result.err
    assert (tmp_path / "died").exists()
    assert result.out.splitlines()[-1] == "24 stories in s.jsonl, 24 of them new"
    assert texts("s.jsonl") == texts("plain.jsonl")


def test_lost_stories_are_generated_again_and_repeated_ones_kept_once(ray, run, tiny_checkpoint, vectors, monkeypatch):
    run("batch", "p.txt", "-o", "plain.jsonl", *OPTIONS, "-m", tiny_checkpoint)
    monkeypatch.setattr(cluster, "Actor", StrayActor)
    result = run("batch", "p.txt", "-o", "s.jsonl", *OPTIONS, "--ray", "local", "-m", tiny_checkpoint)
    assert result.code == 0, result.err
    assert texts("s.jsonl") == texts("plain.jsonl")


def test_a_story_that_kills_its_actors_is_skipped(ray, run, tiny_checkpoint, vectors, monkeypatch):
    options = ["-d", "none", "--max-new-tokens", "6", "-m", tiny_checkpoint]
    run("batch", "p.txt", "-o", "plain.jsonl", *options)
    monkeypatch.setattr(cluster, "Actor", FatalStory)
    monkeypatch.setattr(cluster, "DEATHS", 2)
    result = run("batch", "p.txt", "-o", "s.jsonl", *options, "--ray", "local", "--errors", "bad.jsonl")
    assert (result.code, result.out.splitlines()[-1]) == (0, "11 stories in s.jsonl, 11 of them new")
    (bad,) = map(json.loads, Path("bad.jsonl").read_text().splitlines())
    assert (bad["line"], bad["error"]) == (3, "each of the 2 actors that started it died (is there enough memory?)")
    plain = {job: story for job, story in texts("plain.jsonl").items() if story["line"] != 3}
    assert texts("s.jsonl") == plain


def test_actors_that_die_of_every_chunk_end_the_run(ray, run, tiny_checkpoint, vectors, monkeypatch):
    monkeypatch.setattr(cluster, "Actor", FatalStories)
    monkeypatch.setattr(cluster, "DEATHS", 1)
    monkeypatch.setattr(cluster, "GIVEN_UP", 2)
    result = run("batch", "p.txt", "-o", "s.jsonl", "-d", "none", "--ray", "local", "-m", tiny_checkpoint)
    assert (result.code, result.out) == (1, "")
    assert "steermoe: actors die whatever they generate: is there enough memory on each machine?" in result.err


def test_attempts_of_chunks():
    attempts = cluster.Attempts(2, 3)
    assert [attempts.start(chunk) for chunk in (7, 8, 7, 8)] == ["run"] * 4
    assert [attempts.start(chunk) for chunk in (7, 8, 8, 7)] == ["give up"] * 4
    assert [attempts.start(9) for _ in range(3)] == ["run", "run", "end"]


def test_an_interrupted_run_resumes(ray, run, tiny_checkpoint, vectors, monkeypatch):
    command = ("batch", "p.txt", "-o", "s.jsonl", *OPTIONS, "-m", tiny_checkpoint, "--ray", "local")
    run(*command[:-2], "-o", "plain.jsonl")
    passes = cluster.ClusterWorker._pass

    def interrupted(self, *chunks):
        lines = passes(self, *chunks)
        for _ in range(5):
            yield next(lines)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cluster.ClusterWorker, "_pass", interrupted)
        result = run(*command)
    assert result.code == 130
    assert "the stories so far are in 's.jsonl'; run again to resume" in result.err
    before = Path("s.jsonl").read_bytes()
    assert 0 < before.count(b"\n") <= 5
    with Path("s.jsonl").open("ab") as file:
        file.write(before[:40])  # as a kill tears it
    again = json.loads(run(*command, "--json").out)
    assert (again["stories"], again["already"]) == (24, before.count(b"\n"))
    assert Path("s.jsonl").read_bytes().startswith(before)
    assert texts("s.jsonl") == texts("plain.jsonl")
    assert json.loads(run(*command, "--json").out)["new"] == 0


@pytest.mark.parametrize(
    ("actor", "message"),
    [
        (TwoModels, "'tiny-mixtral' is not the model of the machine that started the run, or has another dtype"),
        (BrokenActor, ": RuntimeError: no such luck\n"),
    ],
)
def test_an_error_on_another_machine_is_one_line_here(ray, run, tiny_checkpoint, vectors, monkeypatch, actor, message):
    monkeypatch.setattr(cluster, "Actor", actor)
    result = run("batch", "p.txt", "-o", "s.jsonl", *OPTIONS, "--ray", "local", "-m", tiny_checkpoint)
    assert result.code == 1
    assert message in result.err
    assert result.err.count("steermoe:") == 1
    assert "Traceback" not in result.err
    assert not Path("s.jsonl").exists()


def test_more_actors_than_fit(ray, run, tiny_checkpoint, vectors):
    result = run("batch", "p.txt", "-o", "s.jsonl", "--ray", "local", "--actors", "3", "-m", tiny_checkpoint)
    assert result.code == 1
    assert "3 actors of 1 CPU each don't fit into the Ray cluster: at most 2 do" in result.err


def test_no_cluster_at_the_address(run, tiny_checkpoint, vectors):
    pytest.importorskip("ray", reason="ray is not installed: pip install 'steermoe[ray]'")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = run("batch", "p.txt", "-o", "s.jsonl", "--ray", address, "-m", tiny_checkpoint)
    assert (result.code, result.out) == (1, "")
    assert f"no Ray cluster at '{address}' (Connection refused): start one with" in result.err
    result = run("batch", "p.txt", "-o", "s.jsonl", "--ray", "nowhere", "-m", tiny_checkpoint)
    assert "--ray 'nowhere': expected auto, local or host:port" in result.err
    result = run("batch", "p.txt", "-o", "s.jsonl", "--ray", "ray://here:10001", "-m", tiny_checkpoint)
    assert "--ray 'ray://here:10001': a Ray client can't drive Ray Data" in result.err


def test_ray_is_missing(run, tiny_checkpoint, vectors, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run("batch", "p.txt", "-o", "s.jsonl", "--ray", "auto", "-m", tiny_checkpoint)
    assert (result.code, result.out) == (1, "")
    assert "--ray needs ray, which is not installed: pip install 'steermoe[ray]'" in result.err


def test_actors_need_ray(run, tiny_checkpoint, vectors):
    result = run("batch", "p.txt", "-o", "s.jsonl", "--actors", "2", "-m", tiny_checkpoint)
    assert (result.code, result.err.strip()) == (1, "steermoe: --actors needs --ray ADDRESS")


@pytest.mark.parametrize(
    ("nodes", "actors", "gpus", "expected"),
    [
        ([NODE], None, 1, (1, 8, 0)),
        ([NODE, NODE, {"CPU": 6.0}], None, 0, (3, 6, 0)),
        ([NODE, {"memory": 1.0}], None, 0, (1, 8, 0)),
        ([NODE, NODE], 4, 1, (4, 4, 0)),
        ([NODE, NODE], 3, 1, (3, 4, 0)),
        ([NODE, GPU_NODE], None, 1, (1, 1, 1)),
        ([GPU_NODE, GPU_NODE], 4, 2, (4, 1, 2)),
        ([GPU_NODE, NODE], None, 0, (2, 8, 0)),
    ],
)
def test_placing(nodes, actors, gpus, expected):
    assert cluster.place(nodes, actors, gpus) == cluster.Placing(*expected)


@pytest.mark.parametrize(
    ("nodes", "actors", "gpus", "message"),
    [
        ([], None, 0, "no machine of the Ray cluster has a free CPU"),
        ([GPU_NODE], 3, 2, "3 actors of 2 GPU each don't fit into the Ray cluster: at most 2 do"),
        ([NODE], 9, 0, "9 actors of 1 CPU each don't fit into the Ray cluster: at most 8 do"),
    ],
)
def test_actors_that_do_not_fit(nodes, actors, gpus, message):
    with pytest.raises(BatchError, match=message):
        cluster.place(nodes, actors, gpus)
