"""The test kit: its clients keep what was enqueued, and answer as real ones do, without Redis."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from interview_access.aio import AsyncInterviewAccessClient
from interview_access.contracts import (
    CREATE_INTERVIEW_ATTEMPT,
    GRANT_ACCESS,
    GRANT_COHORT_ACCESS,
    LIMITS_KEY,
    GrantCohortJob,
    GrantJob,
    WorkerLimits,
)
from interview_access.errors import (
    InvalidGrantRequestException,
    InvalidInterviewIdException,
    JobCancelledException,
    JobIdReusedException,
    NoAnswerInTimeError,
    QueueUnavailableError,
    StorageUnavailableException,
)
from interview_access.producer import InterviewAccessClient
from interview_access.testing import (
    AsyncFakeClient,
    AsyncInlineClient,
    FakeClient,
    InlineClient,
    capture_enqueued,
)
from redis import Redis

FIRST, SECOND = "89d96f4b-c19d-4e69-8eae-e818f3123b09", "a1b2c3d4-e5f6-4a8b-9c0d-e1f2a3b4c5d6"
NOWHERE = "redis://nowhere.invalid"


@pytest.fixture
def client() -> FakeClient:
    """A new fake client."""
    return FakeClient()


# --- The same interface as the real clients -------------------------------------------------------

CALLS: dict[str, Callable[[Any], Any]] = {
    "cancel": lambda client: client.cancel("unknown"),
    "close": lambda client: client.close(),
    "enqueue_attempt": lambda client: client.enqueue_attempt(FIRST, "ann"),
    "enqueue": lambda client: client.enqueue("ann", [FIRST]),
    "enqueue_cohort": lambda client: client.enqueue_cohort(["ann", "bob"], [FIRST]),
    "enqueue_many": lambda client: client.enqueue_many([GrantJob("ann", [FIRST])]),
    "status": lambda client: client.status("unknown"),
    "wait": lambda client: client.wait("known", timeout=60),
}
"""A call of every public method."""

FAKES = {
    InterviewAccessClient: (FakeClient, InlineClient),
    AsyncInterviewAccessClient: (AsyncFakeClient, AsyncInlineClient),
}
PAIRS = [(real, fake) for real, fakes in FAKES.items() for fake in fakes]


def public_methods(of: type) -> set[str]:
    """The names of a class's public methods."""
    return {name for name, _ in inspect.getmembers(of, callable) if not name.startswith("_")}


@pytest.mark.parametrize(("real", "fake"), PAIRS)
def test_every_method_has_the_signature_of_the_real_one(real: type, fake: type) -> None:
    """A call that a fake accepts is one that the real client accepts."""
    for name in public_methods(real):
        signatures = [inspect.signature(getattr(one, name)) for one in (real, fake)]
        assert signatures[0] == signatures[1], name


@pytest.mark.parametrize(("real", "fake"), PAIRS)
def test_no_method_needs_a_server(real: type, fake: type) -> None:
    """Each public method of the real client returns without Redis, and without a pause."""
    assert public_methods(real) == CALLS.keys()
    client: Any = fake()
    started = time.monotonic()

    async def call_all() -> None:
        known = client.enqueue("ann", [], job_id="known")
        await known if inspect.isawaitable(known) else None
        if isinstance(client, FakeClient | AsyncFakeClient):
            client.set_result("known")
        for name, call in CALLS.items():
            result = call(client)
            result = await result if inspect.isawaitable(result) else result
            assert (result is None) == (name == "close")

    asyncio.run(call_all())
    assert time.monotonic() - started < 2


def enqueued_by(client: InterviewAccessClient) -> str:
    """Enqueue a job: code of a service, which expects the real client."""
    return client.enqueue("ann", [FIRST])


async def enqueued_by_asyncio(client: AsyncInterviewAccessClient) -> str:
    """Enqueue a job: code of a service, which expects the real client."""
    return await client.enqueue("ann", [FIRST])


