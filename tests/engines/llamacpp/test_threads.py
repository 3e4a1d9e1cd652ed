"""How many threads llama.cpp gets: as many as torch, which need not be there."""

import sys

import pytest
import torch

from steermoe.engines.llamacpp import threads


@pytest.fixture
def without_torch(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)


def cpus(folder, siblings):
    for number, text in enumerate(siblings):
        place = folder / f"cpu{number}" / "topology"
        place.mkdir(parents=True)
        (place / "thread_siblings_list").write_text(text)
    return folder


def test_torch_decides_where_it_is_loaded(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 17)
    assert threads.default_threads() == 17


@pytest.mark.parametrize(("written", "wanted"), [("3", 3), ("4,2", 4), ("0", 6), ("", 6), ("many", 6)])
def test_variables_decide_otherwise(without_torch, monkeypatch, written, wanted):
    monkeypatch.setattr(threads, "cores", lambda: 6)
    monkeypatch.setenv("OMP_NUM_THREADS", written)
    assert threads.default_threads() == wanted


@pytest.mark.parametrize(
    ("siblings", "wanted"), [(["0\n", "1\n"], 2), (["0,2\n", "1,3\n", "0,2\n", "1,3\n"], 2), (["0-1\n", "0-1\n"], 1)]
)
def test_a_core_counts_once(monkeypatch, tmp_path, siblings, wanted):
    monkeypatch.setattr(threads, "CPUS", cpus(tmp_path, siblings))
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(len(siblings))), raising=False)
    assert threads.cores() == wanted


def test_without_topology_each_cpu_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "CPUS", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    assert threads.cores() == 3
