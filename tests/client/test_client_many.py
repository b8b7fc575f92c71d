"""Both clients sending many jobs at once: what stands in Redis, and what is told of a failure."""

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
from interview_access.contracts import GRANT_ACCESS, QUEUE, GrantJob, request_digest
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
AT_ONCE = 500  # jobs that are sent in one round trip
EXEC = b"EXEC\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """A Redis of these tests' own, which they may fill."""
    with LocalStack(tmp_path_factory.mktemp("server") / "data", durable=False) as stack:
        yield stack


@pytest.fixture
def redis(server: LocalStack) -> Iterator[Redis]:
    """A connection to it, empty."""
    with Redis(unix_socket_path=server.broker_url.removeprefix("redis+socket://")) as redis:
        redis.flushall()
        yield redis


@pytest.fixture(params=CLIENTS)
def client(server: LocalStack, request: pytest.FixtureRequest) -> Iterator[Client]:
    """A client of it: the blocking one and the asyncio one in turn."""
    client = CLIENTS[request.param](server.broker_url)
    yield client
    client.close()


@pytest.fixture
def address() -> Iterator[Path]:
    """Where a relay may listen; short, as sockets need it."""
    folder = Path(tempfile.mkdtemp(prefix="many-"))
    yield folder / "queue"
    shutil.rmtree(folder)


@pytest.fixture
def relay(server: LocalStack, address: Path) -> Iterator[Relay]:
    """A relay before the server."""
    relay = Relay(Path(server.broker_url.removeprefix("redis+socket://")), address)
    yield relay
    relay.close()


@pytest.fixture(params=CLIENTS)
def behind(address: Path, request: pytest.FixtureRequest) -> Iterator[Client]:
    """A client that comes by the relay: the blocking one and the asyncio one in turn."""
    client = CLIENTS[request.param](f"redis+socket://{address}")
    yield client
    client.close()


def jobs_of(count: int) -> list[GrantJob]:
    """As many jobs, of a user each."""
    return [GrantJob(f"user-{number}", [ID]) for number in range(count)]


def ids_of(jobs: list[GrantJob]) -> list[str]:
    """Their ids."""
    return [job.job_id for job in jobs]


def messages(redis: Redis) -> list[dict[str, Any]]:
    """The messages in the queue, the next one first."""
    raws: Any = redis.lrange(QUEUE, 0, -1)
    return [json.loads(raw) for raw in reversed(raws)]


def queued(redis: Redis) -> list[str]:
    """The ids of the jobs in the queue, the next one first."""
    return [message["headers"]["id"] for message in messages(redis)]


def user_of(message: dict[str, Any]) -> str:
    """Whom a message grants."""
    return str(json.loads(message["body"])[1]["user_id"])


def account(error: InterviewAccessError) -> tuple[list[str], list[str], list[str]]:
    """The jobs that were sent, may have been, and were not."""
    return error.details["sent"], error.details["perhaps_sent"], error.details["not_sent"]


@contextmanager
def second_batch(
    relay: Relay, call: Callable[[], list[str]], *, answered: bool = False
) -> Iterator[Background[list[str]]]:
    """The call, held where Redis is to do its second batch, or to answer that it is done."""
    with relay.gate(EXEC) as first:
        calling = Background(call)
        first.until_reached()
        with relay.gate(EXEC, answered=answered) as second:
            first.open()
            second.until_reached()
            yield calling


# --- What is sent -------------------------------------------------------------------------------


def test_ids_come_in_step(redis: Redis, client: Client) -> None:
    """The ids come in the order of the jobs, and so do the messages: chosen ids and random ones."""
    jobs = [GrantJob("ann", [ID], job_id="first"), *jobs_of(2 * AT_ONCE), GrantJob("bob", [])]
    told = client.enqueue_many(iter(jobs))
    assert told == ids_of(jobs) == queued(redis)
    assert all(UUID(job_id).version == 4 for job_id in told[1:])
    assert [user_of(message) for message in messages(redis)] == [job.user_id for job in jobs]


