"""Transactions of a migration: short waits for locks, and no timeouts meant for short statements.

A statement that waits for a table's lock blocks every later statement on that table. So it gives up
after 0.1 s, lets the others proceed, and is retried.

Settings are local to a transaction, because a pooler may give the session to another service next.
Building an index concurrently cannot run in a transaction: :func:`run_concurrently`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from storage import sqlstate
from storage.driver_errors import sqlstate_of
from storage.errors import StorageError

OLD_TRANSACTIONS_SECONDS = 600
"""Longest wait of a concurrent build for transactions that began before it. It blocks nobody."""

_SETTINGS = """
    SELECT pg_backend_pid(),
           set_config('lock_timeout', %(lock)s, %(local)s),
           set_config('statement_timeout', '0', %(local)s),
           set_config('idle_in_transaction_session_timeout', %(idle)s, %(local)s),
           CASE WHEN current_setting('transaction_timeout', true) <> '0'
                THEN set_config('transaction_timeout', '0', %(local)s) END
"""
_LOCK_TIMEOUT = "100ms"
_IDLE_TIMEOUT = "60s"
_RETRY_SECONDS = 0.4  # leaves other statements four fifths of the time


def set_up_transaction(connection: Connection) -> None:
    """Set the timeouts of a migration until the open transaction ends."""
    values = {"lock": _LOCK_TIMEOUT, "idle": _IDLE_TIMEOUT, "local": True}
    (pid, *_) = connection.exec_driver_sql(_SETTINGS, values).one()
    driver: Any = connection.connection.driver_connection
    driver.server_pid = pid


@contextmanager
def transaction(connection: Connection) -> Iterator[None]:
    """Run a transaction on a connection in AUTOCOMMIT."""
    connection.exec_driver_sql("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE")
    try:
        set_up_transaction(connection)
        yield
        connection.exec_driver_sql("COMMIT")
    except BaseException:
        with suppress(SQLAlchemyError):
            connection.exec_driver_sql("ROLLBACK")
        raise


def retry_lock(action: Callable[[], object], *, seconds: float) -> bool:
    """Retry an action that needs a lock until it succeeds or the time is up.

    Args:
        action: Runs in a transaction with the settings of :func:`set_up_transaction`, and rolls
            back what it did if it raises.
        seconds: Time after which no further attempt is made.

    Returns:
        Whether the action succeeded.

    Raises:
        sqlalchemy.exc.DBAPIError: any error of the action but a lock timeout.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            action()
        except DBAPIError as error:
            if sqlstate_of(error) != sqlstate.LOCK_NOT_AVAILABLE:
                raise
            if time.monotonic() >= deadline:
                return False
            time.sleep(_RETRY_SECONDS)
        else:
            return True


def retry_statement(connection: Connection, statement: str, *, seconds: float) -> bool:
    """Execute a statement that needs a lock, each attempt in its own transaction.

    Args:
        connection: A connection in AUTOCOMMIT.
        statement: The statement.
        seconds: See :func:`retry_lock`.

    Returns:
        Whether the statement was executed.

    Raises:
        sqlalchemy.exc.DBAPIError: any error of the statement but a lock timeout.
    """

    def execute() -> None:
        with transaction(connection):
            connection.execute(text(statement))

    return retry_lock(execute, seconds=seconds)


def run_concurrently(
    connection: Connection, statement: str, index: str, *, seconds: int = OLD_TRANSACTIONS_SECONDS
) -> None:
    """Execute CREATE or DROP INDEX CONCURRENTLY, which waits for older transactions to end.

    It cannot run in a transaction, so the timeouts are set for the session and reset afterwards.
    Through a pooler nothing is set, since the reset might reach another session: the role's own
    timeouts apply there.

    Args:
        connection: A connection in AUTOCOMMIT.
        statement: The statement.
        index: The index's name, for errors.
        seconds: Longest wait for older transactions.

    Raises:
        StorageError: if an older transaction stayed open for too long, or the role's
            statement_timeout ended the statement.
        sqlalchemy.exc.DBAPIError: any other error of the statement.
    """
    driver: Any = connection.connection.driver_connection
    if driver.is_pooled:
        driver.checks_without_pid = math.inf  # outside a transaction the session stays unknown
    else:
        values = {"lock": f"{seconds}s", "idle": _IDLE_TIMEOUT, "local": False}
        connection.exec_driver_sql(_SETTINGS, values)
    try:
        connection.exec_driver_sql(statement)
    except DBAPIError as error:
        code = sqlstate_of(error)
        if code == sqlstate.LOCK_NOT_AVAILABLE:
            raise StorageError(
                f"the index {index} waited {seconds} s for transactions that are "
                "still open; find them in pg_stat_activity (the oldest xact_start), end them, "
                "and run migrate again",
                code,
            ) from error
        if driver.is_pooled and code == sqlstate.QUERY_CANCELED:
            raise StorageError(
                f"the index {index} took longer than the role's statement_timeout, which cannot be "
                "changed through a pooler; run migrate with PostgreSQL's own address",
                code,
            ) from error
        raise
    finally:
        if not driver.is_pooled:
            with suppress(SQLAlchemyError):  # a lost connection has nothing to reset
                connection.exec_driver_sql("RESET ALL")
