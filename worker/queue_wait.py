"""Waits until a queue has a message, without receiving the message.

Redis has no blocking command that leaves the element out of its reply, and an element may have
512 MB. ``BLMOVE queue queue RIGHT RIGHT`` moves nothing; of its reply only the beginning is read,
and a connection with a long rest is closed.
"""

from __future__ import annotations

import select
import time
from typing import Any

from redis import ConnectionPool
from redis.exceptions import ConnectionError as RedisConnectionError

_LINE = b"\r\n"
_READ_BYTES = 64 * 1024
_NOTHING = (b"$-1", b"*-1", b"_")  # nil, in RESP2 and RESP3


class QueueWaitRefusedError(Exception):
    """Redis refused to wait: it is full, or the key is not a list."""


class QueueWait:
    """One connection that waits for one queue at a time."""

    def __init__(self, pool: ConnectionPool) -> None:
        """Connects at the first wait.

        Args:
            pool: Makes the connection.
        """
        self._pool = pool
        self._connection: Any = None
        self._reply = bytearray()
        self._sent_at: float | None = None

    @property
    def seconds(self) -> float | None:
        """How long it has waited, or None if it does not wait."""
        return None if self._sent_at is None else time.monotonic() - self._sent_at

    def is_lost(self, seconds: float) -> bool:
        """Whether no reply has come for so long; one that this process has not read yet counts."""
        waited = self.seconds
        if waited is None or waited < seconds:
            return False
        readable, _, _ = select.select([self._connection._sock], [], [], 0)  # noqa: SLF001 - see start
        return not readable

    def start(self, queue: str, timeout: float) -> Any:
        """Wait for a message on a queue, in the background.

        Args:
            queue: Key of the list.
            timeout: Seconds.

        Returns:
            The socket that is readable when the wait may be over.
        """
        if self._connection is None:
            self._connection = self._pool.get_connection()
        self._reply.clear()
        arguments = ("BLMOVE", queue, queue, "RIGHT", "RIGHT", timeout)
        self._connection.send_command(*arguments, check_health=False)
        self._sent_at = time.monotonic()
        return self._connection._sock  # noqa: SLF001 - redis-py has no other way to the socket

    def read(self) -> bool | None:
        """Read what the socket has.

        Returns:
            Whether there is a message, or None if the reply is not complete.

        Raises:
            QueueWaitRefusedError: Redis refused; the connection can wait again.
            RedisConnectionError: the connection is lost, or the server was demoted.
        """
        received = self._received()
        if not received:
            raise RedisConnectionError("connection closed by Redis")
        self._reply += received
        line, end, rest = self._reply.partition(_LINE)
        if not end:
            return None
        if line[:1] == b"-":
            self._sent_at = None
            if line.startswith(b"-READONLY"):
                raise RedisConnectionError(line[1:].decode(errors="replace"))
            raise QueueWaitRefusedError(line[1:].decode(errors="replace"))
        if bytes(line) in _NOTHING:
            self._sent_at = None
            return False
        if line[:1] != b"$":
            raise RedisConnectionError(f"expected a bulk string, got {bytes(line[:20])!r}")
        length = int(line[1:]) + len(_LINE)
        if length > _READ_BYTES:
            self.close()
        elif len(rest) < length:
            return None
        self._sent_at = None
        return True

    def _received(self) -> bytes:
        socket = self._connection._sock  # noqa: SLF001 - see start
        received = bytes(socket.recv(_READ_BYTES))
        while getattr(socket, "pending", int)():  # TLS: decrypted, and not seen by the event loop
            received += socket.recv(_READ_BYTES)
        return received

    def close(self) -> None:
        """Disconnect, and so end the wait."""
        self._sent_at = None
        if self._connection:
            connection, self._connection = self._connection, None
            connection.disconnect()
            self._pool.release(connection)
