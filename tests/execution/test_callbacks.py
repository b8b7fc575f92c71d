"""Callbacks, chains and chords of grant jobs, on a real worker."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

import pytest
from celery import chain, chord

from tests.execution.jobs import INVALID_ID, NO_UUID, ONE, TWO, a_user, success
from tests.faults.invariants import all_settled
from tests.support.stores import until
from tests.support.workers import QUEUE, Site


def test_a_callback_to_a_forbidden_queue_is_not_sent(here: Site) -> None:
    """A job with a forbidden callback succeeds, and its message becomes a dead letter."""
    nobodys = here.producer.signature("nobodys.task", queue="nobodys-queue")
    user, job_id = a_user(), str(uuid4())
    here.producer.send_task(
        "interview_access.grant_access", (user, [ONE]), task_id=job_id, queue=QUEUE, link=nobodys
    )
    assert here.answer(job_id)["result"] == success(1)
    until(lambda: job_id in {letter["job_id"] for letter in here.dead_letters()})
    (letter,) = [one for one in here.dead_letters() if one["job_id"] == job_id]
    assert "queue: expected one of GRANT_CALLBACK_QUEUES, got 'nobodys-queue'" in letter["reason"]
    assert here.answer(job_id)["result"] == success(1)
    assert not here.redis.exists("nobodys-queue")


FORBIDDEN = "interview-access:tries"
"""A key of the protocol; a list under its name would stop every worker."""


def signature(queue: str, **options: Any) -> dict[str, Any]:
    """Return a signature as messages contain it."""
    return {"task": "any.task", "args": [], "kwargs": {}, "options": {"queue": queue, **options}}


@pytest.mark.parametrize("queue", [FORBIDDEN, "celery-task-meta-x", "_kombu.binding.x", "others"])
@pytest.mark.parametrize(
    "embed",
    [
        lambda one: {"callbacks": [one]},
        lambda one: {"chain": [one]},
        lambda one: {"callbacks": [signature("platform") | {"options": {"link": [one]}}, one]},
        lambda one: {
            "callbacks": [
                {
                    "task": "celery.chain",
                    "args": [],
                    "kwargs": {"tasks": [one]},
                    "options": {},
                    "subtask_type": "chain",
                }
            ]
        },
        lambda one: {
            "callbacks": [
                {
                    "task": "celery.group",
                    "args": [],
                    "kwargs": {"tasks": [one]},
                    "options": {},
                    "subtask_type": "group",
                }
            ]
        },
    ],
    ids=["link", "chain", "second link", "chain in a link", "group in a link"],
)
def test_nested_callbacks_to_a_forbidden_queue_are_not_sent(
    here: Site, queue: str, embed: Any
) -> None:
    """A forbidden queue is detected in any signature: the job succeeds as a dead letter."""
    job_id = str(uuid4())
    here.push(
        {"user_id": a_user(), "interview_ids": [ONE]}, job_id=job_id, embed=embed(signature(queue))
    )
    assert here.answer(job_id)["result"] == success(1)
    until(lambda: job_id in {letter["job_id"] for letter in here.dead_letters()})
    (letter,) = [one for one in here.dead_letters() if one["job_id"] == job_id]
    assert "expected one of GRANT_CALLBACK_QUEUES" in letter["reason"]
    assert not here.redis.exists(queue)


@pytest.mark.parametrize("queue", [FORBIDDEN, "others"])
def test_error_callbacks_to_a_forbidden_queue_are_not_sent(here: Site, queue: str) -> None:
    """A failed job with a forbidden error callback becomes a dead letter."""
    job_id = str(uuid4())
    here.push(
        {"user_id": a_user(), "interview_ids": [NO_UUID]},
        job_id=job_id,
        embed={"errbacks": [signature(queue)]},
    )
    assert here.answer(job_id)["result"]["exc_type"] == INVALID_ID
    until(lambda: job_id in {letter["job_id"] for letter in here.dead_letters()})
    assert not here.redis.exists(queue)


@pytest.mark.parametrize("name", ["callbacks", "errbacks"])
def test_built_in_tasks_are_refused_as_callbacks(here: Site, name: str) -> None:
    """A callback to a built-in task, which Celery may run in the pool process, is not sent."""
    job_id, builtin = str(uuid4()), signature("platform") | {"task": "celery.backend_cleanup"}
    ids = [ONE] if name == "callbacks" else [NO_UUID]
    here.push({"user_id": a_user(), "interview_ids": ids}, job_id=job_id, embed={name: [builtin]})
    until(lambda: job_id in {letter["job_id"] for letter in here.dead_letters()})
    (letter,) = [one for one in here.dead_letters() if one["job_id"] == job_id]
    assert "expected a task of an application, got 'celery.backend_cleanup'" in letter["reason"]


def test_callbacks_reach_the_producers_queue(here: Site) -> None:
    """A link, a chain, an error callback and a chord's body are published to their queue."""
    here.redis.delete("platform")
    following = here.producer.signature("platform.after").set(queue="platform")

    def grant(*ids: str) -> Any:
        arguments = {"user_id": a_user(), "interview_ids": ids}
        signature = here.producer.signature("interview_access.grant_access", kwargs=arguments)
        return signature.set(queue=QUEUE, immutable=True)

    grant(ONE).apply_async(link=following)
    chain(grant(ONE), following, app=here.producer).apply_async()
    grant(NO_UUID).apply_async(link_error=following)
    chord([grant(ONE), grant(TWO)], following, app=here.producer).apply_async()
    until(lambda: here.redis.llen("platform") == 4)
    messages: Any = here.redis.lrange("platform", 0, -1)
    assert {json.loads(one)["headers"]["task"] for one in messages} == {"platform.after"}


