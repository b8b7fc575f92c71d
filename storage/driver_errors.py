"""Translation of the errors of psycopg and SQLAlchemy into storage errors."""

from __future__ import annotations

import re

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.pq import PGconn, Ping
from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError

from storage import sqlstate
from storage.errors import StorageError
from storage.server_connection import DEFAULT_OPTIONS, FIXED_OPTIONS, traced_attempt

# Authentication failed, no such database, no right to connect to it, an unknown setting or invalid
# value among the options, an encoding that PostgreSQL cannot convert to UTF-8.
_REFUSED = re.compile(rb'ErrorResponse.* C "(28...|3D000|42...|22023|0A000)"')

_TLS = re.compile(r"certificate|private key file|does not support SSL")
"""In libpq's and OpenSSL's errors for which the options, the files or the server must change."""


class driver_errors_translated:  # noqa: N801 - used as a function, and cheaper than a generator
    """Raise every exception of the driver or SQLAlchemy in a block as :class:`StorageError`.

    Wraps driver calls only, so that OSError and UnicodeDecodeError come from the driver as well.
    """

    def __enter__(self) -> None:
        """Begin the block."""

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """End the block.

        Raises:
            StorageError: if the block raised any Exception but StorageError and MemoryError.
        """
        if isinstance(error, Exception) and not isinstance(error, StorageError | MemoryError):
            raise _translated(error) from error


def _translated(error: Exception) -> StorageError:
    driver = error.orig if isinstance(error, DBAPIError) else error
    if not isinstance(driver, psycopg.Error):
        return StorageError(f"the driver failed: {type(driver).__name__}")
    lines = str(driver).strip().splitlines() or [type(driver).__name__]
    # The driver itself rejects values that it cannot send or hold, as the server would.
    own = sqlstate.DATA_EXCEPTION if isinstance(driver, psycopg.DataError) else None
    return StorageError(driver.diag.message_primary or lines[0], driver.sqlstate or own)


def sqlstate_of(error: DBAPIError) -> str | None:
    """Return PostgreSQL's error code, or None if no server replied."""
    code: str | None = getattr(error.orig, "sqlstate", None)
    return code


def is_tls_failure(error: DBAPIError) -> bool:
    """Return whether TLS cannot be established: a certificate, a key or an option does not fit.

    Args:
        error: The error of the connection that failed.
    """
    return sqlstate_of(error) is None and _TLS.search(str(error.orig)) is not None


def is_refused(url: URL, error: DBAPIError) -> bool:
    """Return whether the configuration prevents a connection: a role, a password, an option.

    libpq reports the SQLSTATE of a failed connection in its trace only; its message is in the
    server's language. So this function connects once more, with a trace.

    Args:
        url: The database URL.
        error: The error of the connection that failed.
    """
    driver = error.orig
    if not isinstance(driver, psycopg.Error) or driver.sqlstate is not None:
        return False  # the connection was open
    if isinstance(driver, psycopg.ProgrammingError):
        return True
    (_, parameters) = url.get_dialect()().create_connect_args(url)
    conninfo = make_conninfo(**{**DEFAULT_OPTIONS, **parameters, **FIXED_OPTIONS}).encode()
    if PGconn.ping(conninfo) == Ping.NO_ATTEMPT:
        return True
    return _REFUSED.search(traced_attempt(conninfo)) is not None
