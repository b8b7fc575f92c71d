"""Jobs end to end: a stock Celery producer, a real queue, a real worker, real rows."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from interview_access.producer import InterviewAccessClient

from tests.execution.jobs import (
    CHUNK,
    INVALID_ID,
    INVALID_REQUEST,
    LIMIT,
    NO_UUID,
    ONE,
    TWO,
    UNKNOWN,
    USER,
    a_user,
    many,
    success,
)
from tests.support.commands import run_module
from tests.support.stores import until
from tests.support.workers import (
    GRANT_ACCESS,
    QUEUE,
    Site,
    events,
    held_grant,
    ledger_missing,
    worker,
)
from worker.broker.claims import DEAD
from worker.operations.pause import PauseSwitch


def test_the_platforms_request(here: Site) -> None:
    """The request of the platform's specification creates 2 grants, and 0 when repeated."""
    for created in (2, 0):
        job_id = here.send(user_id=USER, interview_ids=[ONE, TWO])
        meta = here.answer(job_id)
        assert (meta["status"], meta["result"]) == ("SUCCESS", success(created))
    assert here.store.granted(USER) == [ONE, TWO]


@pytest.mark.parametrize(
    ("ids", "created"),
    [
        ([], 0),
        ([ONE, ONE, ONE.upper(), ONE.replace("-", "")], 1),
        ([UUID(ONE), UUID(TWO)], 2),
        ([TWO, ONE], 2),
    ],
    ids=["empty", "spellings", "uuid objects", "two"],
)
@pytest.mark.parametrize("positional", [True, False])
def test_odd_requests_succeed(
    here: Site, ids: list[object], created: int, positional: bool
) -> None:
    """Order, duplicates, spellings, UUID objects and an empty list are not errors."""
    user = uuid4()
    job_id = here.send(user, ids) if positional else here.send(user_id=user, interview_ids=ids)
    assert here.answer(job_id)["result"] == success(created)
    assert len(here.store.granted(str(user))) == created


@pytest.mark.parametrize("user_id", ["x", "y" * 36, "Zoë, {\"'\\} 😀"], ids=["1", "36", "odd"])
def test_user_ids_are_not_normalized(here: Site, user_id: str) -> None:
    """A user ID may be any 1 to 36 characters, which are stored as they are."""
    assert here.answer(here.send(user_id, [ONE]))["result"] == success(1)
    assert here.store.granted(user_id) == [ONE]


