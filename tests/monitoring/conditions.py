"""The condition of each alert, caused on a real worker within a block, and removed after it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
from interview_access.contracts import announcement_key
from interview_access.producer import InterviewAccessClient
from sqlalchemy import text

from devstack.service import Service
from storage.postgres.retention import LOCK
from tests.faults.workers import kill_process_tree
from tests.monitoring.endpoint import Endpoint
from tests.monitoring.prometheus import Prometheus
from tests.support.commands import run_module
from tests.support.database import connected
from tests.support.stores import until
from tests.support.workers import (
    Site,
    held_grant,
    is_ready,
    ledger_missing,
    started,
    worker_service,
)
from worker.broker.claims import PAUSED
from worker.operations.pause import PauseSwitch

UNKNOWN = "a1b2c3d4-0000-4000-8000-000000000000"


@dataclass(frozen=True)
class Place:
    """Where conditions are caused.

    Attributes:
        here: The queue and the database.
        worker: The worker.
        endpoint: Its monitoring endpoint.
        prometheus: Scrapes the worker.
        samples: IDs of interviews.
        folder: For logs.
    """

    here: Site
    worker: Service
    endpoint: Endpoint
    prometheus: Prometheus
    samples: list[str]
    folder: Path


def environment(here: Site, endpoint: Endpoint) -> dict[str, str]:
    """Return the environment of a worker that prunes, and whose lease expires within 4 s."""
    return here.environment(
        METRICS_ADDRESS=endpoint.address,
        GRANT_LEASE_SECONDS=2,
        GRANT_RETENTION_DAYS=1,
        GRANT_RETRY_MAX_DELAY=1,
        GRANT_DEAD_LETTER_BYTES=1_000_000,
    )


@contextmanager
def worker_killed(place: Place) -> Iterator[None]:
    """The only worker is killed, with its pool processes, and started again."""
    kill_process_tree(place.worker)
    place.worker.wait(30)
    yield
    place.worker.start()
    until(lambda: is_ready(place.worker))


@contextmanager
def second_worker(place: Place) -> Iterator[tuple[Service, str]]:
    """A second worker, which is scraped too, with the selector of its series."""
    endpoint = Endpoint()
    log = place.folder / f"{uuid4()}.log"
    with started(worker_service(log, environment(place.here, endpoint))) as second:
        place.prometheus.scrape(place.endpoint, endpoint)
        selector = f'{{instance="{endpoint.address}"}}'
        until_value(place, f"interview_access_worker_ready{selector}", 1)
        yield second, selector
    place.prometheus.scrape(place.endpoint)


@contextmanager
def second_worker_killed(place: Place) -> Iterator[None]:
    """A second worker is killed. The first one takes over its lease."""
    with second_worker(place) as (second, _):
        kill_process_tree(second)
        yield


@contextmanager
def second_worker_frozen(place: Place) -> Iterator[None]:
    """A second worker is frozen for longer than its lease."""
    with second_worker(place) as (second, selector):
        os.kill(second.pid, signal.SIGSTOP)
        yield
        until_value(place, "interview_access_worker_sessions", 1)
        os.kill(second.pid, signal.SIGCONT)
        until_value(place, f"interview_access_lease_losses_total{selector}", 1)


def until_value(place: Place, query: str, value: float) -> None:
    """Wait until Prometheus has a value."""
    place.prometheus.until(lambda: place.prometheus.value(query) == value)


@contextmanager
def jobs_failing(place: Place) -> Iterator[None]:
    """A trigger refuses the grants of ten jobs until their retries are exhausted."""
    store = place.here.store
    store.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION USING ERRCODE = 'serialization_failure'; END $$"
    )
    store.execute(
        "CREATE TRIGGER refuse BEFORE INSERT ON interview_userinterviewaccess"
        " FOR EACH ROW EXECUTE FUNCTION refuse()"
    )
    try:
        for one in [place.here.send(str(uuid4()), place.samples[:2]) for _ in range(10)]:
            assert place.here.answer(one)["result"]["exc_type"] == "StorageUnavailableException"
    finally:
        store.execute("DROP FUNCTION refuse CASCADE")
    yield


@contextmanager
def messages_unreadable(place: Place) -> Iterator[None]:
    """Ten messages have a task that the worker does not know. They become dead letters."""
    for one in [place.here.send(task="made.up") for _ in range(10)]:
        place.here.answer(one)
    yield


@contextmanager
def requests_invalid(place: Place) -> Iterator[None]:
    """Ten jobs request an unknown interview."""
    for one in [place.here.send("ann", [UNKNOWN]) for _ in range(10)]:
        place.here.answer(one)
    yield


@contextmanager
def grants_locked(place: Place) -> Iterator[None]:
    """Another transaction holds a lock on the table of grants, and three jobs are retried."""
    with connected(place.here.store.database_url) as other:
        other.execute(text("LOCK TABLE interview_userinterviewaccess IN ACCESS EXCLUSIVE MODE"))
        jobs = [place.here.send(str(uuid4()), place.samples[:2]) for _ in range(3)]
        yield
    for job in jobs:
        place.here.answer(job)


@contextmanager
def pool_frozen(place: Place, age: timedelta | None) -> Iterator[None]:
    """All pool processes are frozen with a job each, and another job waits."""
    children = psutil.Process(place.worker.pid).children()
    for one in children:
        one.suspend()
    jobs: list[str] = []
    for _ in children:
        jobs.append(place.here.send(str(uuid4()), place.samples[:2]))
        until(lambda: place.endpoint.value("pool_processes", state="busy") == len(jobs))
    jobs.append(send_aged(place.here, age) if age else place.here.send("waiting", []))
    try:
        yield
    finally:
        for one in children:
            one.resume()
    for job in jobs:
        place.here.answer(job)


def send_aged(here: Site, age: timedelta) -> str:
    """Send a job as the client package would have sent it so long ago, and return its ID."""
    job_id = str(uuid4())
    with InterviewAccessClient(here.broker) as client:
        client.enqueue(user_id="waiting", interview_ids=[], job_id=job_id)
    rewrite(here, announcement_key(job_id), sent_at=(datetime.now(UTC) - age).isoformat())
    return job_id


def rewrite(here: Site, key: str, **fields: object) -> None:
    """Replace fields of a JSON object in Redis."""
    stored: Any = here.redis.get(key)
    here.redis.set(key, json.dumps(json.loads(stored) | fields), keepttl=True)


@contextmanager
def pause_forgotten(place: Place) -> Iterator[None]:
    """The queue was paused two hours ago, and a job waits since."""
    switch = PauseSwitch(place.here.redis)
    switch.pause("ann@host", "move the database")
    age = timedelta(hours=2)
    rewrite(place.here, PAUSED, at=(datetime.now(UTC) - age).isoformat())
    job = send_aged(place.here, age)
    yield
    firing = place.prometheus.firing()
    assert "InterviewAccessJobsWaiting" not in firing
    assert "InterviewAccessNoProgress" not in firing
    assert firing["InterviewAccessQueuePaused"]["description"].startswith("ann@host paused the")
    switch.resume()
    place.here.answer(job)


@contextmanager
def dead_letters_full(place: Place) -> Iterator[None]:
    """Dead letters take most of the memory that they may. An operator drops them."""

    def drop_all() -> None:
        words = ("dead-letters", "drop", "--all", "--yes")
        done = run_module(place.here.environment(), "worker.cli", *words)
        assert done.returncode == 0, done.stderr

    drop_all()  # Redis estimates their memory by the first ones, which were small
    for one in [place.here.send("x" * 150_000, task="made.up") for _ in range(4)]:
        place.here.answer(one)
    yield
    drop_all()


@contextmanager
def outbox_stuck(place: Place) -> Iterator[None]:
    """The relay has delayed a request of ten minutes ago, as it does while Redis refuses it."""
    store, job_id = place.here.store, str(uuid4())
    store.execute(
        "INSERT INTO grant_access_request (job_id, user_id, interview_ids, requested_at, look_at)"
        " VALUES (:job_id, 'ann', '{}', now() - interval '10 min', now() + interval '1 h')",
        job_id=job_id,
    )
    yield
    store.execute("UPDATE grant_access_request SET look_at = now() WHERE job_id = :id", id=job_id)
    place.here.answer(job_id)


@contextmanager
def ledger_unpruned(place: Place) -> Iterator[None]:
    """A job has finished ten days ago, and another process holds the pruners' lock."""
    here = place.here
    with connected(here.store.database_url) as other:
        other.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})
        job = here.send("ann", [])
        here.answer(job)
        here.store.execute(
            "UPDATE grant_access_job SET finished_at = now() - interval '10 d' WHERE job_id = :id",
            id=job,
        )
        yield


