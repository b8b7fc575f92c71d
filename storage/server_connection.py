"""Connections that detect a server that has stopped replying."""

from __future__ import annotations

import fcntl
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
from psycopg.pq import PGconn, PollingStatus, TransactionStatus

CHECK_SECONDS = 5.0
"""Default wait for a reply before the server is asked whether it is working on it."""

_CONNECT_SECONDS = 5
_SILENCE_SECONDS = 10
_CHECKS_WITHOUT_PID = 2
_CHECKS_UNREACHABLE = 3

DEFAULT_OPTIONS: dict[str, object] = {
    "connect_timeout": _CONNECT_SECONDS,
    "keepalives": 1,
    "keepalives_idle": 4,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": _SILENCE_SECONDS * 1000,
}
"""Options of libpq, which a database URL may override."""

FIXED_OPTIONS: dict[str, object] = {"client_encoding": "utf8"}
"""Options of libpq that override those of the database URL."""

_IS_LOST = """
    SELECT NOT EXISTS (
        SELECT FROM pg_stat_activity
        WHERE pid = %s AND coalesce(
            NOT starts_with(state, 'idle')
            OR state_change > clock_timestamp() - CAST(%s AS interval), true)
    )
"""
_BACKEND_MESSAGE = b"\tB\t"  # a message of the server in libpq's trace

Waiting = Generator[Any, Any, Any]
"""A generator of psycopg's: yields what it waits for, and is sent what is ready, or nothing."""


class ServerConnection(psycopg.Connection[Any]):
    """A connection that detects a server that has stopped replying.

    While a reply is missing, a second connection asks the server whether it is working on the
    statement. The first connection is closed as lost, with an OperationalError, if the server is
    not working on it, if the second connection gets no reply in three checks, or if the session is
    unknown after two. A running statement is not interrupted, however long it takes; a server that
    refuses the second connection has replied.

    Attributes:
        parameters: The parameters of the connection.
        check_seconds: Wait for a reply before the server is asked whether it is working on it.
        reply_seconds: Longest wait for any reply; None for statements of any length.
        is_pooled: Whether a pooler may give each transaction another session.
        server_pid: Process ID of the session; None if it is unknown.
        checks_without_pid: Number of checks after which a reply of an unknown session is lost.
    """

    parameters: dict[str, Any]
    check_seconds = CHECK_SECONDS
    reply_seconds: float | None = None
    is_pooled = False
    server_pid: int | None = None
    checks_without_pid: float = _CHECKS_WITHOUT_PID

    def wait(self, gen: Waiting, *args: Any, **options: Any) -> Any:
        """Drive a generator of psycopg's to its end; see :meth:`psycopg.Connection.wait`.

        Raises:
            psycopg.OperationalError: if the connection is lost.
        """
        if self.is_pooled and self.pgconn.transaction_status == TransactionStatus.IDLE:
            self.server_pid = None
        try:
            return super().wait(_watched(gen, self.check_seconds, self._is_lost), *args, **options)
        except _NoReplyError:
            self.close()
            raise

    def _is_lost(self, waited: float) -> bool:
        """Return whether no reply will arrive, after so many seconds without one."""
        if self.reply_seconds is not None and waited > self.reply_seconds:
            return True
        if self.server_pid is None:
            return waited > self.checks_without_pid * self.check_seconds
        if self.info.hostaddr and _unacknowledged_bytes(self.pgconn.socket):
            return False  # tcp_user_timeout decides; a Unix socket has none
        try:
            with _Probe.connect(**self._same_server(), autocommit=True) as probe:
                probe.check_seconds = self.check_seconds
                rows = probe.execute(_IS_LOST, (self.server_pid, f"{self.check_seconds}s"))
                return bool(rows.fetchall()[0][0])
        except psycopg.Error as error:
            is_unreachable = waited > _CHECKS_UNREACHABLE * self.check_seconds
            return is_unreachable and not self._may_be_working(error)

    def _may_be_working(self, error: psycopg.Error) -> bool:
        """Return whether the server may be working although the second connection failed."""
        if isinstance(error, _NoReplyError):
            return self.is_pooled  # all of the pooler's servers may be in use
        if isinstance(error, psycopg.errors.ConnectionTimeout):
            return False
        # The driver has no SQLSTATE of a connection that was refused.
        parameters = {**self._same_server(), "context": None}
        return error.sqlstate is not None or _BACKEND_MESSAGE in traced_attempt(
            make_conninfo(**parameters).encode()
        )

    def _same_server(self) -> dict[str, Any]:
        """Return parameters that connect to this connection's server, of all hosts of the URL."""
        info = self.info
        address = {"host": info.host, "hostaddr": info.hostaddr, "port": info.port}
        parameters = {**self.parameters, **address, "target_session_attrs": "any"}
        parameters.pop("load_balance_hosts", None)
        return parameters


class _Probe(psycopg.Connection[Any]):
    """A connection that waits for each reply no longer than ``check_seconds``."""

    check_seconds = CHECK_SECONDS

    def wait(self, gen: Waiting, *args: Any, **options: Any) -> Any:
        return super().wait(_watched(gen, self.check_seconds, lambda _: True), *args, **options)


class _NoReplyError(psycopg.OperationalError):
    """The server has stopped replying on a connection."""


def _watched(gen: Waiting, check_seconds: float, is_lost: Callable[[float], bool]) -> Waiting:
    """Delegate to a generator, and call ``is_lost`` every ``check_seconds`` without progress."""
    began = time.monotonic()
    check_at = began + check_seconds
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            if not ready and time.monotonic() >= check_at:
                waited = time.monotonic() - began
                if is_lost(waited):
                    raise _NoReplyError(f"the connection is lost: no reply for {waited:.0f} s")
                check_at = time.monotonic() + check_seconds
            wanted = gen.send(ready)
    except StopIteration as done:
        return done.value


def _unacknowledged_bytes(socket: int) -> int:
    """Return the number of sent bytes that the peer has not acknowledged; 0 if it is unknown."""
    try:
        reply = fcntl.ioctl(socket, termios.TIOCOUTQ, bytes(4))
    except OSError:
        return 0
    (count,) = struct.unpack("i", reply)
    return int(count)


def traced_attempt(conninfo: bytes) -> bytes:
    """Attempt to connect, and return libpq's trace of the messages; empty if there is none."""
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
