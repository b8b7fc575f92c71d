"""The session of one transaction: its settings, its time limits and how statements are executed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sqlalchemy import Connection, CursorResult, Executable, Row
from sqlalchemy.exc import DBAPIError

from storage.driver_errors import driver_errors_translated
from storage.errors import StorageError
from storage.server_connection import CHECK_SECONDS

Rows = Sequence[Row[*tuple[Any, ...]]]

# The first statement of each transaction. Local to it: a pooler may share the session.
SETTINGS = (
    "SELECT pg_backend_pid() AS pid,"
    # Time limits. PostgreSQL 17's transaction_timeout would end a statement that waits for others.
    " set_config('lock_timeout', %(lock)s, true),"
    " set_config('statement_timeout', %(statement)s, true),"
    " set_config('idle_in_transaction_session_timeout', %(idle)s, true),"
    " set_config('client_connection_check_interval', '1s', true),"
    " CASE WHEN current_setting('transaction_timeout', true) <> '0'"
    " THEN set_config('transaction_timeout', '0', true) END,"
    # Durability, and the text format of values.
    " set_config('synchronous_commit', 'on', true),"
    " set_config('DateStyle', 'ISO, MDY', true),"
    " set_config('IntervalStyle', 'postgres', true),"
    " set_config('TimeZone', 'UTC', true),"
    # Every plan uses an index, also a plan cached while the table was small. If no index fits,
    # before PostgreSQL 18 the inflated cost estimate triggers JIT compilation.
    " set_config('enable_seqscan', 'off', true),"
    " set_config('jit', 'off', true)"
)


@dataclass(frozen=True)
class DatabaseLimits:
    """Time limits of one transaction, in seconds.

    Attributes:
        lock: Wait for one lock, in a transaction of one job.
        batch_lock: Wait for one lock, in a transaction of several jobs. If it expires, the jobs are
            settled one by one.
        busy: Wait for a job's lock that another transaction holds.
        unresponsive: Time for which the holder of a job's lock may wait for its client before it is
            terminated, because its worker is dead, disconnected or frozen.
        statement: One statement.
        idle: Time between two statements of a transaction.
        check: Wait for a reply before the server is asked whether it is working on it.
    """

    lock: float = 20
    batch_lock: float = 1
    busy: float = 1
    unresponsive: float = 10
    statement: float = 120
    idle: float = 60
    check: float = CHECK_SECONDS

    @cached_property
    def settings(self) -> Mapping[str, str]:
        """Parameters of :data:`SETTINGS` that are the same for every transaction."""
        return {"statement": f"{self.statement}s", "idle": f"{self.idle}s"}


class Session:
    """One transaction on one connection. The modules of this package add the statements.

    Attributes:
        limits: Time limits of the transaction.
        chunk_size: Number of grants inserted by one statement.
        bulk_threshold: Number of grants or IDs from which a savepoint, a lookup of existing grants
            and a custom plan cost less than they save.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        limits: DatabaseLimits,
        chunk_size: int,
        bulk_threshold: int,
    ) -> None:
        """Send nothing yet; the first statement begins the transaction.

        Args:
            connection: An open connection without a transaction.
            limits: See the class.
            chunk_size: See the class.
            bulk_threshold: See the class.
        """
        self.limits = limits
        self.chunk_size = chunk_size
        self.bulk_threshold = bulk_threshold
        self._connection = connection
        self._has_begun = False

    def query(self, statement: str | Executable, parameters: Any = None) -> Rows:
        """Execute a statement and return its rows.

        Args:
            statement: Text is passed to the driver as it is, without being compiled.
            parameters: Values of the statement's named parameters.

        Raises:
            StorageError: if PostgreSQL or the driver failed.
        """
        with driver_errors_translated():
            return self._run(statement, parameters).all()

    def value(self, statement: str, parameters: Any = None) -> Any:
        """Execute a statement and return its only value; see :meth:`query`.

        Raises:
            ValueError: unless the statement returns exactly one row with one column.
            StorageError: if PostgreSQL or the driver failed.
        """
        ((value,),) = self.query(statement, parameters)
        return value

    def execute(self, statement: str | Executable, parameters: Any = None) -> int:
        """Execute a statement and return the number of rows changed; see :meth:`query`."""
        with driver_errors_translated():
            return self._run(statement, parameters).rowcount

    def begin(self, statement: str, *, lock: float, **parameters: object) -> Rows:
        """Execute a statement that contains :data:`SETTINGS`, and return its rows.

        If it is the first statement and the pooled connection turns out to be lost, it is executed
        on a new connection.

        Args:
            statement: Text that contains the settings, and so returns the column ``pid``.
            lock: The transaction's lock timeout, in seconds.
            parameters: Values of the statement's other parameters.

        Raises:
            StorageError: if PostgreSQL or the driver failed.
        """
        with driver_errors_translated():
            return self._begin(statement, lock=lock, **parameters)

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Roll back to a savepoint if the block raises; the transaction can continue.

        Raises:
            StorageError: if the savepoint could not be set or released.
        """
        with driver_errors_translated():
            savepoint = self._connection.begin_nested()
        try:
            yield
        except BaseException:
            with suppress(StorageError), driver_errors_translated():
                savepoint.rollback()
            raise
        with driver_errors_translated():
            savepoint.commit()

    @contextmanager
    def planned_for(self, size: int) -> Iterator[None]:
        """Plan the block's statements for their actual arrays if these are large.

        A generic plan assumes arrays of ten elements: it may compare each of 100,000 IDs with each
        of 100,000 rows.

        Args:
            size: Number of elements.
        """
        driver: Any = self._connection.connection.driver_connection
        threshold = driver.prepare_threshold
        if size >= self.bulk_threshold:
            driver.prepare_threshold = None
        try:
            yield
        finally:
            driver.prepare_threshold = threshold

    def _run(self, statement: str | Executable, parameters: Any) -> CursorResult[*tuple[Any, ...]]:
        if not self._has_begun:
            self._begin(SETTINGS, lock=self.limits.lock)
        if isinstance(statement, str):
            return self._connection.exec_driver_sql(statement, parameters)
        return self._connection.execute(statement, parameters)

    def _begin(self, statement: str, *, lock: float, **others: object) -> Rows:
        parameters = {**self.limits.settings, "lock": f"{lock}s", **others}
        is_first, self._has_begun = not self._has_begun, True
        try:
            rows = self._connection.exec_driver_sql(statement, parameters).all()
        except DBAPIError as error:
            if not (is_first and error.connection_invalidated):
                raise
            self._connection.rollback()  # the pooled connection was lost since its last use
            rows = self._connection.exec_driver_sql(statement, parameters).all()
        driver: Any = self._connection.connection.driver_connection
        driver.server_pid = rows[0].pid
        return rows
