"""The result backend: a poller reads the ledger's result, whatever is stored before or after."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery, states
from celery.exceptions import ChordError, TaskRevokedError
from interview_access.errors import (
    InterviewAccessError,
    InvalidInterviewIdException,
    JobFailedError,
    StorageUnavailableException,
)
from redis import Redis

from devstack.servers import LocalStack
from storage.errors import StorageError
from tasks.celery_tasks import GrantAccessTask, TaskDependencies
from tests.faults.gates import Relay
from tests.support.stores import CHUNK_SIZE, Background, PostgresStore, a_job, created
from worker.broker.results import JobResults
from worker.broker.transport import celery_settings
from worker.settings import Settings

SUCCESS = {"success": True, "created_access_count": 3}
UNAVAILABLE = StorageUnavailableException.of(17, "away")
MALFORMED = InvalidInterviewIdException("No id.", {"total": 1})
GIVEN_UP = JobFailedError("It ended its worker.", {})


def results_at(url: str, **settings: object) -> JobResults:
    """Return a worker's result backend at this URL."""
    app = Celery(set_as_current=False)
    app.loader.override_backends = {"redis": "worker.broker.results:JobResults"}
    app.conf.update(result_backend=url, **settings)
    results: JobResults = app.backend
    return results


@pytest.fixture
def results(stack: LocalStack) -> JobResults:
    """A worker's result backend."""
    return results_at(stack.broker_url)


@pytest.fixture
def redis(stack: LocalStack) -> Iterator[Redis]:
    """The server that pollers read."""
    with Redis(unix_socket_path=stack.broker_url.removeprefix("redis+socket://")) as one:
        yield one


def stored(redis: Redis, job_id: str) -> tuple[str, Any]:
    """Read a job's state and result as a poller does."""
    meta: Any = redis.get(f"celery-task-meta-{job_id}")
    decoded = json.loads(meta)
    return decoded["status"], decoded["result"]


def store(results: JobResults, job_id: str, result: object) -> None:
    """Store a job's result."""
    assert isinstance(result, dict | InterviewAccessError)
    assert results.store_results({job_id: result}) == {job_id}


def test_progress_is_reported_until_a_report_fails(
    postgres: PostgresStore, caplog: pytest.LogCaptureFixture
) -> None:
    """A Redis that does not reply delays a running job once, not once for each chunk."""
    ids = postgres.add_interviews(5 * CHUNK_SIZE)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, and never replies
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        timeout = 0.6  # longer than the time between two reports
        app = results_at(url, redis_socket_timeout=timeout).app
        task = GrantAccessTask(TaskDependencies(lambda: postgres.storage, 1_000, 1, 1))
        app.register_task(task)
        (outcome,) = task.settle([a_job("a", "ann", ids)])
    assert created(outcome) == len(ids)
    assert caplog.text.count("job state is not stored") == 1


def test_late_failure_does_not_replace_a_success(
    stack: LocalStack, results: JobResults, redis: Redis
) -> None:
    """A failure is not stored if another worker stores a success between its read and its write."""
    job_id = str(uuid4())
    relay = Relay(
        Path(stack.broker_url.removeprefix("redis+socket://")),
        Path(f"/tmp/{job_id}"),  # noqa: S108 - short
    )
    try:
        late = results_at(f"redis+socket:///tmp/{job_id}")
        with relay.gate(b"EVALSHA") as gate:
            zombie = Background(lambda: store(late, job_id, UNAVAILABLE))
            gate.until_reached()
            store(results, job_id, SUCCESS)
        zombie.result()
    finally:
        relay.close()
        Path(f"/tmp/{job_id}").unlink()  # noqa: S108 - as above
    assert stored(redis, job_id) == (states.SUCCESS, SUCCESS)


