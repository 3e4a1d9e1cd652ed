"""Compile the steps that a run lacked, after it, in a process of its own: the next run is fast without being asked.

The process has the lowest priority and a session of its own, so that Ctrl-C does not reach it. It does what
`steermoe models compile` does, under the same lock, and writes what it says to a log in the cache folder.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steermoe.engines.hf.compiled.records import (
    SCRATCH,
    Record,
    compiler,
    is_busy,
    read_record,
    whereabouts,
    write_record,
)
from steermoe.errors import SteerMoEError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from steermoe.engines.hf.compiled.artifacts import Kind

logger = logging.getLogger(__name__)

SWITCH = "STEERMOE_COMPILE"
"""The environment variable that switches this on or off; by default it is on, but not in tests and CI."""
LOG = "background.log"
MOST_LOG = 1 << 20
"""Bytes of the log, beyond which it begins anew."""
SPARE = 2 << 30
"""Bytes of memory that must be free besides two copies of the weights."""
LOWEST_PRIORITY = 19


@dataclass(frozen=True)
class Job:
    """What is passed to the process.

    Attributes:
        load: the arguments of `loading.load`.
        threads: torch's, which belong to a step.
        targets: the folder of each kind of step, as the run looked for it.
    """

    load: Mapping[str, Any]
    threads: int
    targets: Mapping[str, str]


def is_wanted() -> bool:
    """Whether steps may be compiled unasked.

    Raises:
        SteerMoEError: the switch is neither on nor off.
    """
    match os.environ.get(SWITCH, "").lower():
        case "":
            return not any(os.environ.get(name) for name in ("CI", "PYTEST_CURRENT_TEST"))
        case "on":
            return True
        case "off":
            return False
        case other:
            raise SteerMoEError(f"{SWITCH} is '{other:.60}', expected on or off: set it to one of them, or unset it")


def compile_later(model: "PreTrainedModel", kinds: "Iterable[Kind]", load: Mapping[str, Any]) -> bool:
    """Begin to compile a model's steps in the background, unless something speaks against it.

    Args:
        model: it has run, and lacked these steps.
        kinds: of the steps.
        load: the arguments with which `loading.load` loaded the model.

    Returns:
        whether it has begun. Not so if it is switched off, or if another process compiles; if a step can't be made
        here, or could not be made before; and if there is too little memory.
    """
    import torch

    from steermoe.engines.hf.compiled.artifacts import folder_of, why_not_compiled
    from steermoe.engines.memory import free_memory

    if not is_wanted() or why_not_compiled(model):
        return False
    targets = {kind: folder_of(model, kind) for kind in kinds}
    records = {kind: read_record(target) for kind, target in targets.items()}
    targets = {kind: target for kind, target in targets.items() if not _is_settled(target, records[kind])}
    needed = 2 * sum(weight.nbytes for weight in model.parameters()) + SPARE
    if not targets or free_memory(torch.device("cpu")) < needed:
        return False
    folder = next(iter(targets.values())).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if is_busy(folder) is not False:
            return False
        _spawn(Job(dict(load), torch.get_num_threads(), {kind: str(path) for kind, path in targets.items()}), folder)
    except OSError:  # a cache that can't be written, or no room for another process: the next run tries again
        return False
    return True


def _is_settled(target: Path, record: Record | None) -> bool:
    """Whether a step is there, of use or not, or could not be made."""
    return target.is_dir() or (record is not None and bool(record.why_not_again))


def _spawn(job: Job, folder: Path) -> None:
    log = folder / LOG
    is_long = log.exists() and log.stat().st_size > MOST_LOG
    command = [sys.executable, "-P", "-m", __name__, json.dumps(asdict(job))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", SWITCH: "off"}
    with log.open("wb" if is_long else "ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
    process.returncode = 0  # it outlives this process, which must not warn about that


def main(text: str) -> None:
    """Compile the steps of a job, given as JSON; what it needs on the disk meanwhile is deleted at the end."""
    job = Job(**json.loads(text))
    if hasattr(os, "nice"):
        os.nice(LOWEST_PRIORITY)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which cleans up
    folder = Path(next(iter(job.targets.values()))).parent
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder, ignore_cleanup_errors=True) as scratch:
        for name in ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR"):  # the compilers' files too
            os.environ[name] = scratch
        tempfile.tempdir = scratch
        run(job)


def run(job: Job) -> None:
    """Compile the steps of a job that are still missing."""
    import torch

    from steermoe.engines.hf.compiled.artifacts import compile_step, folder_of
    from steermoe.models.loading import load

    torch.set_num_threads(job.threads)
    model = load(**job.load).model
    kinds: Any = job.targets
    for kind in kinds:
        target = Path(job.targets[kind])
        if target.is_dir():
            continue
        if folder_of(model, kind) != target:
            why = "this process loads the model in another way than the run that lacked the step"
            about = (whereabouts(str(model.config.name_or_path)), str(model.dtype).removeprefix("torch."), kind)
            write_record(target, Record(*about, "failed", why, compiler=compiler()))
            continue
        try:
            logger.info("%s: %s", target.name, compile_step(model, kind, wait=False))
        except SteerMoEError as error:  # the record says why too
            logger.info("%s: %s", target.name, error)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(sys.argv[1])
