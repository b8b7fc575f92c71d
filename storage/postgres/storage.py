"""The storage and its transaction, composed of the roles in the modules beside this one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg
from sqlalchemy import PoolProxiedConnection, event

from storage.connections import open_engine, parse_url
from storage.driver_errors import driver_errors_translated
from storage.dtos import (
    AccessRequestDTO,
    FinishedJobDTO,
    FinishedJobFilterDTO,
    GrantOriginDTO,
    LedgerTotalsDTO,
    OutboxTotalsDTO,
    PrunedJobDTO,
)
from storage.errors import StorageError
from storage.interface import HasFileno, Storage, Transaction
from storage.postgres.audit import PostgresAudit
from storage.postgres.erasure import PostgresErasure
from storage.postgres.grant_chunks import register_uuid_arrays
from storage.postgres.grants import PostgresGrants
from storage.postgres.interviews import PostgresInterviews
from storage.postgres.ledger import PostgresLedger
from storage.postgres.notifications import RequestNotifications
from storage.postgres.outbox import HAS_DUE_REQUESTS, PostgresOutbox
from storage.postgres.retention import PostgresRetention
from storage.postgres.session import DatabaseLimits

_REPLY_GRACE_SECONDS = 30  # added to the statement timeout before a reply counts as lost


class PostgresTransaction(
    PostgresLedger,
    PostgresAudit,
    PostgresRetention,
    PostgresErasure,
    PostgresGrants,
    PostgresInterviews,
    PostgresOutbox,
    Transaction,
):
    """One transaction on one connection, in all roles."""


class PostgresStorage(Storage):
    """The storage on PostgreSQL. Create one in each process: connections do not survive a fork."""

    def __init__(
        self,
        database_url: str,
        *,
        chunk_size: int = 10_000,
        bulk_threshold: int = 1_000,
        limits: DatabaseLimits | None = None,
    ) -> None:
        """Prepare the engine; the first statement connects.

        Args:
            database_url: ``postgresql://…``, with or without ``+psycopg``.
            chunk_size: Number of grants inserted by one statement.
            bulk_threshold: Number of grants from which statements for many grants are used.
            limits: Time limits of each transaction.

        Raises:
            StorageError: if the URL is not a PostgreSQL URL.
        """
        self._limits = limits or DatabaseLimits()
        self._chunk_size = chunk_size
        self._bulk_threshold = bulk_threshold
        self._engine = open_engine(
            parse_url(database_url),
            application_name="interview-access-worker",
            check_seconds=self._limits.check,
            reply_seconds=self._limits.statement + _REPLY_GRACE_SECONDS,
            pool_size=1,
            max_overflow=-1,  # a pool process has one thread and keeps one connection
        )
        event.listen(self._engine, "connect", register_uuid_arrays)

    @contextmanager
    def transaction(self) -> Iterator[PostgresTransaction]:
        """See the interface."""
        with driver_errors_translated():
            connection = self._engine.connect()
        try:
            yield PostgresTransaction(
                connection,
                limits=self._limits,
                chunk_size=self._chunk_size,
                bulk_threshold=self._bulk_threshold,
            )
            with driver_errors_translated():
                connection.commit()
        except StorageError as error:
            if error.needs_new_connection:
                with driver_errors_translated():
                    connection.invalidate()
            raise
        finally:
            with driver_errors_translated():
                connection.close()

    def get_finished_job(self, job_id: str) -> FinishedJobDTO | None:
        """See the interface."""
        with self.transaction() as transaction:
            return transaction.find_job_with_details(job_id)

    def get_pruned_job(self, job_id: str) -> PrunedJobDTO | None:
        """See the interface."""
        with self.transaction() as transaction:
            return transaction.find_jobs([job_id]).pruned.get(job_id)

    def get_request(self, job_id: str) -> AccessRequestDTO | None:
        """See the interface."""
        with self.transaction() as transaction:
            return transaction.find_request(job_id)

    def is_cancelled(self, job_id: str) -> bool:
        """See the interface."""
        with self.transaction() as transaction:
            return bool(transaction.find_cancelled_jobs([job_id]))

    def list_finished_jobs(
        self, wanted: FinishedJobFilterDTO, limit: int
    ) -> Sequence[FinishedJobDTO]:
        """See the interface."""
        with self.transaction() as transaction:
            return transaction.list_finished_jobs(wanted, limit)

    def find_grant_origin(self, user_id: str, interview_id: str) -> GrantOriginDTO:
        """See the interface."""
        with self.transaction() as transaction:
            return transaction.find_grant_origin(user_id, interview_id)

    def measure_ledger(self) -> LedgerTotalsDTO:
        """See the interface."""
        with self.transaction() as transaction:
            return transaction.measure_ledger()

    def count_requests(self) -> OutboxTotalsDTO:
        """See the interface."""
        with self.transaction() as transaction:
            return transaction.count_requests()

    def list_unsent_requests(self, after: str, limit: int) -> Sequence[str]:
        """See the interface."""
        with self.transaction() as transaction:
            return transaction.list_unsent_requests(after, limit)

    def schedule_all_requests_now(self) -> None:
        """See the interface."""
        with self.transaction() as transaction:
            transaction.schedule_all_requests_now()

    def has_due_requests(self) -> bool:
        """See the interface. One statement without settings: an idle worker executes no other."""
        with self._raw_connection() as connection:
            driver: Any = connection.driver_connection
            ((has_due,),) = driver.execute(HAS_DUE_REQUESTS).fetchall()
            driver.commit()
        return bool(has_due)

    def wait_for_requests(self, seconds: float, wakeup: HasFileno | None = None) -> bool | None:
        """See the interface. Returns None through a pooler, where no notification arrives."""
        with self._raw_connection() as connection:
            return RequestNotifications.of(connection).wait(seconds, wakeup)

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    @contextmanager
    def _raw_connection(self) -> Iterator[PoolProxiedConnection]:
        """Check out the driver's connection, without SQLAlchemy's transactions."""
        with driver_errors_translated():
            connection = self._engine.raw_connection()
            try:
                yield connection
            except psycopg.Error as error:
                connection.invalidate(error)
                raise
            finally:
                connection.close()
