"""Random faults by a seed, against two workers and both servers, until the books are balanced.

    python -m tests.faults.chaos --faults 1000 --jobs 5000 --seed 1

Every fault strikes at a stage of a job's way, where a gate holds what passes; kinds and stages are
drawn so that each kind strikes at each stage as often as any other.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import click
import psutil
from interview_access.errors import JobIdReusedException, QueueUnavailableError
from interview_access.producer import InterviewAccessClient
from redis.exceptions import RedisError
from sqlalchemy import text

from storage.schema import migrate
from tests.database import connected
from tests.faults.books import balance
from tests.faults.gates import Gate, Relay, Relays
from tests.faults.sites import POINTS, family, kill_all
from tests.workers import QUEUE, ROOT, Site, site
from worker.local_stack import LocalStack, Service

WORKERS = 2
PRODUCERS = 3
QUEUED = 40
"""Messages on the queue at most: enough that there is always one to strike at."""

_REST_WITHIN = 600  # seconds, for the jobs that are sent after the last fault

SETTINGS = {
    "GRANT_LEASE_SECONDS": 1,
    "GRANT_CHUNK_SIZE": 8,
    "GRANT_RETRY_MAX_DELAY": 2,
    "GRANT_ATTEMPT_LIMIT": 8,
    "GRANT_STOP_GRACE": 2,
}
USERS = [f"user-{number}" for number in range(25)]
INTERVIEWS = [str(UUID(int=(0xC << 124) + number)) for number in range(200)]
UNKNOWN = str(UUID(int=(0xD << 124)))

CONSEQUENCES = {
    "child lost, tried again": "ended with its child",
    "database in trouble, tried again": "try .* failed",
    "result stored later": "goes back",
    "worker gone, swept": "a worker is gone",
    "lease lost": "lease was lost",
    "reconnected": "Connection to broker lost",
    "told later": "is told later",
    "stopped": "Warm shutdown",
    "rested": "no job is taken",
    "answered before": "answered before",
}
"""What a fault led to, by what the workers' logs say until the next."""


