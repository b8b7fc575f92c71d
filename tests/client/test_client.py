"""Both clients, and the README's examples, with a real worker."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone

import pytest
from interview_access.contracts import QUEUE, GrantJob, JobProgress, result_key
from interview_access.errors import (
    InvalidGrantRequestException,
    InvalidInterviewIdException,
    JobExpiredException,
    JobFailedError,
    NoAnswerInTimeError,
)

from devstack.servers import LocalStack
from storage.samples import NAMED_SAMPLES, load_samples
from tests.support.clients import Client
from tests.support.stores import Background, until
from tests.support.workers import ROOT, Site, held_grant, site_with_worker

README = (ROOT / "README.md").read_text(encoding="utf-8")
CLIENT_README = (ROOT / "client" / "README.md").read_text(encoding="utf-8")
CHUNK = 10


@pytest.fixture(scope="module")
def here(
    stack: LocalStack, _migrated: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """A site with a worker and sample interviews."""
    folder = tmp_path_factory.mktemp("client")
    with site_with_worker(stack, _migrated, 6, folder, GRANT_CHUNK_SIZE=CHUNK) as here:
        yield here


@pytest.fixture
def broker(here: Site) -> str:
    """The URL of the site's queue."""
    return here.broker


@pytest.fixture(scope="module")
def samples(here: Site) -> list[str]:
    """IDs of existing interviews, sorted."""
    return sorted(load_samples(here.store.database_url, 3 * CHUNK))


def test_a_result_is_read_by_its_job_id(client: Client, samples: list[str]) -> None:
    """The result of a job is read by its ID."""
    job_id = client.enqueue(uuid.uuid4(), samples[:2])
    assert client.wait(job_id, timeout=30) == {"success": True, "created_access_count": 2}


@pytest.mark.usefixtures("samples")
def test_uuid_objects_count_as_their_strings(here: Site, client: Client) -> None:
    """User and interviews can be UUID objects."""
    user = uuid.uuid4()
    job_id = client.enqueue(user, [uuid.UUID(one) for one in NAMED_SAMPLES])
    assert client.wait(job_id, timeout=30)["created_access_count"] == len(NAMED_SAMPLES)
    assert here.store.granted(str(user)) == sorted(NAMED_SAMPLES)


def test_the_status_of_a_cohort_counts_each_user(
    here: Site, client: Client, samples: list[str]
) -> None:
    """The result has one count, and the status has the count of each user."""
    users = [f"{name}-{uuid.uuid4()}"[:36] for name in ("ann", "bob")]
    client.wait(client.enqueue(users[0], samples[:1]), timeout=30)
    job_id = client.enqueue_cohort(users, samples[:2])
    assert client.wait(job_id, timeout=30) == {"success": True, "created_access_count": 3}
    known = client.status(job_id, timeout=10)
    assert known.created_by_user == {users[0]: 1, users[1]: 2}
    assert (known.requested, known.already_granted, known.user_id) == (4, 1, None)
    assert here.store.granted(users[1]) == sorted(samples[:2])


def test_a_job_sent_twice_takes_effect_once(client: Client, samples: list[str]) -> None:
    """A job that is sent twice under one ID has one effect and one result."""
    user = job_id = str(uuid.uuid4())
    client.enqueue(user, samples, job_id=job_id)
    client.wait(job_id, timeout=30)
    assert client.enqueue(user, samples, job_id=job_id) == job_id
    assert client.wait(job_id, timeout=30)["created_access_count"] == len(samples)


def test_malformed_ids_are_refused_by_the_worker(client: Client) -> None:
    """A failure is raised as the error that the worker stored, with its details."""
    job_id = client.enqueue("client-3", ["no-uuid"])
    with pytest.raises(InvalidInterviewIdException, match="'no-uuid' is not a UUID") as caught:
        client.wait(job_id, timeout=30)
    assert caught.value.details["total"] == 1


def test_a_request_that_another_producer_sent_fails_in_its_class(
    here: Site, client: Client
) -> None:
    """The failure of an invalid request is raised as the error that the worker stored."""
    job_id = here.send("", [])
    with pytest.raises(InvalidGrantRequestException, match="user_id: expected a string of 1 to 36"):
        client.wait(job_id, timeout=30)


def test_an_attempt_is_created(here: Site, client: Client, samples: list[str]) -> None:
    """The result of an attempt job has the ID of the attempt, which is a row."""
    kind = type(client).__name__
    job_id = client.enqueue_attempt(samples[0], f"attempt-{kind}"[:36])
    result = client.wait(job_id, timeout=30)
    (attempt,) = [one for one in here.store.attempts() if one.user_id == f"attempt-{kind}"[:36]]
    assert result == {"success": True, "interview_attempt_id": attempt.id}
    assert attempt.interview_id == samples[0]
    assert client.status(job_id, timeout=10).state == "succeeded"


