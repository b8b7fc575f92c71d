"""The messages and announcements that both clients write, and the IDs that they refuse."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest
from celery import Celery
from celery.worker.request import Request
from interview_access.aio import AsyncInterviewAccessClient
from interview_access.contracts import (
    GRANT_ACCESS,
    GRANT_COHORT_ACCESS,
    QUEUE,
    announcement_key,
    request_digest,
)
from interview_access.errors import InvalidGrantRequestException, JobIdReusedException
from interview_access.producer import InterviewAccessClient
from redis import Redis

from tests.support.clients import Client
from tests.support.stores import all_at_once

ID = "89d96f4b-c19d-4e69-8eae-e818f3123b09"
OTHER_ID = "a1b2c3d4-e5f6-4a8b-9c0d-e1f2a3b4c5d6"
MONTH = 30 * 86_400  # seconds


@pytest.fixture
def celery_app(broker: str) -> Iterator[Celery]:
    """A Celery app on the same Redis, which does not know this project."""
    with Celery(broker=broker, backend=broker, set_as_current=False) as app:
        yield app


def newest_message(redis: Redis) -> tuple[dict[str, Any], Any]:
    """Decode the newest message on the queue into envelope and body."""
    raw: Any = redis.lindex(QUEUE, 0)
    message = json.loads(raw)
    body = message["body"]
    if message["properties"].get("body_encoding") == "base64":
        body = base64.b64decode(body)
    return message, json.loads(body)


def announcement(redis: Redis, job_id: str) -> dict[str, Any]:
    """Read the announcement of a job."""
    text: Any = redis.get(announcement_key(job_id))
    return dict(json.loads(text))


def test_a_message_equals_celerys(redis: Redis, celery_app: Celery, client: Client) -> None:
    """Body and headers are those that a Celery app sends, except those that identify the sender."""
    at = datetime.now(UTC) + timedelta(hours=1)
    kwargs = {"user_id": "ann", "interview_ids": [ID, "no-uuid", "é"]}
    celery_app.send_task(
        GRANT_ACCESS, kwargs=kwargs, task_id="one", queue=QUEUE, countdown=60, expires=at
    )
    theirs, their_body = newest_message(redis)
    client.enqueue(**kwargs, job_id="one", countdown=60, expires=at)
    ours, our_body = newest_message(redis)
    assert our_body == their_body
    assert ours.keys() == theirs.keys()
    of_the_sender = {"eta", "origin", "kwargsrepr", "delivery_tag"}
    enqueued_at = datetime.fromisoformat(ours["headers"].pop("enqueued_at"))  # an addition
    assert abs(datetime.now(UTC) - enqueued_at) < timedelta(seconds=20)
    for part in ("headers", "properties"):
        assert ours[part].keys() <= theirs[part].keys()
        for name in ours[part].keys() - of_the_sender:
            assert ours[part][name] == theirs[part][name], name
    assert ours["headers"].keys() >= {"lang", "task", "id", "root_id", "parent_id", "group"}
    etas = [datetime.fromisoformat(one["headers"]["eta"]) for one in (ours, theirs)]
    assert abs(etas[0] - etas[1]) < timedelta(seconds=20)


def test_a_cohort_message_has_all_users(redis: Redis, client: Client) -> None:
    """A cohort job has its own task and digest, and its ID is refused to another cohort."""
    users = (user for user in ("ann", UUID(ID)))
    job_id = client.enqueue_cohort(users, {OTHER_ID}, job_id="cohort")
    message, (args, kwargs, _) = newest_message(redis)
    assert (args, kwargs) == ([], {"user_ids": ["ann", ID], "interview_ids": [OTHER_ID]})
    assert message["headers"]["task"] == GRANT_COHORT_ACCESS
    announced = announcement(redis, job_id)
    assert announced["task"] == GRANT_COHORT_ACCESS
    assert announced["digest"] == request_digest(GRANT_COHORT_ACCESS, ["ann", ID], [OTHER_ID])
    assert client.enqueue_cohort([ID, "ann", "ann"], [OTHER_ID], job_id="cohort") == "cohort"
    with pytest.raises(JobIdReusedException):
        client.enqueue_cohort(["ann"], [OTHER_ID], job_id="cohort")
    with pytest.raises(InvalidGrantRequestException, match="user_ids"):
        client.enqueue_cohort([b"ann"], [OTHER_ID])


@pytest.mark.usefixtures("redis")
def test_celery_parses_a_message(broker: str, client: Client) -> None:
    """Celery's worker code finds the task, its arguments and its times in the message."""
    job_id = client.enqueue("ann", [ID], countdown=60, expires=3600)
    app = Celery(broker=broker, set_as_current=False)

    @app.task(name=GRANT_ACCESS, shared=False)  # type: ignore[untyped-decorator] # Celery's
    def task(user_id: str, interview_ids: list[str]) -> None:
        """Of the name, and never run."""

    with app.connection_for_read() as connection, connection.channel() as channel:
        message = channel.basic_get(QUEUE, no_ack=True)
        read = Request(message, app=app, task=task)
    assert (read.id, read.name, read.correlation_id) == (job_id, GRANT_ACCESS, job_id)
    assert (read.args, read.kwargs) == ([], {"user_id": "ann", "interview_ids": [ID]})
    now = datetime.now(UTC)
    assert timedelta(seconds=40) < read.eta - now < timedelta(seconds=61)
    assert timedelta(minutes=59) < read.expires - now <= timedelta(hours=1)