@dataclass
class Chaos:
    """One run."""

    here: Site
    stack: LocalStack
    relays: Relays
    folder: Path
    without: str
    rng: random.Random
    workers: list[Service] = field(default_factory=list)
    old: list[Service] = field(default_factory=list)
    frozen: dict[int, float] = field(default_factory=dict)

    # --- The faults; each is given the process that is held at the gate -----------------------

    def kill_child(self, pid: int) -> None:
        """A child, the one at the gate where it is one."""
        main = self.worker_of(pid)
        children = psutil.Process(main.pid).children()
        for child in [one for one in children if one.pid == pid] or children[:1]:
            child.kill()

    def kill_worker(self, pid: int) -> None:
        """A worker's main process."""
        os.kill(self.worker_of(pid).pid, signal.SIGKILL)

    def kill_worker_and_children(self, pid: int) -> None:
        """A worker with all its processes."""
        kill_all(self.worker_of(pid))

    def stop_worker(self, pid: int) -> None:
        """A worker is asked to stop."""
        os.kill(self.worker_of(pid).pid, signal.SIGTERM)

    def freeze_worker(self, pid: int) -> None:
        """A worker's main process stands still, for longer than its lease or not."""
        self._freeze(self.worker_of(pid).pid)

    def freeze_child(self, pid: int) -> None:
        """A child stands still."""
        main = self.worker_of(pid)
        children = [child.pid for child in psutil.Process(main.pid).children()]
        self._freeze(pid if pid in children else children[0])

    def restart_postgresql(self, _: int) -> None:
        """PostgreSQL crashes and starts."""
        os.kill(self.stack.postgres.pid, signal.SIGQUIT)
        self.stack.postgres.wait()
        self.stack.postgres.start()

    def end_backends(self, _: int) -> None:
        """PostgreSQL ends all of the workers' connections."""
        self._ask_database(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'interview-access-worker'"
        )

    def make_database_read_only(self, _: int) -> None:
        """PostgreSQL takes no writes for a while."""
        for turn in "on", "off":
            self._ask_database(f"ALTER SYSTEM SET default_transaction_read_only = {turn}")
            self._ask_database("SELECT pg_reload_conf()")
            time.sleep(self.rng.uniform(0.1, 1.0))

    def cut_database_connections(self, _: int) -> None:
        """The connections to PostgreSQL are cut."""
        self.relays.database.cut()

    def crash_redis(self, _: int) -> None:
        """Redis crashes and starts, with its append-only file."""
        os.kill(self.stack.valkey.pid, signal.SIGKILL)
        self.stack.valkey.wait()
        self.stack.valkey.start()

    def freeze_redis(self, _: int) -> None:
        """Redis stands still for longer than every lease."""
        os.kill(self.stack.valkey.pid, signal.SIGSTOP)
        time.sleep(self.rng.uniform(0.2, 3.0))
        os.kill(self.stack.valkey.pid, signal.SIGCONT)

    def fill_redis(self, _: int) -> None:
        """Redis has no room for a while."""
        self.here.redis.config_set("maxmemory", 1)
        time.sleep(self.rng.uniform(0.1, 1.5))
        self.here.redis.config_set("maxmemory", 0)

    def demote_redis(self, _: int) -> None:
        """Redis takes no writes for a while."""
        self.here.redis.replicaof("127.0.0.1", 1)
        time.sleep(self.rng.uniform(0.1, 1.0))
        self.here.redis.replicaof("NO", "ONE")

    def cut_redis_connections(self, _: int) -> None:
        """The connections to Redis are cut, the queue's and the results'."""
        self.relays.queue.cut()
        self.relays.results.cut()

    def crash_both_servers(self, pid: int) -> None:
        """Both servers crash and start."""
        self.crash_redis(pid)
        self.restart_postgresql(pid)

    # --- The run --------------------------------------------------------------------------------

    def strike(self, kind: Callable[[Chaos, int], None], stage: str) -> bool:
        """One fault at one stage. Returns whether there was a job to strike at."""
        with self._gate(stage) as gate:
            deadline = time.monotonic() + 5
            while gate and not gate.reached and time.monotonic() < deadline:
                self.tend()
                time.sleep(0.01)  # a job comes by when it does
            if gate and not gate.reached:
                return False
            pid = gate.pid if gate else self.workers[self.rng.randrange(WORKERS)].pid
            try:
                kind(self, pid)
            except (psutil.NoSuchProcess, ProcessLookupError, IndexError):
                return False
        return True

    @contextmanager
    def _gate(self, stage: str) -> Iterator[Gate | None]:
        if stage not in POINTS:
            yield None
            return
        server, pattern, answered = POINTS[stage]
        relay: Relay = getattr(self.relays, server)
        with relay.gate(pattern, answered=answered) as gate:
            yield gate

    def tend(self) -> None:
        """Start workers in the place of those that are gone, and let the frozen go on."""
        for pid, until in list(self.frozen.items()):
            if time.monotonic() > until:
                del self.frozen[pid]
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        self.workers = [worker for worker in self.workers if worker.alive or self._bury(worker)]
        while len(self.workers) < WORKERS:
            self.workers.append(self._new_worker())

    def worker_of(self, pid: int) -> Service:
        """The worker that a process belongs to; any, where it is gone."""
        for worker in self.workers:
            with suppress(psutil.NoSuchProcess):
                if pid in {process.pid for process in family(worker)}:
                    return worker
        return self.rng.choice(self.workers)

    def end(self) -> None:
        """End every process of ours that is left."""
        for pid in self.frozen:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self.frozen.clear()
        for worker in self.workers:
            worker.ask_to_stop()
        for worker in self.workers:
            worker.stop()

    def _bury(self, worker: Service) -> bool:
        worker.stop()
        self.old.append(worker)
        return False

    def _new_worker(self) -> Service:
        number = len(self.workers) + len(self.old)
        application = "tests.faults.broken" if self.without else "worker"
        command = [sys.executable, "-m", "celery", "-A", application, "worker", "-c", "2"]
        service = Service(
            "worker",
            [*command, "-l", "INFO", "-n", f"worker-{number}@%h", "--without-mingle"],
            log=self.folder / f"worker-{number}.log",
            environment=self.here.environment(
                **{**SETTINGS, **self.relays.settings, "CHAOS_WITHOUT": self.without}
            ),
            folder=ROOT,
        )
        service.start()
        return service

    def _freeze(self, pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        self.frozen[pid] = time.monotonic() + self.rng.uniform(0.2, 6.0)

    def _ask_database(self, statement: str) -> None:
        with connected(self.here.store.database_url, autocommit=True) as database:
            database.execute(text(statement))

    def led_to(self, seen: dict[Path, int]) -> Counter[str]:
        """What the logs say since the last look."""
        counts: Counter[str] = Counter()
        for log in self.folder.glob("*.log"):
            with log.open("rb") as lines:
                lines.seek(seen[log])
                new = lines.read().decode(errors="replace")
                seen[log] = lines.tell()
            for name, words in CONSEQUENCES.items():
                first, _, rest = words.partition(" .* ")
                counts[name] += sum(first in line and rest in line for line in new.splitlines())
        return counts


KINDS: dict[str, Callable[[Chaos, int], None]] = {
    "child killed": Chaos.kill_child,
    "worker killed": Chaos.kill_worker,
    "worker and children killed": Chaos.kill_worker_and_children,
    "worker asked to stop": Chaos.stop_worker,
    "worker frozen": Chaos.freeze_worker,
    "child frozen": Chaos.freeze_child,
    "PostgreSQL crashed": Chaos.restart_postgresql,
    "PostgreSQL's backends ended": Chaos.end_backends,
    "PostgreSQL read-only": Chaos.make_database_read_only,
    "PostgreSQL's connections cut": Chaos.cut_database_connections,
    "Redis crashed": Chaos.crash_redis,
    "Redis frozen": Chaos.freeze_redis,
    "Redis full": Chaos.fill_redis,
    "Redis read-only": Chaos.demote_redis,
    "Redis's connections cut": Chaos.cut_redis_connections,
    "both servers crashed": Chaos.crash_both_servers,
}
STAGES = ["waiting", *POINTS]


class Producer(threading.Thread):
    """Sends jobs, again under the same id until Redis has taken them."""

    def __init__(self, here: Site, seed: str, share: int) -> None:
        """Sends so many, and more where it is not told to stop."""
        super().__init__(daemon=True)
        self.accepted: list[str] = []
        self.share = share
        self.enough = threading.Event()
        self._here = here
        self._rng = random.Random(seed)  # noqa: S311 - to be the same again
        self._seed = seed

    def run(self) -> None:
        """Send until there is enough."""
        client = InterviewAccessClient(self._here.broker)
        while len(set(self.accepted)) < self.share or not self.enough.is_set():
            if self._waiting() > QUEUED:
                self.enough.wait(0.02)
                continue
            job_id = f"job-{self._seed}-{len(self.accepted)}"
            if self.accepted and self._rng.random() < 0.05:
                job_id = self._rng.choice(self.accepted[-20:])  # twice, or another request
            user, ids = (
                self._rng.choice(USERS),
                self._rng.sample(INTERVIEWS, self._rng.randrange(30)),
            )
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


def run(
    *, seed: int, faults: int, jobs: int, without: str = "", report: Callable[[str], None]
) -> None:
    """One run, with servers of its own.

    Raises:
        AssertionError: where the books do not balance.
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
                relays = Relays(here.broker, here.store.database_url)
                rng = random.Random(seed)  # noqa: S311 - to be the same again
                chaos = Chaos(here, stack, relays, folder, without, rng)
                try:
                    _run(chaos, seed=seed, faults=faults, jobs=jobs, report=report)
                finally:
                    chaos.end()
                    relays.close()


def _run(chaos: Chaos, *, seed: int, faults: int, jobs: int, report: Callable[[str], None]) -> None:
    producers = [
        Producer(chaos.here, f"{seed}-{number}", jobs // PRODUCERS + 1)
        for number in range(PRODUCERS)
    ]
    chaos.tend()
    for producer in producers:
        producer.start()
    struck: Counter[tuple[str, str]] = Counter()
    led: dict[str, Counter[str]] = defaultdict(Counter)
    seen: dict[Path, int] = defaultdict(int)
    began = time.monotonic()
    pairs: list[tuple[str, str]] = []
    while struck.total() < faults:
        if not pairs:
            pairs = [(kind, stage) for kind in KINDS for stage in STAGES]
            chaos.rng.shuffle(pairs)
        kind, stage = pairs.pop()
        if chaos.strike(KINDS[kind], stage):
            struck[kind, stage] += 1
            led[kind] += chaos.led_to(seen)
            if struck.total() % 100 == 0:
                report(f"{struck.total()} faults in {time.monotonic() - began:.0f} s")
        chaos.tend()
    for producer in producers:
        producer.enough.set()
    deadline = time.monotonic() + _REST_WITHIN
    while any(producer.is_alive() for producer in producers) or chaos.frozen:
        assert time.monotonic() < deadline, "the rest of the jobs is lost: the queue stands still"
        chaos.tend()
        time.sleep(0.1)  # the last jobs are sent
    assert all(len(set(producer.accepted)) >= producer.share for producer in producers)
    accepted = {job_id for producer in producers for job_id in producer.accepted}
    report(_table(struck, led))
    try:
        results = balance(chaos.here, accepted, within=120)
    finally:
        report(f"seed {seed}: {struck.total()} faults over {len(accepted)} jobs")
    kinds = Counter(
        "done" if result.get("success") else result["exc_type"] for result in results.values()
    )
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    report(f"the books balance: {told}; {len(chaos.here.dead_letters())} dead letters")
    full = faults >= len(KINDS) * len(STAGES)
    assert not full or all(struck[kind, stage] for kind in KINDS for stage in STAGES)


def _table(struck: Counter[tuple[str, str]], led: dict[str, Counter[str]]) -> str:
    width = max(map(len, KINDS)) + 2
    lines = ["Faults by kind, and by the stage of the job that each struck at:"]
    lines += [f"  {number}: {stage}" for number, stage in enumerate(STAGES)]
    lines.append(" " * width + "".join(f"{number:>4}" for number in range(len(STAGES))))
    for kind in KINDS:
        lines.append(kind.ljust(width) + "".join(f"{struck[kind, stage]:>4}" for stage in STAGES))
    lines.append("What each led to, by the workers' logs:")
    for kind in KINDS:
        told = ", ".join(f"{name} {count}" for name, count in led[kind].most_common() if count)
        lines.append(f"{kind.ljust(width)}{told}")
    return "\n".join(lines)


@click.command()
@click.option("--seed", default=1, show_default=True, help="Repeats a run.")
@click.option("--faults", default=1_000, show_default=True)
@click.option("--jobs", default=5_000, show_default=True, help="At least so many.")
@click.option(
    "--without",
    type=click.Choice(["", "transport", "ledger", "late-acknowledgement"]),
    default="",
    help="Take a ground of the promises away: the books must not balance.",
)
def main(**options: Any) -> None:
    """Strike at two workers and both servers, and balance the books."""
    run(report=click.echo, **options)


if __name__ == "__main__":
    main()
