"""PostgreSQL stops, crashes and ends connections; the invariants hold."""

from __future__ import annotations

import signal
from pathlib import Path

from devstack.servers import LocalStack
from tests.faults.workers import crash, monitored_workers
from tests.faults.workload import Workload
from tests.support.stores import until


def test_postgresql_stopped_for_a_while(
    servers: LocalStack, workload: Workload, tmp_path: Path
) -> None:
    """During an outage of PostgreSQL jobs stay queued instead of failing one after another."""
    with monitored_workers(workload.here, tmp_path) as (monitor,):
        workload.send_slow(2)
        workload.send(40)
        monitor.reset()
        servers.postgres.stop()
        until(lambda: "no job is claimed: seconds=4" in monitor.log())
        monitor.assert_no_busy_loop()
        assert workload.queued() >= 35
        servers.postgres.start()
        workload.release()
        workload.verify()
        monitor.assert_running()


def test_postgresql_crashes(servers: LocalStack, workload: Workload, tmp_path: Path) -> None:
    """Jobs that run when PostgreSQL crashes run again and count once."""
    with monitored_workers(workload.here, tmp_path) as (monitor,):
        workload.send_slow(2)
        workload.send(40)
        crash(servers.postgres, signal.SIGQUIT)
        servers.postgres.start()
        workload.release()
        workload.verify()
        monitor.assert_running()


def test_postgresql_ends_its_backends(workload: Workload, tmp_path: Path) -> None:
    """Jobs whose backends are terminated repeatedly are retried and count once."""
    with monitored_workers(workload.here, tmp_path) as (monitor,):
        workload.send_slow(2)
        workload.send(100)
        workload.release()
        for turn in range(5):
            until(lambda turn=turn: workload.finished() > 10 * turn)  # type: ignore[misc]
            workload.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'interview-access-worker'"
            )
        workload.verify()
        monitor.assert_running()
