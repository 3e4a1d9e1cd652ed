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
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from typing import Any, Literal

from steermoe.batch.worker import EngineTeller, LeaveOut, Story, first_line
from steermoe.engines.engine import Engine
from steermoe.errors import BatchError, SteerMoEError
from steermoe.steering.report import SteeringReport

CHUNK_ROWS = 4
"""A chunk, what an actor tells at a time, is at most so many times the rows: what an actor's death costs."""
CHUNKS_EACH = 4
"""At least so many chunks for each actor, where there are so many stories: the last ones end at about the same time."""
DEATHS = 3
"""A chunk that so many actors died of is given up, and its stories are told one by one to find the deadly one."""
GIVEN_UP = 16
"""So many chunks given up end the run: actors that die so often do so for another reason."""
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
            the `with` block, or "host:port" of one that this machine belongs to.

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
    with redirect_stdout(sys.stderr):  # where ray tells of actors that died
        try:
            yield
        finally:
            ray.shutdown()


def _check_listens(address: str) -> None:
    """Raise for an address that nobody listens at; ray itself would try for a minute, and then end the process."""
    if address in ("auto", "local"):
        return
    if address.startswith("ray://"):
        raise BatchError(
            f"--ray '{address}': Ray Data can't be driven by a Ray client; run steermoe on a machine of the cluster, "
            "with --ray auto"
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
        "wants a token, or use --ray local for this machine alone"
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

        A story that its actors die of is left out.

        Raises:
            BatchError: an actor has another model or can't open it, actors die of everything, or the cluster is gone.
        """
        waiting = {story.key: story for story in stories}
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
                    story = waiting.pop(line["key"])
                    if "record" in line:
                        yield line["record"]
                    else:
                        leave_out(story.job, line["reason"])
        for story in waiting.values():
            leave_out(story.job, f"each of {DEATHS} actors that began it died (is there enough memory?)")

    def _pass(self, stories: list[Story], size: int) -> Iterator[dict[str, Any]]:
        """All lines that come of stories, as chunks of a size are finished; none of chunks whose actors die."""
        import ray.data

        if not stories:
            return
        # plans that stories share are pickled once a chunk
        chunks = [
            {"number": number, "stories": pickle.dumps(stories[at : at + size])}
            for number, at in enumerate(range(0, len(stories), size))
        ]
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        actors = min(self.placing.actors, len(chunks))
        items = ray.data.from_items(chunks, override_num_blocks=len(chunks))
        attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Attempts).remote(DEATHS, GIVEN_UP)
        told = items.map_batches(
            Actor,
            fn_constructor_args=(self._open_engine, self._rows, self._fingerprint, attempts.begin.remote),
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
                f"the Ray cluster failed ({first_line(error)}): the stories so far are kept, run again to go on"
            ) from error


class Attempts:
    """Counts how often each chunk was begun, for all actors: again only if an actor died of it."""

    def __init__(self, deaths: int, most_given_up: int) -> None:
        self._deaths, self._most_given_up = deaths, most_given_up
        self._begun = Counter[int]()

    def begin(self, chunk: int) -> Literal["tell", "give up", "end"]:
        self._begun[chunk] += 1
        if self._begun[chunk] <= self._deaths:
            return "tell"
        given_up = sum(times > self._deaths for times in self._begun.values())
        return "give up" if given_up < self._most_given_up else "end"


class Actor:
    """Opens the engine when the first chunk comes, and tells chunk after chunk; each comes back whole or not at all.

    Args:
        begin: `Attempts.begin` of the one that all actors share, as a reference to its answer.
    """

    def __init__(
        self, open_engine: Callable[[], Engine], rows: int | None, fingerprint: str, begin: Callable[[int], Any]
    ) -> None:
        self._open_engine, self._rows, self._fingerprint, self._begin = open_engine, rows, fingerprint, begin
        self._engine: Engine | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        import ray

        lines: list[dict[str, Any]] = []
        for number, chunk in zip(batch["number"].tolist(), batch["stories"], strict=True):
            answer = ray.get(self._begin(number))
            if answer == "tell":
                lines += self._tell(pickle.loads(chunk))
            elif answer == "end":
                lines.append({"error": "actors die of whatever they tell: is there enough memory on each machine?"})
        return {"told": [json.dumps(line) for line in lines]}

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
            return [{"error": f"on {socket.gethostname()}: {type(error).__name__}: {first_line(error)}"}]
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
