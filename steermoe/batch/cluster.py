"""Tells stories on several machines by Ray Data: actors open the engine and tell, this process alone keeps what comes.
The only importer of ray.
"""

import json
import logging
import math
import os
import pickle
import socket
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from typing import Any

from steermoe.batch.telling import EngineTeller, LeaveOut, Story
from steermoe.engines.base import Engine
from steermoe.errors import BatchError, SteerMoEError
from steermoe.steering import SteeringReport

CHUNK_ROWS = 4
"""A chunk, what an actor tells at a time, is at most so many times the rows: what an actor's death costs."""
CHUNKS_EACH = 4
"""At least so many chunks for each actor, where there are so many stories: the last ones end at about the same time."""
CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Placing:
    """What an actor asks of its machine."""

    actors: int
    cpus: int
    gpus: int


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect to a cluster; one that this process is connected to already is taken, and stays so.

    Args:
        address: "auto" for the cluster that this machine belongs to, "local" for one that is started here and ends with
            the `with` block, or "host:port" or "ray://host:port".

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
        raise _no_cluster(address, _first_line(error)) from error
    with redirect_stdout(sys.stderr):  # where ray tells of actors that died
        try:
            yield
        finally:
            ray.shutdown()


def _check_listens(address: str) -> None:
    """Raise for an address that nobody listens at; ray itself would try for a minute, and then end the process."""
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise BatchError(f"--ray '{address}': expected auto, local, host:port or ray://host:port")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise _no_cluster(address, error.strerror or str(error)) from error


def _no_cluster(address: str, reason: str) -> BatchError:
    return BatchError(
        f"no Ray cluster at '{address}' ({reason}): start one with `ray start --head`, or use --ray local for this "
        "machine alone"
    )


def place(nodes: Sequence[dict[str, float]], actors: int | None, gpus: int = 0) -> Placing:
    """How many actors there are, and what each takes: the processors of a machine are shared out among its actors.

    Args:
        nodes: the resources of each machine.
        actors: None for one on each machine.
        gpus: accelerators that an actor takes where machines have them; 0 for processors only.

    Raises:
        BatchError: they don't fit.
    """
    has_gpus = bool(gpus) and any(node.get("GPU", 0) for node in nodes)
    kind = "GPU" if has_gpus else "CPU"
    sizes = [int(node[kind]) for node in nodes if node.get(kind, 0) >= 1]
    if not sizes:
        raise BatchError("the Ray cluster has no machine with a processor to use: start one with `ray start`")
    actors = actors or len(sizes)
    each = gpus if has_gpus else max(1, min(sizes) // math.ceil(actors / len(sizes)))
    room = sum(size // each for size in sizes)
    if room < actors:
        raise BatchError(f"{actors} actors of {each} {kind} each don't fit into the Ray cluster: at most {room} do")
    return Placing(actors, 1 if has_gpus else each, each if has_gpus else 0)


class ClusterTeller:
    """Tells stories by actors on the machines of the cluster that this process is connected to.

    Args:
        engine: this process's own; an actor whose model is another is refused. It is closed before actors begin, as
            far as it can be.
        open_engine: opens it in an actor; it is pickled.
        rows: rows at once of an actor; None for what its memory allows.
        actors: None for one on each machine.
        gpus: accelerators of an actor, where there are any.

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

    def tell(self, stories: Iterator[Story], leave_out: LeaveOut) -> Generator[dict[str, Any], None, None]:
        """As `Teller.tell`; a chunk whose actor dies is told again by another, and what comes twice is dropped.

        Raises:
            BatchError: an actor has another model or can't open it, or the cluster is gone.
        """
        waiting = {story.key: story for story in stories}
        close = getattr(self._engine, "close", None)
        if waiting and close is not None:
            close()
        while waiting:
            before = len(waiting)
            for line in self._pass(list(waiting.values())):
                if "error" in line:
                    raise BatchError(line["error"])
                if "report" in line:
                    self.report = joined(self.report, SteeringReport(**line["report"]))
                elif line["key"] in waiting:  # else an actor died after its chunk was kept
                    story = waiting.pop(line["key"])
                    if "record" in line:
                        yield line["record"]
                    else:
                        leave_out(story.job, line["reason"])
            if len(waiting) == before:
                raise BatchError(f"the Ray cluster lost {before} stories: run again to tell them")

    def _pass(self, stories: list[Story]) -> Iterator[dict[str, Any]]:
        """All lines that come of stories, as chunks are finished."""
        import ray.data

        share = math.ceil(len(stories) / (self.placing.actors * CHUNKS_EACH))
        size = min(share, CHUNK_ROWS * self._rows_each)
        # plans that stories share are pickled once a chunk
        chunks = [pickle.dumps(stories[at : at + size]) for at in range(0, len(stories), size)]
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        actors = min(self.placing.actors, len(chunks))
        items = ray.data.from_items([{"stories": chunk} for chunk in chunks], override_num_blocks=len(chunks))
        told = items.map_batches(
            Actor,
            fn_constructor_args=(self._open_engine, self._rows, self._fingerprint),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
            num_cpus=self.placing.cpus,
            num_gpus=self.placing.gpus,
        )  # an actor pool restarts its actors and their chunks without end, and spreads them, unless told otherwise
        try:
            for batch in told.iter_batches(batch_size=None, prefetch_batches=0):
                yield from map(json.loads, batch["told"])
        except ray.exceptions.RayError as error:
            raise BatchError(
                f"the Ray cluster failed ({_first_line(error)}): the stories so far are kept, run again to go on"
            ) from error


class Actor:
    """Opens the engine when the first chunk comes, and tells chunk after chunk; each comes back whole or not at all."""

    def __init__(self, open_engine: Callable[[], Engine], rows: int | None, fingerprint: str) -> None:
        self._open_engine, self._rows, self._fingerprint = open_engine, rows, fingerprint
        self._engine: Engine | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return {"told": [json.dumps(line) for chunk in batch["stories"] for line in self._tell(pickle.loads(chunk))]}

    def _tell(self, stories: list[Story]) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = []
        keys = {id(story.job): story.key for story in stories}
        try:
            teller = EngineTeller(self._opened(), self._rows)
            for record in teller.tell(
                iter(stories), lambda job, reason: lines.append({"key": keys[id(job)], "reason": reason})
            ):
                lines.append({"key": int(record["job"], 16), "record": record})
        except SteerMoEError as error:
            return [{"error": f"on {socket.gethostname()}: {error}"}]
        except Exception as error:  # ray would try again and again, and tell of it in fifty lines
            return [{"error": f"on {socket.gethostname()}: {type(error).__name__}: {_first_line(error)}"}]
        if teller.report is not None:
            lines.append({"report": asdict(teller.report)})
        return lines

    def _opened(self) -> Engine:
        if self._engine is None:
            engine = self._open_engine()
            if engine.fingerprint() != self._fingerprint:
                raise BatchError(
                    f"'{engine.name}' is another model there than here, or in another dtype: put the same files on all "
                    "machines, and name the dtype by --dtype"
                )
            self._engine = engine
        return self._engine


def joined(one: SteeringReport | None, other: SteeringReport) -> SteeringReport:
    """The report of both together."""
    if one is None:
        return other
    steered = one.tokens_steered + other.tokens_steered
    share = one.vector_share * one.tokens_steered + other.vector_share * other.tokens_steered
    return SteeringReport(
        one.router_calls + other.router_calls,
        one.tokens_seen + other.tokens_seen,
        steered,
        share / steered if steered else 0.0,
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
