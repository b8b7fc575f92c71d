"""Workers of this release and of a later one on one queue and one database, under load."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from interview_access.contracts import GrantJob
from interview_access.producer import InterviewAccessClient
from sqlalchemy import text

from devstack.service import Service, stop_all
from tests.faults.invariants import PREFIX, unfinished, verified_results
from tests.faults.workers import SHORT_LEASE, kill_process_tree, success
from tests.support.commands import run_module
from tests.support.database import connected
from tests.support.stores import Background, until
from tests.support.workers import ROOT, Site, worker_service

BATCH = 6
INTERVAL_SECONDS = 0.15
"""Between two batches of the load."""

_REQUEST = text("""
    INSERT INTO grant_access_request (user_id, interview_ids)
    VALUES (:user, CAST(:ids AS text[])) RETURNING job_id
""")


@contextmanager
def load(here: Site, ids: list[str]) -> Iterator[list[str]]:
    """Send jobs until the end of the block. Yields the job IDs.

    Three jobs of each user request overlapping parts of the interviews. One job of each batch is
    requested in the outbox.
    """
    sent: list[str] = []
    stop = threading.Event()
    third = len(ids) // 3

    def send() -> None:
        with (
            closing(InterviewAccessClient(here.broker)) as client,
            connected(here.store.database_url, autocommit=True) as database,
        ):
            while not stop.wait(INTERVAL_SECONDS):
                jobs = [
                    GrantJob(f"user-{number // 3}", ids[number % 3 * third :])
                    for number in range(len(sent), len(sent) + BATCH)
                ]
                sent.extend(client.enqueue_many(jobs))
                requested = {"user": f"outbox-{len(sent)}", "ids": ids}
                sent.append(str(database.execute(_REQUEST, requested).scalar_one()))

    sender = Background(send)
    try:
        yield sent
    finally:
        stop.set()
        sender.result()


class Fleet:
    """The workers of two releases.

    Attributes:
        later: The folder of the later release.
    """

    def __init__(self, here: Site, logs: Path, later: Path, services: ExitStack) -> None:
        """Start no worker yet.

        Args:
            here: The site.
            logs: The folder of the workers' log files.
            later: The folder of the later release.
            services: Stops the workers at its end.
        """
        self.later = later
        self._here, self._logs, self._services = here, logs, services
        self._environment = here.environment(**SHORT_LEASE)

    def worker(self, name: str, folder: Path = ROOT) -> Service:
        """Return a worker of a release, which is not started yet."""
        service = worker_service(
            self._logs / f"{name}.log",
            self._environment,
            processes=1,
            name=f"{name}@test",
            folder=folder,
        )
        self._services.callback(service.stop)
        return service

    def migrate(self, folder: Path) -> str:
        """Run a release's migration, which must succeed. Returns what it reports."""
        done = run_module(self._environment, "worker.cli", "migrate", folder=folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def grant(self, user: str, interview_id: str, *, folder: Path) -> None:
        """Have a release's client request a grant. Its result must be one created grant."""
        words = ("--user", user, "--interview", interview_id, "--wait")
        done = run_module(self._environment, "worker.cli", "grant", *words, folder=folder)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == success(1)


def start(*workers: Service) -> None:
    """Start workers, and wait until they are ready."""
    starts = {one: _count(one, b" ready.") for one in workers}
    for one in workers:
        one.start()
    for one, before in starts.items():
        until(lambda one=one, before=before: _count(one, b" ready.") > before or not one.alive)  # type: ignore[misc] # mypy infers no default
        assert one.alive, one.log_tail()


def drain(*workers: Service) -> None:
    """Stop workers in order. They must finish what they execute."""
    stop_all(workers)


def until_working(*workers: Service, jobs: int = 12) -> None:
    """Wait until each worker has executed so many more jobs."""
    for one in workers:
        expected = count_succeeded(one) + jobs
        until(lambda one=one, expected=expected: count_succeeded(one) >= expected)  # type: ignore[misc] # as in start


def count_succeeded(worker: Service) -> int:
    """Count the jobs that a worker has executed with success."""
    return _count(worker, b" succeeded in ")


def _count(worker: Service, phrase: bytes) -> int:
    return worker.log.read_bytes().count(phrase) if worker.log.exists() else 0


def upgrade(fleet: Fleet, old: tuple[Service, Service], new: tuple[Service, ...]) -> None:
    """Replace running workers of this release by those of the later one, after its migration.

    One of the old workers is killed and started again on the new schema.
    """
    assert "running workers may stay" in fleet.migrate(fleet.later)
    until_working(*old)
    kill_process_tree(old[1])
    old[1].wait()
    start(*new, old[1])
    until_working(*old, *new)
    drain(*old)


def roll_back(fleet: Fleet, old: tuple[Service, ...], new: tuple[Service, ...]) -> None:
    """Replace running workers of the later release by those of this one, on the new schema."""
    assert "nothing to do" in fleet.migrate(ROOT)
    start(*old)
    until_working(*old, *new)
    drain(*new)
    until_working(*old)


def replace(leaving: tuple[Service, ...], coming: tuple[Service, ...]) -> None:
    """Replace running workers by as many others, one after the other; every second one is killed.

    The migration of the later release must have run.
    """
    for number, (one, other) in enumerate(zip(leaving, coming, strict=True)):
        start(other)
        until_working(one, other)
        if number % 2:
            kill_process_tree(one)
            one.wait()
        else:
            drain(one)
    until_working(*coming)


def verify(here: Site, logs: Path, sent: list[str]) -> None:
    """Verify that every job has succeeded, with exact counts, and that none was retried."""
    until(lambda: not unfinished(here, sent))  # requests in the outbox are not in Redis yet
    results: dict[str, Any] = verified_results(here, sent)
    assert all(result.get("success") for result in results.values())
    assert not here.dead_letters()
    assert not here.redis.exists(f"{PREFIX}deferrals")
    lines = [line for log in logs.glob("*.log") for line in log.read_text("utf-8").splitlines()]
    assert not [line for line in lines if "job retried" in line or " ERROR" in line]