def nested(depth: int) -> list[Any]:
    """Return a list nested in so many lists."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


BAD: dict[str, tuple[tuple[object, ...], dict[str, Any], str, str]] = {
    "malformed": ((USER, [ONE, NO_UUID]), {}, INVALID_ID, f"'{NO_UUID}' is not a UUID"),
    "unknown": (
        (USER, [ONE, UNKNOWN]), {}, INVALID_ID, f"'{UNKNOWN}' is not the ID of an interview"
    ),
    "odd malformed": ((USER, ["\0\ud800"]), {}, INVALID_ID, r"'\x00\ud800' is not a UUID"),
    "user of 0": (("", [ONE]), {}, INVALID_REQUEST, "user_id: expected a string of 1 to 36"),
    "user of 37": (("x" * 37, [ONE]), {}, INVALID_REQUEST, "got a string of 37 characters"),
    "user with NUL": (("a\0", [ONE]), {}, INVALID_REQUEST, r"got the string 'a\x00'"),
    "user with surrogate": (("\ud800", [ONE]), {}, INVALID_REQUEST, r"got the string '\ud800'"),
    "user null": ((None, [ONE]), {}, INVALID_REQUEST, "user_id: expected a string of 1 to 36"),
    "user number": ((7, [ONE]), {}, INVALID_REQUEST, "got the number 7"),
    "user true": ((True, [ONE]), {}, INVALID_REQUEST, "got true"),
    "user list": (([USER], [ONE]), {}, INVALID_REQUEST, "got a list of 1"),
    "nothing": ((), {}, INVALID_REQUEST, "user_id: expected a value, got nothing"),
    "missing": ((), {"user_id": USER}, INVALID_REQUEST, "interview_ids: expected a value"),
    "extra": ((USER, [ONE]), {"extra": 1}, INVALID_REQUEST, "extra: expected only user_id and"),
    "odd extra": ((USER, [ONE]), {"\ud800\0": 1}, INVALID_REQUEST, r"\ud800\x00: expected only"),
    "self": ((USER, [ONE]), {"self": 1}, INVALID_REQUEST, "self: expected only user_id and"),
    "too many": ((USER, [ONE], 3), {}, INVALID_REQUEST, "expected at most 2 in order"),
    "twice": ((USER, [ONE]), {"user_id": USER}, INVALID_REQUEST, "user_id: expected one value"),
    "ids null": ((USER, None), {}, INVALID_REQUEST, "interview_ids: expected a list of UUIDs"),
    "ids string": ((USER, ONE), {}, INVALID_REQUEST, "interview_ids: expected a list of UUIDs"),
    "ids object": ((USER, {ONE: 1}), {}, INVALID_REQUEST, "got an object of 1"),
    "element null": ((USER, [ONE, None]), {}, INVALID_REQUEST, "interview_ids[1]: expected a UUID"),
    "element number": ((USER, [7]), {}, INVALID_REQUEST, "as a string, got the number 7"),
    "element list": ((USER, [[ONE]]), {}, INVALID_REQUEST, "interview_ids[0]: expected a UUID"),
    "name with surrogate": ((USER, [ONE]), {"\ud800": 1}, INVALID_REQUEST, "expected only user_id"),
    "very deeply nested": ((USER, nested(900)), {}, INVALID_REQUEST, "got a list of 1"),
    "deeply nested": ((USER, nested(500)), {}, INVALID_REQUEST, "got a list of 1"),
    "beyond the limit": ((USER, [ONE] * (LIMIT + 1)), {}, INVALID_REQUEST, "at most 25,000 IDs"),
}  # fmt: skip


@pytest.mark.parametrize(("args", "kwargs", "kind", "words"), BAD.values(), ids=BAD)
def test_an_invalid_request_fails_with_its_reason(
    here: Site, args: tuple[object, ...], kwargs: dict[str, Any], kind: str, words: str
) -> None:
    """The result of an invalid request has the error's class, sentence and details."""
    before = here.store.rows()
    job_id = here.send(*args, **kwargs)
    meta = here.answer(job_id)
    assert meta["status"] == "FAILURE"
    assert meta["traceback"] is None
    assert meta["result"]["exc_type"] == kind
    assert meta["result"]["exc_module"] == "interview_access.errors"
    sentence, details = meta["result"]["exc_message"]
    assert words in sentence
    assert details["total"] >= 1
    assert here.store.rows() == before
    finished = here.store.storage.get_finished_job(job_id)
    assert finished
    assert finished.outcome.error
    assert finished.outcome.error["type"] == kind


@pytest.mark.parametrize(
    "spelling",
    ["{%s}", "urn:uuid:%s", " %s", "%s\n", "%s0", "\uff10%.35s"],
    ids=["braces", "urn", "space", "line", "longer", "wide digit"],
)
def test_no_other_spelling_is_a_uuid(here: Site, spelling: str) -> None:
    """Spellings that only some parsers accept are malformed, and grant nothing."""
    user, odd = a_user(), spelling % ONE
    result = here.answer(here.send(user, [odd, TWO]))["result"]
    assert result["exc_type"] == INVALID_ID
    shown = odd.replace("\n", r"\n")
    assert result["exc_message"][1]["interview_ids"] == [{"value": shown, "reason": "malformed"}]
    assert here.store.granted(user) == []


