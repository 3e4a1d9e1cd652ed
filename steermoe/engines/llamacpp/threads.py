"""How many threads llama.cpp computes with: as many as torch would take, which is not imported to be asked."""

import os
import sys
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def default_threads() -> int:
    """As many as torch has, if it is loaded; else what its variables say; else a thread for each core."""
    if (torch := sys.modules.get("torch")) is not None:
        return int(torch.get_num_threads())
    for name in VARIABLES:
        number = os.environ.get(name, "").partition(",")[0].strip()
        if number.isascii() and number.isdecimal() and int(number):
            return int(number)
    return cores()


def cores() -> int:
    """The cores that this process may run on; one that appears as several CPUs counts once.

    Systems without /sys count CPUs.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    try:
        found = {(CPUS / f"cpu{number}/topology/thread_siblings_list").read_text() for number in allowed}
    except OSError:
        return len(allowed)
    return len(found)