def test_a_message_is_what_enqueue_sends(redis: Redis, client: Client) -> None:
    """One of many jobs has the message that it has alone."""
    ids: list[str | UUID] = [UUID(ID), "no-uuid", "é"]
    at = datetime(2099, 1, 1, tzinfo=UTC)
    client.enqueue("ann", ids, job_id="one", expires=at)
    client.enqueue_many([GrantJob("ann", ids, "one", expires=at)])
    alone, among = messages(redis)
    assert alone["properties"].pop("delivery_tag") != among["properties"].pop("delivery_tag")
    assert alone == among


def test_each_is_announced(redis: Redis, client: Client) -> None:
    """Every job is announced with its own digest and times."""
    jobs = [*jobs_of(AT_ONCE), GrantJob("ann", iter([ID]), countdown=60, expires=90)]
    told = client.enqueue_many(jobs)
    texts: Any = redis.mget([f"interview-access:job:{job_id}" for job_id in told])
    known = [json.loads(text) for text in texts]
    users = [str(job.user_id) for job in jobs]
    assert [one["digest"] for one in known] == [
        request_digest(GRANT_ACCESS, user, [ID]) for user in users
    ]
    sent, eta, end = (
        datetime.fromisoformat(known[-1][name]) for name in ("sent_at", "eta", "expires_at")
    )
    assert ((eta - sent).total_seconds(), (end - sent).total_seconds()) == (60, 90)


def test_none_are_none(redis: Redis, client: Client) -> None:
    """No jobs have no ids, and Redis is asked nothing."""
    redis.config_resetstat()
    assert client.enqueue_many([]) == []
    assert "cmdstat_exec" not in redis.info("commandstats")


def test_thousands_take_few_round_trips(redis: Redis, client: Client) -> None:
    """10,000 jobs are sent in 20 transactions, with three questions before each."""
    redis.config_resetstat()
    told = client.enqueue_many(jobs_of(10_000))
    assert len(set(told)) == redis.llen(QUEUE) == redis.dbsize() - 1 == 10_000
    stats: Any = redis.info("commandstats")
    asked = {name: stats[f"cmdstat_{name}"]["calls"] for name in ("exec", "watch", "mget")}
    assert asked == {"exec": 20, "watch": 20, "mget": 40}


def test_large_jobs_go_in_smaller_parts(redis: Redis, client: Client) -> None:
    """At most 4 MB are sent at once; a job that is larger goes alone."""
    redis.config_resetstat()
    sizes = [30_000, 30_000, 30_000, 30_000, 110_000, 1]  # ids; 42 bytes each
    told = client.enqueue_many(GrantJob("ann", [ID] * size) for size in sizes)
    assert queued(redis) == told
    stats: Any = redis.info("commandstats")
    assert stats["cmdstat_exec"]["calls"] == 4


# --- Ids that come again ------------------------------------------------------------------------


def test_a_job_given_twice_is_sent_once(redis: Redis, client: Client) -> None:
    """One request that stands twice among the jobs has its id told twice, and one message."""
    job = GrantJob("ann", [ID, OTHER_ID])
    other = GrantJob("bob", [ID])
    again = replace(job, interview_ids=[OTHER_ID.upper(), ID, ID])
    told = client.enqueue_many([job, other, again])
    assert told == [job.job_id, other.job_id, job.job_id]
    assert queued(redis) == [job.job_id, other.job_id]


def test_a_job_that_is_known_is_sent_again(redis: Redis, client: Client) -> None:
    """Jobs sent before go under their ids once more, beside new ones; first announcements stay."""
    jobs = jobs_of(3)
    client.enqueue_many(jobs[:2])
    keys = [f"interview-access:job:{job.job_id}" for job in jobs[:2]]
    before = redis.mget(keys)
    assert client.enqueue_many(jobs) == ids_of(jobs)
    assert queued(redis) == [*ids_of(jobs[:2]), *ids_of(jobs)]
    assert redis.mget(keys) == before