def test_every_offending_id_is_counted_and_twenty_are_named(here: Site) -> None:
    """The error has up to 20 malformed and unknown IDs with their reasons, and the totals."""
    malformed = [f"{number}" for number in range(15)]
    unknown = [str(uuid4()) for _ in range(15)]
    job_id = here.send(USER, [ONE, *unknown, *malformed, malformed[0]])
    sentence, details = here.answer(job_id)["result"]["exc_message"]
    totals = (details["total"], details["malformed_total"], details["unknown_total"])
    assert totals == (30, 15, 15)
    named = [(one["value"], one["reason"]) for one in details["interview_ids"]]
    assert named[:15] == [(one, "malformed") for one in malformed]
    assert named[15:] == [(one, "unknown") for one in unknown[:5]]
    assert "30 interview IDs cannot be granted" in sentence
    assert "; and 10 more" in sentence


def test_a_message_of_a_bare_redis_client_is_a_job(here: Site) -> None:
    """A message that any Redis client pushes is a job, with an ID of up to 255 characters."""
    job_id = here.push({"user_id": a_user(), "interview_ids": [ONE]}, job_id="j" * 255)
    assert here.answer(job_id)["result"] == success(1)


@pytest.mark.parametrize("priority", [3, 6, 9])
def test_an_idle_worker_claims_every_priority(here: Site, priority: int) -> None:
    """Jobs of priorities for which no worker blocks are found and claimed until none is left."""
    queue = f"{QUEUE}\x06\x16{priority}"
    request = {"user_id": a_user(), "interview_ids": [ONE]}
    jobs = [here.push(request, job_id=str(uuid4()), queue=queue) for _ in range(300)]
    for job_id in jobs:
        assert here.answer(job_id)["status"] == "SUCCESS"


@pytest.mark.parametrize("job_id", ["j" * 256, "a\nb"], ids=["256", "line"])
def test_an_invalid_job_id_is_a_dead_letter(here: Site, job_id: str) -> None:
    """A message whose job ID the ledger cannot store becomes a dead letter without a result."""
    here.redis.delete(DEAD)
    here.push({"user_id": USER, "interview_ids": [ONE]}, job_id=job_id)
    until(lambda: bool(here.dead_letters()))
    (letter,) = here.dead_letters()
    assert "id: expected a job ID of 1 to 255 printable characters" in letter["reason"]
    assert (letter["job_id"], letter["in_ledger"]) == ("", "0")
    assert not here.redis.exists(f"celery-task-meta-{job_id}")


def test_a_duplicate_has_the_first_result(here: Site) -> None:
    """A duplicate of a job, also with other spellings, has the first delivery's result."""
    user = a_user()
    job_id = here.send(user, [ONE, TWO])
    assert here.answer(job_id)["result"] == success(2)
    here.redis.delete(f"celery-task-meta-{job_id}")
    here.send(user, [TWO.upper(), ONE, ONE], job_id=job_id)
    assert here.answer(job_id)["result"] == success(2)


def test_a_reused_job_id_is_refused(here: Site, log: Path) -> None:
    """Another request under a used ID becomes a dead letter, a log line and an event."""
    job_id = here.send(a_user(), [ONE])
    first = here.answer(job_id)
    other = a_user()
    with events(here) as received:
        here.send(other, [TWO], job_id=job_id)
        until(lambda: any(event["type"] == "job-refused" for event in received))
    (refused,) = [event for event in received if event["type"] == "job-refused"]
    assert refused["uuid"] == job_id
    until(lambda: any(letter["job_id"] == job_id for letter in here.dead_letters()))
    (letter,) = [letter for letter in here.dead_letters() if letter["job_id"] == job_id]
    assert letter["reason"].startswith("JobIdReusedException: Send this request under a job ID of")
    assert job_id in letter["reason"]
    assert letter["attempts"] == "1"
    assert other in letter["message"]
    assert f"dead letter: job={job_id} task={GRANT_ACCESS} reason=JobIdReused" in log.read_text(
        encoding="utf-8"
    )
    assert here.meta(job_id)["result"] == first["result"]
    assert here.store.granted(other) == []


