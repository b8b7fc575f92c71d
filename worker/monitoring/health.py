"""Liveness and readiness of a worker, from what its threads have recorded; nothing is sent.

Live: the main thread is in its event loop or waits for Redis, and no batch is stuck. Otherwise a
restart helps. Ready: live, consuming the queue with a lease, and PostgreSQL is reached.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from celery.utils.log import get_logger

from storage.errors import StorageError
from worker.broker.lease import Lease
from worker.execution.dispatch import Dispatcher
from worker.services.background import BackgroundService

logger = get_logger(__name__)

MAIN_THREAD_SECONDS = 30.0
"""Seconds without a sign of the main thread after which a worker is not live. Reconnecting to a
Redis that does not reply takes several timeouts of 3 s."""

OUTAGE_SECONDS = 90.0
"""Seconds without a failure after which an outage is over for a worker that has no job to probe
with: fewer than the two minutes after which InterviewAccessNoWorker fires."""

_LOOP_SECONDS = 10.0  # without an iteration of the event loop: it is reconnecting
_DATABASE_SECONDS = 30.0  # without a success of the outbox relay, which has a turn every 2 s
_FILE_SECONDS = 1.0


class Health(NamedTuple):
    """The health of a worker at one moment.

    Attributes:
        is_live: Whether a restart would not help.
        is_ready: Whether it executes jobs.
        reasons: Why it is not live or not ready.
        is_paused: Whether an operator has paused the queue. This affects neither.
    """

    is_live: bool
    is_ready: bool
    reasons: list[str]
    is_paused: bool


class HealthCheck:
    """Reports the health of a worker."""

    def __init__(self, lease: Lease, dispatcher: Dispatcher, relay: BackgroundService) -> None:
        """Check nothing yet.

        Args:
            lease: The worker session.
            dispatcher: The batches in the pool.
            relay: The outbox relay, which reads PostgreSQL every few seconds.
        """
        self._lease = lease
        self._dispatcher = dispatcher
        self._relay = relay

    def __call__(self) -> Health:
        """Return the health now."""
        lease = self._lease
        fatal = []
        if not lease.is_draining and lease.main_thread_seconds > MAIN_THREAD_SECONDS:
            fatal.append(f"the main thread is stuck for {lease.main_thread_seconds:.0f} s")
        if self._dispatcher.has_stuck_batch:
            fatal.append("a pool process does not end after its time limit")
        passing = []
        if lease.is_draining:
            passing.append("the worker is stopping")
        elif lease.loop_seconds > _LOOP_SECONDS:
            passing.append("the event loop does not consume the queue")
        if not lease.is_held:
            passing.append("the lease is not held")
        if lease.policy.breaker.seconds_since_opening < OUTAGE_SECONDS:
            passing.append("the circuit breaker is not closed")
        if not self._is_database_reached():
            passing.append("PostgreSQL is not reached")
        reasons = fatal + passing
        return Health(not fatal, not reasons, reasons, lease.is_paused)

    def _is_database_reached(self) -> bool:
        if isinstance(self._relay.error, StorageError):
            return False
        is_hidden = self._relay.error is not None  # by an outage of Redis
        return is_hidden or self._relay.seconds_since_success < _DATABASE_SECONDS


class HealthFile:
    """A file for probes that execute a command: its age and its first word.

    A thread writes it once a second, atomically, and only while the worker is live.
    """

    def __init__(self, path: Path, check: Callable[[], Health]) -> None:
        """Write nothing yet.

        Args:
            path: The file; its folder exists.
            check: Returns the health.
        """
        self._path = path
        self._check = check
        self._stopping = threading.Event()
        self._has_failed = False
        self._thread = threading.Thread(target=self._run, name="health-file", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and remove the file."""
        self._stopping.set()
        self._thread.join(_FILE_SECONDS)
        self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.write()
                self._has_failed = False
            except Exception as error:  # noqa: BLE001 - the next attempt may succeed
                if not self._has_failed:
                    logger.warning("health file not written: path=%s error=%s", self._path, error)
                self._has_failed = True
            self._stopping.wait(_FILE_SECONDS)

    def write(self) -> None:
        """Write the file once, unless the worker is not live."""
        health = self._check()
        if not health.is_live:
            return
        word = "ready" if health.is_ready else "not-ready"
        new = self._path.with_name(f".{self._path.name}.new")
        new.write_text(f"{word} {time.time():.0f} {'; '.join(health.reasons)}".rstrip() + "\n")
        new.replace(self._path)
