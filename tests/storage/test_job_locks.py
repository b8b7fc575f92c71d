"""Job locks. Some tests hold one transaction open while another thread runs a second one."""

from __future__ import annotations

import psycopg
import pytest
from sqlalchemy import make_url

from storage.dtos import RequestedGrantsDTO
from storage.errors import JobBusyError, LedgerConflictError, StorageError
from storage.postgres import DatabaseLimits, PostgresStorage
from tests.storage.transactions import can_lock, failing_transaction, finished, lock
from tests.support.database import role
from tests.support.stores import PATIENCE_SECONDS, Background, PostgresStore, Store, until


class TestLockJobs:
    """``lock_jobs`` on every storage."""

    def test_wait_locks_all(self, store: Store) -> None:
        """With ``wait``, all IDs are returned."""
        assert lock(store.storage, ["b", "a", "c"], wait=True) == {"a", "b", "c"}

    def test_no_wait_locks_all_free_jobs(self, store: Store) -> None:
        """Without ``wait``, all free IDs are returned."""
        assert lock(store.storage, ["b", "a", "c"], wait=False) == {"a", "b", "c"}

    def test_wait_blocks_on_the_holder(self, store: Store) -> None:
        """With ``wait``, the call returns after the transaction that holds a lock has ended."""
        ends: list[str] = []

        def second() -> None:
            assert lock(store.storage, ["a", "b"], wait=True) == {"a", "b"}
            ends.append("second")

        with store.storage.transaction() as first:
            first.lock_jobs(["b"], wait=True)
            other = Background(second)
            store.until_waiting(other)
            ends.append("first")
        other.result()
        assert ends == ["first", "second"]

    def test_no_wait_skips_locked_jobs(self, store: Store) -> None:
        """Without ``wait``, an ID that another transaction has locked is not returned."""
        with store.storage.transaction() as first:
            first.lock_jobs(["b"], wait=True)
            other = Background(lambda: lock(store.storage, ["a", "b"], wait=False))
            store.until_waiting(other)
            is_concurrent = other.over
        assert other.result() == ({"a"} if is_concurrent else {"a", "b"})

    def test_rollback_releases_locks(self, store: Store) -> None:
        """A transaction that raised holds no lock."""
        with failing_transaction(KeyError, store.storage) as transaction:
            transaction.lock_jobs(["a"], wait=True)
            raise KeyError
        assert lock(store.storage, ["a"], wait=False) == {"a"}


class TestHolders:
    """Locks that another PostgreSQL transaction holds."""

    def test_no_wait_returns_at_once(self, postgres: PostgresStore) -> None:
        """Without ``wait``, the call returns while another transaction holds a lock."""
        with postgres.storage.transaction() as first:
            first.lock_jobs(["b"], wait=True)
            other = Background(lambda: lock(postgres.storage, ["a", "b"], wait=False))
            assert other.result() == {"a"}

    def test_duplicate_delivery_terminates_an_unresponsive_holder(
        self, postgres: PostgresStore
    ) -> None:
        """A duplicate delivery terminates the transaction of a stopped worker and gets the lock."""
        (interview_id,) = postgres.add_interviews(1)
        limits = DatabaseLimits(busy=0.05, unresponsive=0)
        with (
            postgres.another(limits=limits) as duplicate,
            failing_transaction(StorageError, postgres.storage, sqlstate="57P01") as stopped,
        ):
            stopped.lock_jobs(["a"], wait=True)
            stopped.record_jobs([finished("a")])
            assert lock(duplicate, ["a", "b"], wait=True) == {"a", "b"}
            stopped.bulk_create_user_access([RequestedGrantsDTO("ann", (interview_id,))])
        assert postgres.granted("ann") == []

    def test_responsive_holder_continues(self, postgres: PostgresStore) -> None:
        """A holder between two statements continues within the limit; the job is busy."""
        limits = DatabaseLimits(busy=0.05, unresponsive=PATIENCE_SECONDS)
        with postgres.another(limits=limits) as duplicate:
            with postgres.storage.transaction() as holder:
                holder.lock_jobs(["a"], wait=True)
                with pytest.raises(JobBusyError):
                    lock(duplicate, ["a"], wait=True)
                holder.record_jobs([finished("a")])
            assert lock(duplicate, ["a"], wait=True) == {"a"}

    def test_running_statement_is_never_terminated(self, postgres: PostgresStore) -> None:
        """A holder with a running statement continues, however long the statement takes."""
        limits = DatabaseLimits(busy=0.05, unresponsive=0, statement=PATIENCE_SECONDS)

        def hold() -> None:
            with failing_transaction(LedgerConflictError, postgres.storage) as holder:
                holder.lock_jobs(["a"], wait=True)
                holder.record_jobs([finished("a")])

        with (
            postgres.another(limits=limits) as duplicate,
            postgres.another() as other,
        ):
            with other.transaction() as blocking:
                blocking.record_jobs([finished("a")])
                holder = Background(hold)
                postgres.until_waiting(holder)
                with pytest.raises(JobBusyError):
                    lock(duplicate, ["a"], wait=True)
            holder.result()

    def test_lock_of_another_role_is_ignored(self, postgres: PostgresStore) -> None:
        """A lock that another role holds does not block a job: the primary key decides alone."""
        limits = DatabaseLimits(busy=0.05, unresponsive=0)
        with (
            role(postgres.database_url, "pg_read_all_stats") as url,
            postgres.storage.transaction() as holder,
        ):
            holder.lock_jobs(["a"], wait=True)
            storage = PostgresStorage(url, limits=limits)
            assert lock(storage, ["a"], wait=True) == {"a"}
            storage.close()

    def test_holder_that_receives_no_rows_is_terminated(self, postgres: PostgresStore) -> None:
        """A holder whose client receives no rows is terminated after the statement timeout.

        No timeout of the server ends that statement: it blocks in sending.
        """
        limits = DatabaseLimits(busy=0.05, statement=1)
        url = make_url(postgres.database_url).set(drivername="postgresql")
        with (
            psycopg.connect(url.render_as_string(hide_password=False)) as holder,
            postgres.another(limits=limits) as duplicate,
        ):
            holder.execute(
                "SELECT pg_advisory_xact_lock(hashtextextended('grant_access_job:a', 0))"
            )
            holder.pgconn.send_query(b"SELECT repeat('x', 1000) FROM generate_series(1, 100000)")
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'ClientWrite'"
            until(lambda: postgres.value(waiting) == 1)
            until(lambda: can_lock(duplicate, "a"))
            holder.close()
