"""Liveness and readiness of a stepped worker: what only hours or a defect would show."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery

from tests.execution.stepped_worker import SteppedWorker
from tests.support.sessions import TTL
from worker.broker.claims import Claims
from worker.monitoring.health import MAIN_THREAD_SECONDS, OUTAGE_SECONDS, HealthCheck
from worker.services.outbox_relay import OutboxRelay


@pytest.fixture
def health(stepped: SteppedWorker, app: Celery) -> HealthCheck:
    """The health of the worker, whose outbox relay has not begun."""

    def new_storage() -> Any:
        raise AssertionError("the relay was started")

    return HealthCheck(stepped.lease, stepped.dispatcher, OutboxRelay(app, new_storage))


def test_a_running_worker(stepped: SteppedWorker, health: HealthCheck) -> None:
    """Its only reason is that the relay has not reached PostgreSQL."""
    stepped.lease.loop_turned()
    assert health() == (True, False, ["PostgreSQL is not reached"], False)


def test_a_stuck_main_thread(stepped: SteppedWorker, health: HealthCheck) -> None:
    """A worker is not live if its main thread is silent, unless it tries to reconnect."""
    stepped.lease.clock.now += MAIN_THREAD_SECONDS - 1
    assert health().is_live
    assert "the event loop does not consume the queue" in health().reasons
    stepped.lease.clock.now += 2
    assert not health().is_live
    stepped.lease.reconnecting()
    assert health().is_live
    assert "the event loop does not consume the queue" in health().reasons


def test_a_stopping_worker(stepped: SteppedWorker, health: HealthCheck) -> None:
    """It is live however long its main thread waits for the pool."""
    stepped.lease.drain()
    stepped.lease.clock.now += 10 * MAIN_THREAD_SECONDS
    assert health().is_live
    assert "the worker is stopping" in health().reasons


def test_a_stuck_job(stepped: SteppedWorker, health: HealthCheck) -> None:
    """A worker is not live if a pool process does not end after its job's time limit."""
    stepped.send("a", timelimit=[60, None])
    stepped.pump()
    (work,) = stepped.pool.works
    work.accept()
    for _ in range(59):
        stepped.lease.beat(1)
        stepped.lease.loop_turned()
    assert health().is_live
    for _ in range(65):
        stepped.lease.beat(1)
        stepped.lease.loop_turned()
    assert stepped.pool.killed == [work.pid]
    assert health().reasons[0] == "a pool process does not end after its time limit"
    assert not health().is_live
    work.fail(RuntimeError("Worker exited prematurely: signal 9"))
    assert health().is_live


def test_a_lease_that_is_not_renewed(stepped: SteppedWorker, health: HealthCheck) -> None:
    """A worker is not ready once its lease has not been renewed for its TTL."""
    stepped.lease.clock.now += TTL - 1
    assert "the lease is not held" not in health().reasons
    stepped.lease.clock.now += 1
    assert "the lease is not held" in health().reasons
    stepped.lease.beat(1)
    assert "the lease is not held" not in health().reasons


def test_lost_leases_are_counted(stepped: SteppedWorker, redis: Any) -> None:
    """A lease that others have taken over is a loss."""
    assert stepped.lease.losses == 0
    redis.flushdb()
    stepped.lease.beat(1)
    assert stepped.lease.losses == 1
    assert stepped.lease.is_held


def test_takeovers_are_counted(stepped: SteppedWorker, redis: Any) -> None:
    """A lease of a dead worker counts once, at the worker that requeues its jobs."""
    Claims(redis).open("dead")
    stepped.lease.beat_for(TTL)
    assert stepped.lease.takeovers == 0
    stepped.lease.beat_for(3 * TTL)
    assert stepped.lease.takeovers == 1


def test_an_outage_is_over_without_a_job_that_probes(
    stepped: SteppedWorker, health: HealthCheck
) -> None:
    """An idle worker is ready again some time after the last failure, and not before."""
    breaker, reason = stepped.lease.policy.breaker, "the circuit breaker is not closed"
    for _ in range(2):
        breaker.record_failure("PostgreSQL is away")
        stepped.lease.clock.now += OUTAGE_SECONDS - 1
        assert reason in health().reasons
    stepped.lease.clock.now += 1
    assert breaker.is_probing
    assert reason not in health().reasons
