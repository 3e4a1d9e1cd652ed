"""How long something may take, and how much memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@contextmanager
def within(seconds: float, memory: int) -> Iterator[None]:
    """Fail if what is inside takes more CPU time, or at its peak more bytes than there were before."""
    if CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")  # forgets the peak so far
    before, started = _peak(), time.process_time()
    yield
    took, grown = time.process_time() - started, _peak() - before
    assert took <= seconds, f"{took:.1f} s, expected {seconds} at most"
    assert grown <= memory, f"{grown:,} bytes, expected {memory:,} at most"


def _peak() -> int:
    """The most bytes that this process has had in memory; 0 where that is not known."""
    if not STATUS.exists():
        return 0
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10