def test_a_job_is_whole_when_it_is_sent_again(redis: Redis, client: Client) -> None:
    """A job whose ids came from a generator has them each time it is sent."""
    job = GrantJob("ann", (one for one in [ID, OTHER_ID]))
    client.enqueue_many([job])
    client.enqueue_many([job])
    assert [json.loads(message["body"])[1]["interview_ids"] for message in messages(redis)] == [
        [ID, OTHER_ID]
    ] * 2


@pytest.mark.parametrize("many", [True, False])
def test_a_job_that_was_given_up_is_waited_for_anew(
    redis: Redis, client: Client, many: bool
) -> None:
    """Sent again, a job has not the failure any more with which it was given up; others' stay."""
    client.enqueue("ann", [ID], job_id="given-up")
    client.enqueue("ann", [ID], job_id="failed")
    for job_id, kind in ("given-up", "StorageUnavailableException"), ("failed", "JobFailedError"):
        result = {
            "exc_type": kind,
            "exc_module": "interview_access.errors",
            "exc_message": ["", {}],
        }
        meta = {"status": "FAILURE", "result": result}
        redis.set(f"celery-task-meta-{job_id}", json.dumps(meta))
    if many:
        client.enqueue_many([GrantJob("ann", [ID], job_id=one) for one in ("given-up", "failed")])
    else:
        for job_id in "given-up", "failed":
            client.enqueue("ann", [ID], job_id=job_id)
    assert not redis.exists("celery-task-meta-given-up")
    assert redis.exists("celery-task-meta-failed")


@pytest.mark.parametrize("announced", ["1", "x", "[]", '{"digest": 7}'])
def test_what_others_wrote_there_is_no_announcement(
    redis: Redis, client: Client, announced: str
) -> None:
    """A key that holds something else than an announcement refuses no job."""
    redis.set("interview-access:job:odd", announced)
    assert client.enqueue("ann", [ID], job_id="odd") == "odd"
    assert client.enqueue_many([GrantJob("ann", [ID], job_id="odd")]) == ["odd"]


def test_two_requests_of_one_id_are_a_fault(redis: Redis, client: Client) -> None:
    """Jobs of one id that ask for different things are told by position, and nothing is sent."""
    jobs = jobs_of(5)
    jobs[3] = replace(jobs[3], job_id=jobs[1].job_id)
    with pytest.raises(InvalidGrantRequestException, match=r"jobs\[3\].*of its own, got") as caught:
        client.enqueue_many(jobs)
    assert jobs[1].job_id in str(caught.value)
    assert redis.keys() == []


def test_ids_of_other_requests_are_refused(redis: Redis, client: Client) -> None:
    """Ids that are known of other requests are all named, and no job at all is sent."""
    jobs = jobs_of(2 * AT_ONCE)
    taken = [jobs[700].job_id, jobs[900].job_id]
    for job_id in taken:
        client.enqueue("bob", [], job_id=job_id)
    with pytest.raises(JobIdReusedException, match=r"1 more.*job id of its own") as caught:
        client.enqueue_many(jobs)
    details = caught.value.details
    assert (details["total"], details["job_id"], details["others"]) == (2, taken[0], taken[1:])
    assert details["first_digest"] == request_digest(GRANT_ACCESS, "bob", [])
    assert details["digest"] == request_digest(GRANT_ACCESS, "user-700", [ID])
    assert account(caught.value) == ([], [], ids_of(jobs))
    assert queued(redis) == taken


