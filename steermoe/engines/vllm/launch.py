"""Start vLLM: its environment, its sizes, its caches."""

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch

from steermoe.engines.vllm.copies import Copies
from steermoe.errors import ModelError, UnsupportedModel
from steermoe.models.checkpoint import Source

CACHE_SHARE = 0.25
"""Of the memory that is free, what keys and values may take on a processor."""


MOST_CACHE = 8 << 30
WORKER = "steermoe.engines.vllm.plugin.WorkerReport"


def parallel_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """VLLM's three sizes of parallelism, each 1 where the options do not name it.

    `tensor_parallel_size` workers share each layer, `pipeline_parallel_size` stages of them divide the layers, and
    `data_parallel_size` replicas of all that divide the texts.
    """
    return {f"{kind}_parallel_size": options.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline", "data")}


def check_sizes(sizes: Mapping[str, int], compiled: bool) -> None:
    """Raise ModelError for what vLLM can't do on processors, where it would end with an error of its insides."""
    if torch.accelerator.is_available():
        return
    pipeline, data = sizes["pipeline_parallel_size"], sizes["data_parallel_size"]
    if data > 1:
        raise ModelError(
            f"--data-parallel-size {data}: vLLM runs copies of a Mixture-of-Experts model on accelerators only; on "
            "processors, give each of several `steermoe batch` a part of the prompts, or use `steermoe batch --ray`"
        )
    if pipeline > 1 and not compiled:
        raise ModelError(
            f"--pipeline-parallel-size {pipeline}: on processors vLLM divides the layers only of a compiled model: let "
            "it compile (batch --compile, serve without --eager), or use --tensor-parallel-size"
        )


def prepare_environment(workers: int, *, in_process: bool = True) -> None:
    """What vLLM reads from the environment, where the user has not said otherwise.

    Args:
        workers: that the model and its copies have in all.
        in_process: run a single worker in this process: no second interpreter, nothing that needs a `__main__` guard.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # it speaks before it reads its own level
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if in_process and workers == 1 else "1"
    if workers > 1 and not torch.accelerator.is_available():
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", processors_of(workers))
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "steermoe" not in allowed.split(","):
        os.environ["VLLM_PLUGINS"] = ",".join(filter(None, (allowed, "steermoe")))


def processors_of(workers: int) -> str:
    """Each worker's own processors, as vLLM reads them: by itself it divides none of a node among several workers."""
    own = sorted(os.sched_getaffinity(0))
    each = max(1, len(own) // workers)
    parts = [own[(each * number) % len(own) :][:each] for number in range(workers)]
    return "|".join(",".join(map(str, part)) for part in parts)


def start(source: Source, **options: Any) -> Any:
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from steermoe.engines.vllm import plugin

    plugin.register()
    if options.get("kv_cache_memory_bytes") is None and not torch.accelerator.is_available():
        options["kv_cache_memory_bytes"] = cache_bytes()
    options |= {
        "model": source.folder,
        "served_model_name": [source.name],
        "dtype": source.dtype,
        "worker_extension_cls": WORKER,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    try:
        if needs_copies(options):
            return Copies(**options)
        return LLMEngine.from_engine_args(EngineArgs(**options))
    except (UnsupportedModel, KeyboardInterrupt):
        raise
    except Exception as error:  # vLLM raises anything, from its configuration's checks to its workers' end
        raise ModelError(f"vLLM can't run '{source.name}': {' '.join(str(error).split())[:400]}") from error


def needs_copies(options: dict[str, Any]) -> bool:
    return options["data_parallel_size"] > 1


def cache_bytes() -> int:
    """What keys and values may take of this machine's memory, which vLLM would take nearly whole."""
    from steermoe.engines.memory import free_memory

    return min(MOST_CACHE, int(free_memory(torch.device("cpu")) * CACHE_SHARE))