def test_the_event_of_an_expired_job(here: Site) -> None:
    """An expired job sends Celery's event of a revoked task that has expired, and its error."""
    with events(here) as received:
        job_id = str(uuid4())
        here.producer.send_task(
            GRANT_ACCESS, args=[USER, [ONE]], task_id=job_id, queue=QUEUE, expires=-1
        )
        assert here.answer(job_id)["status"] == "FAILURE"
        until(lambda: "task-revoked" in [event["type"] for event in received])
    (event,) = [one for one in received if one["type"] == "task-revoked"]
    assert (event["uuid"], event["expired"]) == (job_id, True)
    assert (event["terminated"], event["signum"]) == (False, None)
    assert event["exception"].startswith("JobExpiredException(")
    assert not [one for one in received if one["type"] in {"task-failed", "task-rejected"}]


def test_the_event_of_a_cancelled_job(here: Site) -> None:
    """A cancelled job sends Celery's event of a revoked task that has not expired."""
    switch = PauseSwitch(here.redis)
    with events(here) as received, InterviewAccessClient(here.broker) as client:
        switch.pause("a test", "")
        try:
            job_id = client.enqueue(a_user(), [ONE])
            assert client.cancel(job_id).state == "cancelled"
        finally:
            switch.resume()
        until(lambda: "task-revoked" in [event["type"] for event in received])
    (event,) = [one for one in received if one["type"] == "task-revoked"]
    assert (event["uuid"], event["expired"]) == (job_id, False)
    assert event["exception"].startswith("JobCancelledException(")


def ids_in(text: str) -> set[str]:
    """Return everything in a text that looks like a UUID."""
    return set(re.findall("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", text))


def test_a_large_job_has_short_events_and_log_lines(here: Site, log: Path) -> None:
    """Events and log lines of a job of 20,000 IDs contain its user and its count, and no ID."""
    user, ids = a_user(), many(20_000)
    before = log.stat().st_size
    with events(here) as received:
        job_id = here.send(user_id=user, interview_ids=ids)
        assert here.answer(job_id)["result"] == success(20_000)
        until(lambda: any(event["type"] == "task-succeeded" for event in received))
    (event,) = [one for one in received if one["type"] == "task-received"]
    assert (event["uuid"], event["args"]) == (job_id, "()")
    assert event["kwargs"] == f"{{'user_id': '{user}', 'interview_ids': […"
    assert not ids_in(str(received)) & set(ids)

    def written() -> str:
        return log.read_bytes()[before:].decode()

    until(lambda: f"[{job_id}] succeeded" in written())
    (line,) = [line for line in written().splitlines() if user in line]
    assert f"job settled: job={job_id} seconds=" in line
    assert "outcome=20,000 created, 0 already granted, 0 repeated" in line
    assert f"user_id='{user}', interview_ids=<a list of 20,000>" in line
    assert not ids_in(written()) & set(ids)


def test_progress_is_reported_without_partial_grants(here: Site) -> None:
    """A job that is blocked in its last chunk reports progress, and none of its rows is visible."""
    user, ids = a_user(), many(3 * CHUNK)
    with held_grant(here, user, ids[-1]):
        job_id = here.send(user, ids)
        assert here.until_state(job_id, "PROGRESS")["result"] == {"done": CHUNK, "total": 3 * CHUNK}
        assert here.store.granted(user) == []
    assert here.answer(job_id)["result"] == success(3 * CHUNK)
    assert len(here.store.granted(user)) == 3 * CHUNK


def test_an_outage_is_retried(here: Site) -> None:
    """A job that fails in an outage of the database is retried until the outage ends."""
    user = a_user()
    with ledger_missing(here):
        job_id = here.send(user, [ONE])
        assert here.until_state(job_id, "RETRY")["traceback"] is None
    assert here.answer(job_id)["result"] == success(1)


