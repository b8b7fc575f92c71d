"""Faults that last longer than a suite should: `make chaos` runs these, by their path."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from devstack.servers import LocalStack
from tests.faults.books import Books, crash, working
from tests.support.stores import until
from tests.support.workers import ledger_missing
from worker.settings import Settings

LEASE_SECONDS = float(Settings.model_fields["grant_lease_seconds"].default)
FROZEN_SECONDS = 2.5 * LEASE_SECONDS


def test_redis_frozen_for_longer_than_two_leases(
    servers: LocalStack, books: Books, tmp_path: Path
) -> None:
    """After a standstill of Redis all workers are alive: none is swept, no job runs twice."""
    with working(books.here, tmp_path, workers=2) as watches:
        running = books.order_slow(3)
        books.order(40)
        os.kill(servers.valkey.pid, signal.SIGSTOP)
        try:
            for watch in watches:
                watch.restart()
            time.sleep(FROZEN_SECONDS)  # the standstill itself
            for watch in watches:
                watch.assert_calm()
        finally:
            os.kill(servers.valkey.pid, signal.SIGCONT)

        until(lambda: len(books.leases()) == 2)
        time.sleep(2 * LEASE_SECONDS)  # in which a sweep would come
        assert len(books.leases()) == 2
        books.release()
        books.until_balanced()
        for watch in watches:
            watch.assert_runs()
            assert "lease expired" not in watch.said()
        assert [sum(watch.starts_of(job_id) for watch in watches) for job_id in running] == [1] * 3


def test_redis_crashes_again_and_again(servers: LocalStack, books: Books, tmp_path: Path) -> None:
    """Messages on their way from the queue into a worker's hands outlive Redis's crashes."""
    with working(books.here, tmp_path) as (watch,):
        books.order(150)
        for turn in range(3):
            until(lambda turn=turn: books.answered() > 20 * turn)  # type: ignore[misc]
            crash(servers.valkey)
            servers.valkey.start()
        books.release()
        books.until_balanced()
        watch.assert_runs()


def test_both_servers_crash(servers: LocalStack, books: Books, tmp_path: Path) -> None:
    """Where both servers are lost at once and come back, nothing else is lost."""
    with working(books.here, tmp_path) as (watch,):
        books.order_slow(2)
        books.order(40)
        crash(servers.valkey)
        crash(servers.postgres, signal.SIGQUIT)
        servers.valkey.start()
        servers.postgres.start()
        books.release()
        books.until_balanced()
        watch.assert_runs()


def test_redis_demoted_for_a_while(books: Books, tmp_path: Path) -> None:
    """Workers wait for a Redis that takes no writes, without haste, and go on by themselves."""
    redis = books.here.redis
    with working(books.here, tmp_path) as (watch,):
        (running,) = books.order_slow()
        watch.restart()
        redis.replicaof("127.0.0.1", 1)
        until(lambda: watch.said().count("Trying to re-establish") >= 3)
        watch.assert_calm()
        redis.replicaof("NO", "ONE")
        books.order(40)
        books.release()
        books.until_balanced()
        assert watch.starts_of(running) == 1


def test_ledger_missing_for_a_while(books: Books, tmp_path: Path) -> None:
    """During an outage of the database jobs stay queued instead of failing one after another."""
    with working(books.here, tmp_path) as (watch,):
        with ledger_missing(books.here):
            watch.restart()
            books.order(40)
            until(lambda: "no job is claimed: seconds=4" in watch.said())
            watch.assert_calm()
            assert books.waiting() >= 35
        books.until_balanced()
        watch.assert_runs()
