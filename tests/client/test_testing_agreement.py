"""The inline client agrees with a real worker: same results, errors and statuses, job by job."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from interview_access.contracts import GRANT_ACCESS, GrantJob, announcement_key, result_key
from interview_access.errors import InterviewAccessError, JobCancelledException, NoAnswerInTimeError
from interview_access.outbox import enqueue_in_sqlalchemy
from interview_access.producer import InterviewAccessClient
from interview_access.testing import FakeClient, InlineClient, assert_requested, requested_jobs

from devstack.servers import LocalStack
from storage.samples import NAMED_SAMPLES, load_samples
from tests.support.database import connected, database
from tests.support.workers import ROOT, Site, site_with_worker

NUMBER = 9  # of the Redis database
FIRST, SECOND = NAMED_SAMPLES
PAST = datetime(2020, 1, 1, tzinfo=UTC)
UNKNOWN = "00000000-0000-4000-8000-000000000000"

Call = Callable[[InterviewAccessClient], str]

CALLS: dict[str, Call] = {
    "created": lambda client: client.enqueue("ann", [FIRST, FIRST.upper()], job_id="one"),
    "the same request again": lambda client: client.enqueue("ann", [FIRST, FIRST], job_id="one"),
    "another request": lambda client: client.enqueue("bob", [FIRST], job_id="one"),
    "already granted": lambda client: client.enqueue("ann", [SECOND, FIRST], job_id="two"),
    "empty": lambda client: client.enqueue("ann", [], job_id="three"),
    "unknown and malformed": lambda client: client.enqueue(
        "ann", ["x", UNKNOWN, FIRST, "x", UNKNOWN.upper(), UNKNOWN.replace("-", "")], job_id="four"
    ),
    "cohort": lambda client: client.enqueue_cohort(
        ["ann", "bob", "bob", "cem"], [FIRST, SECOND], job_id="five"
    ),
    "unknown in a cohort": lambda client: client.enqueue_cohort(["a"], [UNKNOWN], job_id="six"),
    "attempt": lambda client: client.enqueue_attempt(FIRST, "ann", job_id="attempt"),
    "the same attempt again": lambda client: client.enqueue_attempt(FIRST, "ann", job_id="attempt"),
    "unknown in an attempt": lambda client: client.enqueue_attempt(UNKNOWN, "ann", job_id="none"),
    "malformed in an attempt": lambda client: client.enqueue_attempt("x", "ann", job_id="x"),
    "ill-typed": lambda client: client.enqueue("", [FIRST]),
    "too many": lambda client: client.enqueue("ann", [FIRST] * 100_001),
    "many": lambda client: client.enqueue_many(
        [GrantJob("dan", [FIRST], job_id="seven"), GrantJob("dan", [FIRST], job_id="seven")]
    )[1],
    "many with an ID in use": lambda client: client.enqueue_many([GrantJob("eve", [], "seven")])[0],
    "expired": lambda client: client.enqueue("ann", [FIRST], job_id="eight", expires=PAST),
}
"""Calls in order: each depends on those before it."""


@pytest.fixture(scope="module")
def here(
    stack: LocalStack, _migrated: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """A site with a worker and two interviews."""
    folder = tmp_path_factory.mktemp("agreement")
    with site_with_worker(stack, _migrated, NUMBER, folder) as here:
        load_samples(here.store.database_url, len(NAMED_SAMPLES))
        yield here


@pytest.fixture(scope="module")
def on_worker(here: Site) -> Iterator[InterviewAccessClient]:
    """A real client of the site."""
    with InterviewAccessClient(here.broker) as client:
        yield client


@pytest.fixture(scope="module", params=["memory", "postgres"])
def inline(
    stack: LocalStack, _migrated: str, request: pytest.FixtureRequest
) -> Iterator[InlineClient]:
    """The inline client in memory and on a database, each with the same interviews."""
    if request.param == "memory":
        yield InlineClient(NAMED_SAMPLES)
        return
    with database(stack.database_url, template=_migrated) as url:
        load_samples(url, len(NAMED_SAMPLES))
        with InlineClient(database_url=url) as client:
            yield client


def answers(client: InterviewAccessClient, call: Call) -> list[Any]:
    """Make a call, wait for its job, and return all that a service can see of it."""
    try:
        job_id = call(client)
    except InterviewAccessError as error:
        return [type(error), error.sentence, error.details]
    seen: list[Any] = []
    try:
        seen.append(without_attempt(client.wait(job_id, timeout=30)))
    except InterviewAccessError as error:
        seen += [type(error), error.sentence, error.details]
    status, cancelled = client.status(job_id), client.cancel(job_id)
    assert cancelled == status  # finished
    return [*seen, comparable(status.model_dump())]


def comparable(status: dict[str, Any]) -> dict[str, Any]:
    """Remove from a status what differs between two executions of a request."""
    for name in "enqueued_at", "started_at", "finished_at", "worker":
        assert status.pop(name), name
    return without_attempt(status)


def without_attempt(values: dict[str, Any]) -> dict[str, Any]:
    """Replace the ID of an attempt, which is random, in a result or a status."""
    result = values.get("result") or values
    if attempt_id := result.get("interview_attempt_id"):
        result["interview_attempt_id"] = type(attempt_id)
    return values


def of_another_producer(client: InterviewAccessClient) -> str:
    """Send a request under an ID that only the ledger has."""
    return client.enqueue("eve", [FIRST], job_id="one")


@pytest.fixture(scope="module")
def of_worker(here: Site, on_worker: InterviewAccessClient) -> dict[str, list[Any]]:
    """What the real client and a worker answer to the calls."""
    seen = {name: answers(on_worker, call) for name, call in CALLS.items()}
    here.redis.delete(announcement_key("one"), result_key("one"))
    return {**seen, "in the ledger only": answers(on_worker, of_another_producer)}


def test_an_inline_client_agrees_with_a_worker(
    of_worker: dict[str, list[Any]], inline: InlineClient
) -> None:
    """Each call has the same result or error, and its job the same status."""
    for name, call in CALLS.items():
        assert answers(inline, call) == of_worker[name], name
    inline.clear()
    assert answers(inline, of_another_producer) == of_worker["in the ledger only"]
    assert [inline.granted(user_id) for user_id in ("ann", "bob", "dan", "eve")] == [
        sorted(NAMED_SAMPLES),
        sorted(NAMED_SAMPLES),
        [FIRST],
        [],
    ]


def answers_about_jobs_without_a_result(client: InterviewAccessClient) -> list[Any]:
    """Enqueue a job that does not start, and return what a service sees before and after."""
    job_id = client.enqueue("ann", [FIRST], job_id="later", countdown=3600)
    statuses = [client.status(job_id), client.status("never"), client.cancel("never")]
    with pytest.raises(NoAnswerInTimeError) as queued:
        client.wait(job_id, timeout=0)
    statuses += [client.cancel(job_id), client.cancel(job_id)]
    with pytest.raises(JobCancelledException) as cancelled:
        client.wait(job_id, timeout=30)
    times = {"sent_at", "eta", "enqueued_at", "finished_at"}
    return [
        *(one.model_dump(exclude=times) for one in statuses),
        *(one.model_fields_set & times for one in statuses),
        *(str(error.value) for error in (queued, cancelled)),
    ]


def test_a_fake_client_agrees_with_a_worker(on_worker: InterviewAccessClient) -> None:
    """Jobs that are queued, cancelled and unknown have the same statuses and errors."""
    of_worker = answers_about_jobs_without_a_result(on_worker)
    assert answers_about_jobs_without_a_result(FakeClient()) == of_worker


def test_requests_in_the_outbox_are_read_in_their_transaction(here: Site) -> None:
    """Assertions see what the transaction requested, and list it when they fail."""
    with connected(here.store.database_url) as connection:
        enqueue_in_sqlalchemy(connection, "ann", [FIRST], job_id="outbox-1")
        enqueue_in_sqlalchemy(
            connection, "bob", [FIRST, SECOND], job_id="outbox-2", actor="hr", reason="late"
        )
        (job,) = assert_requested(connection, user_id="bob", interview_ids=[SECOND, FIRST], count=1)
        assert (job.job_id, job.task, job.countdown) == ("outbox-2", GRANT_ACCESS, None)
        assert (job.actor, job.reason) == ("hr", "late")
        (other,) = assert_requested(connection, user_id="ann")
        assert (other.actor, other.reason) == (None, None)
        with pytest.raises(AssertionError, match=r"got 0\. Requested: 2:\n  1\. .* 'outbox-1': "):
            assert_requested(connection, user_id="cem")
    with connected(here.store.database_url) as connection:
        assert requested_jobs(connection) == []  # rolled back


def test_the_pages_end_to_end_test(here: Site, tmp_path: Path) -> None:
    """The last block of docs/testing.md passes on a real worker."""
    page = (ROOT / "docs/testing.md").read_text(encoding="utf-8")
    block = page.partition("```python\n# service/test_end_to_end.py\n")[2].partition("```")[0]
    (tmp_path / "test_end_to_end.py").write_text(block, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:django"],
        cwd=tmp_path,
        env={"CELERY_BROKER_URL": here.broker},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr
