"""What both clients put into Redis, refuse to put there, and take away again."""

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
    CONTROL_QUEUE,
    GRANT_ACCESS,
    GRANT_COHORT_ACCESS,
    QUEUE,
    announcement_key,
    request_digest,
)
from interview_access.errors import (
    InvalidGrantRequestException,
    JobIdReusedException,
    NoAnswerInTimeError,
)
from interview_access.producer import InterviewAccessClient
from redis import Redis

from devstack.servers import LocalStack
from tests.support.clients import CLIENTS, Client
from tests.support.database import database
from tests.support.stores import Background, all_at_once
from tests.support.workers import Site, site

ID = "89d96f4b-c19d-4e69-8eae-e818f3123b09"
OTHER_ID = "a1b2c3d4-e5f6-4a8b-9c0d-e1f2a3b4c5d6"
MONTH = 30 * 86_400


@pytest.fixture(scope="module")
def _alone(stack: LocalStack, _migrated: str) -> Iterator[Site]:
    with (
        database(stack.database_url, template=_migrated) as url,
        site(stack, url, 7) as idle,
    ):
        yield idle


@pytest.fixture
def idle(_alone: Site) -> Site:
    """A site without a worker, and an empty Redis."""
    _alone.redis.flushdb()
    return _alone


@pytest.fixture(params=CLIENTS)
def client(idle: Site, request: pytest.FixtureRequest) -> Iterator[Client]:
    """A client of the site: the blocking one and the asyncio one in turn."""
    client = CLIENTS[request.param](idle.broker)
    yield client
    client.close()


def on_the_wire(redis: Redis) -> tuple[dict[str, Any], Any]:
    """The newest message: its envelope and its body."""
    raw: Any = redis.lindex(QUEUE, 0)
    message = json.loads(raw)
    body = message["body"]
    if message["properties"].get("body_encoding") == "base64":
        body = base64.b64decode(body)
    return message, json.loads(body)


def announced(redis: Redis, job_id: str) -> dict[str, Any]:
    """What is known of a job that was sent."""
    text: Any = redis.get(f"interview-access:job:{job_id}")
    return dict(json.loads(text))


# --- The envelope -------------------------------------------------------------------------------


def test_the_message_is_one_of_celerys(idle: Site, client: Client) -> None:
    """Body and headers are those that a Celery app sends, but for what tells of the sender."""
    at = datetime.now(UTC) + timedelta(hours=1)
    kwargs = {"user_id": "ann", "interview_ids": [ID, "no-uuid", "é"]}
    idle.producer.send_task(
        GRANT_ACCESS, kwargs=kwargs, task_id="one", queue=QUEUE, countdown=60, expires=at
    )
    theirs, their_body = on_the_wire(idle.redis)
    client.enqueue(**kwargs, job_id="one", countdown=60, expires=at)
    ours, our_body = on_the_wire(idle.redis)
    assert our_body == their_body
    assert ours.keys() == theirs.keys()
    of_the_sender = {"eta", "origin", "kwargsrepr", "delivery_tag"}
    for part in ("headers", "properties"):
        assert ours[part].keys() <= theirs[part].keys()
        for name in ours[part].keys() - of_the_sender:
            assert ours[part][name] == theirs[part][name], name
    assert ours["headers"].keys() >= {"lang", "task", "id", "root_id", "parent_id", "group"}
    etas = [datetime.fromisoformat(one["headers"]["eta"]) for one in (ours, theirs)]
    assert abs(etas[0] - etas[1]) < timedelta(seconds=20)


def test_a_cohorts_message_names_all_users(idle: Site, client: Client) -> None:
    """It is announced with its task and its digest, and its id is refused to another cohort."""
    users = (user for user in ("ann", UUID(ID)))
    job_id = client.enqueue_cohort(users, {OTHER_ID}, job_id="cohort")
    message, (args, kwargs, _) = on_the_wire(idle.redis)
    assert (args, kwargs) == ([], {"user_ids": ["ann", ID], "interview_ids": [OTHER_ID]})
    assert message["headers"]["task"] == GRANT_COHORT_ACCESS
    raw: Any = idle.redis.get(announcement_key(job_id))
    announced = json.loads(raw)
    assert announced["task"] == GRANT_COHORT_ACCESS
    assert announced["digest"] == request_digest(GRANT_COHORT_ACCESS, ["ann", ID], [OTHER_ID])
    assert client.enqueue_cohort([ID, "ann", "ann"], [OTHER_ID], job_id="cohort") == "cohort"
    with pytest.raises(JobIdReusedException):
        client.enqueue_cohort(["ann"], [OTHER_ID], job_id="cohort")
    with pytest.raises(InvalidGrantRequestException, match="user_ids"):
        client.enqueue_cohort([b"ann"], [OTHER_ID])


def test_celery_reads_the_message_as_its_own(idle: Site, client: Client) -> None:
    """Celery's own worker code finds the task, its arguments and its times in the message."""
    job_id = client.enqueue("ann", [ID], countdown=60, expires=3600)
    app = Celery(broker=idle.broker, set_as_current=False)

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


def test_people_see_a_short_line(idle: Site, client: Client) -> None:
    """The arguments as events and logs show them do not hold the ids."""
    client.enqueue("ann", ["i"] * 5_000)
    message, _ = on_the_wire(idle.redis)
    assert message["headers"]["argsrepr"] == "()"
    assert message["headers"]["kwargsrepr"] == "user_id='ann', interview_ids=<a list of 5,000>"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("job_id", "", "job id: expected 1 to 255 printable characters, got the string ''"),
        ("job_id", "a\nb", r"job id: .* got the string 'a\\nb'"),
        ("job_id", "j" * 256, "job id: .* got a string of 256 characters"),
        ("job_id", 7, "job id: .* got the number 7"),
        ("countdown", "5", "countdown: expected a number of seconds, got the string '5'"),
        ("countdown", float("nan"), "countdown: .* got the number nan"),
        ("countdown", float("inf"), "countdown: .* got the number inf"),
        ("countdown", 1e300, r"countdown: .* got the number 1e\+300"),
        ("countdown", True, "countdown: .* got true"),
        ("countdown", datetime.now(UTC), "countdown: .* got a datetime"),
        ("countdown", Decimal(1), "countdown: .* got a Decimal"),
        ("expires", "soon", "expires: expected a number of seconds.*, got the string 'soon'"),
        ("expires", float("-inf"), "expires: .* got the number -inf"),
        ("expires", timedelta(1), "expires: .* got a timedelta"),
        ("expires", False, "expires: .* got false"),
    ],
)
def test_a_bad_option_is_named(
    idle: Site, client: Client, name: str, value: object, says: str
) -> None:
    """An option that is none is a ValueError that says what was expected and what came."""
    with pytest.raises(ValueError, match=says):
        client.enqueue("ann", [], **{name: value})
    assert idle.redis.keys() == []


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
def test_what_json_has_no_word_for_is_not_sent(
    idle: Site, client: Client, user_id: object, ids: object
) -> None:
    """An argument that cannot be written as JSON fails at once, as the worker would have it."""
    with pytest.raises(InvalidGrantRequestException, match=r"cannot be read: .*: expected"):
        client.enqueue(user_id, ids)
    assert idle.redis.keys() == []


@pytest.mark.parametrize("ids", [{ID}, iter([ID]), (ID,), [UUID(ID)], {ID: 1}.keys()])
def test_ids_may_be_any_iterable(idle: Site, client: Client, ids: Any) -> None:
    """Sets, generators and tuples of ids are sent as lists."""
    client.enqueue("ann", ids if not hasattr(ids, "__next__") else iter([ID]))
    assert on_the_wire(idle.redis)[1][1] == {"user_id": "ann", "interview_ids": [ID]}


# --- The announcement ---------------------------------------------------------------------------


@pytest.mark.parametrize("job_id", [None, "chosen"])
def test_a_job_is_announced_with_its_message(
    idle: Site, client: Client, job_id: str | None
) -> None:
    """What makes the id known and the message itself are written in one transaction."""
    with idle.redis.monitor() as monitor:  # type: ignore[no-untyped-call] # redis-py's
        told = client.enqueue("ann", [ID], job_id=job_id)
        idle.redis.echo("over")
        said: list[str] = []
        for one in monitor.listen():
            said.append(str(one["command"])[:80])
            if "over" in said[-1]:
                break
    at = said.index("MULTI")
    assert said[at + 1].startswith(f"SET interview-access:job:{told} ")
    assert said[at + 2].startswith(f"LPUSH {QUEUE} ")
    assert said[at + 3] == "EXEC"


def test_an_announcement_tells_when_and_what(idle: Site, client: Client) -> None:
    """The announcement holds the request's digest and times, and stays for a month."""
    job_id = client.enqueue("ann", [ID], countdown=86_400, expires=90_000)
    known = announced(idle.redis, job_id)
    assert known["digest"] == request_digest(GRANT_ACCESS, "ann", [ID])
    assert known["task"] == GRANT_ACCESS
    sent, eta, end = (
        datetime.fromisoformat(known[name]) for name in ("sent_at", "eta", "expires_at")
    )
    assert (eta - sent, end - sent) == (timedelta(seconds=86_400), timedelta(seconds=90_000))
    assert abs(idle.redis.ttl(f"interview-access:job:{job_id}") - MONTH - 86_400) < 60


@pytest.mark.parametrize("countdown", [-86_400 * 40, 86_400 * 365 * 7900])
def test_any_countdown_has_an_announcement(idle: Site, client: Client, countdown: float) -> None:
    """A countdown of long ago, or of thousands of years, is sent as any other."""
    job_id = client.enqueue("ann", [ID], countdown=countdown)
    assert idle.redis.llen(QUEUE) == 1
    assert idle.redis.ttl(f"interview-access:job:{job_id}") > MONTH - 60


def test_the_same_request_is_sent_again(idle: Site, client: Client) -> None:
    """One request under one id may be sent again, in another order, spelling and repetition."""
    ids = [str(uuid4()) for _ in range(50)]
    client.enqueue("ann", ids, job_id="again", countdown=1)
    first = announced(idle.redis, "again")
    other = [one.upper() if at % 2 else one.replace("-", "") for at, one in enumerate(2 * ids)]
    random.Random(7).shuffle(other)  # noqa: S311 - an order, not a secret
    assert client.enqueue("ann", other, job_id="again") == "again"
    assert idle.redis.llen(QUEUE) == 2
    assert announced(idle.redis, "again") == first


@pytest.mark.parametrize(
    ("user_id", "ids"), [("bob", [ID]), ("ann", [OTHER_ID]), ("ann", [ID, OTHER_ID]), ("ann", [])]
)
def test_an_id_is_refused_to_another_request(
    idle: Site, client: Client, user_id: str, ids: list[str]
) -> None:
    """An id that another request has raises at once, and nothing more is queued."""
    client.enqueue("ann", [ID], job_id="taken")
    before = announced(idle.redis, "taken")
    with pytest.raises(JobIdReusedException, match="job id of its own") as caught:
        client.enqueue(user_id, ids, job_id="taken")
    assert caught.value.details == {
        "total": 1,
        "job_id": "taken",
        "first_digest": request_digest(GRANT_ACCESS, "ann", [ID]),
        "digest": request_digest(GRANT_ACCESS, user_id, ids),
    }
    assert idle.redis.llen(QUEUE) == 1
    assert announced(idle.redis, "taken") == before


def test_an_announcement_without_a_digest_refuses_nothing(idle: Site, client: Client) -> None:
    """A job that another writer announced without a digest may be sent under its id."""
    now = datetime.now(UTC).isoformat()
    foreign = json.dumps({"task": GRANT_ACCESS, "sent_at": now})
    idle.redis.set("interview-access:job:foreign", foreign)
    client.enqueue("ann", [ID], job_id="foreign")
    assert idle.redis.llen(QUEUE) == 1


def reused(attempt: Any) -> Any:
    """What the attempt returned, or that its id was refused to it."""
    try:
        return attempt()
    except JobIdReusedException as error:
        return error.details["first_digest"]


def owners(redis: Redis) -> set[str]:
    """The users of all messages in the queue."""
    raws: Any = redis.lrange(QUEUE, 0, -1)
    return {json.loads(json.loads(raw)["body"])[1]["user_id"] for raw in raws}


def test_threads_that_race_for_an_id_have_one_winner(idle: Site) -> None:
    """Of two requests that race for one id, only one is ever queued; all others raise."""
    client = InterviewAccessClient(idle.broker)
    users = ["ann", "bob"] * 4
    for turn in range(25):
        job_id = f"race-{turn}"
        told = all_at_once(
            [
                lambda user=user: reused(lambda: client.enqueue(user, [ID], job_id=job_id))  # type: ignore[misc] # noqa: B023 - called within the turn
                for user in users
            ]
        )
        (winner,) = owners(idle.redis)
        digest = request_digest(GRANT_ACCESS, winner, [ID])
        assert told == [job_id if user == winner else digest for user in users]
        assert idle.redis.llen(QUEUE) == 4
        idle.redis.delete(QUEUE)
    client.close()


def test_tasks_that_race_for_an_id_have_one_winner(idle: Site) -> None:
    """On one event loop it is the same."""
    users = ["ann", "bob"] * 4

    async def race() -> list[Any]:
        client = AsyncInterviewAccessClient(idle.broker)
        calls = (client.enqueue(user, [ID], job_id="race") for user in users)
        told = await asyncio.gather(*calls, return_exceptions=True)
        await client.close()
        return told

    told = asyncio.run(race())
    (winner,) = owners(idle.redis)
    assert [one == "race" for one in told] == [user == winner for user in users]
    assert {type(one) for one in told} == {str, JobIdReusedException}
    assert idle.redis.llen(QUEUE) == 4


# --- Questions to workers that are not there ----------------------------------------------------


@pytest.mark.parametrize("question", ["status", "cancel"])
def test_a_question_that_nobody_answers_is_taken_back(
    idle: Site, client: Client, question: str
) -> None:
    """Without a worker the question ends at its deadline, and nothing of it stays in Redis."""
    before = datetime.now(UTC)
    with pytest.raises(NoAnswerInTimeError, match=r"replied about job one within 0\.3 s"):
        getattr(client, question)("one", timeout=0.3)
    assert timedelta(seconds=0.3) <= datetime.now(UTC) - before < timedelta(seconds=3)
    assert idle.redis.keys() == []


def test_a_cancellation_that_was_heard_is_told(idle: Site, client: Client) -> None:
    """A worker that said once that the job still runs, and no more, is believed."""

    def answer_once() -> None:
        taken: Any = idle.redis.brpop([CONTROL_QUEUE], timeout=30)
        reply_to = json.loads(taken[1])["properties"]["reply_to"]
        known = {"job_id": "one", "state": "running", "cancel_requested": True}
        idle.redis.set(reply_to, json.dumps({"status": "SUCCESS", "result": known}))

    answering = Background(answer_once)
    known = client.cancel("one", timeout=0.8)
    answering.result()
    assert (known.state, known.cancel_requested) == ("running", True)
    assert idle.redis.llen(CONTROL_QUEUE) == 0


def test_a_question_waits_on_the_control_queue(idle: Site, client: Client) -> None:
    """A question is a message of its own task, and expires with its deadline."""
    with idle.redis.monitor() as monitor:  # type: ignore[no-untyped-call] # redis-py's
        with pytest.raises(NoAnswerInTimeError):
            client.status("one", timeout=0)
        commands = (str(one["command"]) for one in monitor.listen())
        pushed = next(one for one in commands if one.startswith("LPUSH"))
    assert pushed.startswith(f"LPUSH {CONTROL_QUEUE} ")
    assert '"task": "interview_access.job_status"' in pushed
    assert '"expires": "' in pushed


def test_a_wait_without_any_trace_has_an_end(idle: Site, client: Client) -> None:
    """A wait for a job that nobody knows asks the workers, ends in time and leaves nothing."""
    before = datetime.now(UTC)
    with pytest.raises(NoAnswerInTimeError, match="nothing is stored of it"):
        client.wait("nobody", timeout=0.3)
    assert datetime.now(UTC) - before < timedelta(seconds=3)
    assert idle.redis.keys() == []


# --- Where Redis is -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("sentinel://:s3cret@host:26379", "got 'sentinel:.*@host:26379', expected a master_name"),
        ("amqp://guest:s3cret@host//", r"got 'amqp://guest:\*\*\*@.*expected redis://"),
        ("localhost:6379/s3cret", "got no URL, expected redis://"),
        ("redis://:s3cret/@host:6379/0", "got 'redis://.*@host:6379/0'.*percent-encoded"),
        ("redis://:s3cret#s3cret@host", "percent-encoded .*%23 for #"),
        ("redis://:s3cret@host:port/0", "expected a host and a port"),
        ("redis://:s3cret@host:6379/one", "expected a database number"),
        ("redis://:s3cret@host:99999/0", "expected a host and a port"),
        ("redis://:s3cret@host:6379/0?virtual_host=s3cret", "expected a database number"),
        ("redis://:s3cret@host:6379/0?no_such_option=s3cret", "expected no options but db"),
        ("rediss://:s3cret@host:6379/0?ssl_cert_reqs=s3cret", "required, optional or none"),
        ("redis+socket://:s3cret@/run/redis.sock?virtual_host=x", "redis.socket:///PATH"),
    ],
)
@pytest.mark.parametrize("kind", CLIENTS)
def test_a_url_that_names_no_redis_is_refused(kind: str, url: str, says: str) -> None:
    """The ValueError names the argument and what was expected, and shows no password."""
    for name, arguments in (("broker_url", (url,)), ("result_backend", ("redis://host", url))):
        with pytest.raises(ValueError, match=says) as caught:
            CLIENTS[kind](*arguments)
        assert str(caught.value).startswith(f"{name}: got ")
        assert "s3cret" not in str(caught.value)
        assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("redis://", {"db": 0}),
        ("redis://host", {"host": "host", "db": 0}),
        ("redis://host:1234//", {"host": "host", "port": 1234, "db": 0}),
        ("redis://:pa%2Fss@host/1", {"password": "pa/ss", "host": "host", "db": 1}),
        ("redis://ann:pass@host/1", {"username": "ann", "password": "pass"}),
        ("redis://host/1?virtual_host=/3", {"db": 3}),
        ("rediss://host/1?ssl_cert_reqs=CERT_NONE", {"ssl_cert_reqs": "none", "db": 1}),
        ("rediss://host?ssl_cert_reqs=required", {"ssl_cert_reqs": "required"}),
        ("rediss://host", {"ssl_cert_reqs": "required", "port": 6379}),
        ("redis+socket:///run/r.sock?virtual_host=3", {"path": "/run/r.sock", "db": 3}),
        ("redis+socket://:pass@/run/r.sock", {"path": "/run/r.sock", "password": "pass"}),
    ],
)
def test_a_url_is_read_as_celery_reads_it(url: str, wanted: dict[str, object]) -> None:
    """Both clients connect where the URL says, in each of Celery's spellings."""
    clients = (InterviewAccessClient(url), AsyncInterviewAccessClient(url))
    for pool in (client._queue.connection_pool for client in clients):
        found = {name: pool.connection_kwargs.get(name) for name in wanted}
        assert found | {"db": found.get("db")} == wanted | {"db": found.get("db")}
        if "db" in wanted:
            assert found["db"] == wanted["db"]
        assert ("SSL" in pool.connection_class.__name__) == url.startswith("rediss")


@pytest.mark.parametrize("job_id", ["", "x" * 256, "\ud800", UUID(int=1)])
@pytest.mark.parametrize("call", ["wait", "status", "cancel"])
def test_an_id_that_is_none_is_named(client: Client, call: str, job_id: Any) -> None:
    """What can be no job's id is refused before anybody is asked."""
    with pytest.raises(ValueError, match="job id: expected 1 to 255 printable characters"):
        getattr(client, call)(job_id, timeout=5)


def test_progress_of_another_kind_is_passed_over(idle: Site, client: Client) -> None:
    """A wait goes on where a job's progress is in words that the contract does not know."""
    meta = {"status": "PROGRESS", "result": {"current": 1, "total": 2}}
    idle.redis.set("celery-task-meta-odd", json.dumps(meta))
    with pytest.raises(NoAnswerInTimeError, match="its state is PROGRESS"):
        client.wait("odd", timeout=0.05, on_progress=print)


def test_results_may_stand_on_another_server(idle: Site, stack: LocalStack) -> None:
    """The result is read where the result backend's URL says."""
    elsewhere = f"{stack.broker_url}?virtual_host=8"
    path = stack.broker_url.removeprefix("redis+socket://")
    for make in CLIENTS.values():
        client = make(idle.broker, elsewhere)
        with Redis(unix_socket_path=path, db=8) as redis:
            redis.set("celery-task-meta-far", '{"status": "SUCCESS", "result": {"success": true}}')
            assert client.wait("far", timeout=5) == {"success": True}
            redis.flushdb()
        client.close()


def test_the_environment_names_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without arguments the URLs come from the environment, and their absence is told."""
    for make in CLIENTS.values():
        monkeypatch.delenv("CELERY_BROKER_URL", raising=False)
        monkeypatch.delenv("CELERY_RESULT_BACKEND", raising=False)
        with pytest.raises(ValueError, match=r"expected a URL .* in CELERY_BROKER_URL"):
            make()
        monkeypatch.setenv("CELERY_BROKER_URL", "redis://host")
        make().close()
        monkeypatch.setenv("CELERY_RESULT_BACKEND", "db+postgresql://ann:s3cret@host/db")
        with pytest.raises(ValueError, match=r"CELERY_RESULT_BACKEND: got 'db\+postgresql://"):
            make()