def test_the_representation_of_arguments_omits_ids(redis: Redis, client: Client) -> None:
    """The representation of the arguments for events and logs does not contain the IDs."""
    client.enqueue("ann", ["i"] * 5_000)
    message, _ = newest_message(redis)
    assert message["headers"]["argsrepr"] == "()"
    assert message["headers"]["kwargsrepr"] == "user_id='ann', interview_ids=<a list of 5,000>"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("job_id", "", "job ID: expected 1 to 255 printable characters, got the string ''"),
        ("job_id", "a\nb", r"job ID: .* got the string 'a\\nb'"),
        ("job_id", "j" * 256, "job ID: .* got a string of 256 characters"),
        ("job_id", 7, "job ID: .* got the number 7"),
        ("countdown", "5", "countdown: expected a number of seconds, got the string '5'"),
        ("countdown", float("nan"), "countdown: .* got the number nan"),
        ("countdown", float("inf"), "countdown: .* got the number inf"),
        ("countdown", 1e300, r"countdown: .* got the number 1e\+300"),
        ("countdown", True, "countdown: .* got true"),
        ("countdown", datetime.now(UTC), "countdown: .* got a datetime"),
        ("countdown", Decimal(1), "countdown: .* got a Decimal"),
        ("expires", "soon", "expires: expected a number of seconds or a datetime, got the string"),
        ("expires", float("-inf"), "expires: .* got the number -inf"),
        ("expires", timedelta(1), "expires: .* got a timedelta"),
        ("expires", False, "expires: .* got false"),
    ],
)
def test_an_invalid_option_raises_a_value_error(
    redis: Redis, client: Client, name: str, value: object, says: str
) -> None:
    """The ValueError of an invalid option says what was expected and what was received."""
    with pytest.raises(ValueError, match=says):
        client.enqueue("ann", [], **{name: value})
    assert redis.keys() == []


@pytest.mark.parametrize(
    ("user_id", "ids"),
    [
        ("ann", [ID, object()]),
        ({1: "a", "b": 2}, []),
        (object(), []),
        ("ann", b"bytes"),
    ],
    ids=["an element", "keys of two kinds", "a user", "bytes"],
)
def test_an_argument_without_a_json_encoding_is_not_sent(
    redis: Redis, client: Client, user_id: object, ids: object
) -> None:
    """An argument that cannot be encoded as JSON raises the error that a worker would store."""
    with pytest.raises(InvalidGrantRequestException, match=r"request is invalid: .*: expected"):
        client.enqueue(user_id, ids)
    assert redis.keys() == []


@pytest.mark.parametrize("ids", [{ID}, iter([ID]), (ID,), [UUID(ID)], {ID: 1}.keys()])
def test_interview_ids_can_be_any_iterable(redis: Redis, client: Client, ids: Any) -> None:
    """Sets, generators and tuples of IDs are sent as lists."""
    client.enqueue("ann", ids if not hasattr(ids, "__next__") else iter([ID]))
    assert newest_message(redis)[1][1] == {"user_id": "ann", "interview_ids": [ID]}


@pytest.mark.parametrize("job_id", [None, "chosen"])
def test_announcement_and_message_are_written_in_one_transaction(
    redis: Redis, client: Client, job_id: str | None
) -> None:
    """The announcement and the message are written in one MULTI."""
    with redis.monitor() as monitor:  # type: ignore[no-untyped-call] # redis-py's
        returned = client.enqueue("ann", [ID], job_id=job_id)
        redis.echo("over")
        said: list[str] = []
        for one in monitor.listen():
            said.append(str(one["command"])[:80])
            if "over" in said[-1]:
                break
    at = said.index("MULTI")
    assert said[at + 1].startswith(f"SET {announcement_key(returned)} ")
    assert said[at + 2].startswith(f"LPUSH {QUEUE} ")
    assert said[at + 3] == "EXEC"


def test_an_announcement_has_digest_and_times(redis: Redis, client: Client) -> None:
    """The announcement has the request's digest and times, and is kept for a month from the ETA."""
    job_id = client.enqueue("ann", [ID], countdown=86_400, expires=90_000)
    known = announcement(redis, job_id)
    assert known["digest"] == request_digest(GRANT_ACCESS, "ann", [ID])
    assert known["task"] == GRANT_ACCESS
    sent, eta, end = (
        datetime.fromisoformat(known[name]) for name in ("sent_at", "eta", "expires_at")
    )
    assert (eta - sent, end - sent) == (timedelta(seconds=86_400), timedelta(seconds=90_000))
    assert abs(redis.ttl(announcement_key(job_id)) - MONTH - 86_400) < 60


