"""Generates stories on several machines with Ray Data: actors open the engine and generate, this process alone writes.
The only importer of ray.
"""

import json
import logging
import math
import os
import pickle
import socket
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from typing import Any, Literal

from steermoe.batch.worker import EngineWorker, PlannedJob, Skip, first_line
from steermoe.engines.engine import Engine
from steermoe.errors import BatchError, SteerMoEError
from steermoe.steering.report import SteeringReport

CHUNK_ROWS = 4
"""A chunk is what an actor generates at a time, and what its death costs: at most 4 stories per row."""
CHUNKS_EACH = 4
"""Chunks for each actor, at least, if there are enough stories: then all actors finish at about the same time."""
DEATHS = 3
"""After three actors have died of a chunk it is given up, and its stories run one by one to find the deadly one."""
GIVEN_UP = 16
"""The run ends after 16 chunks were given up: actors that die so often die for another reason."""
CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Placing:
    """How many actors there are, and what each takes of its machine."""

    actors: int
    cpus: int
    gpus: int


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect to a cluster; an existing connection of this process is used, and stays open.

    Args:
        address: "auto" for the cluster that this machine belongs to, "local" for one that is started here and stopped
            at the end of the `with` block, or "host:port" of one that this machine belongs to.

    Raises:
        BatchError: ray is not installed, or there is no cluster.
    """
    try:
        import ray.data
    except ImportError as error:
        raise BatchError("--ray needs ray, which is not installed: pip install 'steermoe[ray]'") from error
    _check_listens(address)
    if ray.is_initialized():
        with redirect_stdout(sys.stderr):
            yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR", **local)
    except (ConnectionError, OSError, RuntimeError, ValueError, ImportError) as error:
        raise _no_cluster(address, first_line(error)) from error
    with redirect_stdout(sys.stderr):  # ray reports dead actors on stdout
        try:
            yield
        finally:
            ray.shutdown()


def _check_listens(address: str) -> None:
    """Raise if nothing listens at the address; ray itself would try for a minute, and then end the process."""
    if address in ("auto", "local"):
        return
    if address.startswith("ray://"):
        raise BatchError(
            f"--ray '{address}': a Ray client can't drive Ray Data; run steermoe on a machine of the cluster, with "
            "--ray auto"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise BatchError(f"--ray '{address}': expected auto, local or host:port")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise _no_cluster(address, error.strerror or str(error)) from error


def _no_cluster(address: str, reason: str) -> BatchError:
    return BatchError(
        f"no Ray cluster at '{address}' ({reason}): start one with `ray start --head`, set RAY_AUTH_MODE=token if it "
        "requires a token, or use --ray local for this machine alone"
    )


def place(nodes: Sequence[dict[str, float]], actors: int | None, gpus: int = 0) -> Placing:
    """How many actors there are, and what each takes: the actors of a machine share its CPU cores.

    Args:
        nodes: the resources of each machine.
        actors: None for one on each machine.
        gpus: GPUs that an actor takes if machines have them; 0 for CPUs only.

    Raises:
        BatchError: they don't fit.
    """
    has_gpus = bool(gpus) and any(node.get("GPU", 0) for node in nodes)
    kind = "GPU" if has_gpus else "CPU"
    sizes = [int(node[kind]) for node in nodes if node.get(kind, 0) >= 1]
    if not sizes:
        raise BatchError("no machine of the Ray cluster has a free CPU: add one with `ray start`")
    actors = actors or len(sizes)
    each = gpus if has_gpus else max(1, min(sizes) // math.ceil(actors / len(sizes)))
    room = sum(size // each for size in sizes)
    if room < actors:
        raise BatchError(f"{actors} actors of {each} {kind} each don't fit into the Ray cluster: at most {room} do")
    return Placing(actors, 1 if has_gpus else each, each if has_gpus else 0)


class ClusterWorker:
    """Generates stories with actors on the machines of the cluster that this process is connected to.

    Args:
        engine: this process's own; an actor with another model is refused. If it can be closed, that happens before
            the actors start.
        open_engine: opens the engine in an actor; it is pickled.
        rows: rows at once per actor; None for as many as its memory allows.
        actors: None for one on each machine.
        gpus: GPUs per actor, if there are any.

    Raises:
        BatchError: the actors don't fit.
    """

    def __init__(
        self,
        engine: Engine,
        open_engine: Callable[[], Engine],
        *,
        rows: int | None = None,
        actors: int | None = None,
        gpus: int = 0,
    ) -> None:
        import ray

        self._engine, self._open_engine, self._rows = engine, open_engine, rows
        self._fingerprint = engine.fingerprint()
        self.placing = place([node["Resources"] for node in ray.nodes() if node["Alive"]], actors, gpus)
        self._rows_each = engine.most_rows if rows is None else rows
        self.rows = self._rows_each * self.placing.actors
        self.report: SteeringReport | None = None

    def generate(self, jobs: Iterator[PlannedJob], skip: Skip) -> Generator[dict[str, Any], None, None]:
        """As `Worker.generate`; if an actor dies, another one generates its chunk again, and duplicates are dropped.

        A story that kills its actors is skipped.

        Raises:
            BatchError: an actor has another model or can't open it, actors die of every chunk, or the cluster is gone.
        """
        waiting = {planned.key: planned for planned in jobs}
        close = getattr(self._engine, "close", None)
        if waiting and close is not None:
            close()
        share = math.ceil(len(waiting) / (self.placing.actors * CHUNKS_EACH))
        for size in (min(share, CHUNK_ROWS * self._rows_each), 1):
            for line in self._pass(list(waiting.values()), size):
                if "error" in line:
                    raise BatchError(line["error"])
                if "report" in line:
                    self.report = (self.report or SteeringReport()) + SteeringReport(**line["report"])
                elif line["key"] in waiting:  # else an actor died after its chunk was kept
                    planned = waiting.pop(line["key"])
                    if "record" in line:
                        yield line["record"]
                    else:
                        skip(planned.job, line["reason"])
        for planned in waiting.values():
            skip(planned.job, f"each of the {DEATHS} actors that started it died (is there enough memory?)")

    def _pass(self, jobs: list[PlannedJob], size: int) -> Iterator[dict[str, Any]]:
        """The lines of all jobs, as chunks of `size` jobs are finished; none of chunks whose actors die."""
        import ray.data

        if not jobs:
            return
        # plans that jobs share are pickled once per chunk
        chunks = [
            {"number": number, "jobs": pickle.dumps(jobs[at : at + size])}
            for number, at in enumerate(range(0, len(jobs), size))
        ]
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        actors = min(self.placing.actors, len(chunks))
        items = ray.data.from_items(chunks, override_num_blocks=len(chunks))
        attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Attempts).remote(DEATHS, GIVEN_UP)
        results = items.map_batches(
            Actor,
            fn_constructor_args=(self._open_engine, self._rows, self._fingerprint, attempts.start.remote),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
            num_cpus=self.placing.cpus,
            num_gpus=self.placing.gpus,
        )  # by default an actor pool restarts its actors and their chunks without limit, and spreads them
        try:
            for batch in results.iter_batches(batch_size=None, prefetch_batches=0):
                yield from map(json.loads, batch["lines"])
        except ray.exceptions.RayError as error:
            raise BatchError(
                f"the Ray cluster failed ({first_line(error)}): the stories so far are kept, run again to resume"
            ) from error


class Attempts:
    """Counts for all actors how often each chunk was started: a second time only if an actor died of it."""

    def __init__(self, deaths: int, most_given_up: int) -> None:
        self._deaths, self._most_given_up = deaths, most_given_up
        self._started = Counter[int]()

    def start(self, chunk: int) -> Literal["run", "give up", "end"]:
        self._started[chunk] += 1
        if self._started[chunk] <= self._deaths:
            return "run"
        given_up = sum(times > self._deaths for times in self._started.values())
        return "give up" if given_up < self._most_given_up else "end"


class Actor:
    """Opens the engine at the first chunk and generates chunk after chunk; each comes back whole or not at all.

    Args:
        start: `Attempts.start` of the one instance that all actors share; returns a reference to the answer.
    """

    def __init__(
        self, open_engine: Callable[[], Engine], rows: int | None, fingerprint: str, start: Callable[[int], Any]
    ) -> None:
        self._open_engine, self._rows, self._fingerprint, self._start = open_engine, rows, fingerprint, start
        self._engine: Engine | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        import ray

        lines: list[dict[str, Any]] = []
        for number, chunk in zip(batch["number"].tolist(), batch["jobs"], strict=True):
            answer = ray.get(self._start(number))
            if answer == "run":
                lines += self._generate(pickle.loads(chunk))
            elif answer == "end":
                lines.append({"error": "actors die whatever they generate: is there enough memory on each machine?"})
        return {"lines": [json.dumps(line) for line in lines]}

    def _generate(self, jobs: list[PlannedJob]) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = []
        keys = {id(planned.job): planned.key for planned in jobs}
        try:
            worker = EngineWorker(self._opened(), self._rows)
            for record in worker.generate(
                iter(jobs), lambda job, reason: lines.append({"key": keys[id(job)], "reason": reason})
            ):
                lines.append({"key": int(record["job"], 16), "record": record})
        except SteerMoEError as error:
            return [{"error": f"on {socket.gethostname()}: {error}"}]
        except Exception as error:  # ray would retry again and again, and print fifty lines about it
            return [{"error": f"on {socket.gethostname()}: {type(error).__name__}: {first_line(error)}"}]
        if worker.report is not None:
            lines.append({"report": asdict(worker.report)})
        return lines

    def _opened(self) -> Engine:
        if self._engine is None:
            engine = self._open_engine()
            if engine.fingerprint() != self._fingerprint:
                raise BatchError(
                    f"'{engine.name}' is not the model of the machine that started the run, or has another dtype: put "
                    "the same files on all machines, and set --dtype"
                )
            self._engine = engine
        return self._engine
