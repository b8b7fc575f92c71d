"""Transactions: atomicity, isolation, durability, time limits and errors."""

from __future__ import annotations

from uuid import uuid4

import pytest
from sqlalchemy.exc import DBAPIError

from storage.dtos import FinishedJobDTO, RequestedGrantsDTO
from storage.errors import StorageError
from storage.postgres import DatabaseLimits, PostgresStorage
from tests.storage.transactions import (
    an_attempt,
    create_grants,
    failing_transaction,
    finish,
    finished,
    lock,
)
from tests.support.stores import Background, PostgresStore, Store


class TestTransaction:
    """``transaction``."""

    def test_commit_stores_everything(self, store: Store) -> None:
        """Grants, attempts and jobs of one transaction are all stored."""
        (interview_id,) = store.add_interviews(1)
        attempt = an_attempt(interview_id)
        with store.storage.transaction() as transaction:
            transaction.bulk_create_user_access([RequestedGrantsDTO("ann", (interview_id,))])
            transaction.create_interview_attempt([attempt])
            transaction.record_jobs([finished("a", 1)])
        assert store.granted("ann") == [interview_id]
        assert list(store.attempts()) == [attempt]
        assert store.storage.get_finished_job("a") == finished("a", 1)

    def test_uncommitted_changes_are_invisible(self, store: Store) -> None:
        """No other transaction sees a grant or a job before the commit."""
        (interview_id,) = store.add_interviews(1)

        def seen() -> tuple[list[str], FinishedJobDTO | None]:
            return store.granted("ann"), store.storage.get_finished_job("a")

        with store.storage.transaction() as transaction:
            transaction.bulk_create_user_access([RequestedGrantsDTO("ann", (interview_id,))])
            transaction.record_jobs([finished("a", 1)])
            reader = Background(seen)
            store.until_waiting(reader)
            is_concurrent = reader.over
        assert reader.result() == (
            ([], None) if is_concurrent else ([interview_id], finished("a", 1))
        )

    def test_exception_rolls_back(self, store: Store) -> None:
        """An exception leaves the block unchanged, and nothing of the transaction is stored."""
        (interview_id,) = store.add_interviews(1)
        with failing_transaction(KeyError, store.storage) as one:
            one.bulk_create_user_access([RequestedGrantsDTO("ann", (interview_id,))])
            one.create_interview_attempt([an_attempt(interview_id)])
            one.record_jobs([finished("a", 1)])
            raise KeyError("the block raises")
        assert store.granted("ann") == []
        assert list(store.attempts()) == []
        assert store.storage.get_finished_job("a") is None

    def test_next_transaction_works_after_a_failure(self, store: Store) -> None:
        """After a failed transaction the next one works."""
        (interview_id,) = store.add_interviews(1)
        with pytest.raises(StorageError):
            create_grants(store.storage, "ann", str(uuid4()))
        assert create_grants(store.storage, "ann", interview_id) == 1

    def test_granted_interview_cannot_be_deleted(self, store: Store) -> None:
        """The platform cannot delete an interview that a user has access to."""
        (interview_id,) = store.add_interviews(1)
        create_grants(store.storage, "ann", interview_id)
        assert not store.delete_interview(interview_id)
        assert store.granted("ann") == [interview_id]


TERMINATE = (
    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
    " WHERE datname = current_database() AND application_name = 'interview-access-worker'"
)


