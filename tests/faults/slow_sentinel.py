"""Failover of Redis under load: the primary is killed, and Sentinels promote a replica."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from interview_access.errors import InterviewAccessError
from interview_access.producer import InterviewAccessClient
from redis.exceptions import RedisError
from sqlalchemy import text

from devstack.service import Service
from tests.support.database import connected
from tests.support.sentinels import Sentinels, sentinels_of
from tests.support.stores import until
from tests.support.workers import Site, worker

PROMOTED_WITHIN = 20.0  # seconds; Sentinels agree after 2 s that the primary is down
RESUMED_WITHIN = 15.0  # seconds after the promotion
FINISHED_WITHIN = 60.0  # seconds
PAUSE = 0.015  # seconds between two jobs
DELAY = 8.0  # seconds, longer than a failover


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Sentinels]:
    """A primary, two replicas and three Sentinels."""
    with sentinels_of(tmp_path / "redis", replicas=2, sentinels=3) as servers:
        yield servers


@pytest.fixture
def running(here: Site, servers: Sentinels, tmp_path: Path) -> Iterator[Service]:
    """A worker behind the Sentinels."""
    with worker(here, tmp_path / "worker.log", **servers.environment()) as service:
        yield service


class Load:
    """Producers that continue during the failover, and the fate of their jobs.

    Attributes:
        accepted: IDs of enqueued jobs, in order.
        replicated: How many of these a replica has confirmed.
        outbox: IDs of jobs requested in the database.
    """

    def __init__(self, here: Site, servers: Sentinels, ids: list[str]) -> None:
        """Send nothing before :meth:`running`."""
        self._here = here
        self._servers = servers
        self._ids = ids
        self._over = threading.Event()
        self.accepted: list[str] = []
        self.replicated = 0
        self.outbox: list[str] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Produce until the block is left."""
        works = (self._produce, self._request, self._confirm)
        threads = [threading.Thread(target=one) for one in works]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in threads:
                thread.join()

    def _produce(self) -> None:
        client = InterviewAccessClient(self._servers.url)
        while not self._over.wait(PAUSE):
            number = len(self.accepted)
            user_id, interview_ids = f"user-{number % 40}", [self._ids[number % len(self._ids)]]
            with suppress(InterviewAccessError):  # sent again under its ID
                client.enqueue(user_id, interview_ids, job_id=f"job-{number}")
                self.accepted.append(f"job-{number}")
        client.close()

    def _request(self) -> None:
        """Request jobs in the database, independently of Redis."""
        with connected(self._here.store.database_url) as database:
            while not self._over.wait(10 * PAUSE):
                job_id = f"outbox-{len(self.outbox)}"
                database.execute(
                    text(
                        "INSERT INTO grant_access_request (job_id, user_id, interview_ids)"
                        " VALUES (:job_id, 'outbox', :ids)"
                    ),
                    {"job_id": job_id, "ids": self._ids},
                )
                database.commit()
                self.outbox.append(job_id)

    def _confirm(self) -> None:
        """Record how many accepted jobs a replica has confirmed."""
        while not self._over.wait(0.1):
            count = len(self.accepted)
            # WAIT covers only writes of its own connection, and with them all earlier ones.
            with (
                suppress(RedisError),
                self._servers.redis(self._servers.primary()) as redis,
                redis.client() as connection,
            ):
                connection.set("confirmed", count)
                if connection.wait(1, 500):
                    self.replicated = count


def finished(here: Site) -> set[str]:
    """Return the IDs of the jobs in the ledger."""
    with connected(here.store.database_url) as database:
        return set(database.execute(text("SELECT job_id FROM grant_access_job")).scalars())


def promoted(servers: Sentinels, killed: int) -> bool:
    """Whether the Sentinels have promoted another primary."""
    with suppress(RedisError):
        return servers.primary() != killed
    return False


def verify_counts(here: Site, service: Service) -> None:
    """Verify that the created counts equal the grants, and that the worker runs."""
    counted = here.store.value("SELECT sum(created) FROM grant_access_job")
    assert counted == here.store.rows()
    assert service.alive


def test_failover_under_load(
    here: Site, servers: Sentinels, running: Service, ids: list[str]
) -> None:
    """Work continues without a restart, and no job that a replica confirmed is lost."""
    load = Load(here, servers, ids)
    with load.running():
        until(lambda: load.replicated > 150)
        primary, confirmed = servers.primary(), load.replicated
        servers.kill(primary)
        until(lambda: promoted(servers, primary), within=PROMOTED_WITHIN)
        before = len(finished(here))
        until(lambda: len(finished(here)) > before + 20, within=RESUMED_WITHIN)
        accepted = len(load.accepted)
        until(lambda: len(load.accepted) > accepted + 150, within=FINISHED_WITHIN)
    kept = {*load.accepted[:confirmed], *load.accepted[accepted:], *load.outbox}
    until(lambda: kept <= finished(here), within=FINISHED_WITHIN)
    until(lambda: here.store.value("SELECT count(*) FROM grant_access_request") == 0)
    verify_counts(here, running)


def test_only_unreplicated_jobs_are_lost(
    here: Site, servers: Sentinels, running: Service, ids: list[str]
) -> None:
    """Delayed jobs that no replica has are lost; replicated ones and database requests are not."""
    client = InterviewAccessClient(servers.url)

    def delayed(name: str) -> set[str]:
        return {
            client.enqueue(f"{name}-{number}", ids, job_id=f"{name}-{number}", countdown=DELAY)
            for number in range(20)
        }

    primary = servers.primary()
    kept = delayed("replicated")
    with servers.redis(primary) as redis, redis.client() as connection:
        connection.set("confirmed", 1)
        assert connection.wait(2, 5_000) == 2
    for port in servers.redis_ports:
        if port != primary:
            with servers.redis(port) as replica:
                replica.replicaof("127.0.0.1", 1)
    lost = delayed("unreplicated")
    here.store.execute(
        "INSERT INTO grant_access_request (job_id, user_id, interview_ids)"
        " VALUES ('outbox', 'outbox', :ids)",
        ids=ids,
    )
    until(lambda: "outbox" in finished(here))
    servers.kill(primary)
    until(lambda: promoted(servers, primary), within=PROMOTED_WITHIN)
    until(lambda: kept <= finished(here), within=FINISHED_WITHIN)
    after = InterviewAccessClient(servers.url)
    assert after.wait(after.enqueue("after", ids), timeout=30)["created_access_count"] == len(ids)
    after.close()
    client.close()
    assert not lost & finished(here)
    verify_counts(here, running)
