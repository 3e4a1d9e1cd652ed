"""Start vLLM: its environment, its sizes, its caches."""

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch

from steermoe.engines.vllm.replicas import Replicas
from steermoe.errors import ModelError, UnsupportedModel
from steermoe.models.checkpoint import Source

CACHE_SHARE = 0.25
"""The share of the free memory that keys and values may take on a CPU."""
MOST_CACHE = 8 << 30
WORKER = "steermoe.engines.vllm.plugin.WorkerReport"


def parallel_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """The three sizes of vLLM's parallelism, each 1 unless the options name it.

    Each layer is split over `tensor_parallel_size` workers, the layers are split into `pipeline_parallel_size`
    pipeline-parallel stages, and the texts over `data_parallel_size` data-parallel replicas of the whole.
    """
    return {f"{kind}_parallel_size": options.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline", "data")}


def check_sizes(sizes: Mapping[str, int], compiled: bool) -> None:
    """Raise ModelError for what vLLM can't do on CPUs, where it would end with an internal error."""
    if torch.accelerator.is_available():
        return
    pipeline, data = sizes["pipeline_parallel_size"], sizes["data_parallel_size"]
    if data > 1:
        raise ModelError(
            f"--data-parallel-size {data}: vLLM runs data-parallel replicas of Mixture-of-Experts models only on GPUs; "
            "on CPUs, split the prompts over several runs of `steermoe batch`, or use `steermoe batch --ray`"
        )
    if pipeline > 1 and not compiled:
        raise ModelError(
            f"--pipeline-parallel-size {pipeline}: on CPUs, pipeline-parallel stages need a compiled model: let vLLM "
            "compile it (batch --compile, serve without --eager), or use --tensor-parallel-size"
        )


def prepare_environment(workers: int, *, in_process: bool = True) -> None:
    """Set the environment variables that vLLM reads; what the user has set stays where it can.

    Args:
        workers: how many workers the model has, its replicas included.
        in_process: run a single worker in this process: no second interpreter, nothing that needs a `__main__` guard.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # it logs before it reads its own level
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if in_process and workers == 1 else "1"
    if workers > 1 and not torch.accelerator.is_available():
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cpus_of(workers))
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "steermoe" not in allowed.split(","):
        os.environ["VLLM_PLUGINS"] = ",".join(filter(None, (allowed, "steermoe")))


def cpus_of(workers: int) -> str:
    """Each worker's CPUs, in vLLM's notation; vLLM does not split the CPUs of a node among workers on its own."""
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
        if needs_replicas(options):
            return Replicas(**options)
        return LLMEngine.from_engine_args(EngineArgs(**options))
    except (UnsupportedModel, KeyboardInterrupt):
        raise
    except Exception as error:  # vLLM raises anything, from its configuration's checks to its workers' end
        raise ModelError(f"vLLM can't run '{source.name}': {' '.join(str(error).split())[:400]}") from error


def needs_replicas(options: dict[str, Any]) -> bool:
    return options["data_parallel_size"] > 1


def cache_bytes() -> int:
    """How much of this machine's memory keys and values may take; vLLM would take nearly all of it."""
    from steermoe.engines.memory import free_memory

    return min(MOST_CACHE, int(free_memory(torch.device("cpu")) * CACHE_SHARE))