def test_a_fake_is_accepted_where_the_real_client_is_expected() -> None:
    """Type checkers accept these calls, and the jobs are kept."""
    blocking, asynchronous = FakeClient(), AsyncFakeClient()
    job_id = enqueued_by(blocking)
    others = [asyncio.run(enqueued_by_asyncio(asynchronous)) for _ in range(2)]
    assert [job.job_id for job in blocking.jobs] == [job_id]
    assert [job.job_id for job in asynchronous.jobs] == others  # of two event loops


# --- What was enqueued ----------------------------------------------------------------------------


def test_jobs_are_kept_in_order(client: FakeClient) -> None:
    """Each job has the task, users, interviews and times that it was enqueued with."""
    client.enqueue("ann", [FIRST, UUID(SECOND)], job_id="one", countdown=60, expires=90)
    client.enqueue_cohort(["bob", "cem"], [FIRST], job_id="two")
    client.enqueue_attempt(FIRST, "dan", job_id="three")
    client.enqueue_many([GrantJob("eve", []), GrantCohortJob(["fay"], [SECOND])])
    one, two, three, *others = client.jobs
    assert (one.task, one.job_id, one.user_id) == (GRANT_ACCESS, "one", "ann")
    assert one.interview_ids == (FIRST, SECOND)
    assert one.countdown == 60
    assert one.expires_at == one.sent_at + timedelta(seconds=90)
    assert (two.task, two.user_ids, two.user_id) == (GRANT_COHORT_ACCESS, ("bob", "cem"), None)
    assert (two.countdown, two.expires_at) == (None, None)
    assert (three.task, three.user_id) == (CREATE_INTERVIEW_ATTEMPT, "dan")
    assert three.interview_ids == (FIRST,)
    assert [job.user_ids for job in others] == [("eve",), ("fay",)]


def test_assert_enqueued_returns_the_jobs_that_match(client: FakeClient) -> None:
    """Order, duplicates and spelling of IDs make no difference; other values do."""
    client.enqueue("ann", [FIRST, SECOND, SECOND.upper()], job_id="one")
    client.enqueue("ann", [FIRST], job_id="two")
    client.enqueue_cohort(["bob", "ann"], [FIRST], job_id="three")

    def found(**expected: Any) -> list[str]:
        return [job.job_id for job in client.assert_enqueued(**expected)]

    assert found() == ["one", "two", "three"]
    assert found(user_id="ann", count=2) == ["one", "two"]
    assert found(user_ids=["ann", "bob"]) == ["three"]
    assert found(interview_ids=[UUID(SECOND), FIRST.replace("-", "")]) == ["one"]
    assert found(task=GRANT_COHORT_ACCESS, interview_ids=iter([FIRST])) == ["three"]
    assert found(job_id="two", count=1) == ["two"]
    assert found(user_id="bob", count=0) == []


def test_a_failed_assertion_lists_what_was_enqueued(client: FakeClient) -> None:
    """The sentence has what was expected, the number of matches, and each job."""
    client.enqueue("ann", [FIRST] * 5, job_id="one")
    client.enqueue_cohort(["bob", "cem"], [SECOND], job_id="two")
    with pytest.raises(AssertionError) as caught:
        client.assert_enqueued(user_id="bob", interview_ids=[FIRST], count=2)
    assert str(caught.value) == (
        f"Expected 2 jobs with user_id='bob', interview_ids=['{FIRST}'], got 0. Enqueued: 2:\n"
        f"  1. interview_access.grant_access 'one': user_id='ann', interview_ids=['{FIRST}', "
        f"'{FIRST}', '{FIRST}', and 2 more]\n"
        "  2. interview_access.grant_cohort_access 'two': user_ids=['bob', 'cem'], "
        f"interview_ids=['{SECOND}']"
    )


def test_a_failed_assertion_without_jobs(client: FakeClient) -> None:
    """The sentence says that nothing was enqueued."""
    with pytest.raises(AssertionError, match=r"^Expected at least 1 job, got 0\. Enqueued: 0$"):
        client.assert_enqueued()


