"""Dispatch and settlement of batches, with a stepped pool and the real Redis."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from celery.worker import state as worker_state
from interview_access.contracts import GRANT_ACCESS
from interview_access.errors import JobFailedError

from tests.execution.stepped_worker import PROCESSES, SteppedWorker, is_idle, lose, message
from tests.support.pools import settled
from tests.support.sessions import (
    DEFERRED,
    ISOLATED,
    ORPHANED_AFTER,
    QUEUE,
    claimed,
    end_delays,
    messages,
)
from worker.broker.claim_policy import SMALL_BYTES
from worker.broker.claims import DEAD, Action
from worker.broker.delivery import State
from worker.execution.batch import partition
from worker.execution.request import JobRequest

HOUR = timedelta(hours=1)


# --- Partition -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "processes", "batches"),
    [
        ([], 3, []),
        ([9], 3, [[9]]),
        ([9] * 3, 3, [[9], [9], [9]]),
        ([9] * 7, 3, [[9] * 3, [9] * 2, [9] * 2]),
        ([9] * 2, 1, [[9] * 2]),
        ([90, 1, 1, 1], 2, [[90], [1, 1, 1]]),
        ([1, 1, 1, 90], 2, [[1, 1, 1, 90]]),
    ],
)
def test_partition(sizes: list[int], processes: int, batches: list[list[int]]) -> None:
    """Deliveries are divided among the free pool processes in their order, by bytes."""
    shared = partition([sized(size) for size in sizes], processes)
    assert [[one.delivery.claim.size for one in batch] for batch in shared] == batches


@pytest.mark.parametrize(
    ("limits", "processes", "batches"),
    [([9, 1, 9, 9], 1, [[9] * 3, [1]]), ([1, 9, 9, 9], 2, [[1], [9], [9] * 2])],
)
def test_a_batch_has_one_time_limit(
    limits: list[float], processes: int, batches: list[list[float]]
) -> None:
    """Deliveries with different time limits are in different batches; the oldest is first."""
    shared = partition([sized(1, limit) for limit in limits], processes)
    assert [[one.time_limit for one in batch] for batch in shared] == batches


def sized(size: int, time_limit: float = 9.0) -> Any:
    """Return a request whose message has this size in bytes."""
    delivery = SimpleNamespace(claim=SimpleNamespace(size=size))
    return SimpleNamespace(time_limit=time_limit, delivery=delivery)


def test_large_jobs_of_a_claim_are_one_batch(stepped: SteppedWorker) -> None:
    """Large jobs take one pool process; the others are for small jobs."""
    stepped.send(*"abc", filling="." * SMALL_BYTES)
    stepped.pump()
    assert [work.job_ids for work in stepped.pool.works] == [[*"abc"]]
    assert stepped.dispatcher.free_processes == PROCESSES - 1


def test_a_batch_keeps_the_order_of_its_messages(stepped: SteppedWorker) -> None:
    """Jobs are divided in the order in which they were claimed."""
    stepped.send(*"abcdefg")
    stepped.pump()
    assert [work.job_ids for work in stepped.pool.works] == [[*"abc"], [*"de"], [*"fg"]]
    assert stepped.dispatcher.free_processes == 0


# --- From dispatch to settlement -----------------------------------------------------------------


def test_a_batch_is_settled_as_it_reports(stepped: SteppedWorker) -> None:
    """Each delivery is settled by its own disposition, and the pool process is free."""
    stepped.send("a", "b", "c", "d", "e")
    stepped.pool.num_processes = 1
    stepped.pump()
    (work,) = stepped.pool.works
    work.accept()
    work.complete(
        settled(Action.ACKNOWLEDGE),
        settled(Action.RETRY, delay=60),
        settled(Action.DEAD_LETTER, reason="because", in_ledger=True),
        settled(Action.DELAY, delay=60),
        settled(Action.REQUEUE),
    )
    assert stepped.redis.lrange(QUEUE, 0, -1) == [message("e").encode()]
    assert stepped.redis.hlen(DEFERRED) == 2
    ((_, letter),) = stepped.redis.xrange(DEAD)
    assert (letter[b"in_ledger"], letter[b"message"]) == (b"1", message("c").encode())
    assert stepped.freed == [1]
    stepped.pool.num_processes = PROCESSES
    assert is_idle(stepped)


def test_events_of_a_job(stepped: SteppedWorker) -> None:
    """The events of a job are received, started and those that the pool process reports."""
    stepped.send("a", root_id="r", parent_id="p", argsrepr="(…)", kwargsrepr="{…}")
    stepped.pump()
    (work,) = stepped.pool.works
    work.accept()
    work.complete(settled(Action.ACKNOWLEDGE, ("task-succeeded", {"runtime": 1.0})))
    assert stepped.events == [
        (
            "task-received",
            {
                "uuid": "a",
                "name": GRANT_ACCESS,
                "args": "(…)",
                "kwargs": "{…}",
                "root_id": "r",
                "parent_id": "p",
                "retries": 0,
                "eta": None,
                "expires": None,
            },
        ),
        ("task-started", {"uuid": "a"}),
        ("task-succeeded", {"uuid": "a", "runtime": 1.0}),
    ]


def test_the_event_of_a_dead_letter(stepped: SteppedWorker) -> None:
    """A dead-lettered job is rejected, with the reason, after the events of its end."""
    stepped.send("a")
    stepped.pump()
    stepped.pool.works[0].complete(
        settled(
            Action.DEAD_LETTER,
            ("task-failed", {"exception": "E()", "traceback": ""}),
            reason="because",
        )
    )
    assert stepped.events[1:] == [
        ("task-failed", {"uuid": "a", "exception": "E()", "traceback": ""}),
        ("task-rejected", {"uuid": "a", "requeue": False, "exception": "because"}),
    ]


@pytest.mark.parametrize("value", [{"x": 1}, "x" * 10_000, "\x1b[2J", 5])
def test_events_contain_no_arbitrary_values(stepped: SteppedWorker, value: object) -> None:
    """Events contain a message's headers only if they are short printable text."""
    stepped.send("a", root_id=value, parent_id=value)
    stepped.pump()
    ((_, fields),) = stepped.events
    assert (fields["root_id"], fields["parent_id"]) == (None, None)


