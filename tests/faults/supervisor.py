"""Supervises the workers of a chaos run: starts and replaces them, and resumes frozen processes."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil
from sqlalchemy import text

from devstack.service import Service
from tests.faults.invariants import all_settled, locate_messages, unfinished
from tests.faults.workers import process_tree
from tests.support.database import connected
from tests.support.workers import Site, is_ready, worker_service

WORKERS = 2
LIVENESS_SECONDS = 30.0
"""For every accepted job to finish once the faults have ended."""

_GRACE_SECONDS = 2
_STOP_SECONDS = _GRACE_SECONDS + 13.0  # for the end of a worker that was asked to stop
_POLL_SECONDS = 0.01  # processes, logs and queues do not signal changes

SETTINGS = {
    "GRANT_LEASE_SECONDS": 1,
    "GRANT_CHUNK_SIZE": 8,
    "GRANT_RETRY_MAX_DELAY": 2,
    "GRANT_ATTEMPT_LIMIT": 8,
    "GRANT_STOP_GRACE": _GRACE_SECONDS,
}


class Supervisor:
    """Keeps two workers running, as an operator's process supervisor does.

    Attributes:
        workers: The workers that run or start.
        failures: Violations that were noticed: workers that ended by themselves or did not stop.
    """

    def __init__(
        self, here: Site, folder: Path, settings: Mapping[str, str], rng: random.Random
    ) -> None:
        """Start no worker yet; see :meth:`tend`.

        Args:
            here: The site.
            folder: For the workers' logs.
            settings: Environment variables of the workers, beside the site's.
            rng: Chooses durations of freezes.
        """
        self.workers: list[Service] = []
        self.failures: list[str] = []
        self._here = here
        self._folder = folder
        self._settings = settings
        self._rng = rng
        self._started = 0
        self._frozen_until: dict[int, float] = {}
        self._must_stop_by: dict[int, float] = {}
        self._expected_to_end: set[int] = set()

    # --- Processes for faults --------------------------------------------------------------------

    def worker_of(self, pid: int) -> Service:
        """Return the worker that a process belongs to; any worker if the process has ended."""
        for worker in self.workers:
            with suppress(psutil.NoSuchProcess):
                if pid in {process.pid for process in process_tree(worker)}:
                    return worker
        return self._rng.choice(self.workers)

    def pool_process(self, pid: int) -> int:
        """Return the process if it is a pool process, otherwise a pool process of its worker."""
        pool = [child.pid for child in psutil.Process(self.worker_of(pid).pid).children()]
        return pid if pid in pool else pool[0]

    def expect_end(self, pid: int, *, in_time: bool = False) -> Service:
        """Expect the end of a process's worker, because a fault kills it or asks it to stop.

        Args:
            pid: A process of the worker.
            in_time: Record a failure if the worker has not ended after its grace period.

        Returns:
            The worker.
        """
        worker = self.worker_of(pid)
        self._expected_to_end.add(worker.pid)
        if in_time:
            self._must_stop_by[worker.pid] = time.monotonic() + _STOP_SECONDS
        return worker

    def freeze(self, pid: int) -> None:
        """Freeze a process for a random time, shorter or longer than a lease."""
        os.kill(pid, signal.SIGSTOP)
        self._frozen_until[pid] = time.monotonic() + self._rng.uniform(0.2, 6.0)

    # --- Supervision -----------------------------------------------------------------------------

    def tend(self) -> None:
        """Replace ended workers, and resume frozen processes whose time is over."""
        for pid, deadline in list(self._frozen_until.items()):
            if time.monotonic() > deadline:
                self._resume(pid)
        for pid, deadline in list(self._must_stop_by.items()):
            if not psutil.pid_exists(pid):
                del self._must_stop_by[pid]
            elif time.monotonic() > deadline and pid not in self._frozen_until:
                del self._must_stop_by[pid]
                self.failures.append(f"worker {pid} did not end within {_STOP_SECONDS:.0f} s")
                os.kill(pid, signal.SIGKILL)
        for worker in [one for one in self.workers if not one.alive]:
            self._remove(worker)
        while len(self.workers) < WORKERS:
            self.workers.append(self._start_worker())

    def tend_until(self, condition: Callable[[], bool], *, within: float) -> bool:
        """Tend until the condition is true.

        Args:
            condition: Is checked every few milliseconds.
            within: Seconds to wait.

        Returns:
            Whether the condition became true in time.
        """
        deadline = time.monotonic() + within
        while not condition():
            if time.monotonic() > deadline:
                return False
            self.tend()
            time.sleep(_POLL_SECONDS)
        return True

    def verify_liveness(self, accepted: set[str]) -> None:
        """Wait until every accepted job has finished, with no worker restarted or signalled.

        Frozen processes resume first, and workers that a fault has ended are replaced.

        Args:
            accepted: The jobs that may be unfinished.

        Raises:
            AssertionError: if jobs are stuck or a worker failed; says which and where.
        """
        for pid in list(self._frozen_until):
            self._resume(pid)

        def are_ready() -> bool:
            return not self._must_stop_by and all(map(is_ready, self.workers))

        assert self.tend_until(are_ready, within=_STOP_SECONDS + 60), "no worker starts"
        deadline = time.monotonic() + LIVENESS_SECONDS
        left = accepted
        while time.monotonic() < deadline and (left or not all_settled(self._here)):
            if not all(worker.alive for worker in self.workers):
                self.tend()  # a fault's late effect, as of a shutdown by control; or a failure
                deadline = time.monotonic() + LIVENESS_SECONDS
            left = unfinished(self._here, left)
            time.sleep(5 * _POLL_SECONDS)
        if left or not all_settled(self._here):
            raise AssertionError(self._describe_stuck(left))
        assert not self.failures, "\n".join(self.failures)

    def stop(self) -> None:
        """Stop all workers."""
        for pid in list(self._frozen_until):
            self._resume(pid)
        for worker in self.workers:
            worker.request_stop()
        for worker in self.workers:
            worker.stop()

    def _describe_stuck(self, left: set[str]) -> str:
        places = locate_messages(self._here)
        lines = [f"{job_id}: {place}" for job_id, place in places]
        lines += [f"{one}: nowhere in Redis" for one in left - {job_id for job_id, _ in places}]
        with connected(self._here.store.database_url) as database:
            backends = database.execute(
                text(
                    "SELECT state, wait_event_type, wait_event, now() - state_change AS since"
                    " FROM pg_stat_activity WHERE application_name <> '' AND state <> 'idle'"
                )
            ).all()
        return (
            f"{len(left)} jobs and {len(places)} messages never finished within"
            f" {LIVENESS_SECONDS:.0f} s of the last fault, with no worker restarted:\n  "
            + "\n  ".join(lines[:30])
            + f"\nbackends: {[tuple(one) for one in backends]}"
        )

    def _remove(self, worker: Service) -> None:
        if worker.pid not in self._expected_to_end and is_ready(worker):
            self.failures.append(f"{worker.name} ended by itself:{worker.log_tail()}")
        worker.stop()
        self.workers.remove(worker)

    def _start_worker(self) -> Service:
        name = f"worker-{self._started}@{socket.gethostname()}"
        log = self._folder / f"worker-{self._started}.log"
        environment = self._here.environment(**{**SETTINGS, **self._settings})
        service = worker_service(log, environment, name=name)
        self._started += 1
        service.start()
        return service

    def _resume(self, pid: int) -> None:
        del self._frozen_until[pid]
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        if pid in self._must_stop_by:
            self._must_stop_by[pid] = time.monotonic() + _STOP_SECONDS
