"""How much memory there is, what a row of a batch takes of it, and which errors mean that there was not enough."""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from steermoe.engines.cache import empty_cache

SHARE = 0.5
"""Of the free memory, what a batch may take."""
LOGITS_BYTES = 40
"""A token of the vocabulary and row: logits as the model gives them, in float32, warped, and twice in float64."""
UNKNOWN_FREE = 4 << 30
"""Where a device does not tell."""


class Room:
    """How many rows fit into the memory that is free now.

    Args:
        model: its cache is measured with a token.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config(decoder=True)
        self._free = int(free_memory(model.device) * SHARE)
        self._token_bytes = _cache_bytes_of_a_token(model)
        self._row_bytes = LOGITS_BYTES * config.vocab_size

    def rows(self, tokens: int) -> int:
        """Rows of so many tokens each, at least 1."""
        return max(1, self._free // (self._row_bytes + tokens * self._token_bytes))


@torch.inference_mode()
def _cache_bytes_of_a_token(model: Any) -> int:
    """Measured, for every kind of cache; 0 where there is none."""
    cache = None if model.config.is_encoder_decoder else empty_cache(model)
    given: dict[str, Any] = {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=model.device)}
    if cache is None:
        given["decoder_input_ids"] = given["input_ids"]
    else:
        given["past_key_values"] = cache
    output = model(**given, use_cache=True)
    return _bytes_in(getattr(output, "past_key_values", None))


def _bytes_in(thing: Any) -> int:
    if isinstance(thing, torch.Tensor):
        return thing.numel() * thing.element_size()
    if isinstance(thing, list | tuple):
        return sum(map(_bytes_in, thing))
    if isinstance(thing, dict):
        return sum(map(_bytes_in, thing.values()))
    return _bytes_in(vars(thing)) if type(thing).__module__.startswith("transformers") else 0


def free_memory(device: torch.device) -> int:
    """Bytes that may still be taken: of an accelerator, or of this machine, its container and this process."""
    if device.type != "cpu":
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
    """Whether an error says that memory was not enough: of an accelerator, of torch on a CPU, or of Python."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and bool(
        re.search(r"not enough memory|out of memory|can'?t allocate memory|cannot allocate memory", text)
    )
