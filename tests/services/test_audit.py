"""What the ledger keeps of who requested a job, when, and which attempt recorded its outcome."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from interview_access.aio import AsyncInterviewAccessClient
from interview_access.contracts import GrantJob
from interview_access.outbox import enqueue_in_sqlalchemy
from interview_access.producer import InterviewAccessClient

from devstack.servers import LocalStack
from storage.dtos import AuditDTO
from tests.faults.workers import kill_process_tree
from tests.support.commands import run_module
from tests.support.database import connected
from tests.support.stores import until
from tests.support.workers import (
    GRANT_ACCESS,
    QUEUE,
    Site,
    held_grant,
    ledger_missing,
    migrated_site,
    started,
    worker_service,
)

NUMBER = 12  # of the Redis database
NODE = "audited@here"
ACTOR, REASON = "hr@example.org", "Second round, ticket HR-7"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of the worker."""
    return tmp_path_factory.mktemp("audit") / "worker.log"


@pytest.fixture(scope="module")
def here(stack: LocalStack, _migrated: str, log: Path) -> Iterator[Site]:
    """A site with a worker of a known node name."""
    with (
        migrated_site(stack, _migrated, NUMBER) as here,
        started(worker_service(log, here.environment(), name=NODE)),
    ):
        yield here


@pytest.fixture(scope="module")
def client(here: Site) -> Iterator[InterviewAccessClient]:
    """A client of the site."""
    with InterviewAccessClient(here.broker) as client:
        yield client


def audit(here: Site, job_id: str) -> AuditDTO:
    """Wait until the ledger has the job, and return what it keeps of its origin."""
    until(lambda: here.store.storage.get_finished_job(job_id) is not None)
    finished = here.store.storage.get_finished_job(job_id)
    assert finished
    assert finished.finished_at
    known = finished.job.audit
    times = known.requested_at, known.enqueued_at, known.started_at, finished.finished_at
    assert [*filter(None, times)] == sorted(filter(None, times))
    return known


# --- Producers ----------------------------------------------------------------------------------


def by_client(here: Site, user: str) -> str:
    """Enqueue with the blocking client."""
    with InterviewAccessClient(here.broker) as client:
        return client.enqueue(user, [], actor=ACTOR, reason=REASON)


def many_by_client(here: Site, user: str) -> str:
    """Enqueue many jobs, each of which has its own origin."""
    job = GrantJob(user, [], actor=ACTOR, reason=REASON)
    with InterviewAccessClient(here.broker) as client:
        return client.enqueue_many([GrantJob(user, [], actor="other"), job])[1]


def by_asyncio(here: Site, user: str) -> str:
    """Enqueue a cohort with the asyncio client."""

    async def enqueue() -> str:
        async with AsyncInterviewAccessClient(here.broker) as client:
            return await client.enqueue_cohort([user], [], actor=ACTOR, reason=REASON)

    return asyncio.run(enqueue())


def by_outbox(here: Site, user: str) -> str:
    """Request in a transaction with the client package."""
    with connected(here.store.database_url) as connection:
        job_id = enqueue_in_sqlalchemy(connection, user, [], actor=ACTOR, reason=REASON)
        connection.commit()
    return job_id


def by_sql(here: Site, user: str) -> str:
    """Request in SQL."""
    headers = json.dumps({"actor": ACTOR, "reason": REASON})
    inserted: str = here.store.value(
        "INSERT INTO grant_access_request (user_id, interview_ids, headers)"
        " VALUES (:user, '{}', CAST(:headers AS jsonb)) RETURNING job_id",
        user=user,
        headers=headers,
    )
    return inserted


