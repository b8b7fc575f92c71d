"""Inject random faults from a seed into two workers and both servers, and verify the invariants.

    python -m tests.faults.chaos --faults 1000 --jobs 5000 --seed 1

Each fault is injected at a stage of a job's way, where a gate holds what passes; kinds and stages
are drawn so that each kind meets each stage as often as any other. Between faults there are quiet
points, and one after the last: with no worker restarted or signalled, every accepted job must
finish within seconds. A job that only a restart would free is found there, close to its cause.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import click
import psutil
from interview_access.errors import JobIdReusedException, QueueUnavailableError
from interview_access.producer import InterviewAccessClient
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError
from sqlalchemy import Connection, make_url, text

from devstack.servers import LocalStack
from devstack.service import Service
from storage.schema import migrate
from tests.faults.books import (
    PREFIX,
    at_rest,
    balance,
    heartbeats,
    session_keys,
    unfinished,
    whereabouts,
)
from tests.faults.gates import Gate, Relay, Relays
from tests.faults.sites import POINTS, family, kill_all
from tests.support.database import connected
from tests.support.fuzz import Fuzz
from tests.support.stores import until
from tests.support.workers import GRANT_ACCESS, QUEUE, ROOT, Site, site

WORKERS = 2
PRODUCERS = 3
QUEUED = 40
"""Messages on the queue at most: enough that there is always one to inject a fault at."""
QUIET_EVERY = 10
"""Faults between two quiet points."""
LIVENESS_SECONDS = 30.0
"""For every accepted job to finish once the faults have ended."""

_GRACE = 2
_STOP_SECONDS = _GRACE + 13.0  # for the end of a worker that was asked to stop
_REST_SECONDS = 600.0  # for the jobs that are sent after the last fault

SETTINGS = {
    "GRANT_LEASE_SECONDS": 1,
    "GRANT_CHUNK_SIZE": 8,
    "GRANT_RETRY_MAX_DELAY": 2,
    "GRANT_ATTEMPT_LIMIT": 8,
    "GRANT_STOP_GRACE": _GRACE,
}
USERS = [f"user-{number}" for number in range(25)]
INTERVIEWS = [str(UUID(int=(0xC << 124) + number)) for number in range(200)]
UNKNOWN = str(UUID(int=(0xD << 124)))
POISON = [
    *("random bytes", "cut off", "nested", "task names", "bomb", "encodings"),
    *("bodies of no text", "Celery options"),
]
"""Of the fuzz's kinds: what a worker must not even notice beside its jobs."""

ABLATIONS = ("", "claims", "takeover", "ledger")


