"""Workers are killed or frozen; pool processes lack memory or meet poison."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from tests.faults.invariants import verified_results
from tests.faults.workers import (
    gate_at,
    kill_process_tree,
    process_tree,
    relayed_worker,
    short_lease_worker,
    success,
)
from tests.support.stores import until
from tests.support.workers import Site

STAGES_OF_WORKER = ["claimed, unknown to the worker", "after COMMIT"]


class TestPoolProcesses:
    """Pool processes end for lack of memory, by poison, or frozen after their worker's end."""

    def test_out_of_memory(self, here: Site, tmp_path: Path) -> None:
        """A job for which the pool processes lack memory runs in their successors."""
        many = [str(uuid4()) for _ in range(90_000)]
        with short_lease_worker(here, tmp_path) as service:
            pool = process_tree(service)[1:]
            for process in pool:
                process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms, psutil.RLIM_INFINITY))
            job_id = here.send("ann", many)
            until(lambda: not all(process.is_running() for process in pool))
            result = verified_results(here, [job_id])[job_id]
        assert result["exc_type"] == "InvalidInterviewIdException"

    def test_poison(self, here: Site, tmp_path: Path, ids: list[str]) -> None:
        """A job that ends its pool process each time fails after its attempts and is kept."""
        with relayed_worker(here, tmp_path, GRANT_ATTEMPT_LIMIT=2) as (relays, _):
            job_id = ""
            for _ in range(2):
                with gate_at(relays, "before the transaction") as gate:
                    job_id = job_id or here.send("ann", ids)
                    os.kill(gate.until_reached(), signal.SIGKILL)
            result = verified_results(here, [job_id])[job_id]
        assert result["exc_type"] == "JobFailedError"
        assert "process ended in 2 attempts" in result["exc_message"][0]
        (letter,) = here.dead_letters()
        assert (letter["job_id"], letter["attempts"], letter["in_ledger"]) == (job_id, "2", "1")
        assert here.store.granted("ann") == []

    def test_frozen(self, here: Site, tmp_path: Path, ids: list[str]) -> None:
        """A pool process frozen inside its transaction delays the job's next delivery shortly."""
        with relayed_worker(here, tmp_path) as (relays, service):
            with gate_at(relays, "inside the transaction") as gate:
                job_id = here.send("ann", ids)
                process = psutil.Process(gate.until_reached())
                process.suspend()
                os.kill(service.pid, signal.SIGKILL)
            try:
                with short_lease_worker(here, tmp_path):
                    assert verified_results(here, [job_id])[job_id] == success(10)
            finally:
                if process.is_running():
                    process.kill()


class TestWorkers:
    """A worker's main process is killed or frozen."""

    @pytest.mark.parametrize("stage", STAGES_OF_WORKER)
    def test_killed(self, here: Site, tmp_path: Path, ids: list[str], stage: str) -> None:
        """A job whose worker is killed at any stage runs in another worker and counts once."""
        with relayed_worker(here, tmp_path) as (relays, service):
            with gate_at(relays, stage) as gate:
                job_id = here.send("ann", ids)
                gate.until_reached()
                os.kill(service.pid, signal.SIGKILL)
            with short_lease_worker(here, tmp_path):
                assert verified_results(here, [job_id])[job_id] == success(10)

    def test_killed_with_its_pool_processes(
        self, here: Site, tmp_path: Path, ids: list[str]
    ) -> None:
        """A job whose worker is killed with its pool processes counts once."""
        with relayed_worker(here, tmp_path) as (relays, service):
            with gate_at(relays, "inside the transaction") as gate:
                job_id = here.send("ann", ids)
                gate.until_reached()
                kill_process_tree(service)
            with short_lease_worker(here, tmp_path):
                assert verified_results(here, [job_id])[job_id] == success(10)

    def test_frozen(self, here: Site, tmp_path: Path, ids: list[str]) -> None:
        """A frozen worker's late commands have no effect, and it continues to work."""
        with relayed_worker(here, tmp_path) as (relays, service):
            main = psutil.Process(service.pid)
            with gate_at(relays, "before the acknowledgement") as gate:
                job_id = here.send("ann", ids)
                gate.until_reached()
                main.suspend()
                with short_lease_worker(here, tmp_path) as other:
                    assert verified_results(here, [job_id])[job_id] == success(10)
                    assert not here.redis.zscore("interview-access:leases", "x")
                    os.kill(other.pid, signal.SIGTERM)
                    other.wait(30)
                here.send("bob", ids, job_id="late")
            main.resume()
            assert verified_results(here, [job_id, "late"])["late"] == success(10)