def test_assert_nothing_enqueued(client: FakeClient) -> None:
    """It passes until a job is enqueued, and again after clear()."""
    client.assert_nothing_enqueued()
    client.enqueue("ann", [], job_id="one")
    with pytest.raises(AssertionError, match=r"Expected 0 jobs, got 1\. Enqueued: 1:\n  1\. "):
        client.assert_nothing_enqueued()
    client.clear()
    client.assert_nothing_enqueued()


def test_a_string_in_place_of_a_list_is_refused(client: FakeClient) -> None:
    """An assertion with an argument that can never match raises a TypeError."""
    with pytest.raises(TypeError, match="interview_ids: expected a list of IDs, got the string"):
        client.assert_enqueued(interview_ids=FIRST, count=0)


@pytest.mark.parametrize(
    ("expected", "sentence"),
    [
        ({"user_id": 7}, "user_id: expected a string, got the number 7"),
        ({"user_ids": [7]}, r"user_ids\[0\]: expected a string"),
        ({"interview_ids": [7]}, r"interview_ids\[0\]: expected a string"),
        ({"job_id": UUID(int=0)}, "job_id: expected a string"),
    ],
)
def test_an_id_that_no_job_can_have_is_refused(
    client: FakeClient, expected: dict[str, Any], sentence: str
) -> None:
    """An integer, such as Django's default key, never equals an ID: `count=0` would always hold."""
    client.enqueue("7", [FIRST])
    with pytest.raises(TypeError, match=sentence):
        client.assert_enqueued(**expected, count=0)


def test_an_unknown_task_is_refused(client: FakeClient) -> None:
    """A misspelled task would make every assertion with `count=0` hold."""
    client.enqueue("ann", [FIRST])
    with pytest.raises(ValueError, match=r"task: expected interview_access\.grant_access or "):
        client.assert_enqueued(task="grant_access", count=0)


# --- Validation and job IDs -----------------------------------------------------------------------


def test_invalid_arguments_raise_as_from_the_real_client(client: FakeClient) -> None:
    """Nothing is kept of a call that raised."""
    wrong: Any = 42
    with pytest.raises(InvalidGrantRequestException, match=r"user_id: .*str\(user\.pk\)"):
        client.enqueue(wrong, [FIRST])
    with pytest.raises(InvalidGrantRequestException, match="at most 100,000 IDs"):
        client.enqueue("ann", [FIRST] * 100_001)
    with pytest.raises(InvalidGrantRequestException, match=r"jobs\[1\]"):
        client.enqueue_many([GrantJob("ann", []), GrantJob("", [])])
    with pytest.raises(ValueError, match="job ID"):
        client.enqueue("ann", [], job_id="")
    with pytest.raises(ValueError, match="timeout: expected a number of seconds"):
        client.wait("one", timeout=float("nan"))
    client.assert_nothing_enqueued()


def test_a_job_id_belongs_to_its_first_request(client: FakeClient) -> None:
    """The same request is accepted again and listed once; another one is refused."""
    for interviews in [FIRST, SECOND], [SECOND, FIRST]:
        assert client.enqueue("ann", interviews, job_id="one") == "one"
    with pytest.raises(JobIdReusedException, match="'one' belongs to another request"):
        client.enqueue("bob", [FIRST, SECOND], job_id="one")
    with pytest.raises(JobIdReusedException):
        client.enqueue_many([GrantJob("cem", []), GrantJob("cem", [], job_id="one")])
    client.assert_enqueued(job_id="one", user_id="ann", count=1)
    assert len(client.jobs) == 1


def test_clear_forgets_job_ids_and_results(client: FakeClient) -> None:
    """After clear() a job ID is free, and its job is queued."""
    client.enqueue("ann", [], job_id="one")
    client.set_result("one")
    client.cancel("two")
    client.clear()
    client.enqueue("bob", [], job_id="one")
    client.enqueue("bob", [], job_id="two")
    assert client.status("one").state == client.status("two").state == "queued"


