"""Connections to PostgreSQL: the one place that reads the database's URL and opens them.

Owns what every connection has, whatever the URL, the server, the database and the role say: text in
UTF-8, transactions READ COMMITTED and READ WRITE, and a bound on how long a lost server goes
unnoticed:

- a host that vanishes: TCP keepalives and ``tcp_user_timeout``, :data:`_SILENCE_SECONDS`;
- a connection that is lost between the two, while both are there (a firewall that forgets it, a
  failover behind one address, a proxy that swallows bytes): :class:`ServerConnection` looks;
- a host that accepts no connection: ``connect_timeout``, for each host of the URL.
"""

from __future__ import annotations

import fcntl
import re
import select
import struct
import termios
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from tempfile import TemporaryFile
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.pq import PGconn, Ping, PollingStatus, TransactionStatus
from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from storage.database_url import parse_database_url
from storage.interface import StorageError

_CONNECT_SECONDS = 5
_SILENCE_SECONDS = 10
LOOK_SECONDS = 5.0
_UNKNOWN_LOOKS = 2
_UNREACHABLE_LOOKS = 3

_DEFAULTS: dict[str, object] = {  # the URL may have its own
    "connect_timeout": _CONNECT_SECONDS,
    "keepalives": 1,
    "keepalives_idle": 4,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": _SILENCE_SECONDS * 1000,
}
_IS_LOST = """
    SELECT NOT EXISTS (
        SELECT FROM pg_stat_activity
        WHERE pid = %s AND coalesce(
            NOT starts_with(state, 'idle')
            OR state_change > clock_timestamp() - CAST(%s AS interval), true)
    )
"""
_REPLY = b"\tB\t"  # of the backend, in libpq's trace
# Authentication, an unknown role or database, no right to connect to it.
_REFUSED = re.compile(rb'ErrorResponse.* C "(28...|3D000|42501)"')
_DATA_EXCEPTION = "22000"

Waiting = Generator[Any, Any, Any]
"""What psycopg drives: yields what it waits for, and is sent what is ready, or nothing."""


def parsed(database_url: str) -> URL:
    """Read the database's URL.

    Raises:
        StorageError: if it is not a PostgreSQL URL. The message omits the password.
    """
    try:
        return make_url(parse_database_url(database_url))
    except ValueError as error:
        raise StorageError(f"the database's URL cannot be read; expected {error}") from None


def place_of(url: URL) -> str:
    """Where a URL leads, for people: no password, and no option that may hold one."""
    hosts = url.query.get("host", url.host or "localhost")
    host = hosts if isinstance(hosts, str) else ",".join(hosts)
    port = f":{url.port}" if url.port else ""
    user = f"{url.username}@" if url.username else ""
    return f"postgresql://{user}{host}{port}/{url.database or ''}"


def open_engine(
    url: URL,
    *,
    application_name: str,
    look_seconds: float = LOOK_SECONDS,
    reply_seconds: float | None = None,
    **options: Any,
) -> Engine:
    """Make an engine; it connects at its first use.

    Args:
        url: As of :func:`parsed`.
        application_name: For ``pg_stat_activity``.
        look_seconds: How long a reply may be missing before the server is asked about it.
        reply_seconds: The longest wait for any reply; None for statements of any length.
        options: For SQLAlchemy.

    Raises:
        StorageError: The URL's hosts and ports do not belong together.
    """
    try:
        engine = create_engine(
            url,
            isolation_level="READ COMMITTED",
            use_native_hstore=False,  # its types would cost each connection a query
            hide_parameters=True,  # IDs of people stay out of errors and logs
            connect_args={
                **{name: value for name, value in _DEFAULTS.items() if name not in url.query},
                "application_name": application_name,
                "client_encoding": "utf8",
            },
            **options,
        )
    except ArgumentError:
        raise StorageError(
            "the database's URL names hosts and ports that do not belong together"
        ) from None

    def connect(
        _dialect: object, _record: object, _args: object, parameters: dict[str, Any]
    ) -> ServerConnection:
        connection = ServerConnection.connect(**parameters)
        connection.parameters = parameters
        connection.look_seconds = look_seconds
        connection.reply_seconds = reply_seconds
        return connection

    event.listen(engine, "do_connect", connect)
    event.listen(engine, "connect", _set_up)
    return engine


