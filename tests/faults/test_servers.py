"""PostgreSQL and Redis stop, crash, refuse and lose connections; the books balance all the same."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import OutOfMemoryError

from tests.faults.books import INTERVIEWS, Books, working
from tests.stores import until
from tests.test_cli import status
from worker.local_stack import LocalStack, Service


def crash(server: Service, how: signal.Signals = signal.SIGKILL) -> None:
    """End a server as no operator would."""
    os.kill(server.pid, how)
    server.wait()


def test_postgresql_stopped_for_a_while(servers: LocalStack, books: Books, tmp_path: Path) -> None:
    """Jobs that run and wait outlive a PostgreSQL that is away; the queue is not run through."""
    with working(books.here, tmp_path) as (watch,):
        books.order_slow(2)
        books.order(40)
        watch.restart()
        servers.postgres.stop()
        until(lambda: "no job is taken for 4 s" in watch.said())
        watch.assert_calm()
        assert books.waiting() >= 35
        servers.postgres.start()
        books.release()
        books.until_balanced()
        watch.assert_runs()


def test_postgresql_crashes(servers: LocalStack, books: Books, tmp_path: Path) -> None:
    """Jobs that ran while PostgreSQL crashed run again, and count once."""
    with working(books.here, tmp_path) as (watch,):
        books.order_slow(2)
        books.order(40)
        crash(servers.postgres, signal.SIGQUIT)
        servers.postgres.start()
        books.release()
        books.until_balanced()
        watch.assert_runs()


def test_postgresql_ends_its_backends(books: Books, tmp_path: Path) -> None:
    """A backend that is ended under a job, again and again, costs a try and nothing else."""
    with working(books.here, tmp_path) as (watch,):
        books.order_slow(2)
        books.order(100)
        books.release()
        for turn in range(5):
            until(lambda turn=turn: books.answered() > 10 * turn)  # type: ignore[misc]
            books.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'interview-access-worker'"
            )
        books.until_balanced()
        watch.assert_runs()


def test_postgresql_read_only_for_a_while(books: Books, tmp_path: Path) -> None:
    """Jobs wait for a database that takes no writes, and the queue is not run through."""
    with working(books.here, tmp_path) as (watch,):
        books.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        books.execute("SELECT pg_reload_conf()")
        until(lambda: books.value("SHOW default_transaction_read_only") == "on")
        watch.restart()
        books.order(40)
        until(lambda: "no job is taken for 4 s" in watch.said())
        watch.assert_calm()
        assert books.waiting() >= 35
        books.execute("ALTER SYSTEM RESET default_transaction_read_only")
        books.execute("SELECT pg_reload_conf()")
        books.until_balanced()
        watch.assert_runs()


def test_redis_crashes(servers: LocalStack, books: Books, tmp_path: Path) -> None:
    """A busy worker outlives the crash of Redis with its jobs, and takes no more than before."""
    with working(books.here, tmp_path) as (watch,):
        running = books.order_slow(2)
        books.order(40)
        watch.restart()
        before = books.leases()
        crash(servers.valkey)
        until(lambda: "Trying again in 4.00 seconds" in watch.said())
        watch.assert_calm()
        servers.valkey.start()
        until(lambda: "all alone" in watch.said())
        until(lambda: books.leases() != before)
        books.release()
        books.until_balanced()
        assert [watch.starts_of(job_id) for job_id in running] == [1, 1]
        assert watch.said().index("succeeded") < watch.said().index("received")


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


def test_redis_full(books: Books, tmp_path: Path) -> None:
    """Where Redis is full, a worker starts, the queue drains, and results are stored."""
    books.order(60)
    books.here.redis.config_set("maxmemory", 1)
    with pytest.raises(OutOfMemoryError):
        books.here.redis.set("one", "more")
    with working(books.here, tmp_path) as (watch,):
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
        until(lambda: "no job is taken for 2 s" in watch.said())
        watch.assert_calm()
        assert books.waiting() >= 35
        told = status(books.here, job_id, **settings)
        assert (told["state"], told["created"]) == ("succeeded", len(INTERVIEWS))
        results.valkey.start()
        books.until_balanced()
        watch.assert_runs()
    books.results.close()
