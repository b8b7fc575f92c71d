"""Fixtures: a site with a worker for all tests of one file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.worker import state as worker_state
from redis import Redis

from devstack.servers import LocalStack
from tests.execution.jobs import CHUNK, LIMIT, ONE, TWO, many
from tests.execution.stepped_worker import LIMITS, PROCESSES, SteppedWorker
from tests.support.pools import SteppedPool, tasks_app
from tests.support.sessions import ManualClock, SteppedLease, connect
from tests.support.workers import QUEUE, Site, migrated_site, worker
from worker.execution.dispatch import Dispatcher


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The worker's log."""
    return tmp_path_factory.mktemp("worker") / "worker.log"


@pytest.fixture(scope="module")
def here(stack: LocalStack, _migrated: str, log: Path) -> Iterator[Site]:
    """A site with a worker and interviews."""
    with migrated_site(stack, _migrated, 1) as here:
        here.store.add_interviews_with_ids([ONE, TWO, *many(LIMIT)])
        settings = {
            "GRANT_MAX_INTERVIEW_IDS": LIMIT,
            "GRANT_CHUNK_SIZE": CHUNK,
            "GRANT_RETRY_LIMIT": 1_000,  # outages of any length are retried
            "GRANT_RETRY_MAX_DELAY": 1,
            "GRANT_CALLBACK_QUEUES": f"{QUEUE},platform",
        }
        with worker(here, log, **settings):
            yield here


@pytest.fixture(scope="module")
def app() -> Celery:
    """An app with the contract's tasks."""
    return tasks_app()


@pytest.fixture
def redis(stack: LocalStack) -> Iterator[Any]:
    """An empty Redis database."""
    with connect(stack) as client:
        client.flushdb()
        yield client


@pytest.fixture
def stepped(redis: Redis, stack: LocalStack, app: Celery) -> Iterator[SteppedWorker]:
    """A worker with three free pool processes."""
    assert redis.dbsize() == 0
    clock = ManualClock()
    lease, pool = SteppedLease(clock, batch_size=10), SteppedPool(PROCESSES)
    dispatcher = Dispatcher(app, pool, "worker@host", lease, LIMITS, clock=clock)
    lease.on_heartbeat = dispatcher.on_heartbeat
    events: list[tuple[str, dict[str, Any]]] = []
    freed: list[int] = []
    dispatcher.send_event = lambda kind, **fields: events.append((kind, fields))
    dispatcher.on_free = lambda: freed.append(dispatcher.free_processes)
    with connect(stack) as client:
        lease.open(client)
        yield SteppedWorker(
            redis=redis, lease=lease, pool=pool, dispatcher=dispatcher, events=events, freed=freed
        )
        lease.close()
    worker_state.reset_state()
