"""Both clients and the README's examples, on a real worker."""

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
from interview_access.contracts import JobProgress
from interview_access.errors import (
    InvalidGrantRequestException,
    InvalidInterviewIdException,
    JobExpiredException,
    JobFailedError,
    NoAnswerInTimeError,
)

from devstack.servers import LocalStack
from storage.samples import NAMED_SAMPLES, load_samples
from tests.support.clients import CLIENTS, Client
from tests.support.database import database
from tests.support.stores import Background, until
from tests.support.workers import ROOT, Site, held_grant, site, worker

README = (ROOT / "README.md").read_text(encoding="utf-8")
CHUNK = 10


@pytest.fixture(scope="module")
def here(
    stack: LocalStack, _migrated: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """A site with a worker and sample interviews."""
    with (
        database(stack.database_url, template=_migrated) as url,
        site(stack, url, 6) as here,
        worker(here, tmp_path_factory.mktemp("client") / "worker.log", GRANT_CHUNK_SIZE=CHUNK),
    ):
        yield here


@pytest.fixture(scope="module")
def samples(here: Site) -> list[str]:
    """Ids of interviews that stand, sorted."""
    return sorted(load_samples(here.store.database_url, 3 * CHUNK))


@pytest.fixture(params=CLIENTS)
def client(here: Site, request: pytest.FixtureRequest) -> Iterator[Client]:
    """A client of the site: the blocking one and the asyncio one in turn."""
    client = CLIENTS[request.param](here.broker)
    yield client
    client.close()


def test_it_enqueues_and_waits(client: Client, samples: list[str]) -> None:
    """A job's result comes back by its id."""
    job_id = client.enqueue(uuid.uuid4(), samples[:2])
    assert client.wait(job_id, timeout=30) == {"success": True, "created_access_count": 2}


@pytest.mark.usefixtures("samples")
def test_uuid_objects_are_their_strings(here: Site, client: Client) -> None:
    """A caller may give UUID objects, as user and as interviews."""
    user = uuid.uuid4()
    job_id = client.enqueue(user, [uuid.UUID(one) for one in NAMED_SAMPLES])
    assert client.wait(job_id, timeout=30)["created_access_count"] == len(NAMED_SAMPLES)
    assert here.store.granted(str(user)) == sorted(NAMED_SAMPLES)


def test_a_cohort_is_told_user_by_user(here: Site, client: Client, samples: list[str]) -> None:
    """One count is the result, and each user's the status, from a worker's answer."""
    users = [f"{name}-{uuid.uuid4()}"[:36] for name in ("ann", "bob")]
    client.wait(client.enqueue(users[0], samples[:1]), timeout=30)
    job_id = client.enqueue_cohort(users, samples[:2])
    assert client.wait(job_id, timeout=30) == {"success": True, "created_access_count": 3}
    known = client.status(job_id, timeout=10)
    assert known.created_by_user == {users[0]: 1, users[1]: 2}
    assert (known.requested, known.already_granted, known.user_id) == (4, 1, None)
    assert here.store.granted(users[1]) == sorted(samples[:2])


def test_the_same_job_id_counts_once(client: Client, samples: list[str]) -> None:
    """A job sent twice under one id has one effect and one answer."""
    user = job_id = str(uuid.uuid4())
    client.enqueue(user, samples, job_id=job_id)
    client.wait(job_id, timeout=30)
    assert client.enqueue(user, samples, job_id=job_id) == job_id
    assert client.wait(job_id, timeout=30)["created_access_count"] == len(samples)


@pytest.mark.parametrize(
    ("user_id", "ids", "kind", "says"),
    [
        ("client-3", ["no-uuid"], InvalidInterviewIdException, "'no-uuid' is not a UUID"),
        ("", [], InvalidGrantRequestException, "user_id: expected a string of 1 to 36"),
    ],
    ids=["interview id", "request"],
)
def test_a_failure_comes_back_in_its_class(
    client: Client, user_id: str, ids: list[str], kind: type[Exception], says: str
) -> None:
    """A failure for cause is raised as what the worker raised, with its details."""
    job_id = client.enqueue(user_id, ids)
    with pytest.raises(kind, match=says) as caught:
        client.wait(job_id, timeout=30)
    assert getattr(caught.value, "details", {})["total"] == 1


@pytest.mark.parametrize(
    ("status", "kind", "module"),
    [
        ("FAILURE", "WorkerLostError", "billiard.exceptions"),
        ("FAILURE", "NoSuchError", "nobodys.module"),
        ("REVOKED", "TaskRevokedError", "celery.exceptions"),
    ],
)
def test_a_foreign_failure_is_told_as_one(
    here: Site, client: Client, status: str, kind: str, module: str
) -> None:
    """A failure that is none of the contract's, a lost worker say, comes as JobFailedError."""
    error = {"exc_type": kind, "exc_module": module, "exc_message": ["Exit 9"]}
    meta = {"status": status, "result": error, "traceback": None, "task_id": kind}
    here.redis.set(f"celery-task-meta-{kind}", json.dumps(meta))
    with pytest.raises(JobFailedError, match=f"{kind}: Exit 9") as caught:
        client.wait(kind, timeout=5)
    assert caught.value.details == {"exc_type": kind}


def test_a_wait_has_an_end(client: Client) -> None:
    """Where no answer comes, the wait ends at its time and says the state."""
    with pytest.raises(NoAnswerInTimeError, match="nothing is stored of it") as caught:
        client.wait("client-4", timeout=0.05)
    assert caught.value.details == {"job_id": "client-4", "state": "PENDING"}


def test_progress_is_passed_on(here: Site, client: Client, samples: list[str]) -> None:
    """A caller that asks for it sees the progress of a job of several chunks."""
    seen: list[JobProgress] = []
    user = str(uuid.uuid4())
    with held_grant(here, user, samples[-1]):
        job_id = client.enqueue(user, samples)
        waiting = Background(lambda: client.wait(job_id, timeout=30, on_progress=seen.append))
        until(lambda: bool(seen))
    assert waiting.result()["created_access_count"] == len(samples)
    assert {one.total for one in seen} == {len(samples)}
    assert {one.done for one in seen} <= {CHUNK, 2 * CHUNK}


def test_a_countdown_is_waited_for(client: Client, here: Site) -> None:
    """A job with a countdown is not begun before it is over."""
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
    """A job that no worker began in time is not done, and says so."""
    job_id = client.enqueue("client-7", samples, expires=expires)
    with pytest.raises(JobExpiredException, match="new job id"):
        client.wait(job_id, timeout=30)


def test_a_job_in_time_is_done(client: Client, samples: list[str]) -> None:
    """An expiry that lies ahead changes nothing."""
    in_a_minute = datetime.now(timezone(timedelta(hours=9))) + timedelta(minutes=1)
    for user_id, expires in (("client-8", 60), ("client-9", in_a_minute)):
        job_id = client.enqueue(f"{user_id}-{uuid.uuid4().hex[:8]}", samples[:1], expires=expires)
        assert client.wait(job_id, timeout=30)["created_access_count"] == 1


@pytest.mark.parametrize("number", [0, 1])
def test_the_readmes_examples_run(here: Site, samples: list[str], number: int) -> None:
    """The README's Python, run as it stands, enqueues and prints a result."""
    assert NAMED_SAMPLES[0] in samples
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    done = subprocess.run(
        [sys.executable, "-c", blocks[number]],
        env=here.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d created\n|\{'success': True, .*\}\n", done.stdout)
