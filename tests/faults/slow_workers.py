"""What takes longer than a suite should: `make chaos` runs these, by their path."""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.books import balance
from tests.faults.sites import POINTS, another, created, gate_at, kill_all, relayed
from tests.faults.test_batches import MANY, order, some
from tests.support.stores import until
from tests.support.workers import Site, held_grant

LONG = 11.0  # seconds, of leases of one


@pytest.mark.parametrize("point", POINTS)
def test_worker_killed(here: Site, tmp_path: Path, ids: list[str], point: str) -> None:
    """A job whose worker is killed, wherever it was, runs elsewhere and counts once."""
    with relayed(here, tmp_path) as (relays, service):
        with gate_at(relays, point) as gate:
            job_id = here.send("ann", ids)
            gate.until_reached()
            os.kill(service.pid, signal.SIGKILL)
        with another(here, tmp_path):
            assert balance(here, [job_id])[job_id] == created(10)


def test_frozen_pool_process(here: Site, tmp_path: Path, ids: list[str]) -> None:
    """A pool process that accepts nothing is replaced, and its jobs count once."""
    with another(here, tmp_path) as service:
        children = psutil.Process(service.pid).children()
        for child in children:
            child.suspend()
        sent = [here.send(f"user-{number}", ids) for number in range(6)]
        until(lambda: not any(child.is_running() for child in children), within=60)
        results = balance(here, sent)
    assert set(map(str, results.values())) == {str(created(10))}


@pytest.mark.parametrize("asked_to_stop", [False, True])
def test_long_job_runs_once(
    here: Site, tmp_path: Path, ids: list[str], asked_to_stop: bool
) -> None:
    """A job of more than ten leases begins once, also where its worker is asked to stop."""
    with ExitStack() as stack:
        service = stack.enter_context(another(here, tmp_path, GRANT_STOP_GRACE=60))
        with held_grant(here, "ann", ids[0]):
            job_id = here.send("ann", ids)
            here.until_state(job_id, "STARTED")
            other = stack.enter_context(another(here, tmp_path))
            if asked_to_stop:
                os.kill(service.pid, signal.SIGTERM)
            time.sleep(LONG)  # the length of the job
        assert balance(here, [job_id])[job_id] == created(10)
        assert f"[{job_id}] received" not in other.log.read_text(encoding="utf-8")


def test_rolling_restart(here: Site, tmp_path: Path, ids: list[str]) -> None:
    """Workers restarted one after the other under load fail no job, and try none again."""
    sent = [here.send(f"user-{number % 9}", ids[number % 7 :]) for number in range(400)]

    def answered(count: int) -> bool:
        metas: Any = here.redis.mget([f"celery-task-meta-{one}" for one in sent])
        return sum(b"SUCCESS" in (meta or b"") for meta in metas) >= count

    with another(here, tmp_path) as first, another(here, tmp_path) as second:
        for number, worker in enumerate((first, second), start=1):
            until(lambda number=number: answered(100 * number))  # type: ignore[misc]
            os.kill(worker.pid, signal.SIGTERM)
            with another(here, tmp_path):
                assert worker.wait(30) == 0
                until(lambda number=number: answered(150 * number))  # type: ignore[misc]
    with another(here, tmp_path):
        results = balance(here, sent)
    assert all(result["success"] for result in results.values())
    logs = [log.read_text(encoding="utf-8") for log in tmp_path.glob("*.log")]
    assert not [line for log in logs for line in log.splitlines() if "job retried: " in line]


def test_poison_in_a_batch(here: Site, tmp_path: Path, ids: list[str]) -> None:
    """A job that ends its child each time fails for good, and no other of its batch does."""
    users = some(MANY)
    with (
        relayed(here, tmp_path, GRANT_ATTEMPT_LIMIT=2) as (relays, _),
        relays.database.gate(users[3].encode()) as among_others,
        relays.database.gate(users[3].encode()) as alone,
        relays.database.gate(users[3].encode()) as again,
    ):
        sent = order(here, users, ids)
        for gate in among_others, alone, again:
            os.kill(gate.until_reached(), signal.SIGKILL)
        results = balance(here, sent)
    assert results[sent[3]]["exc_type"] == "JobFailedError"
    assert [results[one] for one in sent if one != sent[3]] == [created(10)] * (MANY - 1)


@pytest.mark.parametrize("point", POINTS)
def test_worker_killed_with_a_batch(here: Site, tmp_path: Path, ids: list[str], point: str) -> None:
    """Each of many jobs whose worker is killed, wherever it was with them, counts once."""
    with relayed(here, tmp_path) as (relays, service):
        with gate_at(relays, point) as gate:
            sent = order(here, some(MANY), ids)
            gate.until_reached()
            os.kill(service.pid, signal.SIGKILL)
        with another(here, tmp_path):
            assert list(balance(here, sent).values()) == [created(10)] * MANY


def test_poison_of_workers(here: Site, tmp_path: Path, ids: list[str]) -> None:
    """A job that ends its whole worker each time fails for good, and no other with it."""
    sent: list[str] = []
    for turn in range(2):
        with (
            relayed(here, tmp_path, GRANT_ATTEMPT_LIMIT=2) as (relays, service),
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
            kill_all(service)
    with another(here, tmp_path, GRANT_ATTEMPT_LIMIT=2):
        results = balance(here, sent)
    assert results[sent[0]] == created(10)
    assert results[sent[1]]["exc_type"] == "JobFailedError"