def test_more_ids_than_the_workers_allow_are_refused_at_the_call(
    here: Site, client: Client, samples: list[str]
) -> None:
    """The limit is the one that the workers state; it counts users times interviews."""
    with pytest.raises(InvalidGrantRequestException, match=r"at most 100,000 IDs .*, got a list"):
        client.enqueue("client-limit", samples[:1] * 100_001)
    with pytest.raises(InvalidGrantRequestException, match="at most 10 IDs for 10,000 users"):
        client.enqueue_cohort([f"user-{n}" for n in range(10_000)], samples[:1] * 11)
    jobs = [GrantJob("ann", []), GrantJob("client-limit", samples[:1] * 100_001)]
    with pytest.raises(InvalidGrantRequestException, match=r"jobs\[1\]: .*at most 100,000"):
        client.enqueue_many(jobs)
    assert here.redis.llen(QUEUE) == 0


@pytest.mark.parametrize(
    ("status", "kind", "module"),
    [
        ("FAILURE", "WorkerLostError", "billiard.exceptions"),
        ("FAILURE", "NoSuchError", "nobodys.module"),
        ("REVOKED", "TaskRevokedError", "celery.exceptions"),
    ],
)
def test_an_unknown_failure_is_a_job_failed_error(
    here: Site, client: Client, status: str, kind: str, module: str
) -> None:
    """A failure that is not of the contract, such as a lost worker, is a JobFailedError."""
    error = {"exc_type": kind, "exc_module": module, "exc_message": ["Exit 9"]}
    meta = {"status": status, "result": error, "traceback": None, "task_id": kind}
    here.redis.set(result_key(kind), json.dumps(meta))
    with pytest.raises(JobFailedError, match=f"{kind}: Exit 9") as caught:
        client.wait(kind, timeout=5)
    assert caught.value.details == {"exc_type": kind}


def test_waiting_ends_at_the_timeout(client: Client) -> None:
    """Without a result the wait ends at its timeout, with the state in the error."""
    with pytest.raises(NoAnswerInTimeError, match="nothing is stored of it") as caught:
        client.wait("client-4", timeout=0.05)
    assert caught.value.details == {"job_id": "client-4", "state": "PENDING"}


def test_progress_is_reported(here: Site, client: Client, samples: list[str]) -> None:
    """The callback receives the progress of a job of several chunks."""
    seen: list[JobProgress] = []
    user = str(uuid.uuid4())
    with held_grant(here, user, samples[-1]):
        job_id = client.enqueue(user, samples)
        waiting = Background(lambda: client.wait(job_id, timeout=30, on_progress=seen.append))
        until(lambda: bool(seen))
    assert waiting.result()["created_access_count"] == len(samples)
    assert {one.total for one in seen} == {len(samples)}
    assert {one.done for one in seen} <= {CHUNK, 2 * CHUNK}


def test_a_job_starts_after_its_countdown(client: Client, here: Site) -> None:
    """A job with a countdown is not started before the countdown has passed."""
    before = time.time()
    job_id = client.enqueue("client-6", [], countdown=1.5)
    assert client.wait(job_id, timeout=30)["created_access_count"] == 0
    begun = datetime.fromisoformat(here.meta(job_id)["date_done"]).replace(tzinfo=UTC)
    assert begun.timestamp() >= before + 1.5


@pytest.mark.parametrize(
    "expires",
    [-1, datetime(2020, 1, 1, tzinfo=UTC), datetime(2020, 1, 1)],  # noqa: DTZ001 - it counts as UTC
)
def test_an_expired_job_fails(
    client: Client, samples: list[str], expires: float | datetime
) -> None:
    """A job that no worker started before its expiry fails as expired."""
    job_id = client.enqueue("client-7", samples, expires=expires)
    with pytest.raises(JobExpiredException, match="new job ID"):
        client.wait(job_id, timeout=30)


def test_a_job_before_its_expiry_is_executed(client: Client, samples: list[str]) -> None:
    """An expiry in the future changes nothing."""
    in_a_minute = datetime.now(timezone(timedelta(hours=9))) + timedelta(minutes=1)
    for user_id, expires in (("client-8", 60), ("client-9", in_a_minute)):
        job_id = client.enqueue(f"{user_id}-{uuid.uuid4().hex[:8]}", samples[:1], expires=expires)
        assert client.wait(job_id, timeout=30)["created_access_count"] == 1


@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_example_of_the_readmes_runs(here: Site, samples: list[str], number: int) -> None:
    """The Python of both READMEs enqueues a job and prints its result; only the URL differs."""
    assert NAMED_SAMPLES[0] in samples
    blocks = re.findall(r"```python\n(.*?)```", README + CLIENT_README, re.DOTALL)
    assert len(blocks) == 3
    done = subprocess.run(
        [sys.executable, "-c", blocks[number].replace("redis://localhost:6379/0", here.broker)],
        env=here.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d created\n|\{'success': True, .*\}\n", done.stdout)