def test_the_origin_of_a_job_is_kept(client: FakeClient) -> None:
    """Actor and reason are kept for assertions, and the job's status has them."""
    client.enqueue("ann", [], job_id="one", actor=UUID(FIRST), reason="late")
    client.enqueue_many([GrantJob("bob", [], "two", actor="hr")])
    assert [(job.actor, job.reason) for job in client.jobs] == [(FIRST, "late"), ("hr", None)]
    assert (client.status("one").actor, client.status("two").actor) == (FIRST, "hr")
    client.set_result("one")
    ended = client.status("one")
    assert (ended.actor, ended.reason, ended.enqueued_at) == (
        *(FIRST, "late"),
        client.jobs[0].sent_at,
    )


# --- Results --------------------------------------------------------------------------------------


def test_a_job_without_a_result_is_queued(client: FakeClient) -> None:
    """The status has the job's times; wait raises at once."""
    client.enqueue("ann", [FIRST], job_id="one", countdown=60, expires=90)
    status, job = client.status("one"), client.jobs[0]
    assert (status.state, status.task) == ("queued", GRANT_ACCESS)
    assert (status.sent_at, status.eta, status.expires_at) == (
        job.sent_at,
        job.eta,
        job.expires_at,
    )
    started = time.monotonic()
    with pytest.raises(NoAnswerInTimeError, match="it is queued"):
        client.wait("one", timeout=60)
    assert time.monotonic() - started < 1


def test_a_job_that_was_not_enqueued_is_unknown(client: FakeClient) -> None:
    """So that a service's handling of unknown jobs can be tested."""
    client.set_result(created=1)
    assert client.status("one").state == "unknown"
    with pytest.raises(NoAnswerInTimeError, match="nothing is stored of it"):
        client.wait("one", timeout=60)


def test_a_result_of_one_job(client: FakeClient) -> None:
    """The job succeeds with this count; another one stays queued."""
    client.enqueue("ann", [FIRST, SECOND, SECOND], job_id="one")
    client.enqueue("ann", [FIRST], job_id="two")
    client.set_result("one", created=1)
    assert client.wait("one", timeout=1) == {"success": True, "created_access_count": 1}
    status = client.status("one")
    assert (status.state, status.user_id) == ("succeeded", "ann")
    assert (status.requested, status.repeated, status.already_granted, status.created) == (
        *(3, 1),
        *(1, 1),
    )
    assert status.finished_at
    assert client.status("two").state == "queued"


def test_a_result_of_every_job(client: FakeClient) -> None:
    """By default a job created all grants that it requested, for each user."""
    client.set_result()
    client.enqueue("ann", [FIRST, SECOND], job_id="one")
    client.enqueue_cohort(["bob", "cem"], [FIRST, SECOND], job_id="two")
    assert client.wait("one", timeout=1)["created_access_count"] == 2
    assert client.wait("two", timeout=1)["created_access_count"] == 4
    assert client.status("two").created_by_user == {"bob": 2, "cem": 2}


def test_a_result_of_a_cohort(client: FakeClient) -> None:
    """Numbers for each user add up to the count."""
    client.enqueue_cohort(["bob", "cem"], [FIRST, SECOND], job_id="two")
    client.set_result("two", created_by_user={"bob": 2, "cem": 0})
    assert client.wait("two", timeout=1)["created_access_count"] == 2
    assert client.status("two").created_by_user == {"bob": 2, "cem": 0}


def test_a_result_of_an_attempt(client: FakeClient) -> None:
    """The attempt's ID is a UUID, which the test may choose."""
    for number in range(2):
        client.enqueue_attempt(FIRST, "ann", job_id=f"attempt-{number}")
    client.set_result()
    client.set_result("attempt-0", interview_attempt_id=SECOND)
    first, second = (client.wait(job.job_id, timeout=1) for job in client.jobs)
    assert first == {"success": True, "interview_attempt_id": SECOND}
    assert str(UUID(second["interview_attempt_id"])) == second["interview_attempt_id"]
    assert client.status("attempt-1").created is None


