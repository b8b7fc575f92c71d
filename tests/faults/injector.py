"""The faults of a chaos run: of processes, PostgreSQL, Redis, messages and control commands."""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psutil
from kombu.exceptions import OperationalError
from sqlalchemy import Connection, make_url, text

from devstack.servers import LocalStack
from tests.faults.gates import Gate, Relays
from tests.faults.invariants import session_keys
from tests.faults.supervisor import WORKERS, Supervisor
from tests.faults.workers import STAGES as GATED_STAGES
from tests.faults.workers import crash, gate_at, kill_process_tree, process_tree
from tests.support.database import connected
from tests.support.fuzz.generator import Fuzz
from tests.support.stores import until
from tests.support.workers import GRANT_ACCESS, QUEUE, Site

USERS = [f"user-{number}" for number in range(25)]
INTERVIEWS = [str(UUID(int=(0xC << 124) + number)) for number in range(200)]

WAITING = "waiting"
"""The stage without a gate: the fault is injected at once, wherever the jobs are."""
STAGES = [WAITING, *GATED_STAGES]

_POISON_KINDS = [
    *("random bytes", "cut off", "nested", "task names", "bomb", "encodings"),
    *("bodies of no text", "Celery options"),
]
"""Kinds of generated messages that must not disturb a worker's jobs."""


