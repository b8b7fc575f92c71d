"""Transactions of a migration: no timeouts meant for short statements, and brief waits for locks.

A statement that waits for a table's lock holds up everyone who comes after it. So it gives up
after a tenth of a second, lets the others pass, and asks again.

Settings are local to a transaction, for a pooler may give the session to another service next. One
kind of statement cannot run in a transaction, the concurrent build of an index:
:func:`run_concurrently`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from storage.errors import StorageError

OLD_TRANSACTIONS_SECONDS = 600
"""How long a concurrent build waits for transactions that began before it; nobody waits for it."""

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
_PAUSE_SECONDS = 0.4  # between two tries: four fifths of the time belong to the others
_LOCK_NOT_AVAILABLE = "55P03"
_STATEMENT_TOOK_TOO_LONG = "57014"


def sqlstate(error: DBAPIError) -> str | None:
    """PostgreSQL's code of an error, or None where no server answered."""
    code: str | None = getattr(error.orig, "sqlstate", None)
    return code


def is_lock_timeout(error: DBAPIError) -> bool:
    """Whether a statement gave up waiting for a lock."""
    return sqlstate(error) == _LOCK_NOT_AVAILABLE


def set_up_transaction(connection: Connection) -> None:
    """Set, until the open transaction ends, what a migration's transaction needs."""
    values = {"lock": _LOCK_TIMEOUT, "idle": _IDLE_TIMEOUT, "local": True}
    (pid, *_) = connection.exec_driver_sql(_SETTINGS, values).one()
    driver: Any = connection.connection.driver_connection
    driver.server_pid = pid


@contextmanager
def transaction(connection: Connection) -> Iterator[None]:
    """A transaction of a connection in AUTOCOMMIT."""
    connection.exec_driver_sql("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE")
    try:
        set_up_transaction(connection)
        yield
        connection.exec_driver_sql("COMMIT")
    except BaseException:
        with suppress(SQLAlchemyError):
            connection.exec_driver_sql("ROLLBACK")
        raise


def got_briefly(action: Callable[[], object], *, seconds: float) -> bool:
    """Do what needs a lock, as often as it takes for ``seconds``; False where it never got it.

    Args:
        action: Runs in a transaction as of :func:`set_up_transaction`, and undoes what it did where
            it raises.
        seconds: After which no new try is made.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            action()
        except DBAPIError as error:
            if not is_lock_timeout(error):
                raise
            if time.monotonic() >= deadline:
                return False
            time.sleep(_PAUSE_SECONDS)
        else:
            return True


def executed_briefly(connection: Connection, statement: str, *, seconds: float) -> bool:
    """Execute a statement that needs a lock, each try in a transaction of its own, likewise."""

    def execute() -> None:
        with transaction(connection):
            connection.execute(text(statement))

    return got_briefly(execute, seconds=seconds)


def run_concurrently(
    connection: Connection, statement: str, index: str, *, seconds: int = OLD_TRANSACTIONS_SECONDS
) -> None:
    """Run CREATE or DROP INDEX CONCURRENTLY, which wait for the transactions before them.

    Its settings are the session's, since it cannot run in a transaction, and are reset after it.
    Behind a pooler nothing is set: the reset might reach another session than the one that was
    set. The timeouts of the role apply to it there.

    Args:
        connection: In AUTOCOMMIT.
        statement: The statement.
        index: The index's name.
        seconds: How long it may wait.

    Raises:
        StorageError: One of them stayed open for too long.
    """
    driver: Any = connection.connection.driver_connection
    if driver.is_pooled:
        driver.checks_without_pid = math.inf  # no transaction, so the session is not known
    else:
        values = {"lock": f"{seconds}s", "idle": _IDLE_TIMEOUT, "local": False}
        connection.exec_driver_sql(_SETTINGS, values)
    try:
        connection.exec_driver_sql(statement)
    except DBAPIError as error:
        if is_lock_timeout(error):
            raise StorageError(
                f"the index {index} waited {seconds} s for transactions that are "
                "still open; look for them in pg_stat_activity (the oldest xact_start), end them, "
                "and run migrate again",
                sqlstate(error),
            ) from error
        if driver.is_pooled and sqlstate(error) == _STATEMENT_TOOK_TOO_LONG:
            raise StorageError(
                f"the index {index} took longer than the role's statement_timeout, which cannot be "
                "changed through a pooler; run migrate with PostgreSQL's own address",
                sqlstate(error),
            ) from error
        raise
    finally:
        if not driver.is_pooled:
            with suppress(SQLAlchemyError):  # a connection that is lost has nothing to reset
                connection.exec_driver_sql("RESET ALL")