def test_control_commands_find_a_running_job(stepped: SteppedWorker) -> None:
    """Celery's control commands find a request from its dispatch until its settlement."""
    stepped.send("a")
    (delivery,) = stepped.pump()
    assert worker_state.requests.keys() == {"a"}
    request: JobRequest = worker_state.requests["a"]
    assert request.delivery is delivery
    assert set(worker_state.reserved_requests) == {request}
    assert set(worker_state.active_requests) == set()
    (work,) = stepped.pool.works
    work.accept()
    assert set(worker_state.active_requests) == {request}
    assert request.info()["hostname"] == "worker@host"
    assert request.info()["worker_pid"] == work.pid
    assert request.info()["time_start"] == pytest.approx(time.time(), abs=60)
    assert worker_state.total_count == {GRANT_ACCESS: 1}
    work.complete()
    assert is_idle(stepped)


def test_an_outage_opens_the_circuit(stepped: SteppedWorker) -> None:
    """A batch that failed in an outage opens the circuit breaker."""
    stepped.send("a", "b")
    stepped.pool.num_processes = 1
    stepped.pump()
    stepped.pool.works[0].complete(
        *[settled(Action.RETRY)] * 2, outage="PostgreSQL is away", has_success=False
    )
    assert stepped.lease.policy.breaker.is_open
    stepped.lease.clock.now += 1
    stepped.lease.beat()
    stepped.pump()
    stepped.pool.works[0].complete(has_success=False)
    assert stepped.lease.policy.breaker.is_probing
    stepped.pump()
    stepped.pool.works[0].complete()
    assert not stepped.lease.policy.breaker.is_probing


# --- Deliveries that no pool process executes -----------------------------------------------------


def test_an_eta_delays_in_redis(stepped: SteppedWorker) -> None:
    """A job with a future ETA is received and delayed in Redis, without a pool process or retry."""
    eta = (datetime.now(UTC) + HOUR).isoformat()
    stepped.send("a", eta=eta)
    stepped.pump()
    assert stepped.pool.works == []
    ((kind, fields),) = stepped.events
    assert (kind, fields["uuid"], fields["eta"]) == ("task-received", "a", eta)
    assert stepped.redis.hlen(DEFERRED) == 1
    assert is_idle(stepped)
    end_delays(stepped.redis)
    stepped.lease.beat()
    (delivery,) = stepped.pump()
    assert (delivery.claim.attempts, delivery.claim.retries) == (0, 0)


def test_a_message_without_job_id_is_a_dead_letter(stepped: SteppedWorker) -> None:
    """A message without a job ID is dead-lettered without a result."""
    stepped.send(5)  # type: ignore[arg-type]
    stepped.pump()
    ((_, letter),) = stepped.redis.xrange(DEAD)
    assert (letter[b"job_id"], letter[b"task"], letter[b"in_ledger"]) == (
        b"",
        GRANT_ACCESS.encode(),
        b"0",
    )
    assert b"id: expected a job ID" in letter[b"reason"]
    assert stepped.pool.works == []
    assert is_idle(stepped)


