"""Dispatch and settlement of batches, with a stepped pool and the real Redis."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.worker import state as worker_state
from celery.worker.control import Panel
from interview_access.contracts import GRANT_ACCESS
from interview_access.errors import JobCancelledException, JobFailedError
from redis import Redis

from devstack.servers import LocalStack
from tests.support.pools import SteppedPool, settled, tasks_app
from tests.support.sessions import (
    DEFERRED,
    ISOLATED,
    KEYS,
    ORPHANED_AFTER,
    QUEUE,
    ManualClock,
    SteppedLease,
    claimed,
    connect,
    end_delays,
    messages,
)
from worker.broker.claim_policy import SMALL_BYTES
from worker.broker.claims import DEAD, PREFIX, Action
from worker.broker.delivery import Delivery, State
from worker.execution.batch import partition
from worker.execution.dispatch import Dispatcher
from worker.execution.request import JobRequest, Limits

LIMITS = Limits(interview_ids=10, attempts=3, seconds=600.0)
PROCESSES = 3
HOUR = timedelta(hours=1)


@pytest.fixture(scope="module")
def app() -> Celery:
    """An app with the contract's tasks."""
    return tasks_app()


@pytest.fixture
def redis(stack: LocalStack) -> Iterator[Any]:
    """An empty Redis database."""
    with connect(stack) as client:
        client.flushdb()
        yield client


class Site(SimpleNamespace):
    """A worker's main process without an event loop."""

    redis: Any
    lease: SteppedLease
    pool: SteppedPool
    dispatcher: Dispatcher
    events: list[tuple[str, dict[str, Any]]]
    freed: list[int]

    def send(self, *job_ids: str, **headers: Any) -> None:
        """Publish messages."""
        for job_id in job_ids:
            self.redis.lpush(QUEUE, message(job_id, **headers))

    def pump(self) -> list[Delivery]:
        """Claim and dispatch once."""
        deliveries = self.lease.claim(KEYS, 1, PROCESSES)
        assert deliveries is not None
        self.dispatcher.dispatch(deliveries)
        return deliveries

    def kinds(self, job_id: str) -> list[str]:
        """Return the types of a job's events."""
        return [kind for kind, fields in self.events if fields["uuid"] == job_id]


def message(job_id: object, **headers: Any) -> str:
    """Return a message in Celery's protocol."""
    return json.dumps(
        {
            "body": json.dumps([[], {}, {}]),
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": {"id": job_id, "task": GRANT_ACCESS, **headers},
            "properties": {},
        }
    )


@pytest.fixture
def site(redis: Redis, stack: LocalStack, app: Celery) -> Iterator[Site]:
    """A worker with three free pool processes."""
    assert redis.dbsize() == 0
    clock = ManualClock()
    lease, pool = SteppedLease(clock, batch_size=10), SteppedPool(PROCESSES)
    dispatcher = Dispatcher(app, pool, "worker@host", lease, LIMITS, clock=clock)
    lease.on_heartbeat = dispatcher.on_heartbeat
    events: list[tuple[str, dict[str, Any]]] = []
    freed: list[int] = []
    dispatcher.send_event = lambda kind, **fields: events.append((kind, fields))
    dispatcher.on_free = lambda: freed.append(dispatcher.free_processes)
    with connect(stack) as client:
        lease.open(client)
        yield Site(
            redis=redis, lease=lease, pool=pool, dispatcher=dispatcher, events=events, freed=freed
        )
        lease.close()
    worker_state.reset_state()


def is_idle(site: Site) -> bool:
    """Whether no state is left of any delivery."""
    return (
        site.lease.tags == set()
        and site.dispatcher.free_processes == PROCESSES
        and not worker_state.requests
        and not worker_state.reserved_requests
        and not worker_state.active_requests
    )


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