@pytest.mark.parametrize(
    ("first", "second", "stored_one"),
    [
        (SUCCESS, UNAVAILABLE, 1),
        (SUCCESS, GIVEN_UP, 1),
        (MALFORMED, UNAVAILABLE, 1),
        (MALFORMED, GIVEN_UP, 1),
        (UNAVAILABLE, SUCCESS, 2),
        (UNAVAILABLE, MALFORMED, 2),
        (UNAVAILABLE, GIVEN_UP, 2),
        (GIVEN_UP, SUCCESS, 2),
    ],
)
def test_a_result_of_the_ledger_replaces_any_other(
    results: JobResults, redis: Redis, first: object, second: object, stored_one: int
) -> None:
    """A result of the ledger is kept; a failure for lack of the database is replaced."""
    job_id = str(uuid4())
    store(results, job_id, first)
    store(results, job_id, second)
    state, result = stored(redis, job_id)
    expected = first if stored_one == 1 else second
    if isinstance(expected, InterviewAccessError):
        assert (state, result["exc_type"]) == (states.FAILURE, type(expected).__name__)
    else:
        assert (state, result) == (states.SUCCESS, expected)


@pytest.mark.parametrize("state", [states.STARTED, states.RETRY, "PROGRESS"])
@pytest.mark.parametrize("final", [SUCCESS, UNAVAILABLE], ids=["success", "failure"])
def test_no_other_state_replaces_a_final_result(
    results: JobResults, redis: Redis, state: str, final: object
) -> None:
    """A redelivered job that has a final result is not reported as running."""
    job_id = str(uuid4())
    store(results, job_id, final)
    before = stored(redis, job_id)
    results.store_result(job_id, {"done": 1}, state)
    assert stored(redis, job_id) == before


@pytest.mark.parametrize(
    ("state", "result"),
    [
        (states.FAILURE, StorageError("away")),
        (states.REVOKED, TaskRevokedError("revoked")),
        (states.SUCCESS, ValueError("not a job's result")),
    ],
)
def test_celery_stores_no_final_state(
    results: JobResults, redis: Redis, state: str, result: Exception
) -> None:
    """A final state that Celery itself stores for a job is raised instead of stored."""
    job_id = str(uuid4())
    with pytest.raises(type(result)):
        results.store_result(job_id, result, state)
    assert not redis.exists(f"celery-task-meta-{job_id}")


def test_a_revocation_stores_nothing(results: JobResults, redis: Redis) -> None:
    """Celery's revoke stores no result: the ledger decides."""
    job_id = str(uuid4())
    results.mark_as_revoked(job_id, reason="revoked", store_result=True)
    assert not redis.exists(f"celery-task-meta-{job_id}")


def test_the_body_of_a_failed_chord_fails(results: JobResults, redis: Redis) -> None:
    """The error of a failed chord is stored as the result of its body, which never runs."""
    job_id = str(uuid4())
    results.store_result(job_id, ChordError("a part failed"), states.FAILURE)
    state, result = stored(redis, job_id)
    assert (state, result["exc_type"]) == (states.FAILURE, "ChordError")
    store(results, job_id, SUCCESS)
    assert stored(redis, job_id) == (states.SUCCESS, SUCCESS)


@pytest.mark.parametrize("value", [b"\xff", b"[]", b"{}", b'{"status": 1}'])
def test_an_invalid_value_is_replaced(results: JobResults, redis: Redis, value: bytes) -> None:
    """The ledger's result replaces any value under the result's key that is not a result."""
    job_id = str(uuid4())
    redis.set(f"celery-task-meta-{job_id}", value)
    store(results, job_id, SUCCESS)
    assert stored(redis, job_id) == (states.SUCCESS, SUCCESS)


def test_a_key_of_another_type_is_replaced(results: JobResults, redis: Redis) -> None:
    """The ledger's result replaces a list under the result's key."""
    job_id = str(uuid4())
    redis.lpush(f"celery-task-meta-{job_id}", "x")
    store(results, job_id, SUCCESS)
    assert stored(redis, job_id) == (states.SUCCESS, SUCCESS)


