"""Workers under faults: behind relays that hold their traffic, or observed by log and CPU time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from devstack.service import Service
from tests.faults.gates import CLAIM, SETTLEMENT, Gate, Relay, Relays, Traffic
from tests.support.workers import Site, worker

SHORT_LEASE = {"GRANT_LEASE_SECONDS": 1, "GRANT_CHUNK_SIZE": 4}
"""A lease short enough for a test to wait until it expires."""

PATIENT = {"GRANT_RETRY_LIMIT": 1_000, "GRANT_RETRY_MAX_DELAY": 1, "GRANT_STOP_GRACE": 1}
"""Jobs are retried until the fault has ended, with short delays."""

STAGES: dict[str, tuple[str, bytes | Traffic, bool]] = {
    "claimed, unknown to the worker": ("queue", CLAIM, True),
    "before the transaction": ("database", b"BEGIN", False),
    "inside the transaction": ("database", b"INSERT INTO interview_userinterviewaccess", False),
    "at COMMIT": ("database", b"COMMIT\0", False),
    "after COMMIT": ("database", b"COMMIT\0", True),
    "before the result": ("results", b'"status": "SUCCESS"', False),
    "after the result": ("results", b'"status": "SUCCESS"', True),
    "before the acknowledgement": ("queue", SETTLEMENT, False),
    "after the acknowledgement": ("queue", SETTLEMENT, True),
}
"""Stages of a job: the server, the request that marks the stage, and whether it was executed."""


@contextmanager
def relayed_worker(
    here: Site, folder: Path, **settings: object
) -> Iterator[tuple[Relays, Service]]:
    """A worker behind relays; it has executed a job, so that Redis has cached its scripts."""
    relays = Relays(here.broker, here.store.database_url)
    try:
        with short_lease_worker(here, folder, **{**relays.settings, **settings}) as service:
            here.answer(here.send("warm", []))
            yield relays, service
    finally:
        relays.close()


@contextmanager
def short_lease_worker(here: Site, folder: Path, **settings: object) -> Iterator[Service]:
    """A worker whose dead session is taken over soon, with a log file of its own."""
    with worker(here, folder / f"{uuid4()}.log", **{**SHORT_LEASE, **settings}) as service:
        yield service


def gate_at(relays: Relays, stage: str) -> AbstractContextManager[Gate]:
    """Return a gate that holds the next job at a stage."""
    server, traffic, answered = STAGES[stage]
    relay: Relay = getattr(relays, server)
    return relay.gate(traffic, answered=answered)


def process_tree(service: Service) -> list[psutil.Process]:
    """Return a worker's main process, followed by its pool processes."""
    main = psutil.Process(service.pid)
    return [main, *main.children(recursive=True)]


def kill_process_tree(service: Service) -> None:
    """Kill a worker's main process and its pool processes."""
    for process in process_tree(service):
        with suppress(psutil.NoSuchProcess):  # pool processes may end with their main process
            process.kill()


def crash(server: Service, how: signal.Signals = signal.SIGKILL) -> None:
    """Kill a server's process, and wait until it has ended."""
    os.kill(server.pid, how)
    server.wait()


def success(created: int) -> dict[str, Any]:
    """Return the result of a job that created so many grants."""
    return {"success": True, "created_access_count": created}


class Monitor:
    """The log and the CPU time of one worker since the last reset."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._pid = service.pid
        self.reset()

    def reset(self) -> None:
        """Begin the observation now."""
        self._from = self._service.log.stat().st_size
        self._began = time.monotonic()
        self._cpu = self._cpu_seconds()

    def log(self) -> str:
        """Return what the worker has logged since the last reset."""
        with self._service.log.open("rb") as log:
            log.seek(self._from)
            return log.read().decode()

    def assert_no_busy_loop(self) -> None:
        """Assert that the worker logs few lines, uses little CPU time and runs."""
        seconds = time.monotonic() - self._began
        lines, cpu = len(self.log().splitlines()), self._cpu_seconds() - self._cpu
        assert lines < 10 * max(seconds, 1.0), f"{lines} lines in {seconds:.1f} s"
        assert cpu < 0.5 * seconds + 0.5, f"{cpu:.1f} s of CPU in {seconds:.1f} s"
        self.assert_running()

    def assert_running(self) -> None:
        """Assert that the worker's main process is the one that was started."""
        assert self._service.alive, self._service.log_tail()
        assert self._service.pid == self._pid

    def count_starts(self, job_id: str) -> int:
        """Count the deliveries of a job to this worker, since the worker was started."""
        return self._service.log.read_text(encoding="utf-8").count(f"[{job_id}] received")

    def _cpu_seconds(self) -> float:
        total = 0.0
        for process in process_tree(self._service):
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += float(times.user + times.system)
        return total


@contextmanager
def monitored_workers(
    here: Site, folder: Path, *, workers: int = 1, **settings: Any
) -> Iterator[list[Monitor]]:
    """Workers of the site that retry until the fault has ended, each with its monitor."""
    with ExitStack() as services:
        yield [
            Monitor(
                services.enter_context(
                    worker(here, folder / f"worker-{number}.log", **(PATIENT | settings))
                )
            )
            for number in range(workers)
        ]
