"""Redis crashes, refuses, is full and cuts connections; the books balance all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import OutOfMemoryError

from devstack.servers import LocalStack
from tests.cli.test_cli import status
from tests.faults.books import INTERVIEWS, Books, crash, working
from tests.support.stores import until


def test_redis_crashes(servers: LocalStack, books: Books, tmp_path: Path) -> None:
    """A busy worker outlives the crash of Redis with its jobs, and takes no more than before."""
    with working(books.here, tmp_path) as (watch,):
        running = books.order_slow(2)
        books.order(40)
        watch.restart()
        before = books.leases()
        crash(servers.valkey)
        until(lambda: "Trying again in 3.00 seconds" in watch.said())
        watch.assert_calm()
        servers.valkey.start()
        until(lambda: "Connected to" in watch.said())
        until(lambda: books.leases() != before)
        books.release()
        books.until_balanced()
        assert [watch.starts_of(job_id) for job_id in running] == [1, 1]
        assert watch.said().index("succeeded") < watch.said().index("received")


def test_an_idle_worker_notices_that_redis_is_demoted(books: Books, tmp_path: Path) -> None:
    """A worker that waits for a message reconnects, though its wait is not answered any more."""
    with working(books.here, tmp_path) as (watch,):
        books.order(1)
        books.until_balanced()
        watch.restart()
        books.here.redis.replicaof("127.0.0.1", "1")
        try:
            until(lambda: "connection to Redis lost" in watch.said(), within=10)
        finally:
            books.here.redis.replicaof("NO", "ONE")
        books.order(5)
        books.until_balanced()
        watch.assert_runs()


def test_redis_full(books: Books, tmp_path: Path) -> None:
    """Where Redis is full, a worker starts, the queue drains, and results are stored."""
    books.order(60)
    books.here.redis.config_set("maxmemory", 1)
    with pytest.raises(OutOfMemoryError):
        books.here.redis.set("one", "more")
    with working(books.here, tmp_path) as (watch,):
        books.until_balanced()
        watch.assert_runs()


def test_redis_drops_its_clients(books: Books, tmp_path: Path) -> None:
    """Connections that are cut again and again cost no job, and no running one another try."""
    with working(books.here, tmp_path) as (watch,):
        (running,) = books.order_slow()
        books.order(150)
        for turn in range(10):
            until(lambda turn=turn: books.answered() > 10 * turn)  # type: ignore[misc]
            books.here.redis.client_kill_filter(_type="normal", skipme=True)
        books.release()
        books.until_balanced()
        watch.assert_runs()
        assert watch.starts_of(running) == 1


def test_the_results_server_is_away_when_a_job_ends(
    books: Books, results: LocalStack, tmp_path: Path
) -> None:
    """A job whose result has nowhere to go counts once, and its result comes when it can."""
    settings: dict[str, Any] = {"CELERY_RESULT_BACKEND": results.broker_url}
    books.results = Redis(unix_socket_path=results.broker_url.removeprefix("redis+socket://"))
    with working(books.here, tmp_path, **settings) as (watch,):
        job_id, _ = books.order_slow(2)
        books.order(40)
        watch.restart()
        crash(results.valkey)
        books.release()
        until(lambda: "no job is claimed: seconds=2" in watch.said())
        watch.assert_calm()
        assert books.waiting() >= 35
        told = status(books.here, job_id, **settings)
        assert (told["state"], told["created"]) == ("succeeded", len(INTERVIEWS))
        results.valkey.start()
        books.until_balanced()
        watch.assert_runs()
    books.results.close()
