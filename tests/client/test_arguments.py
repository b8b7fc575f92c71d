"""Arguments that both clients refuse before they send anything."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import traceback
from typing import Any
from uuid import UUID

import pytest
from interview_access.aio import AsyncInterviewAccessClient
from interview_access.contracts import (
    LIMITS_KEY,
    QUEUE,
    GrantCohortJob,
    GrantJob,
    InterviewAttemptJob,
    WorkerLimits,
)
from interview_access.errors import InvalidGrantRequestException, QueueUnavailableError
from interview_access.producer import InterviewAccessClient
from redis import Redis

from tests.support.clients import CLIENTS, Client

ID = "89d96f4b-c19d-4e69-8eae-e818f3123b09"
USER = "a string of 1 to 36 characters"
NO_REDIS = "redis+socket:///nonexistent/redis.sock"


@pytest.fixture(params=CLIENTS)
def no_redis(request: pytest.FixtureRequest) -> Any:
    """A client without a server: it can check arguments, and nothing else."""
    client = CLIENTS[request.param](NO_REDIS)
    yield client
    client.close()


@pytest.mark.parametrize(
    ("user_id", "interview_ids", "says"),
    [
        (
            42,
            [ID],
            rf"user_id: expected {USER}.*; convert an integer key: str\(user.pk\), got .*42",
        ),
        (None, [ID], f"user_id: expected {USER}.*, got null"),
        ("", [ID], f"user_id: expected {USER}.*, got the string ''"),
        ("u" * 37, [ID], f"user_id: expected {USER}.*, got a string of 37 characters"),
        ("a\0b", [ID], f"user_id: expected {USER}"),
        ([ID], "ann", f"user_id: expected {USER}.*; interview_ids: expected a list of UUIDs"),
        ("ann", ID, "interview_ids: expected a list of UUIDs as strings, got the string '89d9"),
        ("ann", None, "interview_ids: expected a list of UUIDs as strings, got null"),
        ("ann", {ID: 1}, "interview_ids: expected a list of UUIDs as strings, got an object of 1"),
        ("ann", [ID, 7], r"interview_ids\[1\]: expected a UUID as a string, got the number 7"),
        ("ann", [[ID]], r"interview_ids\[0\]: expected a UUID as a string, got a list of 1"),
    ],
)
def test_an_invalid_argument_is_refused_at_the_call(
    no_redis: Client, user_id: Any, interview_ids: Any, says: str
) -> None:
    """The error is that of a worker, and needs no server."""
    with pytest.raises(InvalidGrantRequestException, match=says):
        no_redis.enqueue(user_id, interview_ids)
    with pytest.raises(InvalidGrantRequestException, match=rf"jobs\[0\]: .*{says}"):
        no_redis.enqueue_many([GrantJob(user_id, interview_ids)])


@pytest.mark.parametrize(
    ("user_ids", "interview_ids", "says"),
    [
        ("ann", [ID], "user_ids: expected a list of user IDs, got the string 'ann'"),
        (["ann", 42], [ID], rf"user_ids\[1\]: expected {USER}.*str\(user.pk\), got the number 42"),
        (["ann"], ID, "interview_ids: expected a list of UUIDs"),
    ],
)
def test_an_invalid_cohort_is_refused_at_the_call(
    no_redis: Client, user_ids: Any, interview_ids: Any, says: str
) -> None:
    """The error names the argument of the cohort, and its element."""
    with pytest.raises(InvalidGrantRequestException, match=says):
        no_redis.enqueue_cohort(user_ids, interview_ids)
    with pytest.raises(InvalidGrantRequestException, match=says):
        no_redis.enqueue_many([GrantCohortJob(user_ids, interview_ids)])


class Interview:
    """An object with the key of Django's models."""

    pk = ID


