"""Jobs of a worker that is stopped by SIGTERM: running ones finish, others run elsewhere."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.faults.invariants import verified_results
from tests.faults.workers import gate_at, relayed_worker, short_lease_worker, success
from tests.support.stores import until
from tests.support.workers import QUEUE, Site


def test_running_job_finishes_and_waiting_ones_run_elsewhere(
    here: Site, tmp_path: Path, ids: list[str]
) -> None:
    """A worker that is asked to stop finishes its running job, and claims nothing more."""
    with (
        relayed_worker(here, tmp_path) as (relays, service),
        short_lease_worker(here, tmp_path) as other,
    ):
        other.stop()
        with gate_at(relays, "inside the transaction") as gate:
            running = here.send("ann", ids)
            gate.until_reached()
            os.kill(service.pid, signal.SIGTERM)
            until(lambda: "Warm shutdown" in service.log_tail())
            waiting = here.send("bob", ids)
        assert service.wait(30) == 0
        assert here.answer(running)["result"] == success(10)
        assert here.redis.llen(QUEUE) == 1
    with short_lease_worker(here, tmp_path):
        assert verified_results(here, [running, waiting])[waiting] == success(10)


@pytest.mark.parametrize("asked", ["once, with a short grace period", "twice"])
def test_grace_period_ends(here: Site, tmp_path: Path, ids: list[str], asked: str) -> None:
    """A job that outlasts the grace period is requeued uncounted and runs elsewhere."""
    grace = 0.1 if "once" in asked else 300
    with relayed_worker(here, tmp_path, GRANT_STOP_GRACE=grace) as (relays, service):
        with gate_at(relays, "inside the transaction") as gate:
            job_id = here.send("ann", ids)
            gate.until_reached()
            os.kill(service.pid, signal.SIGTERM)
            if asked == "twice":
                until(lambda: "Warm shutdown" in service.log_tail())
                os.kill(service.pid, signal.SIGTERM)
            assert service.wait(30) == 0
        assert not here.redis.hlen("interview-access:tries")
        with short_lease_worker(here, tmp_path):
            assert verified_results(here, [job_id])[job_id] == success(10)