def _set_up(connection: ServerConnection, _record: object) -> None:
    connection.read_only = False  # in each BEGIN, whatever the default
    connection.autocommit = True
    ((pid,),) = connection.execute("SELECT pg_backend_pid()").fetchall()
    connection.autocommit = False
    if pid == connection.info.backend_pid:
        connection.server_pid = pid
    else:
        # A pooler replied to the connection. It may give each transaction another session, in which
        # a prepared statement is missing, or is another client's of the same name.
        connection.is_pooled = True
        connection.prepare_threshold = None


class driver_errors_translated:  # noqa: N801 - used as a function, and cheaper than a generator
    """Raise whatever the driver or SQLAlchemy raises in a block as :class:`StorageError`.

    Wraps driver calls only, so every exception comes from the driver, including OSError and
    UnicodeDecodeError.
    """

    def __enter__(self) -> None:
        """Begin the block."""

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """End the block."""
        if isinstance(error, Exception) and not isinstance(error, StorageError | MemoryError):
            raise _translated(error) from error


def _translated(error: Exception) -> StorageError:
    driver = error.orig if isinstance(error, DBAPIError) else error
    if not isinstance(driver, psycopg.Error):
        return StorageError(f"the driver failed: {type(driver).__name__}")
    lines = str(driver).strip().splitlines() or [type(driver).__name__]
    # The driver itself refuses values that it cannot send or hold, as the server would.
    own = _DATA_EXCEPTION if isinstance(driver, psycopg.DataError) else None
    return StorageError(driver.diag.message_primary or lines[0], driver.sqlstate or own)


def is_refused(url: URL, error: DBAPIError) -> bool:
    """Whether no connection can be opened as it is configured: a role, a password, an option.

    libpq reports the SQLSTATE in its trace only; its message is in the server's language.

    Args:
        url: Where the connection was to lead.
        error: How that failed.
    """
    driver = error.orig
    if not isinstance(driver, psycopg.Error) or driver.sqlstate is not None:
        return False  # a connection was there
    if isinstance(driver, psycopg.ProgrammingError):
        return True
    (_, parameters) = url.get_dialect()().create_connect_args(url)
    conninfo = make_conninfo(**{**_DEFAULTS, **parameters}).encode()
    if PGconn.ping(conninfo) == Ping.NO_ATTEMPT:
        return True
    return _REFUSED.search(_traced_attempt(conninfo)) is not None


def _traced_attempt(conninfo: bytes) -> bytes:
    """Attempt to connect; libpq's trace of the messages."""
    with suppress(psycopg.Error), TemporaryFile() as trace:
        attempt = PGconn.connect_start(conninfo)
        attempt.trace(trace.fileno())
        deadline = time.monotonic() + _CONNECT_SECONDS
        while time.monotonic() < deadline:
            match attempt.connect_poll():
                case PollingStatus.READING:
                    select.select([attempt.socket], [], [], _CONNECT_SECONDS)
                case PollingStatus.WRITING:
                    select.select([], [attempt.socket], [], _CONNECT_SECONDS)
                case _:
                    break
        attempt.untrace()
        attempt.finish()
        trace.seek(0)
        return trace.read()
    return b""


