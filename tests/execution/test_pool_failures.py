"""Pool processes that end, freeze or are terminated, and what becomes of their deliveries."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from billiard.einfo import ExceptionWithTraceback
from billiard.exceptions import Terminated, WorkerLostError
from celery.worker import state as worker_state
from celery.worker.control import Panel
from interview_access.errors import JobCancelledException

from tests.execution.stepped_worker import LIMITS, PROCESSES, SteppedWorker, is_idle, lose, message
from tests.support.sessions import ISOLATED, QUEUE, end_delays, messages
from worker.broker.claims import DEAD, PREFIX


def test_a_lost_pool_process_isolates_its_jobs(
    stepped: SteppedWorker, caplog: pytest.LogCaptureFixture
) -> None:
    """Each job of a lost pool process counts an attempt, is isolated and runs alone."""
    stepped.pool.num_processes = 1
    stepped.send("a", "b")
    stepped.pump()
    stepped.pool.running("a").accept()
    lose(stepped, "a")
    assert stepped.redis.llen(ISOLATED) == 2
    assert stepped.kinds("a") == ["task-received", "task-started", "task-retried"]
    lost = [one.message for one in caplog.records if one.levelno == logging.ERROR]
    assert len(lost) == 2
    assert "pool process lost: job='a'" in lost[0]
    assert "attempt=1" in lost[0]
    assert "reason=crash error=Worker exited prematurely: signal 9" in lost[0]
    stepped.send("c")
    for expected in ("a", "b", "c"):
        stepped.pump()
        (work,) = stepped.pool.works
        assert work.job_ids == [expected]
        work.complete()
    stepped.pool.num_processes = PROCESSES
    assert is_idle(stepped)


@pytest.mark.parametrize(
    "error",
    [
        WorkerLostError("Worker exited prematurely: signal 9 (SIGKILL)"),
        Terminated(9),
        Terminated(-9),
    ],
)
def test_the_signal_of_a_lost_pool_process_is_logged(
    stepped: SteppedWorker, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """The log and the event name the signal, whether or not the worker itself has sent it."""
    stepped.send("a")
    stepped.pump()
    stepped.pool.running("a").fail(ExceptionWithTraceback(error, "traceback"))
    (lost,) = [one.message for one in caplog.records if one.levelno == logging.ERROR]
    assert "signal 9 (SIGKILL)" in lost
    kind, fields = stepped.events[-1]
    assert (kind, "signal 9 (SIGKILL)" in fields["exception"]) == ("task-retried", True)


def test_poison_ends_as_a_dead_letter(stepped: SteppedWorker) -> None:
    """A job that ends its pool process each time becomes a dead letter, even without a result."""
    stepped.send("poison")
    failures = []
    while stepped.redis.xlen(DEAD) == 0:
        stepped.pump()
        if stepped.pool.works:
            (dispatched,) = stepped.pool.works[0].deliveries
            failures.append((dispatched.failure is not None, dispatched.body is not None))
            lose(stepped, "poison")
    assert failures == [
        *[(False, True)] * LIMITS.attempts,
        (True, True),
        (True, False),
    ]
    ((_, letter),) = stepped.redis.xrange(DEAD)
    assert (letter[b"job_id"], letter[b"in_ledger"]) == (b"poison", b"")
    assert int(letter[b"attempts"]) == LIMITS.attempts + 2
    assert is_idle(stepped)


def test_a_worker_that_stops_counts_no_attempt(stepped: SteppedWorker) -> None:
    """Jobs of a draining worker's ended pool processes are requeued without an attempt."""
    stepped.send("a")
    stepped.pump()
    stepped.lease.drain()
    stepped.pool.works[0].fail(RuntimeError("Worker exited prematurely: signal 15"))
    assert stepped.redis.lrange(QUEUE, 0, -1) == [message("a").encode()]
    assert is_idle(stepped)


