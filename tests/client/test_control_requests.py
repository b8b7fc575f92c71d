"""Control requests of both clients, without a worker, and polling for an unknown job."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from interview_access.contracts import CONTROL_QUEUE, result_key
from interview_access.errors import JobFailedError, NoAnswerInTimeError
from redis import Redis

from tests.support.clients import Client
from tests.support.stores import Background, until


@pytest.mark.parametrize("call", ["status", "cancel"])
def test_a_request_without_a_reply_is_removed(redis: Redis, client: Client, call: str) -> None:
    """Without a worker the call ends at its deadline and leaves nothing in Redis."""
    before = datetime.now(UTC)
    with pytest.raises(NoAnswerInTimeError, match=r"replied about job one within 0\.3 s"):
        getattr(client, call)("one", timeout=0.3)
    assert timedelta(seconds=0.3) <= datetime.now(UTC) - before < timedelta(seconds=3)
    assert redis.keys() == []


def test_the_last_reply_to_a_cancellation_is_returned(redis: Redis, client: Client) -> None:
    """A reply that the job still runs is returned if no other reply follows."""

    def reply_once() -> None:
        taken: Any = redis.brpop([CONTROL_QUEUE], timeout=30)
        reply_to = json.loads(taken[1])["properties"]["reply_to"]
        known = {"job_id": "one", "state": "running", "cancel_requested": True}
        redis.set(reply_to, json.dumps({"status": "SUCCESS", "result": known}))

    replying = Background(reply_once)
    known = client.cancel("one", timeout=0.8)
    replying.result()
    assert (known.state, known.cancel_requested) == ("running", True)
    assert redis.llen(CONTROL_QUEUE) == 0


def test_a_request_is_a_message_on_the_control_queue(redis: Redis, client: Client) -> None:
    """A request has a task of its own, and expires at the deadline of the call."""
    with redis.monitor() as monitor:  # type: ignore[no-untyped-call] # redis-py's
        with pytest.raises(NoAnswerInTimeError):
            client.status("one", timeout=0)
        commands = (str(one["command"]) for one in monitor.listen())
        pushed = next(one for one in commands if one.startswith("LPUSH"))
    assert pushed.startswith(f"LPUSH {CONTROL_QUEUE} ")
    assert '"task": "interview_access.job_status"' in pushed
    assert '"expires": "' in pushed


def test_waiting_for_an_unknown_job_ends(redis: Redis, client: Client) -> None:
    """Waiting for an unknown job ends at its deadline and leaves nothing in Redis."""
    before = datetime.now(UTC)
    with pytest.raises(NoAnswerInTimeError, match="nothing is stored of it"):
        client.wait("nobody", timeout=0.3)
    assert datetime.now(UTC) - before < timedelta(seconds=3)
    assert redis.keys() == []


@pytest.mark.parametrize("job_id", ["", "x" * 256, "\ud800", UUID(int=1)])
@pytest.mark.parametrize("call", ["wait", "status", "cancel"])
def test_an_invalid_job_id_raises_a_value_error(client: Client, call: str, job_id: Any) -> None:
    """An invalid job ID is refused before anything is sent."""
    with pytest.raises(ValueError, match="job ID: expected 1 to 255 printable characters"):
        getattr(client, call)(job_id, timeout=5)


def test_progress_in_an_unknown_form_is_ignored(redis: Redis, client: Client) -> None:
    """Waiting goes on if the stored progress is not in the contract's form."""
    meta = {"status": "PROGRESS", "result": {"current": 1, "total": 2}}
    redis.set(result_key("odd"), json.dumps(meta))
    with pytest.raises(NoAnswerInTimeError, match="its state is PROGRESS"):
        client.wait("odd", timeout=0.05, on_progress=print)


@pytest.mark.parametrize(
    "meta",
    [
        {"status": "SUCCESS"},
        {"status": "SUCCESS", "result": 7},
        {"status": "SUCCESS", "result": None},
        {"status": "SUCCESS", "result": [1]},
        {"status": "FAILURE"},
        {"status": "REVOKED", "result": [[]]},
    ],
    ids=str,
)
def test_a_malformed_final_state_is_a_job_failed_error(
    redis: Redis, client: Client, meta: dict[str, Any]
) -> None:
    """Waiting ends with JobFailedError if the result of a final state is malformed."""
    redis.set(result_key("odd"), json.dumps(meta))
    with pytest.raises(JobFailedError, match=r"failed|malformed"):
        client.wait("odd", timeout=5)


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"\xff\xfe",
        b"{",
        b"[" * 100_000,
        b"null",
        b"[]",
        b"7",
        b"{}",
        b'{"status": null}',
        b'{"status": []}',
        b'{"status": {}, "queue": []}',
    ],
    ids=lambda stored: repr(stored[:20]),
)
def test_a_value_that_is_not_a_state_counts_as_nothing(
    redis: Redis, client: Client, stored: bytes
) -> None:
    """Waiting goes on if the value of the result key is not a state that Celery stores."""
    redis.set(result_key("odd"), stored)
    with pytest.raises(NoAnswerInTimeError, match="nothing is stored of it"):
        client.wait("odd", timeout=0.05)


def test_progress_without_a_result_is_ignored(redis: Redis, client: Client) -> None:
    """Waiting goes on if the stored progress has no numbers."""
    redis.set(result_key("odd"), json.dumps({"status": "PROGRESS"}))
    with pytest.raises(NoAnswerInTimeError, match="its state is PROGRESS"):
        client.wait("odd", timeout=0.05, on_progress=print)


def test_a_result_is_returned_although_no_worker_replies(redis: Redis, client: Client) -> None:
    """A result that is stored while a status is awaited is returned about a second later."""

    def store_result() -> None:
        until(lambda: redis.llen(CONTROL_QUEUE) == 1)
        redis.set(result_key("one"), json.dumps({"status": "SUCCESS", "result": {"n": 1}}))

    storing = Background(store_result)
    before = time.monotonic()
    assert client.wait("one", timeout=30) == {"n": 1}
    assert time.monotonic() - before < 3
    storing.result()