def test_an_outage_that_outlasts_the_retries(idle: Site, tmp_path: Path) -> None:
    """A job whose retries are used up is dead-lettered, and succeeds if it is sent again."""
    settings = {"GRANT_RETRY_LIMIT": 2, "GRANT_RETRY_MAX_DELAY": 1}
    with worker(idle, tmp_path / "worker.log", **settings):
        with ledger_missing(idle):
            job_id = idle.send("ann", [])
            result = idle.answer(job_id)["result"]
        assert result["exc_type"] == "StorageUnavailableException"
        assert "in all 3 attempts" in result["exc_message"][0]
        assert "42P01" in result["exc_message"][0]
        until(lambda: bool(idle.dead_letters()))
        (letter,) = idle.dead_letters()
        recorded = (letter["job_id"], letter["attempts"], letter["in_ledger"])
        assert recorded == (job_id, "3", "0")
        idle.send("ann", [], job_id=job_id)
        assert idle.until_state(job_id, "SUCCESS")["result"] == success(0)


def test_an_interview_attempt_is_created_once(here: Site) -> None:
    """Two deliveries of one message create one interview attempt and have one result."""
    task, job_id = "interview_access.create_interview_attempt", str(uuid4())
    results = []
    for _ in range(2):
        here.redis.delete(f"celery-task-meta-{job_id}")
        here.send(task=task, job_id=job_id, interview_id=ONE, user_id=USER)
        results.append(here.answer(job_id)["result"])
    (attempt,) = here.store.attempts()
    assert (attempt.interview_id, attempt.user_id) == (ONE, USER)
    assert results == [{"success": True, "interview_attempt_id": attempt.id}] * 2


@pytest.mark.parametrize(
    ("kwargs", "kind", "words"),
    [
        ({"interview_id": NO_UUID, "user_id": USER}, INVALID_ID, f"'{NO_UUID}' is not a UUID"),
        ({"interview_id": UNKNOWN, "user_id": USER}, INVALID_ID, "is not the ID of an interview"),
        (
            {"interview_id": [ONE], "user_id": USER},
            INVALID_REQUEST,
            "interview_id: expected a UUID",
        ),
        ({"interview_id": ONE, "user_id": ""}, INVALID_REQUEST, "user_id: expected a string of 1"),
        ({"interview_id": ONE}, INVALID_REQUEST, "user_id: expected a value, got nothing"),
    ],
    ids=["malformed", "unknown", "list", "user", "missing"],
)
def test_an_invalid_interview_attempt_fails_with_its_reason(
    here: Site, kwargs: dict[str, Any], kind: str, words: str
) -> None:
    """An invalid request for an interview attempt fails like one for grants, and creates none."""
    before = len(here.store.attempts())
    job_id = here.send(task="interview_access.create_interview_attempt", **kwargs)
    result = here.answer(job_id)["result"]
    assert (result["exc_type"], result["exc_module"]) == (kind, "interview_access.errors")
    assert words in result["exc_message"][0]
    assert len(here.store.attempts()) == before
    assert here.store.storage.get_finished_job(job_id)


def test_a_job_without_poller_has_no_result(here: Site) -> None:
    """A job with ``ignore_result`` stores neither a state nor a result, however long it takes."""
    user, job_id = a_user(), str(uuid4())
    with held_grant(here, user, ONE):
        sent = {"task_id": job_id, "queue": QUEUE, "ignore_result": True}
        here.producer.send_task("interview_access.grant_access", (user, [ONE]), **sent)
        polled = here.send(user, [ONE])
        here.until_state(polled, "STARTED")
    assert here.answer(polled)
    until(lambda: here.store.storage.get_finished_job(job_id) is not None)
    assert here.meta(job_id)["status"] == "PENDING"


def test_a_busy_worker_leaves_the_rest_on_the_queue(here: Site) -> None:
    """A worker claims one job for each pool process; the others stay queued for other workers."""
    user, ids = a_user(), many(100)
    with held_grant(here, user, ids[-1]):
        running = []
        for turn in range(2):
            running.append(here.send(user, ids[1 - turn :]))
            here.until_state(running[-1], "STARTED")  # otherwise both jobs might be one batch
        waiting = here.send(a_user(), [])
        (reserved,) = here.producer.control.inspect(timeout=10, limit=1).reserved().values()
        assert waiting not in {job["id"] for job in reserved}
        assert here.redis.llen("interview-access") == 1
        assert here.meta(waiting)["status"] == "PENDING"
    assert here.answer(waiting)["result"] == success(0)
    counts = [here.answer(job_id)["result"]["created_access_count"] for job_id in running]
    assert sum(counts) == len(ids)