@pytest.mark.parametrize("taken", [100, 700], ids=["in this batch", "in the next"])
def test_an_id_taken_meanwhile_is_refused(
    redis: Redis, server: LocalStack, relay: Relay, behind: Client, taken: int
) -> None:
    """An id that another request takes during the call is refused, with all of its batch."""
    jobs = jobs_of(3 * AT_ONCE)
    direct = InterviewAccessClient(server.broker_url)
    with relay.gate(EXEC) as gate:
        calling = Background(lambda: behind.enqueue_many(jobs))
        gate.until_reached()
        direct.enqueue("bob", [], job_id=jobs[taken].job_id)
    direct.close()
    with pytest.raises(JobIdReusedException) as caught:
        calling.result()
    assert caught.value.details["job_id"] == jobs[taken].job_id
    ids, sent = ids_of(jobs), taken // AT_ONCE * AT_ONCE
    assert account(caught.value) == (ids[:sent], [], ids[sent:])
    assert sorted(queued(redis)) == sorted([*ids[:sent], ids[taken]])


def test_calls_that_race_for_ids_share_none(redis: Redis, server: LocalStack) -> None:
    """Of calls that race for the same ids, one has each; the others raise."""
    client = InterviewAccessClient(server.broker_url)
    ids = [str(uuid4()) for _ in range(2 * AT_ONCE)]

    def send(user: str) -> list[str]:
        # Half of them go the other way round, so that batches cross.
        in_order = ids if user < "c" else ids[::-1]
        try:
            return client.enqueue_many(GrantJob(user, [ID], job_id) for job_id in in_order)
        except JobIdReusedException as error:
            return list(error.details["sent"])

    told = all_at_once([lambda user=user: send(user) for user in "abcd"])  # type: ignore[misc] # user
    client.close()
    owners = {
        user: {m["headers"]["id"] for m in messages(redis) if user_of(m) == user} for user in "abcd"
    }
    assert [owners[user] for user in "abcd"] == [set(one) for one in told]
    assert sum(map(len, told)) == len(set().union(*owners.values())) == redis.llen(QUEUE) > 0


# --- What cannot be sent ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "kind", "says"),
    [
        (GrantJob("ann", [], job_id=""), ValueError, r"jobs\[700\]: job id: expected 1 to 255"),
        (GrantJob("ann", [], countdown=float("nan")), ValueError, "countdown: .* got the number"),
        (GrantJob("ann", [], expires="soon"), ValueError, "expires: .* got the string 'soon'"),  # type: ignore[arg-type] # a wrong one
        (
            GrantJob("ann", [ID, object()]),  # type: ignore[list-item] # a wrong one
            InvalidGrantRequestException,
            r"jobs\[700\]: .*interview_ids\[1\]: expected a UUID",
        ),
        (GrantJob({1}, []), InvalidGrantRequestException, "user_id: expected"),  # type: ignore[arg-type] # a wrong one
        (("ann", [ID]), InvalidGrantRequestException, r"jobs\[700\]: .*expected a GrantJob, got"),
    ],
    ids=["job id", "countdown", "expires", "interview id", "user", "no job"],
)
def test_a_fault_is_told_by_its_position(
    redis: Redis, client: Client, job: GrantJob, kind: type[Exception], says: str
) -> None:
    """A job that cannot be sent is told with its position and its fault, and none is sent."""
    with pytest.raises(kind, match=says) as caught:
        client.enqueue_many([*jobs_of(700), job, *jobs_of(1)])
    assert "jobs[700]: " in str(caught.value)
    assert redis.keys() == []


# --- Where Redis fails --------------------------------------------------------------------------


