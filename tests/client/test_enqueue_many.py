"""`enqueue_many` of both clients: what it writes, refuses and reports."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from interview_access.contracts import (
    GRANT_ACCESS,
    QUEUE,
    GrantJob,
    announcement_key,
    request_digest,
    result_key,
)
from interview_access.errors import (
    InterviewAccessError,
    InvalidGrantRequestException,
    JobIdReusedException,
    QueueUnavailableError,
)
from interview_access.producer import InterviewAccessClient
from redis import Redis

from devstack.servers import LocalStack
from tests.faults.gates import Relay
from tests.support.clients import CLIENTS, Client
from tests.support.stores import Background, all_at_once, until

ID = "89d96f4b-c19d-4e69-8eae-e818f3123b09"
OTHER_ID = "a1b2c3d4-e5f6-4a8b-9c0d-e1f2a3b4c5d6"
BATCH = 500  # jobs in one transaction
EXEC = b"EXEC\r\n"


@pytest.fixture
def address() -> Iterator[Path]:
    """Where a relay can listen: a short path, as sockets require."""
    folder = Path(tempfile.mkdtemp(prefix="many-"))
    yield folder / "queue"
    shutil.rmtree(folder)


@pytest.fixture
def relay(server: LocalStack, address: Path) -> Iterator[Relay]:
    """A relay in front of the server."""
    relay = Relay(Path(server.broker_url.removeprefix("redis+socket://")), address)
    yield relay
    relay.close()


@pytest.fixture(params=CLIENTS)
def client_of_relay(address: Path, request: pytest.FixtureRequest) -> Iterator[Client]:
    """The blocking client and the asyncio client in turn, connected through the relay."""
    client = CLIENTS[request.param](f"redis+socket://{address}")
    yield client
    client.close()


def jobs_of(count: int) -> list[GrantJob]:
    """Build so many jobs, each of a user of its own."""
    return [GrantJob(f"user-{number}", [ID]) for number in range(count)]


def ids_of(jobs: list[GrantJob]) -> list[str]:
    """Collect the IDs of jobs."""
    return [job.job_id for job in jobs]


def messages(redis: Redis) -> list[dict[str, Any]]:
    """Decode the messages on the queue, in the order of delivery."""
    raws: Any = redis.lrange(QUEUE, 0, -1)
    return [json.loads(raw) for raw in reversed(raws)]


def queued(redis: Redis) -> list[str]:
    """Collect the IDs of the jobs on the queue, in the order of delivery."""
    return [message["headers"]["id"] for message in messages(redis)]


def user_of(message: dict[str, Any]) -> str:
    """Read the user of a message."""
    return str(json.loads(message["body"])[1]["user_id"])


def account(error: InterviewAccessError) -> tuple[list[str], list[str], list[str]]:
    """Read the IDs of the jobs that were sent, might have been sent, and were not sent."""
    return error.details["sent"], error.details["perhaps_sent"], error.details["not_sent"]


@contextmanager
def second_batch(
    relay: Relay, call: Callable[[], list[str]], *, answered: bool = False
) -> Iterator[Background[list[str]]]:
    """Hold a call before Redis executes its second batch, or before the reply to it."""
    with relay.gate(EXEC) as first:
        calling = Background(call)
        first.until_reached()
        with relay.gate(EXEC, answered=answered) as second:
            first.open()
            second.until_reached()
            yield calling


# --- Sending --------------------------------------------------------------------------------------


def test_ids_and_messages_are_in_the_order_of_the_jobs(redis: Redis, client: Client) -> None:
    """The returned IDs and the messages, with chosen and random IDs, have the order of the jobs."""
    jobs = [GrantJob("ann", [ID], job_id="first"), *jobs_of(2 * BATCH), GrantJob("bob", [])]
    returned = client.enqueue_many(iter(jobs))
    assert returned == ids_of(jobs) == queued(redis)
    assert all(UUID(job_id).version == 4 for job_id in returned[1:])
    assert [user_of(message) for message in messages(redis)] == [job.user_id for job in jobs]


def test_a_message_equals_that_of_enqueue(redis: Redis, client: Client) -> None:
    """A job has the same message alone and among many."""
    ids: list[str | UUID] = [UUID(ID), "no-uuid", "é"]
    at = datetime(2099, 1, 1, tzinfo=UTC)
    client.enqueue("ann", ids, job_id="one", expires=at)
    client.enqueue_many([GrantJob("ann", ids, "one", expires=at)])
    alone, among = messages(redis)
    assert alone["properties"].pop("delivery_tag") != among["properties"].pop("delivery_tag")
    times = [one["headers"].pop("enqueued_at") for one in (alone, among)]
    assert times == sorted(times)
    assert alone == among


def test_each_job_is_announced(redis: Redis, client: Client) -> None:
    """Each job is announced with its own digest and times."""
    jobs = [*jobs_of(BATCH), GrantJob("ann", iter([ID]), countdown=60, expires=90)]
    returned = client.enqueue_many(jobs)
    texts: Any = redis.mget([announcement_key(job_id) for job_id in returned])
    known = [json.loads(text) for text in texts]
    users = [str(job.user_id) for job in jobs]
    assert [one["digest"] for one in known] == [
        request_digest(GRANT_ACCESS, user, [ID]) for user in users
    ]
    sent, eta, end = (
        datetime.fromisoformat(known[-1][name]) for name in ("sent_at", "eta", "expires_at")
    )
    assert ((eta - sent).total_seconds(), (end - sent).total_seconds()) == (60, 90)


def test_no_jobs_send_no_commands(redis: Redis, client: Client) -> None:
    """A call without jobs returns no IDs, and sends nothing."""
    redis.config_resetstat()
    assert client.enqueue_many([]) == []
    assert "cmdstat_exec" not in redis.info("commandstats")


def test_10_000_jobs_are_sent_in_20_transactions(redis: Redis, client: Client) -> None:
    """500 jobs take one transaction, and two lookups of their IDs."""
    redis.config_resetstat()
    returned = client.enqueue_many(jobs_of(10_000))
    assert len(set(returned)) == redis.llen(QUEUE) == redis.dbsize() - 1 == 10_000
    stats: Any = redis.info("commandstats")
    asked = {name: stats[f"cmdstat_{name}"]["calls"] for name in ("exec", "watch", "mget")}
    assert asked == {"exec": 20, "watch": 20, "mget": 40}


def test_a_batch_has_at_most_4_mb(redis: Redis, client: Client) -> None:
    """A batch has at most 4 MB; a larger job is a batch of its own."""
    redis.config_resetstat()
    sizes = [30_000, 30_000, 30_000, 30_000, 110_000, 1]  # ids; 42 bytes each
    returned = client.enqueue_many(GrantJob("ann", [ID] * size) for size in sizes)
    assert queued(redis) == returned
    stats: Any = redis.info("commandstats")
    assert stats["cmdstat_exec"]["calls"] == 4


# --- Used IDs -------------------------------------------------------------------------------------


def test_a_job_given_twice_is_sent_once(redis: Redis, client: Client) -> None:
    """A request that is given twice has its ID twice in the result, and one message."""
    job = GrantJob("ann", [ID, OTHER_ID])
    other = GrantJob("bob", [ID])
    again = replace(job, interview_ids=[OTHER_ID.upper(), ID, ID])
    returned = client.enqueue_many([job, other, again])
    assert returned == [job.job_id, other.job_id, job.job_id]
    assert queued(redis) == [job.job_id, other.job_id]


def test_a_job_of_an_earlier_call_is_sent_again(redis: Redis, client: Client) -> None:
    """It is sent beside new jobs, and the first announcement stays."""
    jobs = jobs_of(3)
    client.enqueue_many(jobs[:2])
    keys = [announcement_key(job.job_id) for job in jobs[:2]]
    before = redis.mget(keys)
    assert client.enqueue_many(jobs) == ids_of(jobs)
    assert queued(redis) == [*ids_of(jobs[:2]), *ids_of(jobs)]
    assert redis.mget(keys) == before


def test_a_job_keeps_the_ids_of_a_generator(redis: Redis, client: Client) -> None:
    """A job whose IDs came from a generator has them each time it is sent."""
    job = GrantJob("ann", (one for one in [ID, OTHER_ID]))
    client.enqueue_many([job])
    client.enqueue_many([job])
    assert [json.loads(message["body"])[1]["interview_ids"] for message in messages(redis)] == [
        [ID, OTHER_ID]
    ] * 2


@pytest.mark.parametrize("many", [True, False])
def test_a_retryable_failure_is_deleted_when_the_job_is_sent_again(
    redis: Redis, client: Client, many: bool
) -> None:
    """Sending a job again deletes a StorageUnavailableException, and no other failure."""
    client.enqueue("ann", [ID], job_id="given-up")
    client.enqueue("ann", [ID], job_id="failed")
    for job_id, kind in ("given-up", "StorageUnavailableException"), ("failed", "JobFailedError"):
        result = {
            "exc_type": kind,
            "exc_module": "interview_access.errors",
            "exc_message": ["", {}],
        }
        meta = {"status": "FAILURE", "result": result}
        redis.set(result_key(job_id), json.dumps(meta))
    if many:
        client.enqueue_many([GrantJob("ann", [ID], job_id=one) for one in ("given-up", "failed")])
    else:
        for job_id in "given-up", "failed":
            client.enqueue("ann", [ID], job_id=job_id)
    assert not redis.exists(result_key("given-up"))
    assert redis.exists(result_key("failed"))


@pytest.mark.parametrize("announced", ["1", "x", "[]", '{"digest": 7}'])
def test_an_invalid_announcement_refuses_no_job(
    redis: Redis, client: Client, announced: str
) -> None:
    """A key that does not hold an announcement refuses no job."""
    redis.set(announcement_key("odd"), announced)
    assert client.enqueue("ann", [ID], job_id="odd") == "odd"
    assert client.enqueue_many([GrantJob("ann", [ID], job_id="odd")]) == ["odd"]


def test_two_requests_with_one_id_are_refused(redis: Redis, client: Client) -> None:
    """Two requests with one ID in a call are an error with the position, and nothing is sent."""
    jobs = jobs_of(5)
    jobs[3] = replace(jobs[3], job_id=jobs[1].job_id)
    says = r"jobs\[3\].*job_id: expected an ID that no other request in the call has, got"
    with pytest.raises(InvalidGrantRequestException, match=says) as caught:
        client.enqueue_many(jobs)
    assert jobs[1].job_id in str(caught.value)
    assert redis.keys() == []


def test_used_ids_are_refused(redis: Redis, client: Client) -> None:
    """The error lists all IDs that other requests have, and nothing is sent."""
    jobs = jobs_of(2 * BATCH)
    taken = [jobs[700].job_id, jobs[900].job_id]
    for job_id in taken:
        client.enqueue("bob", [], job_id=job_id)
    with pytest.raises(JobIdReusedException, match=r"job ID of its own.*in use: 1\.") as caught:
        client.enqueue_many(jobs)
    details = caught.value.details
    assert (details["total"], details["job_id"], details["others"]) == (2, taken[0], taken[1:])
    assert details["first_digest"] == request_digest(GRANT_ACCESS, "bob", [])
    assert details["digest"] == request_digest(GRANT_ACCESS, "user-700", [ID])
    assert account(caught.value) == ([], [], ids_of(jobs))
    assert queued(redis) == taken


@pytest.mark.parametrize("taken", [100, 700], ids=["in this batch", "in the next"])
def test_an_id_used_during_the_call_is_refused(
    redis: Redis, server: LocalStack, relay: Relay, client_of_relay: Client, taken: int
) -> None:
    """An ID that another request uses during the call is refused together with its batch."""
    jobs = jobs_of(3 * BATCH)
    direct = InterviewAccessClient(server.broker_url)
    with relay.gate(EXEC) as gate:
        calling = Background(lambda: client_of_relay.enqueue_many(jobs))
        gate.until_reached()
        direct.enqueue("bob", [], job_id=jobs[taken].job_id)
    direct.close()
    with pytest.raises(JobIdReusedException) as caught:
        calling.result()
    assert caught.value.details["job_id"] == jobs[taken].job_id
    ids, sent = ids_of(jobs), taken // BATCH * BATCH
    assert account(caught.value) == (ids[:sent], [], ids[sent:])
    assert sorted(queued(redis)) == sorted([*ids[:sent], ids[taken]])


def test_calls_that_race_for_ids_share_none(redis: Redis, server: LocalStack) -> None:
    """Of calls that race for the same IDs, one has each; the others raise."""
    client = InterviewAccessClient(server.broker_url)
    ids = [str(uuid4()) for _ in range(2 * BATCH)]

    def send(user: str) -> list[str]:
        # Half of them go the other way round, so that batches cross.
        in_order = ids if user < "c" else ids[::-1]
        try:
            return client.enqueue_many(GrantJob(user, [ID], job_id) for job_id in in_order)
        except JobIdReusedException as error:
            return list(error.details["sent"])

    returned = all_at_once([lambda user=user: send(user) for user in "abcd"])  # type: ignore[misc] # user
    client.close()
    owners = {
        user: {m["headers"]["id"] for m in messages(redis) if user_of(m) == user} for user in "abcd"
    }
    assert [owners[user] for user in "abcd"] == [set(one) for one in returned]
    assert sum(map(len, returned)) == len(set().union(*owners.values())) == redis.llen(QUEUE) > 0


# --- Invalid jobs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "kind", "says"),
    [
        (GrantJob("ann", [], job_id=""), ValueError, r"jobs\[700\]: job ID: expected 1 to 255"),
        (GrantJob("ann", [], countdown=float("nan")), ValueError, "countdown: .* got the number"),
        (GrantJob("ann", [], expires="soon"), ValueError, "expires: .* got the string 'soon'"),  # type: ignore[arg-type] # deliberately wrong
        (
            GrantJob("ann", [ID, object()]),  # type: ignore[list-item] # deliberately wrong
            InvalidGrantRequestException,
            r"jobs\[700\]: .*interview_ids\[1\]: expected a UUID",
        ),
        (GrantJob({1}, []), InvalidGrantRequestException, "user_id: expected"),  # type: ignore[arg-type] # deliberately wrong
        (
            ("ann", [ID]),
            InvalidGrantRequestException,
            r"jobs\[700\]: .*a GrantJob, .*, got",
        ),
    ],
    ids=["job id", "countdown", "expires", "interview id", "user", "no job"],
)
def test_an_invalid_job_is_named_by_its_position(
    redis: Redis, client: Client, job: GrantJob, kind: type[Exception], says: str
) -> None:
    """An invalid job is an error with its position and the reason, and nothing is sent."""
    with pytest.raises(kind, match=says) as caught:
        client.enqueue_many([*jobs_of(700), job, *jobs_of(1)])
    assert "jobs[700]: " in str(caught.value)
    assert redis.keys() == []


# --- Outages --------------------------------------------------------------------------------------


def test_an_outage_during_the_call_is_accounted_for(
    redis: Redis, server: LocalStack, relay: Relay, address: Path, client_of_relay: Client
) -> None:
    """The error lists which jobs were sent, and a second call sends the others."""
    jobs = jobs_of(3 * BATCH)
    ids = ids_of(jobs)
    with second_batch(relay, lambda: client_of_relay.enqueue_many(jobs)) as calling:
        address.unlink()
        relay.cut()
    says = "1,500 jobs 500 were sent, 500 might have been sent"
    with pytest.raises(QueueUnavailableError, match=says) as caught:
        calling.result()
    sent, perhaps, not_sent = account(caught.value)
    assert (sent, perhaps, not_sent) == (ids[:BATCH], ids[BATCH:-BATCH], ids[-BATCH:])
    assert queued(redis) == sent
    direct = InterviewAccessClient(server.broker_url)
    left = {*perhaps, *not_sent}
    assert direct.enqueue_many(job for job in jobs if job.job_id in left) == ids[BATCH:]
    direct.close()
    assert queued(redis) == ids


@pytest.mark.parametrize("answered", [False, True], ids=["before", "after"])
def test_a_lost_connection_is_reopened(
    redis: Redis, relay: Relay, client_of_relay: Client, answered: bool
) -> None:
    """If it is lost before Redis executes a batch, or before the reply, each job is sent once."""
    jobs = jobs_of(3 * BATCH)
    with second_batch(
        relay, lambda: client_of_relay.enqueue_many(jobs), answered=answered
    ) as calling:
        until(lambda: redis.llen(QUEUE) == (2 if answered else 1) * BATCH)
        relay.cut()
    assert calling.result() == ids_of(jobs) == queued(redis)


def test_a_refusal_after_a_lost_connection_is_uncertain(
    redis: Redis, relay: Relay, client_of_relay: Client
) -> None:
    """A batch might have been sent if its first attempt was lost and the second was refused."""
    jobs = jobs_of(3 * BATCH)
    ids = ids_of(jobs)
    try:
        with second_batch(relay, lambda: client_of_relay.enqueue_many(jobs)) as calling:
            redis.config_set("maxmemory", 1)
            relay.cut()
        with pytest.raises(QueueUnavailableError) as caught:
            calling.result()
    finally:
        redis.config_set("maxmemory", 0)
    assert account(caught.value) == (ids[:BATCH], ids[BATCH:-BATCH], ids[-BATCH:])


@pytest.mark.parametrize("job_id", [None, "chosen"])
def test_a_single_job_whose_reply_is_lost_is_sent_once(
    redis: Redis, relay: Relay, client_of_relay: Client, job_id: str | None
) -> None:
    """If only the reply was lost, the job is not sent twice."""
    with relay.gate(EXEC, answered=True) as gate:
        calling = Background(lambda: client_of_relay.enqueue("ann", [ID], job_id=job_id))
        gate.until_reached()
        until(lambda: redis.llen(QUEUE) == 1)
        relay.cut()
    assert [calling.result()] == queued(redis)


def test_a_full_redis_accepts_no_job(redis: Redis, client: Client) -> None:
    """The error says that nothing was sent, and the same call succeeds later."""
    jobs = jobs_of(2 * BATCH)
    redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(QueueUnavailableError, match="maxmemory") as caught:
            client.enqueue_many(jobs)
    finally:
        redis.config_set("maxmemory", 0)
    assert account(caught.value) == ([], [], ids_of(jobs))
    assert redis.keys() == []
    assert client.enqueue_many(jobs) == ids_of(jobs) == queued(redis)


def test_a_batch_that_redis_refuses_was_not_sent(
    redis: Redis, relay: Relay, client_of_relay: Client
) -> None:
    """The error says for certain that a refused batch was not sent."""
    jobs = jobs_of(3 * BATCH)
    ids = ids_of(jobs)
    try:
        with second_batch(relay, lambda: client_of_relay.enqueue_many(jobs)) as calling:
            redis.config_set("maxmemory", 1)
        with pytest.raises(QueueUnavailableError, match="maxmemory") as caught:
            calling.result()
    finally:
        redis.config_set("maxmemory", 0)
    assert account(caught.value) == (ids[:BATCH], [], ids[BATCH:])
    assert queued(redis) == ids[:BATCH]