@dataclass
class Chaos:
    """One run."""

    here: Site
    stack: LocalStack
    relays: Relays
    folder: Path
    rng: random.Random
    workers: list[Service] = field(default_factory=list)
    old: list[Service] = field(default_factory=list)
    frozen: dict[int, float] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    """Main processes that a fault killed or asked to stop."""
    stopping: dict[int, float] = field(default_factory=dict)
    """Main processes that were signalled to stop, and until when they may take."""
    accepted: list[str] = field(default_factory=list)
    """Jobs that were sent as part of a fault."""
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Prepare the poison."""
        trap = str(self.folder / "trap")
        self._fuzz = Fuzz(self.rng.randrange(1_000), INTERVIEWS[:10], trap)

    # --- Faults of processes; each is given the process that is held at the gate -----------------

    def kill_pool_process(self, pid: int) -> None:
        """Kill a pool process, the one at the gate where it is one."""
        psutil.Process(self._pool_process(pid)).kill()

    def kill_worker(self, pid: int) -> None:
        """Kill a worker's main process."""
        os.kill(self._ends(pid).pid, signal.SIGKILL)

    def kill_worker_and_pool(self, pid: int) -> None:
        """Kill a worker with all its processes."""
        kill_all(self._ends(pid))

    def stop_worker(self, pid: int) -> None:
        """Ask a worker to stop."""
        os.kill(self._ends(pid, asked=True).pid, signal.SIGTERM)

    def stop_group(self, pid: int) -> None:
        """Ask all processes of a worker to stop, as systemd does."""
        os.killpg(self._ends(pid, asked=True).pid, signal.SIGTERM)

    def shut_down_by_control(self, pid: int) -> None:
        """Shut a worker down by Celery's remote control; it may miss the command."""
        worker = self._ends(pid)
        self._control("shutdown", destination=[worker.name])

    def freeze_worker(self, pid: int) -> None:
        """Freeze a worker's main process, for longer than its lease or not."""
        self._freeze(self.worker_of(pid).pid)

    def freeze_pool_process(self, pid: int) -> None:
        """Freeze one pool process."""
        self._freeze(self._pool_process(pid))

    def freeze_worker_and_pool(self, pid: int) -> None:
        """Freeze a worker with all its processes, as a virtual machine's pause does."""
        for process in family(self.worker_of(pid)):
            self._freeze(process.pid)

    # --- Faults of PostgreSQL --------------------------------------------------------------------

    def crash_postgresql(self, _: int) -> None:
        """PostgreSQL crashes and starts."""
        os.kill(self.stack.postgres.pid, signal.SIGQUIT)
        self.stack.postgres.wait()
        self.stack.postgres.start()

    def end_backends(self, _: int) -> None:
        """PostgreSQL ends all of the workers' connections."""
        with connected(self.here.store.database_url) as database:
            _end_backends(database)

    def refuse_database_connections(self, _: int) -> None:
        """PostgreSQL ends all connections and accepts none for a while."""
        url = make_url(self.here.store.database_url)
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
        """The connections to PostgreSQL are cut."""
        self.relays.database.cut()

    # --- Faults of Redis -------------------------------------------------------------------------

    def crash_redis(self, _: int) -> None:
        """Redis crashes and starts, with its append-only file."""
        os.kill(self.stack.valkey.pid, signal.SIGKILL)
        self.stack.valkey.wait()
        self.stack.valkey.start()

    def freeze_redis(self, _: int) -> None:
        """Redis is frozen for longer than every lease."""
        os.kill(self.stack.valkey.pid, signal.SIGSTOP)
        self._hold(0.2, 3.0)
        os.kill(self.stack.valkey.pid, signal.SIGCONT)

    def fill_redis(self, _: int) -> None:
        """Redis has no room for a while."""
        self.here.redis.config_set("maxmemory", 1)
        self._hold(0.1, 1.5)
        self.here.redis.config_set("maxmemory", 0)

    def demote_redis(self, _: int) -> None:
        """Redis takes no writes for a while."""
        self.here.redis.replicaof("127.0.0.1", 1)
        self._hold(0.1, 1.0)
        self.here.redis.replicaof("NO", "ONE")

    def cut_redis_connections(self, _: int) -> None:
        """The connections to Redis are cut, the queue's and the results'."""
        self.relays.queue.cut()
        self.relays.results.cut()

    def kill_clients(self, _: int) -> None:
        """Redis closes all of its connections."""
        for kind in "normal", "pubsub":
            self.here.redis.client_kill_filter(_type=kind, skipme=True)

    def kill_clients_while_batches_wait(self, pid: int) -> None:
        """Redis closes all of its connections while jobs wait for a lock on their table."""
        with connected(self.here.store.database_url) as database:
            database.execute(text("LOCK TABLE interview_userinterviewaccess IN EXCLUSIVE MODE"))
            with suppress(AssertionError):  # a fault without such a job is a fault nevertheless
                until(self._waits_for_lock, within=3)
            self._hold(0.0, 3.0)
            self.kill_clients(pid)
            self._hold(0.0, 1.0)

    def crash_both_servers(self, pid: int) -> None:
        """Both servers crash and start."""
        self.crash_redis(pid)
        self.crash_postgresql(pid)

    # --- Messages and commands -------------------------------------------------------------------

    def revoke(self, _: int) -> None:
        """Celery's remote control revokes a job in flight."""
        self._revoke(terminate=False)

    def revoke_and_terminate(self, _: int) -> None:
        """The same, and ends the pool process that runs it."""
        self._revoke(terminate=True)

    def duplicate(self, _: int) -> None:
        """Messages in flight come again, to be claimed next."""
        for raw in self._in_flight():
            self.here.redis.rpush(QUEUE, raw)

    def delay_and_expire(self, _: int) -> None:
        """Jobs come that are due in a moment, or expire in one."""
        for name in "countdown", "expires":
            job_id = str(uuid4())
            ids = self.rng.sample(INTERVIEWS, 5)
            with self.here.producer.connection_for_write() as connection:
                self.here.producer.send_task(
                    *(GRANT_ACCESS, (self.rng.choice(USERS), ids)),
                    task_id=job_id,
                    queue=QUEUE,
                    connection=connection,
                    **{name: self.rng.uniform(0.1, 2.0)},
                )
            self.accepted.append(job_id)

    def poison(self, _: int) -> None:
        """Messages come that a worker must survive."""
        for message in self._fuzz.wave(3, POISON):
            if not message.delayed:
                self.here.redis.rpush(QUEUE, message.raw)

    # --- The run ---------------------------------------------------------------------------------

    def inject(self, kind: Callable[[Chaos, int], None], stage: str) -> bool:
        """Inject a fault at a stage. Returns whether there was a job to inject it at."""
        with self._gate(stage) as gate:
            if gate and not self.tend_until(lambda: bool(gate.reached), within=5):
                return False
            pid = gate.pid if gate else self.workers[self.rng.randrange(WORKERS)].pid
            try:
                kind(self, pid)
            except (psutil.NoSuchProcess, ProcessLookupError, IndexError, OperationalError):
                return False
        return True

    @contextmanager
    def _gate(self, stage: str) -> Iterator[Gate | None]:
        if stage not in POINTS:
            yield None
            return
        server, traffic, answered = POINTS[stage]
        relay: Relay = getattr(self.relays, server)
        with relay.gate(traffic, answered=answered) as gate:
            yield gate

    def tend(self) -> None:
        """Replace ended workers, as a supervisor does, and resume frozen processes in time."""
        for pid, deadline in list(self.frozen.items()):
            if time.monotonic() > deadline:
                self._resume(pid)
        for pid, deadline in list(self.stopping.items()):
            if not psutil.pid_exists(pid):
                del self.stopping[pid]
            elif time.monotonic() > deadline and pid not in self.frozen:
                del self.stopping[pid]
                self.failures.append(f"worker {pid} did not end within {_STOP_SECONDS:.0f} s")
                os.kill(pid, signal.SIGKILL)
        self.workers = [worker for worker in self.workers if worker.alive or self._replaced(worker)]
        while len(self.workers) < WORKERS:
            self.workers.append(self._new_worker())

    def tend_until(self, condition: Callable[[], bool], *, within: float) -> bool:
        """Tend until the condition is true. Returns whether it was within so many seconds."""
        deadline = time.monotonic() + within
        while not condition():
            if time.monotonic() > deadline:
                return False
            self.tend()
            time.sleep(
                0.01
            )  # between two looks at processes, logs and queues, which signal nothing
        return True

    def verify_liveness(self, accepted: set[str]) -> None:
        """Wait until every accepted job has finished, with the workers that there are.

        Frozen processes resume, and workers that were killed or asked to stop are replaced.

        Args:
            accepted: The jobs whose end nobody has seen yet; those that finished are taken out.

        Raises:
            AssertionError: saying which jobs are stuck and where, or which worker ended by itself.
        """
        for pid in list(self.frozen):
            self._resume(pid)

        def are_ready() -> bool:
            return not self.stopping and all(map(_is_ready, self.workers))

        assert self.tend_until(are_ready, within=_STOP_SECONDS + 60), "no worker starts"
        deadline = time.monotonic() + LIVENESS_SECONDS
        left = accepted
        while time.monotonic() < deadline and (left or not at_rest(self.here)):
            if not all(worker.alive for worker in self.workers):
                self.tend()  # a fault's late effect, as of a shutdown by control; or a failure
                deadline = time.monotonic() + LIVENESS_SECONDS
            left = unfinished(self.here, left)
            time.sleep(0.05)  # between two looks at the queues, which signal nothing
        if left or not at_rest(self.here):
            raise AssertionError(self._stuck(left))
        accepted.clear()
        assert not self.failures, "\n".join(self.failures)

    def _stuck(self, left: set[str]) -> str:
        places = whereabouts(self.here)
        lines = [f"{job_id}: {place}" for job_id, place in places]
        lines += [f"{one}: nowhere in Redis" for one in left - {job_id for job_id, _ in places}]
        with connected(self.here.store.database_url) as database:
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

    def worker_of(self, pid: int) -> Service:
        """The worker that a process belongs to; any, where it is gone."""
        for worker in self.workers:
            with suppress(psutil.NoSuchProcess):
                if pid in {process.pid for process in family(worker)}:
                    return worker
        return self.rng.choice(self.workers)

    def end(self) -> None:
        """End every process that is left."""
        for pid in list(self.frozen):
            self._resume(pid)
        for worker in self.workers:
            worker.request_stop()
        for worker in self.workers:
            worker.stop()

    def _ends(self, pid: int, *, asked: bool = False) -> Service:
        """The worker of a process, which is about to be killed or asked to stop."""
        worker = self.worker_of(pid)
        self.ended.add(worker.pid)
        if asked:
            self.stopping[worker.pid] = time.monotonic() + _STOP_SECONDS
        return worker

    def _pool_process(self, pid: int) -> int:
        pool = [child.pid for child in psutil.Process(self.worker_of(pid).pid).children()]
        return pid if pid in pool else pool[0]

    def _replaced(self, worker: Service) -> bool:
        if worker.pid not in self.ended and _is_ready(worker):
            self.failures.append(f"{worker.name} ended by itself:{worker.log_tail()}")
        worker.stop()
        self.old.append(worker)
        return False

    def _new_worker(self) -> Service:
        number = len(self.workers) + len(self.old)
        name = f"worker-{number}@{socket.gethostname()}"
        service = Service(
            name,
            [
                *(sys.executable, "-m", "celery", "-A", "worker", "worker", "-c", "2"),
                *("-l", "INFO", "-n", name, "--without-mingle"),
            ],
            log=self.folder / f"worker-{number}.log",
            environment=self.here.environment(**{**SETTINGS, **self.relays.settings}),
            folder=ROOT,
        )
        service.start()
        return service

    def _freeze(self, pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        self.frozen[pid] = time.monotonic() + self.rng.uniform(0.2, 6.0)

    def _resume(self, pid: int) -> None:
        del self.frozen[pid]
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        if pid in self.stopping:
            self.stopping[pid] = time.monotonic() + _STOP_SECONDS

    def _in_flight(self) -> list[bytes]:
        """Some messages that a worker has claimed."""
        redis: Any = self.here.redis
        values = [value for key in session_keys(self.here) for value in redis.hvals(key)]
        return [value.partition(b"\0")[2] for value in self.rng.sample(values, min(3, len(values)))]

    def _revoke(self, *, terminate: bool) -> None:
        for raw in self._in_flight():
            with suppress(ValueError, KeyError, TypeError):
                job_id = json.loads(raw)["headers"]["id"]
                self._control("revoke", task_id=[job_id], terminate=terminate, signal="SIGTERM")

    def _control(self, command: str, destination: list[str] | None = None, **options: Any) -> None:
        with self.here.producer.connection_for_write() as connection:
            self.here.producer.control.broadcast(
                command, arguments=options, destination=destination, connection=connection
            )

    def _waits_for_lock(self) -> bool:
        with connected(self.here.store.database_url) as database:
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            return bool(database.execute(text(waiting)).scalar_one())

    def _hold(self, least: float, most: float) -> None:
        """Keep a fault in force, or put off the next, for a random time in seconds.

        The time is part of the fault: nothing is awaited that could happen earlier.
        """
        time.sleep(self.rng.uniform(least, most))


def _end_backends(database: Connection) -> None:
    database.execute(
        text(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name <> '' AND pid <> pg_backend_pid()"
            " AND backend_type = 'client backend'"
        )
    )


def _is_ready(worker: Service) -> bool:
    return worker.alive and b" ready." in worker.log.read_bytes()


KINDS: dict[str, Callable[[Chaos, int], None]] = {
    "pool process killed": Chaos.kill_pool_process,
    "worker killed": Chaos.kill_worker,
    "worker and pool killed": Chaos.kill_worker_and_pool,
    "worker asked to stop": Chaos.stop_worker,
    "worker and pool asked to stop": Chaos.stop_group,
    "worker shut down by control": Chaos.shut_down_by_control,
    "worker frozen": Chaos.freeze_worker,
    "pool process frozen": Chaos.freeze_pool_process,
    "worker and pool frozen": Chaos.freeze_worker_and_pool,
    "PostgreSQL crashed": Chaos.crash_postgresql,
    "PostgreSQL's backends ended": Chaos.end_backends,
    "PostgreSQL refuses connections": Chaos.refuse_database_connections,
    "PostgreSQL's connections cut": Chaos.cut_database_connections,
    "Redis crashed": Chaos.crash_redis,
    "Redis frozen": Chaos.freeze_redis,
    "Redis full": Chaos.fill_redis,
    "Redis read-only": Chaos.demote_redis,
    "Redis's connections cut": Chaos.cut_redis_connections,
    "Redis's clients killed": Chaos.kill_clients,
    "the same while jobs wait": Chaos.kill_clients_while_batches_wait,
    "both servers crashed": Chaos.crash_both_servers,
    "job revoked": Chaos.revoke,
    "job revoked and terminated": Chaos.revoke_and_terminate,
    "message in flight duplicated": Chaos.duplicate,
    "jobs delayed and expiring": Chaos.delay_and_expire,
    "poison messages": Chaos.poison,
}
STAGES = ["waiting", *POINTS]


class Producer(threading.Thread):
    """Sends jobs, again under the same ID until Redis has accepted them."""

    def __init__(self, here: Site, seed: str, share: int) -> None:
        """Sends so many jobs, and more until told that it is enough."""
        super().__init__(daemon=True)
        self.accepted: list[str] = []
        self.share = share
        self.enough = threading.Event()
        self.running = threading.Event()
        self.running.set()
        self.is_idle = False
        self._here = here
        self._rng = random.Random(seed)  # noqa: S311 - to be the same again
        self._seed = seed

    def run(self) -> None:
        """Send until there is enough."""
        client = InterviewAccessClient(self._here.broker)
        while len(set(self.accepted)) < self.share or not self.enough.is_set():
            if not self.running.is_set():
                self.is_idle = True
                self.running.wait()
                self.is_idle = False
            if self._waiting() > QUEUED:
                self.enough.wait(0.02)
                continue
            self._send(client)
        self.is_idle = True

    def _send(self, client: InterviewAccessClient) -> None:
        job_id = f"job-{self._seed}-{len(self.accepted)}"
        if self.accepted and self._rng.random() < 0.05:
            job_id = self._rng.choice(self.accepted[-20:])  # twice, or another request
        user = self._rng.choice(USERS)
        ids = self._rng.sample(INTERVIEWS, self._rng.randrange(30))
        if self._rng.random() < 0.03:
            ids.append(UNKNOWN)
        while True:
            with suppress(QueueUnavailableError, RedisError):
                try:
                    client.enqueue(user, ids, job_id=job_id)
                except JobIdReusedException:  # as the client refuses; the worker must, too
                    self._here.push({"user_id": user, "interview_ids": ids}, job_id=job_id)
                break
        self.accepted.append(job_id)

    def _waiting(self) -> int:
        try:
            return int(self._here.redis.llen(QUEUE))
        except RedisError:
            return QUEUED + 1


class Saboteur(threading.Thread):
    """Takes one ground of the promises away, from outside: the invariants must not hold then."""

    def __init__(self, here: Site, ground: str) -> None:
        """Takes away the ground of that name.

        Args:
            here: The site.
            ground: ``claims``: Redis forgets soon what a worker has claimed, as if messages were
                acknowledged when their jobs begin. ``takeover``: no dead session's lease expires.
                ``ledger``: a finished job is forgotten when it comes again.
        """
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self._here = here
        self._ground = ground
        self._seen: set[tuple[str, bytes]] = set()
        if ground == "ledger":
            here.store.execute(
                "CREATE FUNCTION forget() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
                " DELETE FROM grant_access_job WHERE job_id = NEW.job_id; RETURN NEW; END $$"
            )
            here.store.execute(
                "CREATE TRIGGER forget BEFORE INSERT ON grant_access_job"
                " FOR EACH ROW EXECUTE FUNCTION forget()"
            )

    def run(self) -> None:
        """Do so until stopped."""
        while not self.stop.wait(0.03):
            with suppress(RedisError):
                if self._ground == "claims":
                    self._forget_claims()
                elif self._ground == "takeover":
                    self._renew_leases()

    def _forget_claims(self) -> None:
        redis: Any = self._here.redis
        claims = {
            (key, delivery) for key in session_keys(self._here) for delivery in redis.hkeys(key)
        }
        for key, delivery in claims & self._seen:
            redis.hdel(key, delivery)
        self._seen = claims

    def _renew_leases(self) -> None:
        redis: Any = self._here.redis
        key = f"{PREFIX}leases"
        is_hash = redis.type(key) == b"hash"
        for session in heartbeats(self._here):
            if is_hash:
                redis.hincrby(key, session, 1)
            else:
                redis.zincrby(key, 1_000, session)


def run(
    *, seed: int, faults: int, jobs: int, without: str = "", report: Callable[[str], None]
) -> None:
    """One run, with servers of its own.

    Raises:
        AssertionError: where an invariant does not hold.
    """
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        with LocalStack(folder / "servers") as stack:
            migrate(stack.database_url, report=lambda _: None)
            with site(stack, stack.database_url, 0) as here:
                here.store.execute(
                    "INSERT INTO interview_interview (id, title, duration) SELECT CAST(id AS uuid),"
                    " 'Interview', interval '1 hour' FROM unnest(CAST(:ids AS text[])) AS id",
                    ids=INTERVIEWS,
                )
                saboteur = Saboteur(here, without)
                saboteur.start()
                relays = Relays(here.broker, here.store.database_url)
                rng = random.Random(seed)  # noqa: S311 - to be the same again
                chaos = Chaos(here, stack, relays, folder, rng)
                producers = [
                    Producer(here, f"{seed}-{number}", jobs // PRODUCERS + 1)
                    for number in range(PRODUCERS)
                ]
                try:
                    _run(chaos, producers, seed=seed, faults=faults, report=report)
                finally:
                    for producer in producers:
                        producer.share = 0
                        producer.enough.set()
                        producer.running.set()
                    saboteur.stop.set()
                    chaos.end()
                    relays.close()


def _run(
    chaos: Chaos,
    producers: list[Producer],
    *,
    seed: int,
    faults: int,
    report: Callable[[str], None],
) -> None:
    chaos.tend()
    for producer in producers:
        producer.start()
    injected: Counter[tuple[str, str]] = Counter()
    began = time.monotonic()
    pairs: list[tuple[str, str]] = []
    recent: list[tuple[str, str]] = []
    checked: set[str] = set()
    while injected.total() < faults:
        if not pairs:
            pairs = [(kind, stage) for kind in KINDS for stage in STAGES]
            chaos.rng.shuffle(pairs)
        kind, stage = pairs.pop()
        if chaos.inject(KINDS[kind], stage):
            injected[kind, stage] += 1
            recent.append((kind, stage))
            if injected.total() % 100 == 0:
                report(f"{injected.total()} faults in {time.monotonic() - began:.0f} s")
        chaos.tend()
        if len(recent) == QUIET_EVERY:
            _quiet_point(chaos, producers, checked, recent)
    for producer in producers:
        producer.enough.set()

    def are_done() -> bool:
        return not any(producer.is_alive() for producer in producers)

    assert chaos.tend_until(are_done, within=_REST_SECONDS), "not all jobs could be sent"
    _quiet_point(chaos, producers, checked, recent)
    report(_table(injected))
    accepted = {*chaos.accepted, *(one for producer in producers for one in producer.accepted)}
    try:
        results = balance(chaos.here, accepted, within=LIVENESS_SECONDS)
    finally:
        report(f"seed {seed}: {injected.total()} faults over {len(accepted)} jobs")
    kinds = Counter(
        "done" if result.get("success") else result["exc_type"] for result in results.values()
    )
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    letters: Any = chaos.here.redis.xlen(f"{PREFIX}dead")
    report(f"the invariants hold: {told}; {letters} dead letters")
    full = faults >= len(KINDS) * len(STAGES)
    assert not full or all(injected[kind, stage] for kind in KINDS for stage in STAGES)


def _quiet_point(
    chaos: Chaos, producers: list[Producer], checked: set[str], recent: list[tuple[str, str]]
) -> None:
    """Let all accepted jobs finish while nothing else happens."""
    for producer in producers:
        producer.running.clear()

    def are_idle() -> bool:
        return all(producer.is_idle for producer in producers)

    assert chaos.tend_until(are_idle, within=LIVENESS_SECONDS), "a producer cannot send"
    accepted = {*chaos.accepted, *(one for producer in producers for one in producer.accepted)}
    try:
        chaos.verify_liveness(accepted - checked)
    except AssertionError as error:
        faults = "\n  ".join(f"{kind}, {stage}" for kind, stage in recent)
        raise AssertionError(f"{error}\nafter these faults:\n  {faults}") from None
    checked |= accepted
    recent.clear()
    for producer in producers:
        producer.running.set()


def _table(injected: Counter[tuple[str, str]]) -> str:
    width = max(map(len, KINDS)) + 2
    lines = ["Faults by kind, and by the stage of the job that each was injected at:"]
    lines += [f"  {number}: {stage}" for number, stage in enumerate(STAGES)]
    lines.append(" " * width + "".join(f"{number:>4}" for number in range(len(STAGES))))
    for kind in KINDS:
        counts = "".join(f"{injected[kind, stage]:>4}" for stage in STAGES)
        lines.append(kind.ljust(width) + counts)
    return "\n".join(lines)


@click.command()
@click.option("--seed", default=1, show_default=True, help="Repeats a run.")
@click.option("--faults", default=1_000, show_default=True)
@click.option("--jobs", default=5_000, show_default=True, help="At least so many.")
@click.option(
    "--without",
    type=click.Choice(ABLATIONS),
    default="",
    help="Take a ground of the promises away: an invariant must fail.",
)
def main(**options: Any) -> None:
    """Inject faults into two workers and both servers, and verify the invariants."""
    run(report=click.echo, **options)


if __name__ == "__main__":
    main()
