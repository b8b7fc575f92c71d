"""Redis crashes, is demoted, is full and cuts connections; the invariants hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import OutOfMemoryError

from devstack.servers import LocalStack
from tests.cli.test_cli import status
from tests.faults.workers import crash, monitored_workers
from tests.faults.workload import INTERVIEWS, Workload
from tests.support.stores import until


def test_redis_crashes(servers: LocalStack, workload: Workload, tmp_path: Path) -> None:
    """Running jobs continue when Redis crashes, and the worker claims none until one finishes."""
    with monitored_workers(workload.here, tmp_path) as (monitor,):
        running = workload.send_slow(2)
        workload.send(40)
        monitor.reset()
        before = workload.live_sessions()
        crash(servers.valkey)
        until(lambda: "Trying again in 3.00 seconds" in monitor.log())
        monitor.assert_no_busy_loop()
        servers.valkey.start()
        until(lambda: "Connected to" in monitor.log())
        until(lambda: workload.live_sessions() != before)
        workload.release()
        workload.verify()
        assert [monitor.count_starts(job_id) for job_id in running] == [1, 1]
        assert monitor.log().index("succeeded") < monitor.log().index("received")


def test_an_idle_worker_detects_that_redis_is_demoted(workload: Workload, tmp_path: Path) -> None:
    """A worker that waits for a message reconnects when its server becomes a replica."""
    with monitored_workers(workload.here, tmp_path) as (monitor,):
        workload.send(1)
        workload.verify()
        monitor.reset()
        workload.here.redis.replicaof("127.0.0.1", "1")
        try:
            until(lambda: "connection to Redis lost" in monitor.log(), within=10)
        finally:
            workload.here.redis.replicaof("NO", "ONE")
        workload.send(5)
        workload.verify()
        monitor.assert_running()


def test_redis_full(workload: Workload, tmp_path: Path) -> None:
    """With a full Redis a worker starts, drains the queue and stores results."""
    workload.send(60)
    workload.here.redis.config_set("maxmemory", 1)
    with pytest.raises(OutOfMemoryError):
        workload.here.redis.set("one", "more")
    with monitored_workers(workload.here, tmp_path) as (monitor,):
        workload.verify()
        monitor.assert_running()


def test_a_full_redis_is_logged_once(workload: Workload, tmp_path: Path) -> None:
    """The log of an idle worker has the beginning of the outage with its cause, and its end."""
    redis = workload.here.redis

    def refused() -> int:
        statistics: Any = redis.info("commandstats")
        return int(statistics.get("cmdstat_blmove", {"rejected_calls": 0})["rejected_calls"])

    with monitored_workers(workload.here, tmp_path) as (monitor,):
        redis.config_set("maxmemory", 1)
        redis.config_resetstat()
        for client in redis.client_list(_type="normal"):
            redis.client_unblock(int(client["id"]))
        until(lambda: refused() > 20)
        redis.config_set("maxmemory", 0)
        until(lambda: monitor.log().count(" again") == 2)
        log = monitor.log()
    causes = re.findall("refuses to wait .*OutOfMemoryError: .*used memory > 'maxmemory'", log)
    assert len(causes) == 2
    for kind in ("jobs", "control requests"):
        assert log.count(f"Redis refuses to wait for {kind}") == 1
        assert log.count(f"Redis permits waiting for {kind} again") == 1
    assert log.count("WARNING") == 2, log


def test_redis_closes_its_connections(workload: Workload, tmp_path: Path) -> None:
    """Connections that are closed repeatedly lose no job, and restart no running one."""
    with monitored_workers(workload.here, tmp_path) as (monitor,):
        (running,) = workload.send_slow()
        workload.send(150)
        for turn in range(10):
            until(lambda turn=turn: workload.finished() > 10 * turn)  # type: ignore[misc]
            workload.here.redis.client_kill_filter(_type="normal", skipme=True)
        workload.release()
        workload.verify()
        monitor.assert_running()
        assert monitor.count_starts(running) == 1


def test_the_results_server_is_away_when_a_job_finishes(
    workload: Workload, result_servers: LocalStack, tmp_path: Path
) -> None:
    """A job that finishes while the results' Redis is away counts once; its result comes later."""
    url = result_servers.broker_url
    settings: dict[str, Any] = {"CELERY_RESULT_BACKEND": url}
    workload.results = Redis(unix_socket_path=url.removeprefix("redis+socket://"))
    with monitored_workers(workload.here, tmp_path, **settings) as (monitor,):
        job_id, _ = workload.send_slow(2)
        workload.send(40)
        monitor.reset()
        crash(result_servers.valkey)
        workload.release()
        until(lambda: "no job is claimed: seconds=2" in monitor.log())
        monitor.assert_no_busy_loop()
        assert workload.queued() >= 35
        known = status(workload.here, job_id, **settings)
        assert (known["state"], known["created"]) == ("succeeded", len(INTERVIEWS))
        result_servers.valkey.start()
        workload.verify()
        monitor.assert_running()
    workload.results.close()