class ServerConnection(psycopg.Connection[Any]):
    """A connection that notices when the server has stopped replying.

    While a reply is missing, the server is asked over a second connection whether it is working on
    the statement. The connection is closed as lost, with an OperationalError, if the server is not
    working on it, if it does not reply there for :data:`_UNREACHABLE_LOOKS` either, or, where the
    session is not known, after :data:`_UNKNOWN_LOOKS`. A running statement is not cut off, however
    long it takes: a server that refuses the second connection has replied.

    Attributes:
        parameters: What it was opened with.
        look_seconds: How long a reply may be missing before the server is asked about it.
        reply_seconds: The longest wait for any reply; None: as long as the statement runs.
        is_pooled: Whether a pooler may give each transaction another session.
        server_pid: The process of the session that serves it; None where it is not known (yet).
        unknown_looks: Looks after which a reply of a session that is not known counts as lost.
    """

    parameters: dict[str, Any]
    look_seconds = LOOK_SECONDS
    reply_seconds: float | None = None
    is_pooled = False
    server_pid: int | None = None
    unknown_looks: float = _UNKNOWN_LOOKS

    def wait(self, gen: Waiting, *args: Any, **options: Any) -> Any:
        """Wait for what a generator of psycopg's waits for."""
        if self.is_pooled and self.pgconn.transaction_status == TransactionStatus.IDLE:
            self.server_pid = None
        try:
            return super().wait(_watched(gen, self.look_seconds, self._is_lost), *args, **options)
        except _NoReplyError:
            self.close()
            raise

    def _is_lost(self, waited: float) -> bool:
        """Whether no reply will come, after so many seconds without."""
        if self.reply_seconds is not None and waited > self.reply_seconds:
            return True
        if self.server_pid is None:
            return waited > self.unknown_looks * self.look_seconds
        if self.info.hostaddr and _unacknowledged_bytes(self.pgconn.socket):
            return False  # tcp_user_timeout decides; a Unix socket has none
        try:
            with _Probe.connect(**self._same_server(), autocommit=True) as probe:
                probe.look_seconds = self.look_seconds
                rows = probe.execute(_IS_LOST, (self.server_pid, f"{self.look_seconds}s"))
                return bool(rows.fetchall()[0][0])
        except psycopg.Error as error:
            is_unreachable = waited > _UNREACHABLE_LOOKS * self.look_seconds
            return is_unreachable and not self._replies(error)

    def _replies(self, error: psycopg.Error) -> bool:
        """Whether the server may be working, although a second connection failed."""
        if isinstance(error, _NoReplyError):
            return self.is_pooled  # whose servers may all be in use
        if isinstance(error, psycopg.errors.ConnectionTimeout):
            return False
        # Of a connection that was refused, the driver has no SQLSTATE.
        parameters = {**self._same_server(), "context": None}
        return error.sqlstate is not None or _REPLY in _traced_attempt(
            make_conninfo(**parameters).encode()
        )

    def _same_server(self) -> dict[str, Any]:
        """Build the parameters of a connection to this one's server, whatever hosts the URL has."""
        info = self.info
        address = {"host": info.host, "hostaddr": info.hostaddr, "port": info.port}
        parameters = {**self.parameters, **address, "target_session_attrs": "any"}
        parameters.pop("load_balance_hosts", None)
        return parameters


class _Probe(psycopg.Connection[Any]):
    """A connection on which no reply is waited for longer than a look."""

    look_seconds = LOOK_SECONDS

    def wait(self, gen: Waiting, *args: Any, **options: Any) -> Any:
        return super().wait(_watched(gen, self.look_seconds, lambda _: True), *args, **options)


class _NoReplyError(psycopg.OperationalError):
    """The server has stopped replying on a connection."""


def _watched(gen: Waiting, look_seconds: float, is_lost: Callable[[float], bool]) -> Waiting:
    """Do what the generator does, and look now and then whether it waits in vain."""
    began = time.monotonic()
    look_at = began + look_seconds
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            if not ready and time.monotonic() >= look_at:
                waited = time.monotonic() - began
                if is_lost(waited):
                    raise _NoReplyError(f"the connection is lost: no reply for {waited:.0f} s")
                look_at = time.monotonic() + look_seconds
            wanted = gen.send(ready)
    except StopIteration as done:
        return done.value


def _unacknowledged_bytes(socket: int) -> int:
    """Bytes sent on a socket that its peer has not confirmed; 0 where the system cannot tell."""
    try:
        reply = fcntl.ioctl(socket, termios.TIOCOUTQ, bytes(4))
    except OSError:
        return 0
    (count,) = struct.unpack("i", reply)
    return int(count)