def test_model_objects_are_refused_with_one_hint(no_redis: Client) -> None:
    """Objects in place of IDs are described once, with the query that reads the IDs."""
    objects: Any = [Interview() for _ in range(30)]
    hint = r'; pass the IDs of the objects: values_list\("pk", flat=True\), got a .*; and 29 more'
    with pytest.raises(InvalidGrantRequestException, match=rf"interview_ids\[0\]: [^[]*{hint}"):
        no_redis.enqueue("ann", objects)
    with pytest.raises(InvalidGrantRequestException, match=rf"user_ids\[0\]: [^[]*{hint}"):
        no_redis.enqueue_cohort(objects, [ID])


@pytest.mark.parametrize(
    ("interview_id", "user_id", "says"),
    [
        (None, "ann", "interview_id: expected a UUID as a string, got null"),
        (ID, 42, rf"user_id: expected {USER}.*str\(user.pk\), got the number 42"),
        ([ID], "ann", "interview_id: expected a UUID as a string, got a list of 1"),
    ],
)
def test_an_invalid_attempt_is_refused_at_the_call(
    no_redis: Client, interview_id: Any, user_id: Any, says: str
) -> None:
    """The error names the argument of the attempt."""
    with pytest.raises(InvalidGrantRequestException, match=says):
        no_redis.enqueue_attempt(interview_id, user_id)
    with pytest.raises(InvalidGrantRequestException, match=says):
        no_redis.enqueue_many([InterviewAttemptJob(interview_id, user_id)])


@pytest.mark.parametrize("jobs", [GrantJob("ann", []), None, "job", {"job": 1}], ids=type)
def test_jobs_that_are_not_a_list_are_refused(no_redis: Client, jobs: Any) -> None:
    """The error of enqueue_many says that a list was expected."""
    with pytest.raises(InvalidGrantRequestException, match="jobs: expected a list of jobs, got"):
        no_redis.enqueue_many(jobs)


@pytest.mark.parametrize("timeout", [None, "5", float("nan"), True, [1]], ids=repr)
def test_an_invalid_timeout_is_refused(no_redis: Client, timeout: Any) -> None:
    """The ValueError says what was received."""
    for call in (no_redis.wait, no_redis.status, no_redis.cancel):
        with pytest.raises(ValueError, match="timeout: expected a number of seconds, got"):
            call("job", timeout=timeout)


def test_a_number_of_any_size_is_refused(no_redis: Client) -> None:
    """Python converts no integer of more than 4,300 digits to a string."""
    with pytest.raises(InvalidGrantRequestException, match=r"got a number of 16,6\d\d bits"):
        no_redis.enqueue(10**5_000, [ID])


def test_malformed_interview_ids_are_left_to_the_worker(redis: Redis, client: Client) -> None:
    """The client sends strings that are not UUIDs: the worker's error lists them all."""
    client.enqueue("ann", ["no-uuid", ID, UUID(ID)])
    client.enqueue_attempt("no-uuid", "ann")
    assert redis.llen(QUEUE) == 2


def test_the_stated_limit_holds(redis: Redis, client: Client) -> None:
    """A request over the limit in Redis is refused; a limit that was raised counts at once."""
    redis.set(LIMITS_KEY, WorkerLimits(max_interview_ids=2).model_dump_json())
    with pytest.raises(InvalidGrantRequestException, match=r"expected at most 2 IDs .*a list of 3"):
        client.enqueue("ann", [ID] * 3)
    with pytest.raises(InvalidGrantRequestException, match="at most 1 IDs for 2 users"):
        client.enqueue_cohort(["ann", "bob"], [ID] * 2)
    with pytest.raises(InvalidGrantRequestException, match=r"jobs\[1\]: .*at most 2 IDs"):
        client.enqueue_many([GrantJob("ann", [ID]), GrantJob("ann", [ID] * 3)])
    assert redis.llen(QUEUE) == 0
    redis.set(LIMITS_KEY, WorkerLimits(max_interview_ids=3).model_dump_json())
    client.enqueue("ann", [ID] * 3)
    assert redis.llen(QUEUE) == 1


