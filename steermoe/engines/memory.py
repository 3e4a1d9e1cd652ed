"""Memory: how much is free, how much a row takes, which errors mean too little, and what C libraries may keep."""

import ctypes
import functools
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SHARE = 0.5
"""The share of the free memory that a batch may take."""
UNKNOWN_FREE = 4 << 30
"""Assumed where a device does not report its free memory."""
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""The numbers of glibc's limits (malloc.h)."""
LIMITS = {MMAP_THRESHOLD: 1 << 30, TRIM_THRESHOLD: 1 << 30, TOP_PAD: 64 << 20}
"""Blocks of up to 1 GiB come from the heap, which keeps 1 GiB; the heaps of threads, 64 MiB each, are kept too."""
KERNEL_CACHES = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "DNNL_PRIMITIVE_CACHE_CAPACITY",
    "LRU_CACHE_CAPACITY": "LRU_CACHE_CAPACITY",
}
KERNELS = "128"
"""What oneDNN and torch read once to know how many compiled kernels to keep (with their earlier names), 1,024 by
default; and how many we let them keep."""


@dataclass(frozen=True)
class Room:
    """How many rows fit into memory.

    Attributes:
        free: bytes that they may take.
        row_bytes, token_bytes: bytes of a row, and of each of its tokens.
    """

    free: int
    row_bytes: int
    token_bytes: int

    def rows(self, tokens: int) -> int:
        """How many rows of this many tokens fit, at least 1."""
        return max(1, self.free // (self.row_bytes + tokens * self.token_bytes))


def free_memory(device: "torch.device | None") -> int:
    """Bytes that are still free: on a GPU, or within the limits of this machine, its container and this process.

    Args:
        device: None for the CPU.
    """
    if device is not None and device.type != "cpu":
        import torch

        module: Any = getattr(torch, device.type, None)
        free = module.mem_get_info(device)[0] if hasattr(module, "mem_get_info") else UNKNOWN_FREE
        return int(free)
    found = [UNKNOWN_FREE]
    with suppress(OSError, ValueError, TypeError):
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        found = [int(match[1]) << 10] if match else found
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    with suppress(ImportError, OSError, ValueError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            found.append(limit - used)
    return max(0, min(found))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was not enough: on a GPU, for torch on a CPU, or for Python."""
    torch = sys.modules.get("torch")  # where it is not loaded, it can't have run out of memory
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and bool(
        re.search(r"not enough memory|out of memory|can'?t allocate memory|cannot allocate memory", text)
    )


@contextmanager
def few_kernels() -> Iterator[None]:
    """Have oneDNN keep few compiled kernels if its first product is computed in here; the user's own limits stay.

    Each number of tokens that an expert gets makes another product of matrices, and each of them takes about 0.2 MiB.
    """
    unset = [name for name, earlier in KERNEL_CACHES.items() if not {name, earlier} & os.environ.keys()]
    os.environ.update(dict.fromkeys(unset, KERNELS))
    try:
        yield
    finally:
        for name in unset:
            os.environ.pop(name, None)


def return_freed_memory() -> None:
    """Return to the system what is free in the heap, where the C library can do so; glibc keeps what lies between."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@functools.cache
def keep_freed_memory() -> bool:
    """Have this process use the memory of a step's large tensors again, and say whether its limits were set.

    By default glibc maps every block above 32 MiB anew, and returns it to the system when it is freed; so do the heaps
    of threads. The kernel then clears the pages of the same logits at every step. Kept memory is at most what was in
    use at once. Does nothing without glibc, nor if the user has set glibc's limits.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    is_set = "glibc.malloc." in tunables or any(name.startswith("MALLOC_") for name in os.environ)
    if is_set or not sys.platform.startswith("linux"):
        return False
    with suppress(OSError, ValueError, AttributeError):
        if not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
            return False
        set_limit = ctypes.CDLL(None).mallopt
        return all(set_limit(limit, size) == 1 for limit, size in LIMITS.items())
    return False
