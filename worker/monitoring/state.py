"""Gauges that are read for a scrape: of this worker, of Redis and of PostgreSQL."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Generic, TypeVar

from celery.utils.log import get_logger
from interview_access.errors import shortened
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from storage.dtos import LedgerTotalsDTO, OutboxTotalsDTO
from worker.broker.lease import Lease
from worker.execution.dispatch import Dispatcher
from worker.monitoring import catalog
from worker.monitoring.catalog import Metric
from worker.monitoring.health import Health
from worker.operations.inspection import QueueSnapshot

logger = get_logger(__name__)

T = TypeVar("T")

_FRESH_SECONDS = 5.0  # scrapes of several servers share one read
_WAIT_SECONDS = 2.0  # for a read, in one scrape


class Source(Generic[T]):
    """A server that is read for scrapes, by one thread at a time.

    A scrape waits for a read for a short time. One that hangs delays no other scrape.
    """

    def __init__(self, name: str, read: Callable[[], T]) -> None:
        """Read nothing yet.

        Args:
            name: ``redis`` or ``postgresql``.
            read: Reads it; raises any exception if that fails.
        """
        self.name = name
        self._read = read
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._done.set()
        self._value: T | None = None
        self._read_at = 0.0
        self._has_failed = False

    def start(self) -> None:
        """Begin a read, unless one is going on or the last one is recent."""
        with self._lock:
            if not self._done.is_set() or self._is_fresh:
                return
            self._done.clear()
            threading.Thread(target=self._run, name=f"scrape-{self.name}", daemon=True).start()

    def value(self, deadline: float) -> T | None:
        """Wait for the read.

        Args:
            deadline: Time of the monotonic clock after which it is not waited for.

        Returns:
            What it has read, or None if that failed or takes longer.
        """
        is_done = self._done.wait(max(deadline - time.monotonic(), 0.0))
        return self._value if is_done and self._is_fresh else None

    @property
    def _is_fresh(self) -> bool:
        return self._value is not None and time.monotonic() < self._read_at + _FRESH_SECONDS

    def _run(self) -> None:
        began = time.monotonic()
        try:
            value = self._read()
        except Exception as error:  # noqa: BLE001 - the metric source_up reports it
            if not self._has_failed:
                text = shortened(str(error), quoted=False, at_most=500)
                logger.warning("metrics cannot be read: source=%s error=%s", self.name, text)
            self._has_failed, self._value = True, None
        else:
            self._has_failed, self._value, self._read_at = False, value, began
        finally:
            self._done.set()


class State(Collector):
    """Collects the gauges at each scrape."""

    def __init__(
        self,
        lease: Lease,
        dispatcher: Dispatcher,
        health: Callable[[], Health],
        queue: Source[QueueSnapshot],
        tables: Source[tuple[OutboxTotalsDTO, LedgerTotalsDTO]],
        *,
        retention: timedelta | None,
        dead_letter_bytes: int,
        dropped: Mapping[str, int],
    ) -> None:
        """Collect nothing yet.

        Args:
            lease: The worker session.
            dispatcher: The batches in the pool.
            health: Returns the worker's health.
            queue: The queue in Redis.
            tables: The outbox and the ledger in PostgreSQL.
            retention: Time after which this worker prunes a job; None: never.
            dead_letter_bytes: Memory of the dead letters beyond which it drops the oldest.
            dropped: Numbers of dead letters that it has dropped, by reason. They grow.
        """
        self._lease = lease
        self._dispatcher = dispatcher
        self._health = health
        self._queue = queue
        self._tables = tables
        self._retention = retention
        self._dead_letter_bytes = dead_letter_bytes
        self._dropped = dropped

    def describe(self) -> list[Family]:
        """Describe nothing: the registry would collect to learn the names."""
        return []

    def collect(self) -> Iterator[Family]:
        """Collect the gauges of the worker, and those of the servers that reply in time."""
        self._queue.start()
        self._tables.start()
        deadline = time.monotonic() + _WAIT_SECONDS
        yield from self._of_worker()
        queue, tables = self._queue.value(deadline), self._tables.value(deadline)
        up = _gauge(catalog.SOURCE_UP)
        up.add_metric([self._queue.name], queue is not None)
        up.add_metric([self._tables.name], tables is not None)
        yield up
        if queue:
            yield from _of_queue(queue)
        if tables:
            yield from _of_tables(*tables)

    def _of_worker(self) -> Iterator[Family]:
        lease, breaker, health = self._lease, self._lease.policy.breaker, self._health()
        idle = self._dispatcher.free_processes
        claimed, oldest = lease.claims
        yield _gauge(
            catalog.POOL_PROCESSES, {"busy": self._dispatcher.processes - idle, "idle": idle}
        )
        yield _gauge(catalog.WORKER_CLAIMED, claimed)
        yield _gauge(catalog.WORKER_CLAIMED_AGE, oldest)
        for metric, count in (
            (catalog.LEASE_LOSSES, lease.losses),
            (catalog.LEASE_TAKEOVERS, lease.takeovers),
        ):
            yield CounterMetricFamily(metric.name, metric.help, count)
        metric = catalog.DEAD_DROPPED
        dropped = CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
        for reason, count in self._dropped.items():
            dropped.add_metric([reason], count)
        yield dropped
        state = "open" if breaker.is_open else "probing" if breaker.is_probing else "closed"
        states = {one: float(one == state) for one in ("closed", "open", "probing")}
        yield _gauge(catalog.BREAKER, states)
        yield _gauge(catalog.LIVE, health.is_live)
        yield _gauge(catalog.READY, health.is_ready)
        yield _gauge(catalog.MAIN_THREAD_AGE, max(lease.main_thread_seconds, 0.0))
        if self._retention:
            yield _gauge(catalog.RETENTION, self._retention.total_seconds())
        yield _gauge(catalog.DEAD_LIMIT, self._dead_letter_bytes)


def _of_queue(queue: QueueSnapshot) -> Iterator[Family]:
    def age(moment: datetime | None) -> float:
        return max((queue.at - moment).total_seconds(), 0.0) if moment else 0.0

    yield _gauge(catalog.LANE_JOBS, {lane.name: lane.waiting for lane in queue.lanes})
    ages = {
        lane.name: age(lane.oldest.sent_at if lane.oldest else None)
        for lane in queue.lanes
        if not lane.oldest or lane.oldest.sent_at
    }
    yield _gauge(catalog.LANE_AGE, ages)
    yield _gauge(catalog.DELAYED, queue.delayed)
    yield _gauge(catalog.DELAYED_OVERDUE, age(queue.next_due_at))
    yield _gauge(catalog.CLAIMED, queue.claimed)
    yield _gauge(catalog.SESSIONS, queue.workers)
    yield _gauge(catalog.DEAD, queue.dead_letters.count)
    yield _gauge(catalog.DEAD_BYTES, queue.dead_letters.size)
    yield _gauge(catalog.DEAD_AGE, age(queue.dead_letters.oldest_at))
    pause = queue.pause
    yield _gauge(catalog.PAUSED, pause is not None)
    if pause:
        info = _gauge(catalog.PAUSE_INFO)
        info.add_metric([shortened(one, quoted=False) for one in (pause.by, pause.reason)], 1)
        yield info
        if pause.at:
            yield _gauge(catalog.PAUSED_AT, pause.at.timestamp())


def _of_tables(outbox: OutboxTotalsDTO, ledger: LedgerTotalsDTO) -> Iterator[Family]:
    def age(moment: datetime | None) -> float:
        return max((datetime.now(UTC) - moment).total_seconds(), 0.0) if moment else 0.0

    yield _gauge(catalog.OUTBOX, {"unsent": outbox.unsent, "sent": outbox.sent})
    yield _gauge(catalog.OUTBOX_AGE, age(outbox.oldest_unsent_at))
    yield _gauge(catalog.LEDGER_ROWS, ledger.rows)
    yield _gauge(catalog.LEDGER_BYTES, ledger.size)
    yield _gauge(catalog.LEDGER_AGE, age(ledger.oldest_at))


def _gauge(
    metric: Metric, value: float | dict[str, float] | dict[str, int] | None = None
) -> GaugeMetricFamily:
    """Build a gauge: one value, or values by the value of its one label."""
    if value is None or isinstance(value, dict):
        family = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
        for label, one in (value or {}).items():
            family.add_metric([label], one)
        return family
    return GaugeMetricFamily(metric.name, metric.help, float(value))