def test_a_failure(client: FakeClient) -> None:
    """Wait raises the error in its class; the status lists the offending IDs."""
    client.enqueue("ann", [FIRST, "x"], job_id="one")
    client.set_failure("one", InvalidInterviewIdException.of(["x"], [FIRST]))
    with pytest.raises(InvalidInterviewIdException, match="2 interview IDs cannot be granted"):
        client.wait("one", timeout=1)
    status = client.status("one")
    assert (status.state, status.unknown_interview_ids) == ("failed", [FIRST])
    assert status.malformed_interview_ids == ["x"]


def test_a_class_in_place_of_an_error_is_refused(client: FakeClient) -> None:
    """The sentence says how to make an error."""
    wrong: Any = InvalidInterviewIdException
    with pytest.raises(TypeError, match="error: expected an exception of"):
        client.set_failure("one", wrong)


def test_a_retryable_failure_is_forgotten_when_the_job_is_sent_again(client: FakeClient) -> None:
    """After StorageUnavailableException the same ID can be sent again, and is then queued."""
    client.enqueue("ann", [], job_id="one")
    client.set_failure("one", StorageUnavailableException.of(1, "gone"))
    client.enqueue("ann", [], job_id="one")
    assert client.status("one").state == "queued"


def test_cancellation(client: FakeClient) -> None:
    """A queued job is cancelled; a finished one keeps its state; an unknown one will not start."""
    for job_id in "one", "two":
        client.enqueue("ann", [], job_id=job_id)
    client.set_result("two")
    assert client.cancel("one").state == "cancelled"
    assert client.cancel("two").state == "succeeded"
    unknown = client.cancel("three")
    assert (unknown.state, unknown.cancel_requested) == ("unknown", True)
    client.enqueue("ann", [], job_id="three")
    for job_id in "one", "three":
        with pytest.raises(JobCancelledException):
            client.wait(job_id, timeout=1)


def test_an_unavailable_redis(client: FakeClient) -> None:
    """Every call raises QueueUnavailableError, and nothing is kept."""
    client.is_available = False
    calls: list[Callable[[], object]] = [
        lambda: client.enqueue("ann", []),
        lambda: client.enqueue_many([GrantJob("ann", [])]),
        lambda: client.wait("one", timeout=1),
        lambda: client.status("one"),
        lambda: client.cancel("one"),
    ]
    for call in calls:
        with pytest.raises(QueueUnavailableError, match="the test has set is_available to False"):
            call()
    client.is_available = True
    client.assert_nothing_enqueued()