def test_a_large_job_leaves_a_pool_process_to_small_ones(here: Site) -> None:
    """While a pool process executes a large job, small jobs overtake the next large one."""
    user, ids = a_user(), many(2 * CHUNK)
    with held_grant(here, user, ids[-1]):
        large = here.send(user, ids)
        here.until_state(large, "STARTED", "PROGRESS")
        next_large = here.send(a_user(), ids)
        small = [here.send(a_user(), ids[:2]) for _ in range(3)]
        for job_id in small:
            assert here.answer(job_id)["result"] == success(2)
        assert here.meta(next_large)["status"] == "PENDING"
    assert here.answer(large)["result"] == success(2 * CHUNK)
    assert here.answer(next_large)["result"] == success(2 * CHUNK)


def test_commands_without_effect_are_refused(here: Site) -> None:
    """Remote control refuses rate limits and time limits, which have no effect."""
    control = here.producer.control
    for reply in (
        *control.rate_limit("interview_access.grant_access", "1/s", reply=True, timeout=10),
        *control.time_limit("interview_access.grant_access", hard=5, reply=True, timeout=10),
    ):
        assert all("error" in one for one in reply.values())


def test_the_pool_has_no_time_limits(here: Site) -> None:
    """The pool, which would keep a timer for each batch, leaves time limits to the dispatcher."""
    (stats,) = here.producer.control.inspect(timeout=10, limit=1).stats().values()
    assert stats["pool"]["timeouts"] == [0, 0]


def test_a_pickled_message_is_refused(here: Site) -> None:
    """A pickled message is not decoded, and the worker continues."""
    here.producer.send_task(
        "interview_access.grant_access",
        kwargs={"user_id": USER, "interview_ids": [ONE]},
        queue="interview-access",
        serializer="pickle",
    )
    assert here.answer(here.send(a_user(), [ONE]))["result"] == success(1)


def started(here: Site, **settings: object) -> subprocess.CompletedProcess[str]:
    """Run a worker that is expected to end by itself."""
    environment = {
        name: value for name, value in here.environment(**settings).items() if value != "None"
    }
    return run_module(environment, "celery", "-A", "worker", "worker", "-c", "1")


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        (
            "DATABASE_URL",
            "mysql://me:a/secret@db/x",
            "got 'mysql://me:***@db/x', expected postgresql",
        ),
        ("CELERY_BROKER_URL", None, "CELERY_BROKER_URL: not set, expected redis://"),
        ("GRANT_CHUNK_SIZE", "0", "GRANT_CHUNK_SIZE: got '0', expected greater than or equal to 1"),
    ],
)
def test_an_invalid_setting_ends_the_worker(
    here: Site, variable: str, value: str | None, words: str
) -> None:
    """The error for an invalid setting has its name, its value without password, and the range."""
    ended = started(here, **{variable: value})
    assert ended.returncode != 0
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "secret" not in ended.stdout + ended.stderr


def test_an_unmigrated_database_ends_the_worker(here: Site, database_url: str) -> None:
    """The error for a database without tables names the command to run."""
    ended = started(here, DATABASE_URL=database_url)
    assert ended.returncode != 0
    assert "run `interview-access migrate`" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_configuration_of_a_running_worker(here: Site) -> None:
    """A running worker acknowledges late, prefetches nothing and consumes only its queue."""
    inspect = here.producer.control.inspect(timeout=10, limit=1)
    (conf,) = inspect.conf().values()
    assert conf["task_acks_late"] is True
    assert conf["worker_prefetch_multiplier"] == 1
    (queues,) = inspect.active_queues().values()
    assert [queue["name"] for queue in queues] == ["interview-access"]