def test_an_unreadable_message_with_job_id_gets_a_result(stepped: SteppedWorker) -> None:
    """An unreadable message with a job ID is dispatched, so that its failure is recorded."""
    stepped.send("a", task="unknown")
    stepped.pump()
    ((dispatched,),) = [work.deliveries for work in stepped.pool.works]
    assert isinstance(dispatched.failure, JobFailedError)


def test_unknown_tasks_leave_no_statistics(stepped: SteppedWorker) -> None:
    """Unknown task names are not counted in Celery's statistics, which never shrink."""
    for at in range(5):
        stepped.send(f"job {at}", task=f"unknown {at}")
        stepped.pump()
        stepped.pool.works[0].accept()
        stepped.pool.works[0].complete()
    assert not worker_state.total_count
    assert is_idle(stepped)


# --- Time limits ---------------------------------------------------------------------------------


def test_a_time_limit_ends_the_pool_process(stepped: SteppedWorker) -> None:
    """The first heartbeat after the time limit kills the pool process; an attempt is counted."""
    stepped.send("a", timelimit=[60, None])
    stepped.pump()
    (work,) = stepped.pool.works
    stepped.lease.beat(20)
    work.accept()
    stepped.lease.beat(59)
    assert stepped.pool.killed == []
    stepped.lease.beat(2)
    stepped.lease.beat(2)
    assert stepped.pool.killed == [work.pid]
    lose(stepped, "a")
    assert stepped.redis.llen(ISOLATED) == 1


def test_a_time_limit_ends_no_other_job(stepped: SteppedWorker) -> None:
    """A time limit kills no pool process of jobs with a longer limit."""
    stepped.pool.num_processes = 1
    stepped.send("short", timelimit=[1, None])
    stepped.send("long")
    stepped.pump()
    for work in stepped.pool.works:
        work.accept()
    stepped.lease.beat(30)
    assert stepped.pool.killed == [stepped.pool.running("short").pid]


def test_the_oldest_job_is_executed_first(stepped: SteppedWorker) -> None:
    """Jobs whose time limit differs from the oldest one's are requeued without an event."""
    stepped.pool.num_processes = 1
    stepped.send("old", "old too")
    stepped.send("new", "newer", timelimit=[1, None])
    stepped.pump()
    assert stepped.pool.works[0].job_ids == ["old", "old too"]
    returned: Any = stepped.redis.lrange(QUEUE, 0, -1)
    assert [json.loads(one)["headers"]["id"] for one in returned] == ["newer", "new"]
    assert stepped.kinds("new") == []
    assert {request.id for request in worker_state.reserved_requests} == {"old", "old too"}


# --- Lost batches and reports --------------------------------------------------------------------


def test_a_forgotten_batch_frees_its_pool_process(stepped: SteppedWorker) -> None:
    """Jobs of a batch that the pool forgot count an attempt, and the pool process is free."""
    stepped.send("a", "b")
    stepped.pump()
    stepped.pool.running("a").forget()
    stepped.lease.beat()
    assert stepped.dispatcher.free_processes == PROCESSES - 1
    stepped.lease.beat(ORPHANED_AFTER)
    assert claimed(stepped.redis, stepped.lease.session) == [message("b").encode()]
    assert stepped.redis.llen(ISOLATED) == 1
    stepped.pool.running("b").complete()
    assert is_idle(stepped)


def test_a_report_of_another_length_is_contained(stepped: SteppedWorker) -> None:
    """A report whose length differs from its batch settles nothing; the jobs are redelivered."""
    stepped.send("a")
    stepped.pump()
    with pytest.raises(ValueError, match="zip"):
        stepped.pool.works[0].complete(settled(), settled())
    for _ in range(2):
        stepped.lease.beat(ORPHANED_AFTER)
    assert stepped.redis.llen(ISOLATED) == 1


def test_a_late_report_has_no_effect(stepped: SteppedWorker) -> None:
    """A report after the session was closed has no effect."""
    stepped.send("a")
    (delivery,) = stepped.pump()
    stepped.lease.close()
    stepped.pool.works[0].complete()
    assert messages(stepped.redis) == {message("a").encode(): 1}
    assert delivery.state is State.DISPATCHED
    assert is_idle(stepped)
