"""A wait until a queue has a message, without receiving the message.

Redis has no blocking command whose reply omits the element. An element may have 512 MB, which Redis
would copy into a reply for each idle worker. ``BLMOVE queue queue RIGHT RIGHT`` blocks and does not
change the list. ``CLIENT REPLY SKIP`` before it suppresses its reply. The ``LLEN`` after it is
executed when the wait is over.
"""

from __future__ import annotations

import select
import time
from typing import Any

from redis import ConnectionPool
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, ResponseError

_LINE = b"\r\n"
_READ_BYTES = 4 * 1024
_SHORT_WAITS = 5  # in succession; single ones are due to other workers' claims
_TRIAL_SECONDS = 1.0  # of a wait after a refused one, which shows soon that Redis blocks again


class QueueWaitRefusedError(Exception):
    """Redis refuses the wait: it is full, the key is not a list, or an ACL denies a command."""


class QueueWait:
    """One connection that waits for one queue at a time."""

    def __init__(self, pool: ConnectionPool, *, is_refused: bool = False) -> None:
        """Connect at the first wait.

        Args:
            pool: Provides the connection.
            is_refused: Whether Redis refused the last wait of an earlier connection.
        """
        self.is_refused = is_refused
        """Whether Redis has refused a wait, and blocked in none since."""
        self._pool = pool
        self._queue = ""
        self._connection: Any = None
        self._reply = bytearray()
        self._timeout = 0.0
        self._sent_at: float | None = None
        self._short_waits = 0

    @property
    def seconds(self) -> float | None:
        """Seconds since the wait began; None if there is no wait."""
        return None if self._sent_at is None else time.monotonic() - self._sent_at

    def is_lost(self, seconds: float) -> bool:
        """Report whether a wait has had no reply for so many seconds. An unread reply counts."""
        waited = self.seconds
        if waited is None or waited < seconds:
            return False
        readable, _, _ = select.select([self._connection._sock], [], [], 0)  # noqa: SLF001 - see start
        return not readable

    def start(self, queue: str, timeout: float) -> Any:
        """Wait for a message on a queue, in the background.

        Args:
            queue: Key of the list.
            timeout: Seconds; one at most after a refusal.

        Returns:
            The socket that is readable when the wait may be over.
        """
        if self._connection is None:
            self._connection = self._pool.get_connection()
        self._reply.clear()
        timeout = min(timeout, _TRIAL_SECONDS) if self.is_refused else timeout
        self._queue, self._timeout = queue, timeout
        commands = self._connection.pack_commands(
            [
                ("CLIENT", "REPLY", "SKIP"),
                ("BLMOVE", queue, queue, "RIGHT", "RIGHT", timeout),
                ("LLEN", queue),
            ]
        )
        self._connection.send_packed_command(commands, check_health=False)
        self._sent_at = time.monotonic()
        return self._connection._sock  # noqa: SLF001 - redis-py has no other way to the socket

    def read(self) -> bool | None:
        """Read what the socket has received.

        Returns:
            Whether there is a message, or None if the reply is not complete.

        Raises:
            QueueWaitRefusedError: if Redis refused; the next wait has a new connection.
            RedisConnectionError: if the connection is lost.
        """
        received = self._received()
        if not received:
            raise RedisConnectionError("connection closed by Redis")
        self._reply += received
        if not self._reply.endswith(_LINE):
            return None
        waited, self._sent_at = self.seconds or 0.0, None
        reply = self._reply.removesuffix(_LINE).decode(errors="replace")
        if reply.startswith("-"):
            self.close()  # if it refused to suppress a reply, more of them follow
            self.is_refused = True
            raise QueueWaitRefusedError(reply[1:])
        if not reply.startswith(":"):
            raise RedisConnectionError(f"expected an integer, got {reply[:20]!r}")
        has_message = reply != ":0"
        has_blocked = waited >= self._timeout / 2
        self.is_refused = self.is_refused and not has_blocked
        is_short = not has_message and not has_blocked
        self._short_waits = self._short_waits + 1 if is_short else 0
        if self._short_waits >= (1 if self.is_refused else _SHORT_WAITS):
            self._short_waits, self.is_refused = 0, True
            reason = "BLMOVE returns at once although the queue is empty"
            raise QueueWaitRefusedError(f"{reason}{self._cause()}")
        return has_message

    def _cause(self) -> str:
        """Return why Redis refuses writes, if it does, from its reply to one that changes nothing.

        The reply to BLMOVE itself is suppressed.
        """
        try:
            self._connection.send_command("SETRANGE", self._queue, 0, "", check_health=False)
            self._connection.read_response()
        except NoPermissionError:
            return ""
        except ResponseError as error:  # WRONGTYPE: the list has a message by now
            is_accepted = str(error).startswith("WRONGTYPE")
            return "" if is_accepted else f": {type(error).__name__}: {error}"
        return ""

    def _received(self) -> bytes:
        socket = self._connection._sock  # noqa: SLF001 - see start
        received = bytes(socket.recv(_READ_BYTES))
        while getattr(socket, "pending", int)():  # TLS: decrypted bytes, which no poll reports
            received += socket.recv(_READ_BYTES)
        return received

    def close(self) -> None:
        """Disconnect, which ends the wait."""
        self._sent_at = None
        if self._connection:
            connection, self._connection = self._connection, None
            connection.disconnect()
            self._pool.release(connection)
