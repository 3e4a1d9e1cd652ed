"""What a server measures about itself, in Prometheus' format."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

if TYPE_CHECKING:
    from steermoe.serving.live import LiveEngine
    from steermoe.serving.ticket import Ticket

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server.

    Args:
        live: what generates.

    Attributes:
        answering: requests of programs that are being answered now.
    """

    def __init__(self, live: "LiveEngine") -> None:
        self.answering = 0
        self._registry = CollectorRegistry()
        self._registry.register(_Rows(live))
        self.requests = self._made(
            Counter, "steermoe_requests", "Requests that were answered.", ("path", "status"), is_labelled=True
        )
        self.texts = self._made(Counter, "steermoe_texts", "Texts that were begun.", ("steered",), is_labelled=True)
        self.prompt_tokens = self._made(Counter, "steermoe_prompt_tokens", "Tokens of prompts of these texts.")
        self.seconds = self._made(Histogram, "steermoe_request_seconds", "Time of requests for texts.")

    def _made(self, kind: Any, name: str, help: str, labels: Sequence[str] = (), *, is_labelled: bool = False) -> Any:
        more: dict[str, Any] = {"buckets": SECONDS} if kind is Histogram else {}
        return kind(name, help, labels if is_labelled else (), registry=self._registry, **more)

    def started(self, tickets: "Sequence[Ticket]") -> None:
        """Count texts that were taken."""
        for ticket in tickets:
            self.texts.labels("yes" if ticket.plan is not None and ticket.plan.does_something else "no").inc()
            self.prompt_tokens.inc(len(ticket.prompt))

    def answered(self, path: str, status: int, started: float, *, is_text: bool) -> None:
        """Count an answered request; `started` is of `time.perf_counter`."""
        self.requests.labels(path, str(status)).inc()
        if is_text:
            self.seconds.observe(time.perf_counter() - started)

    def text(self) -> bytes:
        """What `/metrics` answers."""
        return generate_latest(self._registry)


class _Rows:
    """What the engine itself counts."""

    def __init__(self, live: "LiveEngine") -> None:
        self._live = live

    def collect(self) -> Any:
        from prometheus_client.core import CounterMetricFamily

        live = self._live
        yield GaugeMetricFamily("steermoe_rows", "Texts that can be generated at once.", live.rows)
        yield GaugeMetricFamily("steermoe_running", "Texts that are being generated.", live.running)
        yield GaugeMetricFamily("steermoe_waiting", "Texts that wait for a row.", live.waiting)
        yield CounterMetricFamily("steermoe_generated_tokens", "Tokens generated in texts that ended.", live.generated)
        yield CounterMetricFamily("steermoe_finished_texts", "Texts that ended.", live.finished)
        yield CounterMetricFamily("steermoe_failed_texts", "Texts that failed.", live.failed)
        yield CounterMetricFamily("steermoe_steps", "Steps of the engine, each a token of every text.", live.steps)
