"""Errors of a storage: classification, translation, and the connection afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import make_url

from storage.errors import JobBusyError, LedgerError, StorageError
from storage.interface import Storage
from storage.postgres import PostgresStorage, PostgresTransaction
from tests.storage.transactions import failing_transaction
from tests.support.database import role
from tests.support.stores import PostgresStore


def with_options(database_url: str, **options: str) -> str:
    """Return the URL with additional connection options."""
    url = make_url(database_url).update_query_dict(options)
    return url.render_as_string(hide_password=False)


@contextmanager
def storage_of(database_url: str) -> Iterator[PostgresStorage]:
    """Open a storage and close it at the end."""
    storage = PostgresStorage(database_url)
    try:
        yield storage
    finally:
        storage.close()


class TestOutage:
    """Classification of errors: those of one job, and outages that would fail every job."""

    @pytest.mark.parametrize(
        "sqlstate",
        [
            None,  # no server replied
            *("08006", "08P01", "28P01", "3D000"),  # no connection
            *("53100", "53300", "57P01", "57P03", "58030"),  # the server is full, ends or fails
            *("25006", "42501", "42P01", "42703", "42P10", "55000", "F0000"),  # not set up for us
            *("HV000", "ZZ999"),  # nothing that we know of
        ],
    )
    def test_unknown_codes_are_outages(self, sqlstate: str | None) -> None:
        """An error is an outage unless its code is known to concern one job."""
        assert StorageError("reason", sqlstate).is_outage

    @pytest.mark.parametrize(
        "sqlstate",
        [
            *("21000", "22001", "22P02", "23503", "23505", "40001", "40P01", "44000", "54000"),
            *("P0001", "XX000", "XX001", "55P03", "57014"),
            *("25P02", "25P03", "25P04", "26000", "42P05", "0A000"),
        ],
    )
    def test_errors_of_one_job_are_no_outage(self, sqlstate: str) -> None:
        """Errors of values, rows, locks and one connection are no outage."""
        assert not StorageError("reason", sqlstate).is_outage

    def test_busy_jobs_and_ledger_errors_are_no_outage(self) -> None:
        """A busy job and a ledger error concern their own jobs."""
        assert not JobBusyError("reason").is_outage
        assert not LedgerError("reason").is_outage


class TestDriverErrors:
    """Every exception of SQLAlchemy and psycopg leaves the storage as StorageError."""

    def test_unknown_option_is_an_outage(self, migrated_url: str) -> None:
        """A connection option unknown to libpq is an outage: jobs wait until it is corrected."""
        with (
            pytest.raises(StorageError, match="only options of libpq; unknown: mode") as caught,
            storage_of(with_options(migrated_url, mode="public")) as storage,
        ):
            storage.is_cancelled("a")
        assert caught.value.is_outage

    @pytest.mark.parametrize(
        "url",
        [
            "mysql://ann:geheim@db/x",
            "postgresql://ann:ge@heim@db/x",
            "postgresql://ann:geheim@db:port/x",
            "postgresql://db/x?host=a:1&host=b:2&port=3&password=geheim",
            "postgresql://ann:geheim@/x?host=/nonexistent&connect_timeout=soon",
            "postgresql://ann:geheim@/x?host=/nonexistent&sslmode=perhaps",
            "geheim",
        ],
    )
    def test_invalid_url_is_an_outage(self, url: str) -> None:
        """An invalid URL is an outage; the error contains no part of its password."""
        with pytest.raises(StorageError) as caught, storage_of(url) as storage:
            storage.is_cancelled("a")
        assert caught.value.is_outage
        assert "geheim" not in str(caught.value)
        assert "heim" not in str(caught.value)

    def test_unreadable_value_is_no_outage(self, postgres: PostgresStore) -> None:
        """A value that the driver cannot convert concerns the job that reads it."""
        with pytest.raises(StorageError) as caught, postgres.storage.transaction() as transaction:
            transaction.query("SELECT 'infinity'::timestamptz")
        assert not caught.value.is_outage

    def test_missing_privilege_is_an_outage(self, postgres: PostgresStore) -> None:
        """A missing privilege is an outage."""
        with role(postgres.database_url) as url, storage_of(url) as storage:
            with pytest.raises(StorageError) as caught:
                storage.is_cancelled("a")
            assert caught.value.sqlstate == "42501"
            assert caught.value.is_outage


class TestFailedTransaction:
    """The connection after a failed transaction."""

    @pytest.mark.parametrize(
        "error",
        [
            JobBusyError("another transaction holds the job's lock"),
            LedgerError("a defect"),
            StorageError("an interview is missing", "23503"),
            ValueError("none of the storage's"),
        ],
    )
    def test_connection_is_kept_after_an_error_of_one_job(
        self, postgres: PostgresStore, error: Exception
    ) -> None:
        """After an error of one job the connection is rolled back and used again."""
        before = server_process(postgres.storage)
        with failing_transaction(type(error), postgres.storage) as transaction:
            transaction.request_cancellation("a")
            raise error
        assert server_process(postgres.storage) == before
        assert not postgres.storage.is_cancelled("a")

    @pytest.mark.parametrize("sqlstate", [None, "57P01", "26000", "42P05", "0A000"])
    def test_connection_is_replaced_after_an_outage(
        self, postgres: PostgresStore, sqlstate: str | None
    ) -> None:
        """After an outage or a stale prepared statement a new connection is opened."""
        before = server_process(postgres.storage)
        with failing_transaction(StorageError, postgres.storage) as transaction:
            transaction.request_cancellation("a")
            raise StorageError("reason", sqlstate)
        assert server_process(postgres.storage) != before
        assert not postgres.storage.is_cancelled("a")


def server_process(storage: Storage) -> int:
    """Return the process ID of the storage's only connection."""
    with storage.transaction() as transaction:
        assert isinstance(transaction, PostgresTransaction)
        return int(transaction.value("SELECT pg_backend_pid()", None))