def test_large_jobs_of_a_claim_are_one_batch(site: Site) -> None:
    """Large jobs take one pool process; the others are for small jobs."""
    site.send(*"abc", filling="." * SMALL_BYTES)
    site.pump()
    assert [work.job_ids for work in site.pool.works] == [[*"abc"]]
    assert site.dispatcher.free_processes == PROCESSES - 1


def test_a_batch_keeps_the_order_of_its_messages(site: Site) -> None:
    """Jobs are divided in the order in which they were claimed."""
    site.send(*"abcdefg")
    site.pump()
    assert [work.job_ids for work in site.pool.works] == [[*"abc"], [*"de"], [*"fg"]]
    assert site.dispatcher.free_processes == 0


# --- From dispatch to settlement -----------------------------------------------------------------


def test_a_batch_is_settled_as_it_reports(site: Site) -> None:
    """Each delivery is settled by its own disposition, and the pool process is free."""
    site.send("a", "b", "c", "d", "e")
    site.pool.num_processes = 1
    site.pump()
    (work,) = site.pool.works
    work.accept()
    work.complete(
        settled(Action.ACKNOWLEDGE),
        settled(Action.RETRY, delay=60),
        settled(Action.DEAD_LETTER, reason="because", in_ledger=True),
        settled(Action.DELAY, delay=60),
        settled(Action.REQUEUE),
    )
    assert site.redis.lrange(QUEUE, 0, -1) == [message("e").encode()]
    assert site.redis.hlen(DEFERRED) == 2
    ((_, letter),) = site.redis.xrange(DEAD)
    assert (letter[b"in_ledger"], letter[b"message"]) == (b"1", message("c").encode())
    assert site.freed == [1]
    site.pool.num_processes = PROCESSES
    assert is_idle(site)


