"""The metrics of a real worker while jobs succeed, fail, are retried and end their pool process."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from interview_access.producer import InterviewAccessClient

from devstack.servers import LocalStack
from devstack.service import Service
from tests.monitoring.endpoint import Endpoint
from tests.support.stores import until
from tests.support.workers import (
    GRANT_ACCESS,
    QUEUE,
    ROOT,
    Site,
    held_grant,
    ledger_missing,
    migrated_site,
    started,
    worker_service,
)
from worker.broker.claims import PREFIX
from worker.monitoring.catalog import OF_JOBS, OF_POSTGRESQL, OF_REDIS, OF_WORKER, with_table
from worker.operations.pause import PauseSwitch

PAGE = ROOT / "docs" / "metrics.md"
UNKNOWN = "a1b2c3d4-0000-4000-8000-000000000000"


@pytest.fixture(scope="module")
def here(stack: LocalStack, _migrated: str) -> Iterator[Site]:
    """A site for the worker."""
    with migrated_site(stack, _migrated, 13) as here:
        yield here


@pytest.fixture(scope="module")
def endpoint() -> Endpoint:
    """The worker's endpoint."""
    return Endpoint()


@pytest.fixture(scope="module")
def worker(
    here: Site, endpoint: Endpoint, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """A worker with metrics, which all tests of this file share."""
    environment = here.environment(
        METRICS_ADDRESS=endpoint.address, GRANT_RETRY_MAX_DELAY=1, GRANT_RETENTION_DAYS=30
    )
    log = tmp_path_factory.mktemp("metrics") / "worker.log"
    with started(worker_service(log, environment)) as service:
        yield service


class Growth:
    """How much counters have grown since it was made."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._before = endpoint.scrape()

    def of(self, name: str, **labels: str) -> float:
        """Return the growth of ``interview_access_NAME`` over the series with these labels."""
        before = self._before.get(f"interview_access_{name}", {})
        fitting = [one for found, one in before.items() if labels.items() <= dict(found).items()]
        return self._endpoint.value(name, **labels) - sum(fitting)

    def until(self, name: str, growth: float, **labels: str) -> None:
        """Wait for a growth: a result is stored before its batch is reported."""
        until(lambda: self.of(name, **labels) >= growth)
        assert self.of(name, **labels) == growth


@pytest.fixture
def growth(endpoint: Endpoint, worker: Service) -> Growth:
    """The growth of the counters during the test."""
    assert worker.alive
    return Growth(endpoint)


@contextmanager
def blocked_job(here: Site, samples: list[str], user: str, **headers: object) -> Iterator[str]:
    """A job that waits within its transaction, with its ID."""
    with held_grant(here, user, samples[0]):
        job_id = str(uuid4())
        here.producer.send_task(
            GRANT_ACCESS, (user, samples[:2]), task_id=job_id, queue="interview-access", **headers
        )
        here.until_state(job_id, "STARTED")
        yield job_id


def test_a_job_that_succeeds(here: Site, growth: Growth, samples: list[str], user: str) -> None:
    """It counts once, with its grants: requested, repeated, already granted and created."""
    here.answer(here.send(user, samples[:2]))
    here.answer(here.send(user, [*samples[:5], samples[4]]))
    growth.until("jobs_total", 2, task=GRANT_ACCESS, outcome="succeeded", error="")
    assert growth.of("grants_requested_total", task=GRANT_ACCESS) == 8
    assert growth.of("grants_repeated_total") == 1
    assert growth.of("grants_already_granted_total") == 2
    assert growth.of("grants_created_total") == 5
    assert growth.of("job_requested_grants_sum") == 8
    assert growth.of("batch_jobs_sum") == 2


@pytest.mark.parametrize(
    ("ids", "error"),
    [([UNKNOWN], "InvalidInterviewIdException"), (7, "InvalidGrantRequestException")],
)
def test_a_job_that_fails(here: Site, growth: Growth, user: str, ids: object, error: str) -> None:
    """It counts under the class of its error, and adds no grants."""
    here.answer(here.send(user, ids))
    growth.until("jobs_total", 1, task=GRANT_ACCESS, outcome="failed", error=error)
    assert growth.of("jobs_total") == 1
    assert growth.of("grants_requested_total") == 0


def test_a_job_that_expires(here: Site, growth: Growth, samples: list[str], user: str) -> None:
    """It counts as expired."""
    past = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    job_id = str(uuid4())
    here.producer.send_task(
        GRANT_ACCESS, (user, samples), task_id=job_id, queue="interview-access", expires=past
    )
    growth.until("jobs_total", 1, outcome="expired", error="JobExpiredException")


def test_a_job_that_is_cancelled(here: Site, growth: Growth, samples: list[str], user: str) -> None:
    """It counts as cancelled."""
    job_id = str(uuid4())
    with InterviewAccessClient(here.broker) as client:
        client.cancel(job_id)
    here.send(user, samples, job_id=job_id)
    growth.until("jobs_total", 1, outcome="cancelled", error="JobCancelledException")


def test_a_job_that_is_cancelled_while_it_waits(
    here: Site, growth: Growth, samples: list[str], user: str
) -> None:
    """It counts at the worker that replies, once, and its delivery as a repeated one."""
    with InterviewAccessClient(here.broker) as client:
        job_id = client.enqueue(user_id=user, interview_ids=samples, countdown=600)
        assert client.cancel(job_id).state == "cancelled"
        assert client.cancel(job_id).state == "cancelled"
    growth.until(
        "jobs_total", 1, task=GRANT_ACCESS, outcome="cancelled", error="JobCancelledException"
    )
    here.send(user, samples, job_id=job_id)
    growth.until("repeated_deliveries_total", 1, task=GRANT_ACCESS)
    assert growth.of("jobs_total") == 1


def test_a_cancelled_job_whose_pool_process_had_ended(
    here: Site, growth: Growth, samples: list[str], user: str
) -> None:
    """It counts when it is cancelled, and not at the delivery after the crash."""
    switch = PauseSwitch(here.redis)
    switch.pause("ann@host", "crash")
    try:
        with InterviewAccessClient(here.broker) as client:
            job_id = client.enqueue(user_id=user, interview_ids=samples)
            waiting: Any = here.redis.lrange(QUEUE, 0, -1)
            (digest,) = (hashlib.sha1(one).hexdigest() for one in waiting)  # noqa: S324 - as the claim script does
            here.redis.hset(f"{PREFIX}tries", digest, 1)
            assert client.cancel(job_id).state == "cancelled"
    finally:
        switch.resume()
    growth.until("repeated_deliveries_total", 1, task=GRANT_ACCESS)
    assert growth.of("jobs_total", outcome="cancelled") == 1


def test_a_job_that_is_repeated(here: Site, growth: Growth, samples: list[str], user: str) -> None:
    """A second delivery counts apart, and another request under its ID as refused."""
    job_id = here.send(user, samples[:3])
    here.answer(job_id)
    growth.until("jobs_total", 1)
    here.send(user, samples[:3], job_id=job_id)
    growth.until("repeated_deliveries_total", 1)
    assert growth.of("grants_created_total") == 3
    here.send(user, samples[:4], job_id=job_id)
    growth.until("jobs_total", 1, outcome="refused", error="JobIdReusedException")
    growth.until("dead_lettered_jobs_total", 1, task=GRANT_ACCESS)


def test_a_task_that_is_unknown(here: Site, growth: Growth) -> None:
    """Its name is not the value of a label."""
    here.answer(here.send(task="made.up"))
    growth.until("jobs_total", 1, task="other", outcome="failed", error="JobFailedError")


def test_a_message_that_cannot_be_read(here: Site, growth: Growth, user: str) -> None:
    """It does not count as a failed job of the task that it names."""
    job_id = str(uuid4())
    here.producer.send_task(
        GRANT_ACCESS, (user, []), task_id=job_id, queue=QUEUE, serializer="yaml"
    )
    assert "cannot be read" in here.answer(job_id)["result"]["exc_message"][0]
    here.redis.lpush(QUEUE, json.dumps({"headers": {"task": GRANT_ACCESS}, "properties": {}}))
    growth.until("jobs_total", 2, task="other", outcome="failed", error="JobFailedError")
    assert growth.of("dead_lettered_jobs_total", task=GRANT_ACCESS) == 2


def test_a_job_that_is_retried(
    here: Site, growth: Growth, endpoint: Endpoint, samples: list[str], user: str
) -> None:
    """Retries count by class of PostgreSQL's error code, and the circuit breaker shows."""
    with ledger_missing(here):
        job_id = here.send(user, samples[:2])
        until(lambda: growth.of("job_retries_total", task=GRANT_ACCESS, error_class="42") > 0)
        assert endpoint.value("circuit_breaker_state", state="closed") == 0
        assert growth.of("jobs_total") == 0
    here.answer(job_id)
    growth.until("jobs_total", 1, outcome="succeeded")
    assert endpoint.value("circuit_breaker_state", state="closed") == 1


def test_a_crash_of_a_pool_process(
    here: Site, growth: Growth, endpoint: Endpoint, samples: list[str], user: str
) -> None:
    """It counts once, and so does its job, which is executed again."""
    with blocked_job(here, samples, user) as job_id:
        assert endpoint.value("pool_processes", state="busy") == 1
        assert endpoint.value("worker_claimed_jobs") == 1
        os.kill(here.meta(job_id)["result"]["pid"], signal.SIGKILL)
        growth.until("pool_process_losses_total", 1, reason="crash")
    here.answer(job_id)
    growth.until("jobs_total", 1, outcome="succeeded")
    assert growth.of("grants_created_total") == 2
    until(lambda: endpoint.value("pool_processes", state="idle") == 2)


def test_a_frozen_pool_process(
    here: Site, growth: Growth, endpoint: Endpoint, samples: list[str], user: str
) -> None:
    """Its job's time limit ends it; the worker is live and ready meanwhile."""
    with blocked_job(here, samples, user, time_limit=2) as job_id:
        os.kill(here.meta(job_id)["result"]["pid"], signal.SIGSTOP)
        assert endpoint.is_live
        assert endpoint.is_ready
        growth.until("pool_process_losses_total", 1, reason="time_limit")
    here.answer(job_id)
    growth.until("jobs_total", 1, outcome="succeeded")


def test_the_time_in_the_queue(
    here: Site, growth: Growth, endpoint: Endpoint, samples: list[str], user: str
) -> None:
    """It is measured for messages of the client package, and shows jobs that wait."""
    switch = PauseSwitch(here.redis)
    switch.pause("ann@host", 'maintenance "of" the\nplatform')
    try:
        with InterviewAccessClient(here.broker) as client:
            job_id = client.enqueue(user_id=user, interview_ids=samples[:2])
        until(lambda: endpoint.value("queue_oldest_age_seconds", lane="priority-0") > 1)
        assert endpoint.value("queue_jobs", lane="priority-0") == 1
        assert endpoint.value("queue_paused") == 1
        info = endpoint.scrape()["interview_access_queue_pause_info"]
        assert [dict(labels)["by"] for labels in info] == ["ann@host"]
        assert endpoint.is_ready
        until(lambda: bool(endpoint.health("/readyz")[1]["paused"]))
    finally:
        switch.resume()
    here.answer(job_id)
    growth.until("job_queue_seconds_count", 1, task=GRANT_ACCESS)
    assert growth.of("job_queue_seconds_sum") > 1


def test_the_time_in_the_queue_of_an_invalid_header(
    here: Site, growth: Growth, samples: list[str], user: str
) -> None:
    """A header that is not a time is not measured, and harms no job."""
    job_id = str(uuid4())
    here.producer.send_task(
        GRANT_ACCESS,
        (user, samples[:2]),
        task_id=job_id,
        queue="interview-access",
        headers={"enqueued_at": "soon"},
    )
    assert here.answer(job_id)["status"] == "SUCCESS"
    growth.until("jobs_total", 1)
    assert growth.of("job_queue_seconds_count") == 0


@pytest.mark.parametrize("task", [GRANT_ACCESS, "other"])
def test_a_series_begins_at_zero(endpoint: Endpoint, worker: Service, task: str) -> None:
    """A failure that has not happened yet has a series, so that a rate counts the first one."""
    assert worker.alive
    series = endpoint.scrape()["interview_access_jobs_total"]
    for error in ("StorageUnavailableException", "JobFailedError", "InvalidInterviewIdException"):
        assert (("error", error), ("outcome", "failed"), ("task", task)) in series


def test_the_ledger_and_the_outbox(here: Site, growth: Growth, endpoint: Endpoint) -> None:
    """Their sizes and the ages of their oldest rows are served."""
    here.answer(here.send("anyone", []))
    growth.until("jobs_total", 1)
    until(lambda: endpoint.value("ledger_rows") > 0)  # PostgreSQL's statistics are late
    assert endpoint.value("ledger_bytes") > 0
    assert endpoint.value("ledger_oldest_age_seconds") > 0
    assert endpoint.value("retention_seconds") == 30 * 86_400
    assert endpoint.value("dead_letters_limit_bytes") == 256_000_000
    assert endpoint.value("outbox_requests", state="unsent") == 0
    assert endpoint.value("source_up") == 2


def test_every_metric_is_in_the_catalog(here: Site, endpoint: Endpoint, growth: Growth) -> None:
    """Names and labels are those of the catalog, and no label has the ID of a job or a user."""
    user, job_id = str(uuid4()), here.send("who", [UNKNOWN], job_id=f"job-{uuid4()}")
    here.answer(job_id)
    growth.until("jobs_total", 1)
    catalog = {one.name: one for one in (*OF_JOBS, *OF_WORKER, *OF_REDIS, *OF_POSTGRESQL)}
    for name, samples in endpoint.scrape().items():
        base = max((one for one in catalog if name.startswith(one)), key=len)
        suffix = name.removeprefix(base)
        assert suffix in ({"_bucket", "_count", "_sum"} if catalog[base].buckets else {""})
        for labels in samples:
            assert {key for key, _ in labels} - {"le"} == {*catalog[base].labels}, name
            assert not any(one in value for _, value in labels for one in (user, job_id, UNKNOWN))


def test_a_scrape_is_not_delayed_by_a_slow_client(endpoint: Endpoint, growth: Growth) -> None:
    """Connections that send nothing take no more than their share, and end."""
    host, port = endpoint.address.split(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(8)]
    began = time.monotonic()
    assert endpoint.is_live
    assert growth.of("jobs_total") == 0
    assert time.monotonic() - began < 3
    for one in silent:
        one.close()


def test_the_page_has_the_table_of_the_catalog() -> None:
    """docs/metrics.md is what `make metrics-table` writes."""
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page) == page


def test_a_port_in_use(here: Site, endpoint: Endpoint, worker: Service, tmp_path: Path) -> None:
    """A second worker on the address ends with one sentence."""
    assert worker.alive
    environment = here.environment(METRICS_ADDRESS=endpoint.address)
    second = worker_service(tmp_path / "second.log", environment)
    second.start()
    assert second.wait(30) == 1
    said = second.log.read_text(encoding="utf-8")
    assert f"METRICS_ADDRESS: got {endpoint.address}, expected an address of this host with" in said
    assert "Traceback" not in said


def test_a_health_file_that_cannot_be_written(here: Site, tmp_path: Path) -> None:
    """The worker ends with one sentence."""
    environment = here.environment(HEALTH_FILE=tmp_path / "missing" / "health")
    service = worker_service(tmp_path / "worker.log", environment)
    service.start()
    assert service.wait(30) == 1
    said = service.log.read_text(encoding="utf-8")
    assert "HEALTH_FILE: got" in said
    assert "Traceback" not in said