@contextmanager
def pool_processes_killed(place: Place) -> Iterator[None]:
    """The pool processes are killed three times during a job, as if no memory was left."""
    here, value, user = place.here, place.endpoint.value, str(uuid4())
    before = value("pool_process_losses_total", reason="crash")
    with held_grant(here, user, place.samples[0]):
        job = here.send(user, place.samples[:2])
        for losses in range(1, 4):
            until(lambda: value("pool_processes", state="busy") == 1)
            for one in psutil.Process(place.worker.pid).children():
                one.kill()
            expected = before + losses
            until(lambda: value("pool_process_losses_total", reason="crash") == expected)  # noqa: B023 - called in this iteration
    here.answer(job)
    yield


@contextmanager
def tables_unreadable(place: Place) -> Iterator[None]:
    """The ledger's table is missing. A job is retried meanwhile."""
    with ledger_missing(place.here):
        job = place.here.send("ann", place.samples[:2])
        yield
    place.here.answer(job)


CONDITIONS: dict[str, Callable[[Place], AbstractContextManager[None]]] = {
    "InterviewAccessNoWorker": worker_killed,
    "InterviewAccessWorkerNotReady": second_worker_frozen,
    "InterviewAccessJobsFailing": jobs_failing,
    "InterviewAccessRequestsInvalid": requests_invalid,
    "InterviewAccessJobsWaiting": lambda place: pool_frozen(place, timedelta(minutes=10)),
    "InterviewAccessNoProgress": lambda place: pool_frozen(place, None),
    "InterviewAccessQueuePaused": pause_forgotten,
    "InterviewAccessDeadLettersGrowing": messages_unreadable,
    "InterviewAccessDeadLettersFull": dead_letters_full,
    "InterviewAccessOutboxStuck": outbox_stuck,
    "InterviewAccessLedgerUnpruned": ledger_unpruned,
    "InterviewAccessPoolProcessesLost": pool_processes_killed,
    "InterviewAccessLeaseExpired": second_worker_killed,
    "InterviewAccessMetricsMissing": tables_unreadable,
}