def test_a_chain_behind_a_failed_job_fails(here: Site) -> None:
    """The last task of a chain, or the body of a chord in it, gets the failed job's error."""
    failing = here.producer.signature(
        "interview_access.grant_access", (a_user(), [NO_UUID]), queue=QUEUE, immutable=True
    )
    after = here.producer.signature("platform.after", queue="platform")
    parts = chord([after.clone(), after.clone()], after.clone(), app=here.producer)
    for following in ([after.clone(), after.clone()], [parts]):
        last = chain(failing.clone(), *following, app=here.producer).apply_async()
        result = here.answer(last.id)["result"]
        assert (result["exc_type"], result["exc_module"]) == (INVALID_ID, "interview_access.errors")


def test_a_job_behind_a_failed_one_can_still_be_executed(here: Site) -> None:
    """A failure inherited from an earlier job of the chain is replaced by the job's own result."""
    job_id = str(uuid4())
    following = here.producer.signature(
        "interview_access.grant_access", (a_user(), [ONE]), queue=QUEUE, task_id=job_id
    )
    failing = here.producer.signature("interview_access.grant_access", (a_user(), [NO_UUID]))
    chain(failing.set(queue=QUEUE), following, app=here.producer).apply_async()
    assert here.answer(job_id)["status"] == "FAILURE"
    here.send(a_user(), [ONE], job_id=job_id)
    assert here.until_state(job_id, "SUCCESS")["result"] == success(1)


def test_a_finished_job_behind_a_failed_one_is_not_failed(here: Site) -> None:
    """A job with a result in the ledger inherits no failure, also if Redis has dropped it."""
    job_id = here.send(a_user(), [ONE])
    here.answer(job_id)
    here.redis.delete(f"celery-task-meta-{job_id}")
    following = here.producer.signature(
        "interview_access.grant_access", (a_user(), [ONE]), queue=QUEUE, task_id=job_id
    )
    failing = here.producer.signature("interview_access.grant_access", (a_user(), [NO_UUID]))
    failed = chain(failing.set(queue=QUEUE), following, app=here.producer).apply_async().parent
    here.answer(failed.id)
    until(lambda: all_settled(here))
    assert here.meta(job_id)["status"] == "PENDING"


def test_a_chord_with_a_failed_part_fails(here: Site) -> None:
    """The body of a chord with a failed part fails and never runs."""
    part = here.producer.signature("interview_access.grant_access", (a_user(), [NO_UUID]))
    body = here.producer.signature("platform.after").set(queue="platform")
    failing = chord([part.set(queue=QUEUE), part.clone().set(queue=QUEUE)], body, app=here.producer)
    assert here.answer(failing.apply_async().id)["result"]["exc_type"] == "ChordError"