@pytest.mark.parametrize("countdown", [-86_400 * 40, 86_400 * 365 * 7900])
def test_an_extreme_countdown_is_announced(redis: Redis, client: Client, countdown: float) -> None:
    """A countdown in the past, or of thousands of years, is sent like any other."""
    job_id = client.enqueue("ann", [ID], countdown=countdown)
    assert redis.llen(QUEUE) == 1
    assert redis.ttl(announcement_key(job_id)) > MONTH - 60


def test_one_request_can_be_sent_again_under_its_id(redis: Redis, client: Client) -> None:
    """Order, spelling and duplicates do not make it another request."""
    ids = [str(uuid4()) for _ in range(50)]
    client.enqueue("ann", ids, job_id="again", countdown=1)
    first = announcement(redis, "again")
    other = [one.upper() if at % 2 else one.replace("-", "") for at, one in enumerate(2 * ids)]
    random.Random(7).shuffle(other)  # noqa: S311 - an order, not a secret
    assert client.enqueue("ann", other, job_id="again") == "again"
    assert redis.llen(QUEUE) == 2
    assert announcement(redis, "again") == first


@pytest.mark.parametrize(
    ("user_id", "ids"), [("bob", [ID]), ("ann", [OTHER_ID]), ("ann", [ID, OTHER_ID]), ("ann", [])]
)
def test_a_used_id_is_refused_to_another_request(
    redis: Redis, client: Client, user_id: str, ids: list[str]
) -> None:
    """The second request raises an error with both digests, and nothing is queued."""
    client.enqueue("ann", [ID], job_id="taken")
    before = announcement(redis, "taken")
    with pytest.raises(JobIdReusedException, match="job ID of its own") as caught:
        client.enqueue(user_id, ids, job_id="taken")
    assert caught.value.details == {
        "total": 1,
        "job_id": "taken",
        "first_digest": request_digest(GRANT_ACCESS, "ann", [ID]),
        "digest": request_digest(GRANT_ACCESS, user_id, ids),
    }
    assert redis.llen(QUEUE) == 1
    assert announcement(redis, "taken") == before


def test_an_announcement_without_a_digest_refuses_no_request(redis: Redis, client: Client) -> None:
    """A job that another producer announced without a digest can be sent under its ID."""
    now = datetime.now(UTC).isoformat()
    foreign = json.dumps({"task": GRANT_ACCESS, "sent_at": now})
    redis.set(announcement_key("foreign"), foreign)
    client.enqueue("ann", [ID], job_id="foreign")
    assert redis.llen(QUEUE) == 1


def or_first_digest(attempt: Any) -> Any:
    """Call a function; return its result, or the first digest if the ID was refused."""
    try:
        return attempt()
    except JobIdReusedException as error:
        return error.details["first_digest"]


def queued_users(redis: Redis) -> set[str]:
    """Collect the users of all messages on the queue."""
    raws: Any = redis.lrange(QUEUE, 0, -1)
    return {json.loads(json.loads(raw)["body"])[1]["user_id"] for raw in raws}


def test_one_of_two_requests_that_race_for_an_id_wins(broker: str, redis: Redis) -> None:
    """Of two requests that threads send under one ID, one is queued; the other calls raise."""
    client = InterviewAccessClient(broker)
    users = ["ann", "bob"] * 4
    for turn in range(25):
        job_id = f"race-{turn}"
        returned = all_at_once(
            [
                lambda user=user: or_first_digest(lambda: client.enqueue(user, [ID], job_id=job_id))  # type: ignore[misc] # noqa: B023 - called within the turn
                for user in users
            ]
        )
        (winner,) = queued_users(redis)
        digest = request_digest(GRANT_ACCESS, winner, [ID])
        assert returned == [job_id if user == winner else digest for user in users]
        assert redis.llen(QUEUE) == 4
        redis.delete(QUEUE)
    client.close()


def test_one_of_two_requests_of_tasks_wins(broker: str, redis: Redis) -> None:
    """Of two requests that tasks of one event loop send under one ID, one is queued."""
    users = ["ann", "bob"] * 4

    async def race() -> list[Any]:
        client = AsyncInterviewAccessClient(broker)
        calls = (client.enqueue(user, [ID], job_id="race") for user in users)
        returned = await asyncio.gather(*calls, return_exceptions=True)
        await client.close()
        return returned

    returned = asyncio.run(race())
    (winner,) = queued_users(redis)
    assert [one == "race" for one in returned] == [user == winner for user in users]
    assert {type(one) for one in returned} == {str, JobIdReusedException}
    assert redis.llen(QUEUE) == 4
