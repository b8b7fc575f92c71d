"""PostgreSQL stops, crashes, refuses and cuts connections; the books balance all the same."""

from __future__ import annotations

import signal
from pathlib import Path

from devstack.servers import LocalStack
from tests.faults.books import Books, crash, working
from tests.support.stores import until


def test_postgresql_stopped_for_a_while(servers: LocalStack, books: Books, tmp_path: Path) -> None:
    """Jobs that run and wait outlive a PostgreSQL that is away; the queue is not run through."""
    with working(books.here, tmp_path) as (watch,):
        books.order_slow(2)
        books.order(40)
        watch.restart()
        servers.postgres.stop()
        until(lambda: "no job is claimed: seconds=4" in watch.said())
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