def test_a_state_that_cannot_be_stored_raises_nothing(tmp_path: Path) -> None:
    """During an outage of the results' Redis the state of a running job is dropped."""
    results_at(f"redis+socket://{tmp_path}/none").store_result(str(uuid4()), {}, states.STARTED)


@pytest.mark.parametrize("forgotten", [True, False])
def test_results_of_several_jobs_are_stored_together(
    redis: Redis, results: JobResults, forgotten: bool
) -> None:
    """Results of a batch replace earlier states, also on a server that has lost its scripts."""
    new, started = str(uuid4()), str(uuid4())
    results.store_started([started], pid=1)
    assert stored(redis, started) == ("STARTED", {"pid": 1})
    if forgotten:
        redis.script_flush()
    failure = json.loads(results.encode(results.encode_result(MALFORMED, states.FAILURE)))
    assert results.store_results({new: SUCCESS, started: MALFORMED}) == {new, started}
    assert stored(redis, new) == ("SUCCESS", SUCCESS)
    assert stored(redis, started) == ("FAILURE", failure)
    metas: list[Any] = [redis.get(f"celery-task-meta-{job_id}") for job_id in (new, started)]
    assert [json.loads(meta)["children"] for meta in metas] == [[], []]


def test_stored_results_cost_one_command(redis: Redis, results: JobResults) -> None:
    """Results that are stored already are read by one command, however many they are."""
    jobs = [str(uuid4()) for _ in range(10)]
    results.store_results(dict.fromkeys(jobs, SUCCESS))
    redis.config_resetstat()
    assert results.store_results(dict.fromkeys(jobs, SUCCESS)) == set(jobs)
    statistics: Any = redis.info("commandstats")
    assert statistics["cmdstat_evalsha"]["calls"] == statistics["cmdstat_mget"]["calls"] == 1


def test_a_result_that_is_not_final_is_replaced_in_a_batch(
    redis: Redis, results: JobResults
) -> None:
    """A result of the ledger replaces an earlier failure for lack of the database in a batch."""
    given_up, done = str(uuid4()), str(uuid4())
    results.store_results({given_up: StorageUnavailableException.of(3, "away"), done: SUCCESS})
    assert results.store_results(dict.fromkeys((given_up, done), SUCCESS)) == {given_up, done}
    assert stored(redis, given_up) == ("SUCCESS", SUCCESS)


@pytest.mark.parametrize("forgotten", [True, False])
def test_a_started_state_replaces_no_final_result(
    redis: Redis, results: JobResults, forgotten: bool
) -> None:
    """A job that has a final result by then keeps it."""
    running, done = str(uuid4()), str(uuid4())
    results.store_results({done: SUCCESS})
    if forgotten:
        redis.script_flush()
    results.store_started([running, done], pid=1)
    assert stored(redis, running) == ("STARTED", {"pid": 1})
    assert stored(redis, done) == ("SUCCESS", SUCCESS)


def test_results_that_cannot_be_stored_are_not_reported(tmp_path: Path) -> None:
    """During an outage no job is reported as stored, and nothing is raised."""
    away = results_at(f"redis+socket://{tmp_path}/none")
    assert away.store_results({str(uuid4()): SUCCESS}) == frozenset()
    away.store_started([str(uuid4())])


def test_a_result_is_kept_for_its_retention(stack: LocalStack, redis: Redis) -> None:
    """RESULT_RETENTION is the expiry of a stored result, in seconds."""
    settings = Settings(
        database_url="postgresql://me@h/x", celery_broker_url=stack.broker_url, result_retention=600
    )
    expires = celery_settings(settings)["result_expires"]
    results = results_at(stack.broker_url, result_expires=expires)
    assert results.store_results({"kept": SUCCESS}) == {"kept"}
    assert 590 < int(str(redis.ttl("celery-task-meta-kept"))) <= 600
