"""The C library keeps the memory of large tensors, unless the user has set its limits."""

import os
import sys
from pathlib import Path

import pytest
import torch

from steermoe.engines import memory

LARGE = 12 << 20
"""Numbers of a tensor of 48 MiB, which glibc would map anew: its own limit is never above 32 MiB."""

glibc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's limits")


def faults_of(count: int) -> int:
    """Pages that the kernel had to provide for so many large tensors, one after the other."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.ones(LARGE)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@glibc
def test_large_tensors_use_the_same_memory_again():
    if not memory.keep_freed_memory():
        pytest.skip("another C library, or limits of the user's own")
    faults_of(4)  # the heap grows
    assert faults_of(8) < 4 * LARGE // os.sysconf("SC_PAGE_SIZE")


@glibc
@pytest.mark.parametrize(
    ("name", "value"), [("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1"), ("MALLOC_TOP_PAD_", "1")]
)
def test_limits_of_the_user_stay(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda *names: pytest.fail("the limits were changed"))
    assert memory.keep_freed_memory.__wrapped__() is False


@pytest.mark.parametrize("failure", [ValueError, OSError])
def test_other_c_libraries_are_left_alone(monkeypatch, failure):
    def refuse(name: str) -> str:
        raise failure(name)

    for name in [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory.os, "confstr", refuse, raising=False)
    assert memory.keep_freed_memory.__wrapped__() is False


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, ["128", "128"]),
        ({"LRU_CACHE_CAPACITY": "7"}, ["128", "7"]),
        ({"DNNL_PRIMITIVE_CACHE_CAPACITY": "7"}, [None, "128"]),
    ],
)
def test_few_kernels_are_kept_unless_the_user_says_otherwise(monkeypatch, own, expected):
    for name in (*memory.KERNEL_CACHES, "DNNL_PRIMITIVE_CACHE_CAPACITY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with memory.few_kernels():
        assert [os.environ.get(name) for name in memory.KERNEL_CACHES] == expected
    assert dict(os.environ) == before


@glibc
def test_freed_memory_is_returned():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not memory.keep_freed_memory():
        pytest.skip("another C library, or limits of the user's own")
    torch.ones(LARGE)
    before = resident()
    memory.return_freed_memory()
    assert resident() < before - 2 * LARGE