class Injector:
    """Injects a fault at a stage of a job.

    Attributes:
        accepted: Jobs that faults have sent.
    """

    def __init__(
        self,
        here: Site,
        stack: LocalStack,
        relays: Relays,
        supervisor: Supervisor,
        rng: random.Random,
    ) -> None:
        """Inject nothing yet.

        Args:
            here: The site.
            stack: Its servers.
            relays: The relays between the workers and the servers.
            supervisor: The workers' supervisor.
            rng: Chooses victims and durations.
        """
        self.accepted: list[str] = []
        self._here = here
        self._stack = stack
        self._relays = relays
        self._supervisor = supervisor
        self._rng = rng
        trap = str(Path(tempfile.gettempdir()) / f"chaos-trap-{os.getpid()}")
        self._fuzz = Fuzz(rng.randrange(1_000), INTERVIEWS[:10], trap)

    def inject(self, kind: Callable[[Injector, int], None], stage: str) -> bool:
        """Inject a fault.

        Args:
            kind: One of KINDS.
            stage: One of STAGES.

        Returns:
            Whether the fault was injected: a job reached the stage, and the fault found its victim.
        """
        with self._gate(stage) as gate:
            if gate and not self._supervisor.tend_until(lambda: bool(gate.reached), within=5):
                return False
            pid = gate.pid if gate else self._supervisor.workers[self._rng.randrange(WORKERS)].pid
            try:
                kind(self, pid)
            except (psutil.NoSuchProcess, ProcessLookupError, IndexError, OperationalError):
                return False
        return True

    @contextmanager
    def _gate(self, stage: str) -> Iterator[Gate | None]:
        if stage == WAITING:
            yield None
            return
        with gate_at(self._relays, stage) as gate:
            yield gate

    # --- Processes; each fault receives the ID of the process that is held at the gate -----------

    def kill_pool_process(self, pid: int) -> None:
        """Kill a pool process, preferably the one at the gate."""
        psutil.Process(self._supervisor.pool_process(pid)).kill()

    def kill_worker(self, pid: int) -> None:
        """Kill a worker's main process."""
        os.kill(self._supervisor.expect_end(pid).pid, signal.SIGKILL)

    def kill_worker_and_pool(self, pid: int) -> None:
        """Kill a worker with all its processes."""
        kill_process_tree(self._supervisor.expect_end(pid))

    def stop_worker(self, pid: int) -> None:
        """Ask a worker to stop."""
        os.kill(self._supervisor.expect_end(pid, in_time=True).pid, signal.SIGTERM)

    def stop_group(self, pid: int) -> None:
        """Ask all processes of a worker to stop, as systemd does."""
        os.killpg(self._supervisor.expect_end(pid, in_time=True).pid, signal.SIGTERM)

    def shut_down_by_control(self, pid: int) -> None:
        """Shut a worker down by Celery's remote control; it may miss the command."""
        worker = self._supervisor.expect_end(pid)
        self._control("shutdown", destination=[worker.name])

    def freeze_worker(self, pid: int) -> None:
        """Freeze a worker's main process, perhaps for longer than its lease."""
        self._supervisor.freeze(self._supervisor.worker_of(pid).pid)

    def freeze_pool_process(self, pid: int) -> None:
        """Freeze one pool process."""
        self._supervisor.freeze(self._supervisor.pool_process(pid))

    def freeze_worker_and_pool(self, pid: int) -> None:
        """Freeze a worker with all its processes, as a virtual machine's pause does."""
        for process in process_tree(self._supervisor.worker_of(pid)):
            self._supervisor.freeze(process.pid)

    # --- PostgreSQL ------------------------------------------------------------------------------

    def crash_postgresql(self, _: int) -> None:
        """Crash PostgreSQL and start it."""
        crash(self._stack.postgres, signal.SIGQUIT)
        self._stack.postgres.start()

    def end_backends(self, _: int) -> None:
        """Terminate the PostgreSQL backends of all workers."""
        with connected(self._here.store.database_url) as database:
            _end_backends(database)

    def refuse_database_connections(self, _: int) -> None:
        """Terminate all backends, and refuse new connections for a random time."""
        url = make_url(self._here.store.database_url)
        server = url.set(database="postgres").render_as_string(hide_password=False)
        with connected(server, autocommit=True) as database:
            refuse = f"ALTER DATABASE {url.database} ALLOW_CONNECTIONS"
            database.execute(text(f"{refuse} false"))
            try:
                _end_backends(database)
                self._hold(0.1, 2.0)
            finally:
                database.execute(text(f"{refuse} true"))

    def cut_database_connections(self, _: int) -> None:
        """Cut the connections to PostgreSQL."""
        self._relays.database.cut()

    # --- Redis -----------------------------------------------------------------------------------

    def crash_redis(self, _: int) -> None:
        """Crash Redis and start it with its append-only file."""
        crash(self._stack.valkey)
        self._stack.valkey.start()

    def freeze_redis(self, _: int) -> None:
        """Freeze Redis for a random time, perhaps for longer than every lease."""
        os.kill(self._stack.valkey.pid, signal.SIGSTOP)
        self._hold(0.2, 3.0)
        os.kill(self._stack.valkey.pid, signal.SIGCONT)

    def fill_redis(self, _: int) -> None:
        """Let Redis refuse writes that need memory for a random time."""
        self._here.redis.config_set("maxmemory", 1)
        self._hold(0.1, 1.5)
        self._here.redis.config_set("maxmemory", 0)

    def demote_redis(self, _: int) -> None:
        """Make Redis a replica, which accepts no writes, for a random time."""
        self._here.redis.replicaof("127.0.0.1", 1)
        self._hold(0.1, 1.0)
        self._here.redis.replicaof("NO", "ONE")

    def cut_redis_connections(self, _: int) -> None:
        """Cut the connections to Redis, the queue's and the results'."""
        self._relays.queue.cut()
        self._relays.results.cut()

    def kill_clients(self, _: int) -> None:
        """Let Redis close all of its connections."""
        for kind in "normal", "pubsub":
            self._here.redis.client_kill_filter(_type=kind, skipme=True)

    def kill_clients_while_batches_wait(self, pid: int) -> None:
        """Let Redis close all of its connections while jobs wait for a table lock."""
        with connected(self._here.store.database_url) as database:
            database.execute(text("LOCK TABLE interview_userinterviewaccess IN EXCLUSIVE MODE"))
            with suppress(AssertionError):  # the fault is injected also if no job waits
                until(self._waits_for_lock, within=3)
            self._hold(0.0, 3.0)
            self.kill_clients(pid)
            self._hold(0.0, 1.0)

    def crash_both_servers(self, pid: int) -> None:
        """Crash both servers and start them."""
        self.crash_redis(pid)
        self.crash_postgresql(pid)

    # --- Messages and control commands -----------------------------------------------------------

    def revoke(self, _: int) -> None:
        """Revoke jobs in flight by Celery's remote control."""
        self._revoke(terminate=False)

    def revoke_and_terminate(self, _: int) -> None:
        """Revoke jobs in flight, and terminate the pool processes that run them."""
        self._revoke(terminate=True)

    def duplicate(self, _: int) -> None:
        """Publish duplicates of messages in flight at the consuming end of the queue."""
        for raw in self._in_flight():
            self._here.redis.rpush(QUEUE, raw)

    def delay_and_expire(self, _: int) -> None:
        """Send a job with a short countdown and one with a short expiry."""
        for name in "countdown", "expires":
            job_id = str(uuid4())
            ids = self._rng.sample(INTERVIEWS, 5)
            with self._here.producer.connection_for_write() as connection:
                self._here.producer.send_task(
                    *(GRANT_ACCESS, (self._rng.choice(USERS), ids)),
                    task_id=job_id,
                    queue=QUEUE,
                    connection=connection,
                    **{name: self._rng.uniform(0.1, 2.0)},
                )
            self.accepted.append(job_id)

    def poison(self, _: int) -> None:
        """Publish poison messages."""
        for message in self._fuzz.wave(3, _POISON_KINDS):
            if not message.delayed:
                self._here.redis.rpush(QUEUE, message.raw)

    def _in_flight(self) -> list[bytes]:
        """Choose messages that a worker has claimed."""
        redis: Any = self._here.redis
        values = [value for key in session_keys(self._here) for value in redis.hvals(key)]
        return [
            value.partition(b"\0")[2] for value in self._rng.sample(values, min(3, len(values)))
        ]

    def _revoke(self, *, terminate: bool) -> None:
        for raw in self._in_flight():
            with suppress(ValueError, KeyError, TypeError):
                job_id = json.loads(raw)["headers"]["id"]
                self._control("revoke", task_id=[job_id], terminate=terminate, signal="SIGTERM")

    def _control(self, command: str, destination: list[str] | None = None, **options: Any) -> None:
        with self._here.producer.connection_for_write() as connection:
            self._here.producer.control.broadcast(
                command, arguments=options, destination=destination, connection=connection
            )

    def _waits_for_lock(self) -> bool:
        with connected(self._here.store.database_url) as database:
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            return bool(database.execute(text(waiting)).scalar_one())

    def _hold(self, least: float, most: float) -> None:
        """Keep a fault in effect for a random time in seconds.

        The time is part of the fault: no event could end the wait earlier.
        """
        time.sleep(self._rng.uniform(least, most))