def test_threads_enqueue_at_once(client: FakeClient) -> None:
    """A job ID is given to one of two requests, and no job is lost."""
    refused: list[str] = []

    def enqueue(user_id: str) -> None:
        for number in range(50):
            client.enqueue(user_id, [])
            try:
                client.enqueue(user_id, [], job_id=f"shared-{number}")
            except JobIdReusedException:
                refused.append(user_id)

    threads = [threading.Thread(target=enqueue, args=(name,)) for name in ("ann", "bob")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 50
    assert len(client.jobs) == 150


def test_none_is_no_wildcard() -> None:
    """An expected value of None, as of an attribute that is not set, is a TypeError."""
    client = FakeClient()
    client.enqueue("ann", [])
    for name in ("user_id", "job_id", "task", "user_ids", "interview_ids"):
        with pytest.raises(TypeError, match=f"{name}: expected"):
            client.assert_enqueued(**{name: None})  # type: ignore[arg-type] # deliberately wrong


@pytest.mark.parametrize(
    ("result", "says"),
    [
        ({"created": 3}, "created: expected 0 to 2 for the job, got 3"),
        ({"created": -1}, "created: expected 0 to 2 for the job, got -1"),
        ({"interview_attempt_id": FIRST}, "interview_attempt_id: expected none"),
    ],
)
def test_a_result_that_no_worker_returns_is_refused(result: Any, says: str) -> None:
    """A test cannot state more grants than were requested, or an attempt of another task."""
    client = FakeClient()
    job_id = client.enqueue("ann", [FIRST, SECOND, FIRST])
    with pytest.raises(ValueError, match=says):
        client.set_result(job_id, **result)
    attempt = client.enqueue_attempt(FIRST, "ann")
    with pytest.raises(ValueError, match="created: expected none for an attempt"):
        client.set_result(attempt, created=1)


# --- capture_enqueued -----------------------------------------------------------------------------


def test_capture_receives_the_calls_of_every_client() -> None:
    """Clients that exist, blocking or asyncio, enqueue into one; wait does not sleep."""
    blocking, asynchronous = InterviewAccessClient(NOWHERE), AsyncInterviewAccessClient(NOWHERE)

    async def use() -> None:
        job_id = await asynchronous.enqueue("bob", [])
        with pytest.raises(NoAnswerInTimeError):
            await asynchronous.wait(job_id, timeout=60)
        assert (await asynchronous.cancel(job_id)).state == "cancelled"

    started = time.monotonic()
    with capture_enqueued() as captured:
        job_id = blocking.enqueue("ann", [FIRST, SECOND])
        with pytest.raises(NoAnswerInTimeError):
            blocking.wait(job_id, timeout=60)
        captured.set_result(job_id, created=1)
        assert InterviewAccessClient(NOWHERE).wait(job_id, timeout=60)["created_access_count"] == 1
        asyncio.run(use())
        asyncio.run(use())  # another event loop, as test runners use for each test
        thread = threading.Thread(target=blocking.enqueue, args=("cem", []))
        thread.start()
        thread.join()
    assert time.monotonic() - started < 2
    assert [job.user_id for job in captured.jobs] == ["ann", "bob", "bob", "cem"]


def test_captures_nest_and_end() -> None:
    """The innermost receives the calls. After the last one, clients connect again."""
    client = InterviewAccessClient("redis+socket:///nowhere/redis.sock")
    with capture_enqueued() as outer:
        with capture_enqueued(InlineClient()) as inner:
            assert client.wait(client.enqueue("ann", []), timeout=1)["created_access_count"] == 0
        client.enqueue("bob", [])
    assert [job.user_id for job in inner.jobs] == ["ann"]
    assert [job.user_id for job in outer.jobs] == ["bob"]
    with pytest.raises(QueueUnavailableError):
        client.enqueue("cem", [])


def test_captures_of_threads_may_end_in_any_order() -> None:
    """The first of two blocks may end first; after both, clients connect again."""
    client = InterviewAccessClient("redis+socket:///nowhere/redis.sock")
    first, second = capture_enqueued(), capture_enqueued()
    first.__enter__()
    receiver = second.__enter__()
    first.__exit__(None, None, None)
    client.enqueue("ann", [])
    second.__exit__(None, None, None)
    assert [job.user_id for job in receiver.jobs] == ["ann"]
    with pytest.raises(QueueUnavailableError):
        client.enqueue("bob", [])


def test_a_captured_client_remembers_no_limit(redis: Redis, broker: str) -> None:
    """After the block a client reads the limit that the workers state."""
    client = InterviewAccessClient(broker)
    with capture_enqueued():
        client.enqueue("ann", [])
    redis.set(LIMITS_KEY, WorkerLimits(max_interview_ids=1).model_dump_json())
    with pytest.raises(InvalidGrantRequestException, match="at most 1 IDs"):
        client.enqueue("ann", [FIRST, SECOND])
    client.close()


def test_a_capture_ends_also_after_an_exception() -> None:
    """The clients of the next test connect again."""
    before = InterviewAccessClient.wait, AsyncInterviewAccessClient.wait
    with pytest.raises(ZeroDivisionError), capture_enqueued():
        _ = 1 / 0
    assert (InterviewAccessClient.wait, AsyncInterviewAccessClient.wait) == before
