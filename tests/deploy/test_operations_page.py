"""docs/operations.md: the connections of a worker, and who may list lost jobs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner
from interview_access.contracts import GrantJob
from interview_access.producer import InterviewAccessClient

from devstack.servers import LocalStack
from tests.deploy.servers import Servers
from tests.monitoring.endpoint import Endpoint
from tests.support.stores import until
from tests.support.workers import ROOT, Site, migrated_site, started, worker_service
from worker.cli import main

PAGE = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
NUMBER = 8  # of the Redis database
JOBS = 1_000


@pytest.fixture(scope="module")
def here(stack: LocalStack, _migrated: str) -> Iterator[Site]:
    """A site for workers."""
    with migrated_site(stack, _migrated, NUMBER) as here:
        yield here


def documented(server: str) -> tuple[int, int]:
    """Return the connections that the page states, beside the pool processes: without, with all."""
    (row,) = re.findall(rf"^\| {server} \| N \+ (\d+) \| N \+ (\d+) \|$", PAGE, re.MULTILINE)
    return int(row[0]), int(row[1])


@pytest.mark.parametrize("everything", [False, True], ids=["default", "metrics and pruning"])
def test_a_worker_has_the_documented_connections(
    here: Site, tmp_path: Path, *, everything: bool
) -> None:
    """Under load and after it, to PostgreSQL exactly as many, to Redis no more than stated."""
    processes = 2
    endpoint = Endpoint()
    settings = {"METRICS_ADDRESS": endpoint.address, "GRANT_RETENTION_DAYS": 30}
    environment = here.environment(**(settings if everything else {}))
    ids = here.store.add_interviews(3)
    service = worker_service(tmp_path / "worker.log", environment, processes=processes)
    others = redis_clients(here)  # of commands that ran in this process before
    with started(service), closing(InterviewAccessClient(here.broker)) as client:
        sent = client.enqueue_many([GrantJob(f"user-{number}", ids) for number in range(JOBS)])
        most = 0
        while here.meta(sent[-1])["status"] == "PENDING":
            most = max(most, len(redis_clients(here) - others))
        client.status(sent[0])
        if everything:
            endpoint.scrape()
        until(lambda: connections_to_postgresql(here) >= processes + documented("PostgreSQL")[0])
        expected = processes + documented("PostgreSQL")[everything]
        until(lambda: connections_to_postgresql(here) == expected)
        most = max(most, len(redis_clients(here) - others))
        assert processes < most <= processes + documented("Redis")[everything]


def connections_to_postgresql(here: Site) -> int:
    """Count the worker's connections, as PostgreSQL names them."""
    return int(
        here.store.value(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name = 'interview-access-worker'"
        )
    )


def redis_clients(here: Site) -> set[str]:
    """Return the IDs of the workers' connections, as Redis names them."""
    clients = here.redis.client_list()
    return {client["id"] for client in clients if client["name"] == "interview-access-worker"}


def test_the_workers_credentials_suffice_for_lost_jobs(servers: Servers) -> None:
    """The worker's role and user may list and forget lost jobs."""
    meta = '{"status": "SUCCESS", "task_id": "lost", "result": {"created_access_count": 1}}'
    servers.admin.set("celery-task-meta-lost", meta)
    done = CliRunner().invoke(
        main, ["lost-jobs", "--forget", "--yes"], env=servers.environment("worker", "worker")
    )
    assert (done.exit_code, done.stderr) == (0, "1 lost job forgotten.\n")
    assert not servers.admin.exists("celery-task-meta-lost")