def test_events_of_a_job(site: Site) -> None:
    """The events of a job are received, started and those that the pool process reports."""
    site.send("a", root_id="r", parent_id="p", argsrepr="(…)", kwargsrepr="{…}")
    site.pump()
    (work,) = site.pool.works
    work.accept()
    work.complete(settled(Action.ACKNOWLEDGE, ("task-succeeded", {"runtime": 1.0})))
    assert site.events == [
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


@pytest.mark.parametrize("value", [{"x": 1}, "x" * 10_000, "\x1b[2J", 5])
def test_events_contain_no_arbitrary_values(site: Site, value: object) -> None:
    """Events contain a message's headers only if they are short printable text."""
    site.send("a", root_id=value, parent_id=value)
    site.pump()
    ((_, fields),) = site.events
    assert (fields["root_id"], fields["parent_id"]) == (None, None)


def test_control_commands_find_a_running_job(site: Site) -> None:
    """Celery's control commands find a request from its dispatch until its settlement."""
    site.send("a")
    (delivery,) = site.pump()
    assert worker_state.requests.keys() == {"a"}
    request: JobRequest = worker_state.requests["a"]
    assert request.delivery is delivery
    assert set(worker_state.reserved_requests) == {request}
    assert set(worker_state.active_requests) == set()
    (work,) = site.pool.works
    work.accept()
    assert set(worker_state.active_requests) == {request}
    assert request.info()["hostname"] == "worker@host"
    assert request.info()["worker_pid"] == work.pid
    assert request.info()["time_start"] == pytest.approx(time.time(), abs=60)
    assert worker_state.total_count == {GRANT_ACCESS: 1}
    work.complete()
    assert is_idle(site)


def test_an_outage_opens_the_circuit(site: Site) -> None:
    """A batch that failed in an outage opens the circuit breaker."""
    site.send("a", "b")
    site.pool.num_processes = 1
    site.pump()
    site.pool.works[0].complete(
        *[settled(Action.RETRY)] * 2, outage="PostgreSQL is away", has_success=False
    )
    assert site.lease.policy.breaker.is_open
    site.lease.clock.now += 1
    site.lease.beat()
    site.pump()
    site.pool.works[0].complete(has_success=False)
    assert site.lease.policy.breaker.is_probing
    site.pump()
    site.pool.works[0].complete()
    assert not site.lease.policy.breaker.is_probing


# --- What no pool process executes ---------------------------------------------------------------


def test_an_eta_delays_in_redis(site: Site) -> None:
    """A job with a future ETA is delayed in Redis without a pool process or a retry."""
    site.send("a", eta=(datetime.now(UTC) + HOUR).isoformat())
    site.pump()
    assert site.pool.works == []
    assert site.events == []
    assert site.redis.hlen(DEFERRED) == 1
    assert is_idle(site)
    end_delays(site.redis)
    site.lease.beat()
    (delivery,) = site.pump()
    assert (delivery.claim.attempts, delivery.claim.retries) == (0, 0)


def test_a_message_without_job_id_is_a_dead_letter(site: Site) -> None:
    """A message without a job ID is dead-lettered without a result."""
    site.send(5)  # type: ignore[arg-type]
    site.pump()
    ((_, letter),) = site.redis.xrange(DEAD)
    assert (letter[b"job_id"], letter[b"task"], letter[b"in_ledger"]) == (
        b"",
        GRANT_ACCESS.encode(),
        b"0",
    )
    assert b"id: expected a job ID" in letter[b"reason"]
    assert site.pool.works == []
    assert is_idle(site)


def test_an_unreadable_message_with_job_id_gets_a_result(site: Site) -> None:
    """An unreadable message with a job ID is dispatched, so that its failure is recorded."""
    site.send("a", task="unknown")
    site.pump()
    ((dispatched,),) = [work.deliveries for work in site.pool.works]
    assert isinstance(dispatched.failure, JobFailedError)


def test_unknown_tasks_leave_no_statistics(site: Site) -> None:
    """Unknown task names are not counted in Celery's statistics, which never shrink."""
    for at in range(5):
        site.send(f"job {at}", task=f"unknown {at}")
        site.pump()
        site.pool.works[0].accept()
        site.pool.works[0].complete()
    assert not worker_state.total_count
    assert is_idle(site)


# --- Pool processes that end ---------------------------------------------------------------------


def lose(site: Site, job_id: str) -> None:
    """End a job's pool process, and then the delay of its redelivery."""
    site.pool.running(job_id).fail(RuntimeError("Worker exited prematurely: signal 9"))
    end_delays(site.redis)
    site.lease.beat()


def test_a_lost_pool_process_isolates_its_jobs(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """Each job of a lost pool process counts an attempt, is isolated and runs alone."""
    site.pool.num_processes = 1
    site.send("a", "b")
    site.pump()
    site.pool.running("a").accept()
    lose(site, "a")
    assert site.redis.llen(ISOLATED) == 2
    assert site.kinds("a") == ["task-received", "task-started", "task-retried"]
    lost = [one.message for one in caplog.records if one.levelno == logging.ERROR]
    assert len(lost) == 2
    assert "pool process lost: job='a'" in lost[0]
    site.send("c")
    for expected in ("a", "b", "c"):
        site.pump()
        (work,) = site.pool.works
        assert work.job_ids == [expected]
        work.complete()
    site.pool.num_processes = PROCESSES
    assert is_idle(site)


def test_poison_ends_as_a_dead_letter(site: Site) -> None:
    """A job that ends its pool process each time becomes a dead letter, even without a result."""
    site.send("poison")
    failures = []
    while site.redis.xlen(DEAD) == 0:
        site.pump()
        if site.pool.works:
            (dispatched,) = site.pool.works[0].deliveries
            failures.append((dispatched.failure is not None, dispatched.body is not None))
            lose(site, "poison")
    assert failures == [
        *[(False, True)] * LIMITS.attempts,
        (True, True),
        (True, False),
    ]
    ((_, letter),) = site.redis.xrange(DEAD)
    assert (letter[b"job_id"], letter[b"in_ledger"]) == (b"poison", b"")
    assert int(letter[b"attempts"]) == LIMITS.attempts + 2
    assert is_idle(site)


def test_a_worker_that_stops_counts_no_attempt(site: Site) -> None:
    """Jobs of a draining worker's ended pool processes are requeued without an attempt."""
    site.send("a")
    site.pump()
    site.lease.drain()
    site.pool.works[0].fail(RuntimeError("Worker exited prematurely: signal 15"))
    assert site.redis.lrange(QUEUE, 0, -1) == [message("a").encode()]
    assert is_idle(site)


def test_an_operator_terminates_a_job(site: Site) -> None:
    """``revoke --terminate`` kills the pool process once; the redelivered job is cancelled."""
    site.pool.num_processes = 1
    site.send("a", "other")
    site.pump()
    first = worker_state.requests["a"]
    (work,) = site.pool.works
    work.accept()
    worker_state.revoked.add("a")
    for _ in range(2):
        first.terminate(site.pool)
    assert site.pool.killed == [work.pid]
    work.fail(RuntimeError("Worker exited prematurely: signal 9"))
    assert site.redis.llen(QUEUE) == 2
    site.pump()
    failures = {one.job_id: one.failure for one in site.pool.works[0].deliveries}
    assert isinstance(failures["a"], JobCancelledException)
    assert failures["other"] is None


def test_a_poison_job_that_is_revoked_counts_attempts(site: Site) -> None:
    """A revoked job that ends its pool process by itself counts an attempt."""
    worker_state.revoked.add("poison")
    site.send("poison")
    for _ in range(LIMITS.attempts + 2):
        site.pump()
        lose(site, "poison")
    site.pump()
    assert site.redis.xlen(DEAD) == 1


def test_a_revoked_job_that_is_not_running_is_not_terminated(site: Site) -> None:
    """Terminating a settled job kills no process, which may execute another batch by now."""
    site.send("a")
    site.pump()
    request = worker_state.requests["a"]
    work = site.pool.works[0]
    work.accept()
    work.complete()
    request.terminate(site.pool)
    assert site.pool.killed == []


@pytest.mark.parametrize("is_full", [False, True])
def test_a_job_revoked_before_it_runs_is_terminated(site: Site, is_full: bool) -> None:
    """The pool process is killed as soon as it is known, and no attempt is counted."""
    site.pool.is_full = is_full
    site.send("a")
    site.pump()
    worker_state.requests["a"].terminate(site.pool)
    (work,) = site.pool.works
    assert site.pool.killed == ([] if is_full else [work.pid])
    work.accept()
    assert site.pool.killed == [work.pid]
    work.fail(RuntimeError("Worker exited prematurely: signal 9"))
    assert site.redis.hlen(f"{PREFIX}tries") == 0


def test_celery_revokes_an_unaccepted_job(site: Site) -> None:
    """Celery's ``revoke`` command works on jobs that no pool process has accepted."""
    site.send("a", "b")
    site.pump()
    state = SimpleNamespace(consumer=SimpleNamespace(pool=site.pool), app=None)
    assert "ok" in Panel.data["revoke"](state, ["a", "b"], terminate=True)
    assert len(site.pool.killed) == 2


def test_a_frozen_pool_process_is_replaced(site: Site) -> None:
    """A pool process that does not accept its batch is killed after 30 s; until then it is busy."""
    site.send("a")
    site.pump()
    (work,) = site.pool.works
    result = work.result
    assert result
    site.lease.beat(29)
    assert site.pool.killed == []
    assert site.dispatcher.free_processes == PROCESSES - 1
    site.lease.beat(2)
    assert site.pool.killed == [work.pid]
    assert result.is_terminated
    work.fail(RuntimeError("Worker exited prematurely: signal 9"))
    assert site.redis.hlen(f"{PREFIX}tries") == 1
    assert is_idle(site)


def test_a_batch_that_waits_in_the_pool_ends_no_process(site: Site) -> None:
    """A batch that waits in a full pool for longer than 30 s kills no process."""
    site.pool.is_full = True
    site.send("a")
    site.pump()
    site.lease.beat(31)
    (work,) = site.pool.works
    assert site.pool.killed == []
    work.accept()
    work.complete()
    assert messages(site.redis) == {}
    assert is_idle(site)


def test_a_pool_that_refuses_a_batch(site: Site) -> None:
    """Jobs of a batch that the pool refuses are redelivered without an attempt."""
    site.send("a")
    site.pool.error = OSError("too many open files")
    site.pump()
    end_delays(site.redis)
    site.lease.beat()
    assert is_idle(site)
    (delivery,) = site.pump()
    assert delivery.claim.attempts == 0


# --- Time limits ---------------------------------------------------------------------------------


def test_a_time_limit_ends_the_pool_process(site: Site) -> None:
    """The first heartbeat after the time limit kills the pool process; an attempt is counted."""
    site.send("a", timelimit=[60, None])
    site.pump()
    (work,) = site.pool.works
    site.lease.beat(20)
    work.accept()
    site.lease.beat(59)
    assert site.pool.killed == []
    site.lease.beat(2)
    site.lease.beat(2)
    assert site.pool.killed == [work.pid]
    lose(site, "a")
    assert site.redis.llen(ISOLATED) == 1


def test_a_time_limit_ends_no_other_job(site: Site) -> None:
    """A time limit kills no pool process of jobs with a longer limit."""
    site.pool.num_processes = 1
    site.send("short", timelimit=[1, None])
    site.send("long")
    site.pump()
    for work in site.pool.works:
        work.accept()
    site.lease.beat(30)
    assert site.pool.killed == [site.pool.running("short").pid]


def test_the_oldest_job_is_executed_first(site: Site) -> None:
    """Jobs whose time limit differs from the oldest one's are requeued without an event."""
    site.pool.num_processes = 1
    site.send("old", "old too")
    site.send("new", "newer", timelimit=[1, None])
    site.pump()
    assert site.pool.works[0].job_ids == ["old", "old too"]
    returned: Any = site.redis.lrange(QUEUE, 0, -1)
    assert [json.loads(one)["headers"]["id"] for one in returned] == ["newer", "new"]
    assert site.kinds("new") == []
    assert {request.id for request in worker_state.reserved_requests} == {"old", "old too"}


# --- What is lost between -----------------------------------------------------------------------


def test_a_forgotten_batch_frees_its_pool_process(site: Site) -> None:
    """Jobs of a batch that the pool forgot count an attempt, and the pool process is free."""
    site.send("a", "b")
    site.pump()
    site.pool.running("a").forget()
    site.lease.beat()
    assert site.dispatcher.free_processes == PROCESSES - 1
    site.lease.beat(ORPHANED_AFTER)
    assert claimed(site.redis, site.lease.session) == [message("b").encode()]
    assert site.redis.llen(ISOLATED) == 1
    site.pool.running("b").complete()
    assert is_idle(site)


def test_a_report_of_another_length_is_contained(site: Site) -> None:
    """A report whose length differs from its batch settles nothing; the jobs are redelivered."""
    site.send("a")
    site.pump()
    with pytest.raises(ValueError, match="zip"):
        site.pool.works[0].complete(settled(), settled())
    for _ in range(2):
        site.lease.beat(ORPHANED_AFTER)
    assert site.redis.llen(ISOLATED) == 1


def test_a_late_report_has_no_effect(site: Site) -> None:
    """A report after the session was closed has no effect."""
    site.send("a")
    (delivery,) = site.pump()
    site.lease.close()
    site.pool.works[0].complete()
    assert messages(site.redis) == {message("a").encode(): 1}
    assert delivery.state is State.DISPATCHED
    assert is_idle(site)
