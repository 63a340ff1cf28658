"""What Prometheus asks a server for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from ttsnap.live.result import SearchResult
from ttsnap.server.lanes import Cancelled

if TYPE_CHECKING:
    from ttsnap.server.lanes import Search
    from ttsnap.server.worker import Worker

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)


class Metrics:
    """Counts of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "ttsnap_requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        self._searches = Counter("ttsnap_searches", "Searches that ended.", ["outcome"], registry=registry)
        self._calls = Counter("ttsnap_denoiser_calls", "Denoiser calls of finished searches (NFE).", registry=registry)
        self._tflop = Counter("ttsnap_tflop", "Operations of finished searches, in TFLOP.", registry=registry)
        self._waited = Histogram(
            "ttsnap_queue_seconds",
            "Seconds from a request to the begin of its search.",
            buckets=SECONDS,
            registry=registry,
        )
        self._took = Histogram(
            "ttsnap_search_seconds",
            "Seconds from the begin of a search to its end.",
            buckets=SECONDS,
            registry=registry,
        )
        self._taken = Counter("ttsnap_batch_candidates", "Candidates in denoiser batches.", registry=registry)
        self._places = Counter("ttsnap_batch_places", "Places that there were in them.", registry=registry)

    def watch(self, worker: Worker) -> None:
        """Ask a worker how it stands whenever somebody wants to know."""
        for name, text, value in (
            ("searches_waiting", "Searches that have not begun.", lambda: worker.waiting),
            ("searches_running", "Searches that have begun.", lambda: worker.running),
            ("open_calls", "Suspended calls of the pipeline.", lambda: worker.open_calls),
            ("sessions", "Sets of arguments for which a session is kept.", lambda: worker.lanes),
        ):
            Gauge(f"ttsnap_{name}", text, registry=self.registry).set_function(value)

    def requested(self, path: str, status: int) -> None:
        """A request was answered."""
        self._requests.labels(path, str(status)).inc()

    def batch(self, taken: int, places: int) -> None:
        """A batch was run."""
        self._taken.inc(taken)
        self._places.inc(places)

    def ended(self, search: Search, outcome: SearchResult | Exception) -> None:
        """A search has ended."""
        if isinstance(outcome, SearchResult):
            kind = "finished"
            self._calls.inc(outcome.cost.nfe)
            self._tflop.inc(outcome.cost.tflop)
        else:
            kind = "cancelled" if isinstance(outcome, Cancelled) else "failed"
        self._searches.labels(kind).inc()
        if search.begun_at is not None:
            self._waited.observe(search.begun_at - search.asked_at)
            self._took.observe(time.monotonic() - search.begun_at)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