def by_command(here: Site, user: str) -> str:
    """Enqueue an attempt, which fails, on the command line."""
    words = ("--user", user, "--interview", str(uuid4()), "--actor", ACTOR, "--reason", REASON)
    done = run_module(here.environment(), "worker.cli", "attempt", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def by_celery(here: Site, user: str) -> str:
    """Send with Celery alone."""
    return send(here, user, {"actor": ACTOR, "reason": REASON})


def by_redis(here: Site, user: str) -> str:
    """Push with a plain Redis client."""
    return push(here, user, {"actor": ACTOR, "reason": REASON})


def send(here: Site, user: str, headers: dict[str, Any]) -> str:
    """Send a message with headers as a stock Celery app does."""
    job_id = str(uuid4())
    kwargs = {"user_id": user, "interview_ids": []}
    options = {"task_id": job_id, "queue": QUEUE, "headers": headers}
    here.producer.send_task(GRANT_ACCESS, kwargs=kwargs, **options)
    return job_id


def push(here: Site, user: str, headers: dict[str, Any], arguments: object = None) -> str:
    """Push a message with headers as a plain Redis client does."""
    job_id = str(uuid4())
    kwargs = arguments or {"user_id": user, "interview_ids": []}
    envelope = {
        "body": json.dumps([[], kwargs, {}]),
        "content-type": "application/json",
        "headers": {"task": GRANT_ACCESS, "id": job_id, **headers},
        "properties": {},
    }
    here.redis.lpush(QUEUE, json.dumps(envelope))
    return job_id


CLIENTS = [by_client, many_by_client, by_asyncio, by_command]
OUTBOXES = [by_outbox, by_sql]
OTHERS = [by_celery, by_redis]


@pytest.mark.parametrize("producer", [*CLIENTS, *OUTBOXES, *OTHERS])
def test_the_origin_of_a_job_is_kept(
    here: Site, user: str, producer: Callable[[Site, str], str]
) -> None:
    """Actor, reason, times, attempts and worker are kept, whoever sent the job."""
    began = datetime.now(UTC)
    known = audit(here, producer(here, user))
    assert (known.actor, known.reason) == (ACTOR, REASON)
    assert (known.attempts, known.worker) == (1, NODE)
    assert known.started_at
    assert began <= known.started_at <= datetime.now(UTC)
    assert (known.requested_at is not None) == (producer in OUTBOXES)
    assert (known.enqueued_at is not None) == (producer not in OTHERS)


def test_the_status_has_the_origin(here: Site, client: InterviewAccessClient, user: str) -> None:
    """A client reads the origin before and after the job has ended."""
    job_id = client.enqueue(user, [], countdown=3600, actor=ACTOR, reason=REASON)
    waiting = client.status(job_id)
    assert (waiting.state, waiting.actor, waiting.reason) == ("queued", ACTOR, REASON)
    other = client.enqueue(user, [], actor=ACTOR)
    known = audit(here, other)
    ended = client.status(other)
    assert (ended.actor, ended.reason, ended.worker) == (ACTOR, None, NODE)
    assert (ended.enqueued_at, ended.started_at) == (known.enqueued_at, known.started_at)


def test_an_origin_is_no_part_of_the_request(client: InterviewAccessClient, user: str) -> None:
    """The same request under its ID is the same job, whoever sends it; the first origin stays."""
    job_id = client.enqueue(user, [], actor="first")
    client.wait(job_id, timeout=30)
    assert client.enqueue(user, [], job_id=job_id, actor="second") == job_id
    client.wait(job_id, timeout=30)
    assert client.status(job_id).actor == "first"


@pytest.mark.parametrize("value", ["", "a\nb", "\x1b[31m", "\0", "\ud800", "x" * 1_001, 5, b"hr"])
@pytest.mark.parametrize("name", ["actor", "reason"])
def test_an_invalid_origin_is_refused_by_the_client(
    client: InterviewAccessClient, here: Site, user: str, name: str, value: Any
) -> None:
    """An actor or a reason that does not print, or is too long, is an error at the call."""
    with pytest.raises(ValueError, match=f"^{name}: expected 1 to [0-9,]+ printable characters"):
        client.enqueue(user, [], **{name: value})
    with connected(here.store.database_url) as connection, pytest.raises(ValueError, match=name):
        enqueue_in_sqlalchemy(connection, user, [], **{name: value})


CUT = "x" * 254
RUBBISH = [
    ({"n": 1}, None),
    (["hr"], None),
    (5, None),
    (True, None),
    ("", None),
    ("x" * 1_000_000, "x" * 255),
    ("N\0UL", "N\\x00UL"),
    ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
    ("\ud800", "\\ud800"),
    ("\u202eevil", "\\u202eevil"),
    (CUT + "\0\0", CUT + "\\"),
]


@pytest.mark.parametrize(("value", "kept"), RUBBISH, ids=range(len(RUBBISH)))
def test_rubbish_fails_no_job(here: Site, user: str, value: object, kept: str | None) -> None:
    """A header of any type, size and content is cut, escaped or ignored; the job succeeds."""
    headers = {"actor": value, "reason": value, "enqueued_at": value, "requested_at": value}
    job_id = push(here, user, headers)
    assert here.answer(job_id)["status"] == "SUCCESS"
    known = audit(here, job_id)
    assert known.actor == kept
    assert (known.reason or "")[:200] == (kept or "")[:200]
    assert (known.enqueued_at, known.requested_at) == (None, None)


def test_bytes_fail_no_job(here: Site, user: str) -> None:
    """Bytes, which Celery encodes as an object, are ignored."""
    job_id = send(here, user, {"actor": b"hr", "reason": b"\xff"})
    assert here.answer(job_id)["status"] == "SUCCESS"
    assert (audit(here, job_id).actor, audit(here, job_id).reason) == (None, None)


def test_rubbish_in_the_outbox_fails_no_job(here: Site, user: str) -> None:
    """Headers of a service are kept as those of a message are."""
    headers = json.dumps({"actor": "a\x1bb" + "x" * 300, "reason": 5, "requested_at": "soon"})
    job_id: str = here.store.value(
        "INSERT INTO grant_access_request (user_id, interview_ids, headers)"
        " VALUES (:user, '{}', CAST(:headers AS jsonb)) RETURNING job_id",
        user=user,
        headers=headers,
    )
    known = audit(here, job_id)
    assert known.actor == ("a\\x1bb" + "x" * 300)[:255]
    assert known.reason is None
    assert known.requested_at
    assert known.requested_at <= datetime.now(UTC)


def test_a_changed_header_is_logged(here: Site, user: str, log: Path) -> None:
    """The log has a warning that names the job and the header, and no control character of it."""
    job_id = push(here, user, {"actor": "\x1b[31m"})
    audit(here, job_id)
    until(lambda: f"message header not kept unchanged: job='{job_id}'" in log.read_text())
    (line,) = (one for one in log.read_text().splitlines() if job_id in one and "unchanged" in one)
    assert "header=actor" in line
    assert "\x1b" not in line


# --- Attempts -----------------------------------------------------------------------------------


def test_a_retry_counts_as_an_attempt(here: Site, user: str, log: Path) -> None:
    """A job that was retried has the number and the start of its last attempt."""
    with ledger_missing(here):
        job_id = push(here, user, {"actor": ACTOR, "enqueued_at": datetime.now(UTC).isoformat()})
        here.until_state(job_id, "RETRY")
        failed_at = datetime.now(UTC)
    assert here.answer(job_id)["status"] == "SUCCESS"
    known = audit(here, job_id)
    until(lambda: f"job settled: job={job_id}" in log.read_text())
    (attempt,) = re.findall(rf"job settled: job={job_id} \S+ attempt=(\d+)", log.read_text())
    assert known.attempts == int(attempt) >= 2
    assert known.started_at
    assert known.enqueued_at
    assert known.enqueued_at < failed_at
    assert known.actor == ACTOR


def test_a_dead_workers_job_has_the_worker_that_finished_it(
    idle: Site, user: str, tmp_path: Path
) -> None:
    """After a worker's death the second attempt is kept, with its worker and its start."""
    (interview_id,) = idle.store.add_interviews(1)
    environment = idle.environment(GRANT_LEASE_SECONDS=2)
    with InterviewAccessClient(idle.broker) as client:
        job_id = client.enqueue(user, [interview_id], actor=ACTOR)
    with (
        held_grant(idle, user, interview_id),
        started(worker_service(tmp_path / "first", environment, name="first@here")) as first,
    ):
        idle.until_state(job_id, "STARTED")
        killed_at = datetime.now(UTC)
        kill_process_tree(first)
    with started(worker_service(tmp_path / "second", environment, name="second@here")):
        known = audit(idle, job_id)
    assert (known.attempts, known.worker, known.actor) == (2, "second@here", ACTOR)
    assert known.enqueued_at
    assert known.started_at
    assert known.enqueued_at < killed_at < known.started_at


# --- Jobs that are not executed -----------------------------------------------------------------


def test_a_job_that_is_cancelled_while_it_waits(
    here: Site, client: InterviewAccessClient, user: str
) -> None:
    """No attempt was made; the origin is that of the announcement."""
    job_id = client.enqueue(user, [], countdown=3600, actor=ACTOR, reason=REASON)
    assert client.cancel(job_id).state == "cancelled"
    known = audit(here, job_id)
    assert (known.actor, known.reason) == (ACTOR, REASON)
    assert known.enqueued_at
    assert (known.started_at, known.attempts, known.worker) == (None, None, None)


def test_a_request_that_is_cancelled_before_it_is_sent(idle: Site, user: str) -> None:
    """The ledger has the time of the request, and none of a message."""
    job_id = by_outbox(idle, user)
    done = run_module(idle.environment(), "worker.cli", "cancel", job_id)
    assert done.returncode == 0, done.stderr
    known = audit(idle, job_id)
    assert (known.actor, known.reason) == (ACTOR, REASON)
    assert known.requested_at
    assert (known.enqueued_at, known.started_at, known.worker) == (None, None, None)


def test_an_expired_job(here: Site, client: InterviewAccessClient, user: str) -> None:
    """The worker that received an expired job is kept, and when."""
    past = datetime.now(UTC) - timedelta(seconds=1)
    job_id = client.enqueue(user, [], expires=past, actor=ACTOR)
    known = audit(here, job_id)
    assert client.status(job_id).state == "expired"
    assert (known.actor, known.attempts, known.worker) == (ACTOR, 1, NODE)


@pytest.mark.parametrize("arguments", [{"user_id": ""}, {"user_id": "u", "interview_ids": ["x"]}])
def test_a_rejected_job(here: Site, user: str, arguments: object) -> None:
    """A job with invalid arguments or IDs has an origin, too."""
    job_id = push(here, user, {"actor": ACTOR, "reason": REASON}, arguments)
    known = audit(here, job_id)
    assert (known.actor, known.reason, known.attempts, known.worker) == (ACTOR, REASON, 1, NODE)


def test_an_undecodable_message(here: Site) -> None:
    """A job whose body cannot be decoded has the origin of its headers."""
    job_id = str(uuid4())
    headers = {"task": GRANT_ACCESS, "id": job_id, "actor": ACTOR}
    envelope = {"body": "{", "content-type": "application/json", "headers": headers}
    here.redis.lpush(QUEUE, json.dumps({**envelope, "properties": {}}))
    known = audit(here, job_id)
    assert (known.actor, known.attempts, known.worker) == (ACTOR, 1, NODE)