def test_an_operator_terminates_a_job(stepped: SteppedWorker) -> None:
    """``revoke --terminate`` kills the pool process once; the redelivered job is cancelled."""
    stepped.pool.num_processes = 1
    stepped.send("a", "other")
    stepped.pump()
    first = worker_state.requests["a"]
    (work,) = stepped.pool.works
    work.accept()
    worker_state.revoked.add("a")
    for _ in range(2):
        first.terminate(stepped.pool)
    assert stepped.pool.killed == [work.pid]
    work.fail(RuntimeError("Worker exited prematurely: signal 9"))
    assert stepped.redis.llen(QUEUE) == 2
    stepped.pump()
    failures = {one.job_id: one.failure for one in stepped.pool.works[0].deliveries}
    assert isinstance(failures["a"], JobCancelledException)
    assert failures["other"] is None


def test_a_poison_job_that_is_revoked_counts_attempts(stepped: SteppedWorker) -> None:
    """A revoked job that ends its pool process by itself counts an attempt."""
    worker_state.revoked.add("poison")
    stepped.send("poison")
    for _ in range(LIMITS.attempts + 2):
        stepped.pump()
        lose(stepped, "poison")
    stepped.pump()
    assert stepped.redis.xlen(DEAD) == 1


def test_a_revoked_job_that_is_not_running_is_not_terminated(stepped: SteppedWorker) -> None:
    """Terminating a settled job kills no process, which may execute another batch by now."""
    stepped.send("a")
    stepped.pump()
    request = worker_state.requests["a"]
    work = stepped.pool.works[0]
    work.accept()
    work.complete()
    request.terminate(stepped.pool)
    assert stepped.pool.killed == []


@pytest.mark.parametrize("is_full", [False, True])
def test_a_job_revoked_before_it_runs_is_terminated(stepped: SteppedWorker, is_full: bool) -> None:
    """The pool process is killed as soon as it is known, and no attempt is counted."""
    stepped.pool.is_full = is_full
    stepped.send("a")
    stepped.pump()
    worker_state.requests["a"].terminate(stepped.pool)
    (work,) = stepped.pool.works
    assert stepped.pool.killed == ([] if is_full else [work.pid])
    work.accept()
    assert stepped.pool.killed == [work.pid]
    work.fail(RuntimeError("Worker exited prematurely: signal 9"))
    assert stepped.redis.hlen(f"{PREFIX}tries") == 0


def test_celery_revokes_an_unaccepted_job(stepped: SteppedWorker) -> None:
    """Celery's ``revoke`` command works on jobs that no pool process has accepted."""
    stepped.send("a", "b")
    stepped.pump()
    state = SimpleNamespace(consumer=SimpleNamespace(pool=stepped.pool), app=None)
    assert "ok" in Panel.data["revoke"](state, ["a", "b"], terminate=True)
    assert len(stepped.pool.killed) == 2


def test_a_frozen_pool_process_is_replaced(stepped: SteppedWorker) -> None:
    """A pool process that does not accept its batch is killed after 30 s; until then it is busy."""
    stepped.send("a")
    stepped.pump()
    (work,) = stepped.pool.works
    result = work.result
    assert result
    stepped.lease.beat(29)
    assert stepped.pool.killed == []
    assert stepped.dispatcher.free_processes == PROCESSES - 1
    stepped.lease.beat(2)
    assert stepped.pool.killed == [work.pid]
    assert result.is_terminated
    work.fail(RuntimeError("Worker exited prematurely: signal 9"))
    assert stepped.redis.hlen(f"{PREFIX}tries") == 1
    assert is_idle(stepped)


def test_a_batch_that_waits_in_the_pool_ends_no_process(stepped: SteppedWorker) -> None:
    """A batch that waits in a full pool for longer than 30 s kills no process."""
    stepped.pool.is_full = True
    stepped.send("a")
    stepped.pump()
    stepped.lease.beat(31)
    (work,) = stepped.pool.works
    assert stepped.pool.killed == []
    work.accept()
    work.complete()
    assert messages(stepped.redis) == {}
    assert is_idle(stepped)


def test_a_pool_that_refuses_a_batch(stepped: SteppedWorker) -> None:
    """Jobs of a batch that the pool refuses are redelivered without an attempt."""
    stepped.send("a")
    stepped.pool.error = OSError("too many open files")
    stepped.pump()
    end_delays(stepped.redis)
    stepped.lease.beat()
    assert is_idle(stepped)
    (delivery,) = stepped.pump()
    assert delivery.claim.attempts == 0
