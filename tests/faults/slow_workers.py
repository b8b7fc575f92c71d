"""Faults of workers that take too long for the suite; `make chaos` runs them."""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.invariants import verified_results
from tests.faults.workers import (
    STAGES,
    gate_at,
    kill_process_tree,
    relayed_worker,
    short_lease_worker,
    success,
)
from tests.faults.workload import BATCH, new_users, send_together
from tests.support.stores import until
from tests.support.workers import Site, held_grant

LONG_SECONDS = 11.0  # more than ten leases of one second


@pytest.mark.parametrize("stage", STAGES)
def test_worker_killed(here: Site, tmp_path: Path, ids: list[str], stage: str) -> None:
    """A job whose worker is killed at any stage runs in another worker and counts once."""
    with relayed_worker(here, tmp_path) as (relays, service):
        with gate_at(relays, stage) as gate:
            job_id = here.send("ann", ids)
            gate.until_reached()
            os.kill(service.pid, signal.SIGKILL)
        with short_lease_worker(here, tmp_path):
            assert verified_results(here, [job_id])[job_id] == success(10)


def test_frozen_pool_process(here: Site, tmp_path: Path, ids: list[str]) -> None:
    """A pool process that accepts nothing is replaced, and its jobs count once."""
    with short_lease_worker(here, tmp_path) as service:
        pool = psutil.Process(service.pid).children()
        for process in pool:
            process.suspend()
        sent = [here.send(f"user-{number}", ids) for number in range(6)]
        until(lambda: not any(process.is_running() for process in pool), within=60)
        results = verified_results(here, sent)
    assert set(map(str, results.values())) == {str(success(10))}


@pytest.mark.parametrize("asked_to_stop", [False, True])
def test_long_job_runs_once(
    here: Site, tmp_path: Path, ids: list[str], asked_to_stop: bool
) -> None:
    """A job that takes longer than ten leases runs once, also if its worker is asked to stop."""
    with ExitStack() as stack:
        service = stack.enter_context(short_lease_worker(here, tmp_path, GRANT_STOP_GRACE=60))
        with held_grant(here, "ann", ids[0]):
            job_id = here.send("ann", ids)
            here.until_state(job_id, "STARTED")
            other = stack.enter_context(short_lease_worker(here, tmp_path))
            if asked_to_stop:
                os.kill(service.pid, signal.SIGTERM)
            time.sleep(LONG_SECONDS)  # the duration of the job
        assert verified_results(here, [job_id])[job_id] == success(10)
        assert f"[{job_id}] received" not in other.log.read_text(encoding="utf-8")


def test_rolling_restart(here: Site, tmp_path: Path, ids: list[str]) -> None:
    """Restarting workers one after the other under load fails no job and retries none."""
    sent = [here.send(f"user-{number % 9}", ids[number % 7 :]) for number in range(400)]

    def have_succeeded(count: int) -> bool:
        metas: Any = here.redis.mget([f"celery-task-meta-{one}" for one in sent])
        return sum(b"SUCCESS" in (meta or b"") for meta in metas) >= count

    with short_lease_worker(here, tmp_path) as first, short_lease_worker(here, tmp_path) as second:
        for number, worker in enumerate((first, second), start=1):
            until(lambda number=number: have_succeeded(100 * number))  # type: ignore[misc]
            os.kill(worker.pid, signal.SIGTERM)
            with short_lease_worker(here, tmp_path):
                assert worker.wait(30) == 0
                until(lambda number=number: have_succeeded(150 * number))  # type: ignore[misc]
    with short_lease_worker(here, tmp_path):
        results = verified_results(here, sent)
    assert all(result["success"] for result in results.values())
    logs = [log.read_text(encoding="utf-8") for log in tmp_path.glob("*.log")]
    assert not [line for log in logs for line in log.splitlines() if "job retried: " in line]


def test_poison_in_a_batch(here: Site, tmp_path: Path, ids: list[str]) -> None:
    """A job that ends its pool process each time fails, and no other job of its batch does."""
    users = new_users(BATCH)
    with (
        relayed_worker(here, tmp_path, GRANT_ATTEMPT_LIMIT=2) as (relays, _),
        relays.database.gate(users[3].encode()) as among_others,
        relays.database.gate(users[3].encode()) as alone,
        relays.database.gate(users[3].encode()) as again,
    ):
        sent = send_together(here, users, ids)
        for gate in among_others, alone, again:
            os.kill(gate.until_reached(), signal.SIGKILL)
        results = verified_results(here, sent)
    assert results[sent[3]]["exc_type"] == "JobFailedError"
    assert [results[one] for one in sent if one != sent[3]] == [success(10)] * (BATCH - 1)


@pytest.mark.parametrize("stage", STAGES)
def test_worker_killed_with_a_batch(here: Site, tmp_path: Path, ids: list[str], stage: str) -> None:
    """Each job of a batch whose worker is killed at any stage counts once."""
    with relayed_worker(here, tmp_path) as (relays, service):
        with gate_at(relays, stage) as gate:
            sent = send_together(here, new_users(BATCH), ids)
            gate.until_reached()
            os.kill(service.pid, signal.SIGKILL)
        with short_lease_worker(here, tmp_path):
            assert list(verified_results(here, sent).values()) == [success(10)] * BATCH


def test_poison_of_workers(here: Site, tmp_path: Path, ids: list[str]) -> None:
    """A job that ends its whole worker each time fails, and no other job does."""
    sent: list[str] = []
    for turn in range(2):
        with (
            relayed_worker(here, tmp_path, GRANT_ATTEMPT_LIMIT=2) as (relays, service),
            relays.database.gate(b"innocent") as held,
            relays.database.gate(b"poison") as gate,
        ):
            if turn == 0:
                sent.append(here.send("ann", ids, job_id="innocent"))
                held.until_reached()
                sent.append(here.send("bob", ids, job_id="poison"))
            else:
                held.open()
            gate.until_reached()
            kill_process_tree(service)
    with short_lease_worker(here, tmp_path, GRANT_ATTEMPT_LIMIT=2):
        results = verified_results(here, sent)
    assert results[sent[0]] == success(10)
    assert results[sent[1]]["exc_type"] == "JobFailedError"