def test_a_redis_that_goes_away_on_the_way(
    redis: Redis, server: LocalStack, relay: Relay, address: Path, behind: Client
) -> None:
    """What was sent, may have been and was not is told, and a second call sends the rest."""
    jobs = jobs_of(3 * AT_ONCE)
    ids = ids_of(jobs)
    with second_batch(relay, lambda: behind.enqueue_many(jobs)) as calling:
        address.unlink()
        relay.cut()
    says = "1,500 jobs 500 were sent, 500 might have been sent"
    with pytest.raises(QueueUnavailableError, match=says) as caught:
        calling.result()
    sent, perhaps, not_sent = account(caught.value)
    assert (sent, perhaps, not_sent) == (ids[:AT_ONCE], ids[AT_ONCE:-AT_ONCE], ids[-AT_ONCE:])
    assert queued(redis) == sent
    direct = InterviewAccessClient(server.broker_url)
    left = {*perhaps, *not_sent}
    assert direct.enqueue_many(job for job in jobs if job.job_id in left) == ids[AT_ONCE:]
    direct.close()
    assert queued(redis) == ids


@pytest.mark.parametrize("answered", [False, True], ids=["asked", "done"])
def test_a_connection_that_is_lost_on_the_way(
    redis: Redis, relay: Relay, behind: Client, answered: bool
) -> None:
    """Lost before Redis was asked or with its answer, the call goes on: each job is sent once."""
    jobs = jobs_of(3 * AT_ONCE)
    with second_batch(relay, lambda: behind.enqueue_many(jobs), answered=answered) as calling:
        until(lambda: redis.llen(QUEUE) == (2 if answered else 1) * AT_ONCE)
        relay.cut()
    assert calling.result() == ids_of(jobs) == queued(redis)


def test_a_refusal_after_a_lost_connection(redis: Redis, relay: Relay, behind: Client) -> None:
    """A batch whose first try was lost may have been sent, even if the second was refused."""
    jobs = jobs_of(3 * AT_ONCE)
    ids = ids_of(jobs)
    try:
        with second_batch(relay, lambda: behind.enqueue_many(jobs)) as calling:
            redis.config_set("maxmemory", 1)
            relay.cut()
        with pytest.raises(QueueUnavailableError) as caught:
            calling.result()
    finally:
        redis.config_set("maxmemory", 0)
    assert account(caught.value) == (ids[:AT_ONCE], ids[AT_ONCE:-AT_ONCE], ids[-AT_ONCE:])


@pytest.mark.parametrize("job_id", [None, "chosen"])
def test_a_single_job_whose_answer_is_lost(
    redis: Redis, relay: Relay, behind: Client, job_id: str | None
) -> None:
    """It is the same for one job: where only the answer was lost, it is not sent twice."""
    with relay.gate(EXEC, answered=True) as gate:
        calling = Background(lambda: behind.enqueue("ann", [ID], job_id=job_id))
        gate.until_reached()
        until(lambda: redis.llen(QUEUE) == 1)
        relay.cut()
    assert [calling.result()] == queued(redis)


def test_a_redis_that_is_full(redis: Redis, client: Client) -> None:
    """A full Redis takes none, and the account says so; with room again, the same call serves."""
    jobs = jobs_of(2 * AT_ONCE)
    redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(QueueUnavailableError, match="maxmemory") as caught:
            client.enqueue_many(jobs)
    finally:
        redis.config_set("maxmemory", 0)
    assert account(caught.value) == ([], [], ids_of(jobs))
    assert redis.keys() == []
    assert client.enqueue_many(jobs) == ids_of(jobs) == queued(redis)


def test_a_redis_that_becomes_full_on_the_way(redis: Redis, relay: Relay, behind: Client) -> None:
    """A batch that Redis refuses was not sent, and the account says so for certain."""
    jobs = jobs_of(3 * AT_ONCE)
    ids = ids_of(jobs)
    try:
        with second_batch(relay, lambda: behind.enqueue_many(jobs)) as calling:
            redis.config_set("maxmemory", 1)
        with pytest.raises(QueueUnavailableError, match="maxmemory") as caught:
            calling.result()
    finally:
        redis.config_set("maxmemory", 0)
    assert account(caught.value) == (ids[:AT_ONCE], [], ids[AT_ONCE:])
    assert queued(redis) == ids[:AT_ONCE]
