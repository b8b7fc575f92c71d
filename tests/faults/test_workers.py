"""Whole workers die, stand still or are asked to stop, and the last they take with them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from tests.faults.books import balance
from tests.faults.sites import another, created, family, gate_at, kill_all, relayed
from tests.support.stores import until
from tests.support.workers import QUEUE, Site

AT_WORKER = ["claimed, unknown to the worker", "after COMMIT"]


class TestLostChildren:
    """A child dies in a way that it takes more to get over."""

    def test_out_of_memory(self, here: Site, tmp_path: Path) -> None:
        """A job for which a worker's children have no memory runs in those that come after."""
        many = [str(uuid4()) for _ in range(90_000)]
        with another(here, tmp_path) as service:
            children = family(service)[1:]
            for child in children:
                child.rlimit(psutil.RLIMIT_AS, (child.memory_info().vms, psutil.RLIM_INFINITY))
            job_id = here.send("ann", many)
            until(lambda: not all(child.is_running() for child in children))
            result = balance(here, [job_id])[job_id]
        assert result["exc_type"] == "InvalidInterviewIdException"

    def test_poison(self, here: Site, tmp_path: Path, ids: list[str]) -> None:
        """A job that ends its child each time fails for good after its tries, and is kept."""
        with relayed(here, tmp_path, GRANT_ATTEMPT_LIMIT=2) as (relays, _):
            job_id = ""
            for _ in range(2):
                with gate_at(relays, "before the transaction") as gate:
                    job_id = job_id or here.send("ann", ids)
                    os.kill(gate.until_reached(), signal.SIGKILL)
            result = balance(here, [job_id])[job_id]
        assert result["exc_type"] == "JobFailedError"
        assert "ended its worker's process 2 times" in result["exc_message"][0]
        (letter,) = here.dead_letters()
        assert (letter["job_id"], letter["attempts"], letter["in_ledger"]) == (job_id, "2", "1")
        assert here.store.granted("ann") == []

    def test_frozen(self, here: Site, tmp_path: Path, ids: list[str]) -> None:
        """A dead worker's child, frozen inside its transaction, holds its successor up shortly."""
        with relayed(here, tmp_path) as (relays, service):
            with gate_at(relays, "inside the transaction") as gate:
                job_id = here.send("ann", ids)
                child = psutil.Process(gate.until_reached())
                child.suspend()
                os.kill(service.pid, signal.SIGKILL)
            try:
                with another(here, tmp_path):
                    assert balance(here, [job_id])[job_id] == created(10)
            finally:
                if child.is_running():
                    child.kill()


class TestWorkers:
    """A worker's main process dies, or stands still."""

    @pytest.mark.parametrize("point", AT_WORKER)
    def test_killed(self, here: Site, tmp_path: Path, ids: list[str], point: str) -> None:
        """A job whose worker is killed, wherever it was, runs elsewhere and counts once."""
        with relayed(here, tmp_path) as (relays, service):
            with gate_at(relays, point) as gate:
                job_id = here.send("ann", ids)
                gate.until_reached()
                os.kill(service.pid, signal.SIGKILL)
            with another(here, tmp_path):
                assert balance(here, [job_id])[job_id] == created(10)

    def test_killed_with_its_children(self, here: Site, tmp_path: Path, ids: list[str]) -> None:
        """A job whose worker is killed with all of its processes counts once."""
        with relayed(here, tmp_path) as (relays, service):
            with gate_at(relays, "inside the transaction") as gate:
                job_id = here.send("ann", ids)
                gate.until_reached()
                kill_all(service)
            with another(here, tmp_path):
                assert balance(here, [job_id])[job_id] == created(10)

    def test_frozen(self, here: Site, tmp_path: Path, ids: list[str]) -> None:
        """What a frozen worker does late changes nothing, and it works again."""
        with relayed(here, tmp_path) as (relays, service):
            main = psutil.Process(service.pid)
            with gate_at(relays, "before the acknowledgement") as gate:
                job_id = here.send("ann", ids)
                gate.until_reached()
                main.suspend()
                with another(here, tmp_path) as other:
                    assert balance(here, [job_id])[job_id] == created(10)
                    assert not here.redis.zscore("interview-access:leases", "x")
                    os.kill(other.pid, signal.SIGTERM)
                    other.wait(30)
                here.send("bob", ids, job_id="late")
            main.resume()
            assert balance(here, [job_id, "late"])["late"] == created(10)


class TestStopping:
    """A worker is asked to stop."""

    def test_running_job_ends_and_waiting_ones_run_elsewhere(
        self, here: Site, tmp_path: Path, ids: list[str]
    ) -> None:
        """A worker that is asked to stop ends what it began, and takes nothing more."""
        with relayed(here, tmp_path) as (relays, service), another(here, tmp_path) as other:
            other.stop()
            with gate_at(relays, "inside the transaction") as gate:
                running = here.send("ann", ids)
                gate.until_reached()
                os.kill(service.pid, signal.SIGTERM)
                until(lambda: "Warm shutdown" in service.log_tail())
                waiting = here.send("bob", ids)
            assert service.wait(30) == 0
            assert here.answer(running)["result"] == created(10)
            assert here.redis.llen(QUEUE) == 1
        with another(here, tmp_path):
            assert balance(here, [running, waiting])[waiting] == created(10)

    @pytest.mark.parametrize("asked", ["once, with a short grace", "twice"])
    def test_grace_is_over(self, here: Site, tmp_path: Path, ids: list[str], asked: str) -> None:
        """A job that goes on after the grace goes back, uncounted, and runs elsewhere."""
        grace = 0.1 if "once" in asked else 300
        with relayed(here, tmp_path, GRANT_STOP_GRACE=grace) as (relays, service):
            with gate_at(relays, "inside the transaction") as gate:
                job_id = here.send("ann", ids)
                gate.until_reached()
                os.kill(service.pid, signal.SIGTERM)
                if asked == "twice":
                    until(lambda: "Warm shutdown" in service.log_tail())
                    os.kill(service.pid, signal.SIGTERM)
                assert service.wait(30) == 0
            assert not here.redis.hlen("interview-access:tries")
            with another(here, tmp_path):
                assert balance(here, [job_id])[job_id] == created(10)
