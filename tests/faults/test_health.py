"""Health of a real worker under faults of its servers and of its own processes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from devstack.servers import LocalStack
from devstack.service import Service
from tests.faults.workers import crash
from tests.faults.workload import Workload
from tests.monitoring.endpoint import Endpoint
from tests.support.stores import until
from tests.support.workers import ROOT, started, worker_service

LIVE, READY = (
    line.partition("#")[0].strip()
    for line in (ROOT / "docs" / "running.md").read_text(encoding="utf-8").splitlines()
    if line.startswith('find "$HEALTH_FILE"')
)


@pytest.fixture
def endpoint() -> Endpoint:
    """The worker's endpoint."""
    return Endpoint()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The worker's health file."""
    return tmp_path / "health"


@pytest.fixture
def worker(workload: Workload, endpoint: Endpoint, file: Path) -> Iterator[Service]:
    """A ready worker."""
    environment = workload.here.environment(
        METRICS_ADDRESS=endpoint.address, HEALTH_FILE=file, GRANT_STOP_GRACE=20
    )
    with started(worker_service(file.with_name("worker.log"), environment)) as service:
        until(lambda: endpoint.is_ready)
        until(lambda: passes(READY, file))
        yield service


def passes(probe: str, file: Path) -> bool:
    """Run a probe of the page in sh, without anything else than the system's commands."""
    done = subprocess.run(
        ["/bin/sh", "-c", probe],
        env={"PATH": "/usr/bin:/bin", "HEALTH_FILE": str(file)},
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


def test_redis_is_away(
    servers: LocalStack, workload: Workload, worker: Service, endpoint: Endpoint, file: Path
) -> None:
    """The worker is live and not ready, serves its own metrics, and is ready again afterwards."""
    crash(servers.valkey)
    until(lambda: not endpoint.is_ready and not passes(READY, file))
    # The main thread has left its event loop for longer than it is silent while it reconnects.
    until(lambda: b"Trying again in 4.00 seconds" in worker.log.read_bytes())
    began = time.monotonic()
    assert endpoint.value("worker_main_thread_age_seconds") < 3
    assert endpoint.value("source_up", source="redis") == 0
    assert time.monotonic() - began < 5
    assert endpoint.is_live
    assert passes(LIVE, file)
    assert not endpoint.is_ready
    assert endpoint.value("source_up", source="postgresql") == 1
    assert "interview_access_queue_jobs" not in endpoint.scrape()
    servers.valkey.start()
    until(lambda: endpoint.is_ready and passes(READY, file))
    workload.send(3)
    workload.verify()
    assert worker.alive


def test_postgresql_is_away(
    servers: LocalStack, worker: Service, endpoint: Endpoint, file: Path
) -> None:
    """The worker is live and not ready, and ready again afterwards."""
    servers.postgres.stop()
    until(lambda: not endpoint.is_ready)
    assert "PostgreSQL is not reached" in endpoint.health("/readyz")[1]["reasons"]
    assert endpoint.is_live
    until(lambda: endpoint.value("source_up", source="postgresql") == 0)
    assert endpoint.value("source_up", source="redis") == 1
    servers.postgres.start()
    until(lambda: endpoint.is_ready and passes(READY, file))
    assert worker.alive


def test_frozen_servers_do_not_delay_a_scrape(
    servers: LocalStack, worker: Service, endpoint: Endpoint
) -> None:
    """A scrape waits for two seconds at most, also if the one before it is still waiting."""
    os.kill(servers.valkey.pid, signal.SIGSTOP)
    try:
        until(lambda: not endpoint.is_ready)
        for _ in range(3):
            began = time.monotonic()
            endpoint.scrape()
            assert time.monotonic() - began < 3
        assert endpoint.is_live
    finally:
        os.kill(servers.valkey.pid, signal.SIGCONT)
    until(lambda: endpoint.is_ready)
    assert worker.alive


def test_the_main_process_is_frozen(worker: Service, endpoint: Endpoint, file: Path) -> None:
    """Neither probe passes while the main process is frozen; both do afterwards."""
    os.kill(worker.pid, signal.SIGSTOP)
    try:
        until(lambda: not passes(LIVE, file))
        assert not passes(READY, file)
        with pytest.raises(TimeoutError):
            endpoint.get("/healthz")
    finally:
        os.kill(worker.pid, signal.SIGCONT)
    until(lambda: endpoint.is_live and passes(LIVE, file))
    until(lambda: endpoint.is_ready)


def test_a_graceful_shutdown(
    workload: Workload, worker: Service, endpoint: Endpoint, file: Path
) -> None:
    """The worker is not ready at once, live until its job has finished, and leaves no file."""
    (job_id,) = workload.send_slow()
    workload.here.until_state(job_id, "STARTED")
    os.kill(worker.pid, signal.SIGTERM)
    until(lambda: not endpoint.is_ready, within=3)
    until(lambda: not passes(READY, file), within=3)
    time.sleep(3)  # a part of the grace period: no event marks that the worker stays live in it
    assert endpoint.is_live
    assert passes(LIVE, file)
    workload.release()
    until(lambda: not worker.alive)
    assert not file.exists()
    assert workload.here.meta(job_id)["status"] == "SUCCESS"


def test_pool_processes_do_not_keep_the_port(workload: Workload, worker: Service) -> None:
    """Only the main process has the socket, so that its successor can listen at once."""
    (job_id,) = workload.send_slow()
    workload.here.until_state(job_id, "STARTED")
    pool_process = workload.here.meta(job_id)["result"]["pid"]
    assert [one.status for one in psutil.Process(worker.pid).net_connections("tcp")] == ["LISTEN"]
    assert psutil.Process(pool_process).net_connections("tcp") == []
    workload.release()