class TestPostgresTransaction:
    """Isolation, durability, time limits and errors of a PostgreSQL transaction."""

    def test_isolation_is_read_committed(self, postgres: PostgresStore) -> None:
        """A grant committed after this transaction began is an existing grant."""
        ids = postgres.add_interviews(2)
        with postgres.storage.transaction() as transaction:
            assert list(transaction.get_existing_user_access(["ann"])) == []
            other = Background(lambda: create_grants(postgres.storage, "ann", ids[0]))
            assert other.result() == 1
            requested = RequestedGrantsDTO("ann", tuple(ids))
            assert transaction.bulk_create_user_access([requested]) == [1]

    def test_commit_is_synchronous(self, postgres: PostgresStore) -> None:
        """A commit is synchronous, also if the default of the database is not."""
        postgres.configure("synchronous_commit", "off")
        postgres.execute("CREATE TABLE seen (synchronous_commit text)")
        postgres.execute(
            "CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " INSERT INTO seen VALUES (current_setting('synchronous_commit')); RETURN NULL; END $$"
        )
        postgres.execute(
            "CREATE TRIGGER look AFTER INSERT ON grant_access_job"
            " FOR EACH STATEMENT EXECUTE FUNCTION look()"
        )
        with postgres.another() as storage:
            finish(storage, finished("a"))
        assert postgres.value("SELECT synchronous_commit FROM seen") == "on"

    @pytest.mark.parametrize(
        ("waits", "lock_timeout"), [(None, "20000"), (True, "20000"), (False, "1000")]
    )
    def test_time_limits_apply_from_the_first_statement(
        self, postgres: PostgresStore, waits: bool | None, lock_timeout: str
    ) -> None:
        """Time limits apply from the first statement on, whichever that is."""
        postgres.execute("CREATE TABLE seen (name text, setting text)")
        postgres.execute(
            "CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " INSERT INTO seen SELECT name, setting FROM pg_settings; RETURN NULL; END $$"
        )
        postgres.execute(
            "CREATE TRIGGER look AFTER INSERT ON grant_access_job"
            " FOR EACH STATEMENT EXECUTE FUNCTION look()"
        )
        with postgres.storage.transaction() as transaction:
            if waits is not None:
                transaction.lock_jobs(["a"], wait=waits)
            transaction.record_jobs([finished("a")])
        assert {
            name: postgres.value("SELECT setting FROM seen WHERE name = :name", name=name)
            for name in (
                *("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout"),
                "client_connection_check_interval",
            )
        } == {
            "lock_timeout": lock_timeout,
            "statement_timeout": "120000",
            "idle_in_transaction_session_timeout": "60000",
            "client_connection_check_interval": "1000",
        }

    def test_lock_timeout(self, postgres: PostgresStore) -> None:
        """A wait for a lock ends at its limit with a transient error."""
        with (
            postgres.another(limits=DatabaseLimits(lock=0.05)) as impatient,
            postgres.storage.transaction() as holder,
        ):
            holder.record_jobs([finished("a", 1)])
            with failing_transaction(StorageError, impatient, sqlstate="55P03") as transaction:
                transaction.record_jobs([finished("a", 1)])

    def test_statement_timeout(self, postgres: PostgresStore) -> None:
        """A statement ends at its limit with a transient error."""
        with (
            postgres.another(limits=DatabaseLimits(statement=0.05)) as impatient,
            postgres.storage.transaction() as holder,
        ):
            holder.lock_jobs(["a"], wait=True)
            with failing_transaction(StorageError, impatient, sqlstate="57014") as transaction:
                transaction.lock_jobs(["a"], wait=True)

    def test_idle_timeout(self, postgres: PostgresStore) -> None:
        """The server ends a transaction that is idle for too long, with a transient error."""
        with (
            postgres.another(limits=DatabaseLimits(idle=0.05)) as frozen,
            failing_transaction(StorageError, frozen, sqlstate="25P03") as transaction,
        ):
            transaction.lock_jobs(["a"], wait=True)
            assert lock(postgres.storage, ["a"], wait=True)
            transaction.lock_jobs(["b"], wait=True)

    def test_terminated_backend(self, postgres: PostgresStore) -> None:
        """A terminated connection is a transient error, and the next transaction works."""
        with failing_transaction(StorageError, postgres.storage, sqlstate="57P01") as transaction:
            transaction.lock_jobs(["a"], wait=True)
            postgres.value(TERMINATE)
            transaction.lock_jobs(["b"], wait=True)
        assert lock(postgres.storage, ["a"], wait=False) == {"a"}

    def test_connection_lost_inside_commit(self, postgres: PostgresStore) -> None:
        """If it is unknown whether the transaction committed, the error is transient."""
        postgres.execute(
            "CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$"
        )
        postgres.execute(
            "CREATE CONSTRAINT TRIGGER die AFTER INSERT ON grant_access_job"
            " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION die()"
        )
        reached_the_end = False
        with failing_transaction(StorageError, postgres.storage, sqlstate="57P01") as transaction:
            transaction.record_jobs([finished("a")])
            reached_the_end = True
        assert reached_the_end
        assert postgres.storage.get_finished_job("a") is None

    def test_deadlock(self, postgres: PostgresStore) -> None:
        """A deadlock caused by others is a transient error of one of the two transactions."""
        postgres.configure("deadlock_timeout", "20ms")

        def second() -> None:
            with storage.transaction() as transaction:
                transaction.record_jobs([finished("b")])
                transaction.record_jobs([finished("a")])

        with postgres.another() as storage:
            errors = []
            try:
                with storage.transaction() as first:
                    first.record_jobs([finished("a")])
                    other = Background(second)
                    postgres.until_waiting(other)
                    first.record_jobs([finished("b")])
            except StorageError as error:
                errors.append(error)
            try:
                other.result()
            except StorageError as error:
                errors.append(error)
        (deadlock,) = errors
        assert not deadlock.is_outage
        assert deadlock.sqlstate == "40P01"

    def test_unreachable_server(self) -> None:
        """An unreachable server is an error without a code and without the password."""
        url = "postgresql+psycopg://ann:geheim@/interviews?host=/nonexistent"
        with pytest.raises(StorageError) as caught:
            lock(PostgresStorage(url), ["a"], wait=True)
        assert caught.value.sqlstate is None
        assert isinstance(caught.value.__cause__, DBAPIError)
        assert "geheim" not in repr(caught.value)

    def test_missing_table(self, postgres: PostgresStore) -> None:
        """A missing table is an outage."""
        postgres.execute("DROP TABLE grant_access_job")
        with pytest.raises(StorageError) as caught:
            finish(postgres.storage, finished("a"))
        assert caught.value.is_outage
        assert caught.value.sqlstate == "42P01"
        assert "grant_access_job" in str(caught.value)

    def test_chained_driver_error_omits_parameters(self, postgres: PostgresStore) -> None:
        """The chained driver error, which is logged, omits the statement's parameters."""
        postgres.execute("ALTER TABLE grant_access_job DROP COLUMN created")
        with pytest.raises(StorageError) as caught:
            finish(postgres.storage, finished("job-of-the-row"))
        assert "job-of-the-row" not in str(caught.value.__cause__)
