"""Faults of servers that take too long for the suite; `make chaos` runs them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from devstack.servers import LocalStack
from tests.faults.workers import crash, monitored_workers
from tests.faults.workload import Workload
from tests.support.stores import until
from tests.support.workers import ledger_missing
from worker.settings import Settings

LEASE_SECONDS = float(Settings.model_fields["grant_lease_seconds"].default)
FROZEN_SECONDS = 2.5 * LEASE_SECONDS


def test_redis_frozen_for_longer_than_two_leases(
    servers: LocalStack, workload: Workload, tmp_path: Path
) -> None:
    """A frozen Redis expires no lease, and no job runs twice."""
    with monitored_workers(workload.here, tmp_path, workers=2) as monitors:
        running = workload.send_slow(3)
        workload.send(40)
        os.kill(servers.valkey.pid, signal.SIGSTOP)
        try:
            for monitor in monitors:
                monitor.reset()
            time.sleep(FROZEN_SECONDS)  # the fault itself
            for monitor in monitors:
                monitor.assert_no_busy_loop()
        finally:
            os.kill(servers.valkey.pid, signal.SIGCONT)

        until(lambda: len(workload.live_sessions()) == 2)
        time.sleep(2 * LEASE_SECONDS)  # in which a takeover would happen
        assert len(workload.live_sessions()) == 2
        workload.release()
        workload.verify()
        for monitor in monitors:
            monitor.assert_running()
            assert "lease expired" not in monitor.log()
        assert [
            sum(monitor.count_starts(job_id) for monitor in monitors) for job_id in running
        ] == [1] * 3


def test_redis_crashes_again_and_again(
    servers: LocalStack, workload: Workload, tmp_path: Path
) -> None:
    """Repeated crashes of Redis lose no message between the queue and a worker."""
    with monitored_workers(workload.here, tmp_path) as (monitor,):
        workload.send(150)
        for turn in range(3):
            until(lambda turn=turn: workload.finished() > 20 * turn)  # type: ignore[misc]
            crash(servers.valkey)
            servers.valkey.start()
        workload.release()
        workload.verify()
        monitor.assert_running()


def test_both_servers_crash(servers: LocalStack, workload: Workload, tmp_path: Path) -> None:
    """Crashes of both servers at once lose no job."""
    with monitored_workers(workload.here, tmp_path) as (monitor,):
        workload.send_slow(2)
        workload.send(40)
        crash(servers.valkey)
        crash(servers.postgres, signal.SIGQUIT)
        servers.valkey.start()
        servers.postgres.start()
        workload.release()
        workload.verify()
        monitor.assert_running()


def test_redis_demoted_for_a_while(workload: Workload, tmp_path: Path) -> None:
    """Workers back off while Redis accepts no writes, and continue without a restart."""
    redis = workload.here.redis
    with monitored_workers(workload.here, tmp_path) as (monitor,):
        (running,) = workload.send_slow()
        monitor.reset()
        redis.replicaof("127.0.0.1", 1)
        until(lambda: monitor.log().count("Trying to re-establish") >= 3)
        monitor.assert_no_busy_loop()
        redis.replicaof("NO", "ONE")
        workload.send(40)
        workload.release()
        workload.verify()
        assert monitor.count_starts(running) == 1


def test_ledger_missing_for_a_while(workload: Workload, tmp_path: Path) -> None:
    """During an outage of the database jobs stay queued instead of failing one after another."""
    with monitored_workers(workload.here, tmp_path) as (monitor,):
        with ledger_missing(workload.here):
            monitor.reset()
            workload.send(40)
            until(lambda: "no job is claimed: seconds=4" in monitor.log())
            monitor.assert_no_busy_loop()
            assert workload.queued() >= 35
        workload.verify()
        monitor.assert_running()
