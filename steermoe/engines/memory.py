"""How much memory is free, how much a row of a batch takes, and which errors mean that it was not enough."""

import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SHARE = 0.5
"""The share of the free memory that a batch may take."""
UNKNOWN_FREE = 4 << 30
"""Assumed where a device does not report its free memory."""


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