def _end_backends(database: Connection) -> None:
    database.execute(
        text(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name <> '' AND pid <> pg_backend_pid()"
            " AND backend_type = 'client backend'"
        )
    )


KINDS: dict[str, Callable[[Injector, int], None]] = {
    "pool process killed": Injector.kill_pool_process,
    "worker killed": Injector.kill_worker,
    "worker and pool killed": Injector.kill_worker_and_pool,
    "worker asked to stop": Injector.stop_worker,
    "worker and pool asked to stop": Injector.stop_group,
    "worker shut down by control": Injector.shut_down_by_control,
    "worker frozen": Injector.freeze_worker,
    "pool process frozen": Injector.freeze_pool_process,
    "worker and pool frozen": Injector.freeze_worker_and_pool,
    "PostgreSQL crashed": Injector.crash_postgresql,
    "PostgreSQL's backends ended": Injector.end_backends,
    "PostgreSQL refuses connections": Injector.refuse_database_connections,
    "PostgreSQL's connections cut": Injector.cut_database_connections,
    "Redis crashed": Injector.crash_redis,
    "Redis frozen": Injector.freeze_redis,
    "Redis full": Injector.fill_redis,
    "Redis read-only": Injector.demote_redis,
    "Redis's connections cut": Injector.cut_redis_connections,
    "Redis's clients killed": Injector.kill_clients,
    "Redis's clients killed while jobs wait": Injector.kill_clients_while_batches_wait,
    "both servers crashed": Injector.crash_both_servers,
    "job revoked": Injector.revoke,
    "job revoked and terminated": Injector.revoke_and_terminate,
    "message in flight duplicated": Injector.duplicate,
    "jobs delayed and expiring": Injector.delay_and_expire,
    "poison messages": Injector.poison,
}