@pytest.mark.parametrize(
    "stated",
    [None, b"", b"{}", b"\xff", b'{"max_interview_ids": "many"}', b'{"max_interview_ids": -1}'],
)
def test_an_unknown_limit_refuses_nothing(
    redis: Redis, client: Client, stated: bytes | None
) -> None:
    """Without a readable limit the worker checks the number of IDs."""
    if stated is None:
        redis.lpush(LIMITS_KEY, "of another type")
    else:
        redis.set(LIMITS_KEY, stated)
    client.enqueue("ann", [ID] * 3)
    assert redis.llen(QUEUE) == 1


def test_a_forbidden_limit_refuses_nothing(broker: str, redis: Redis) -> None:
    """A Redis user of an earlier release, who may not read the limit, can enqueue."""
    redis.acl_setuser(
        "old",
        enabled=True,
        passwords=["+secret"],
        keys=["interview-access", "interview-access:job:*"],
        commands=["+@all"],
    )
    try:
        for make in CLIENTS.values():
            client = make(broker.replace("://", "://old:secret@"))
            client.enqueue("ann", [ID] * 3)
            client.close()
    finally:
        redis.acl_deluser("old")
    assert redis.llen(QUEUE) == 2


def test_an_outage_has_a_short_traceback() -> None:
    """An unreachable Redis is one exception of at most ten lines."""
    code = (
        "from interview_access.producer import InterviewAccessClient\n"
        f"client = InterviewAccessClient({NO_REDIS!r})\n"
        f"client.enqueue('ann', [{ID!r}])\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    lines = ended.stderr.splitlines()
    assert lines[-1].startswith("interview_access.errors.QueueUnavailableError: Job ")
    assert lines.count("Traceback (most recent call last):") == 1
    assert len(lines) <= 10


def test_the_asyncio_client_has_a_short_traceback() -> None:
    """An outage is one exception, with the frames of the call only."""

    async def enqueue() -> None:
        async with AsyncInterviewAccessClient(NO_REDIS) as client:
            await client.enqueue("ann", [ID])

    with pytest.raises(QueueUnavailableError) as caught:
        asyncio.run(enqueue())
    error = caught.value
    assert error.__cause__ is None
    assert error.__suppress_context__
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "interview_access" in frame.filename]
    assert len(ours) <= 4


def test_a_client_closes_its_connections_as_a_context_manager(redis: Redis, broker: str) -> None:
    """`with` and `async with` close what the block opened."""

    def named() -> int:
        clients: Any = redis.client_list()
        return sum(one["name"] == "interview-access-client" for one in clients)

    with InterviewAccessClient(broker) as client:
        client.enqueue("ann", [ID])
        assert named() == 1
    assert named() == 0

    async def enqueue() -> None:
        async with AsyncInterviewAccessClient(broker) as other:
            await other.enqueue("ann", [ID])
            assert named() == 1

    asyncio.run(enqueue())
    assert named() == 0


def test_another_event_loop_is_named() -> None:
    """A client of an earlier loop raises an error that says what to do instead."""
    client = AsyncInterviewAccessClient(NO_REDIS)

    async def enqueue() -> None:
        with pytest.raises(QueueUnavailableError):
            await client.enqueue("ann", [ID])

    with asyncio.Runner() as runner:
        runner.run(enqueue())
        with pytest.raises(RuntimeError, match="of an earlier event loop, which is another one"):
            asyncio.run(client.enqueue("ann", [ID]))
    with pytest.raises(RuntimeError, match="which is closed; expected one client per event loop"):
        asyncio.run(client.enqueue("ann", [ID]))
    asyncio.run(client.close())
    asyncio.run(enqueue())


def test_a_closed_client_can_be_used_in_another_event_loop(redis: Redis, broker: str) -> None:
    """After close() the next call opens connections in the loop that runs then."""
    client = AsyncInterviewAccessClient(broker)

    async def enqueue_and_close() -> None:
        await asyncio.gather(*(client.enqueue("ann", [ID]) for _ in range(60)))
        await client.close()

    for _ in range(2):
        asyncio.run(enqueue_and_close())
    assert redis.llen(QUEUE) == 120
