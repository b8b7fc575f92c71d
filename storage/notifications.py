"""Notifications of new requests in the outbox: LISTEN, and a wait that another event can end."""

from __future__ import annotations

import select
import time
from typing import Any, Self

import psycopg
from sqlalchemy import PoolProxiedConnection

from storage.interface import HasFileno
from storage.models import GrantAccessRequest

_CHANNEL = GrantAccessRequest.__tablename__
_LISTEN = f"LISTEN {_CHANNEL}"
# The trigger of migration 0006. It does not notify where transactions may be prepared.
_IS_NOTIFIED = """
    SELECT current_setting('max_prepared_transactions') = '0' AND EXISTS (
        SELECT FROM pg_trigger
        WHERE tgrelid = to_regclass(%s) AND tgname = 'grant_access_request_notify'
            AND tgenabled IN ('O', 'A'))
"""


class RequestNotifications:
    """The notifications that reach one session, from its first use on."""

    def __init__(self, connection: Any) -> None:
        """Listen, unless nothing would be received.

        Args:
            connection: psycopg's, as :func:`storage.connections.open_engine` opens it.

        Raises:
            psycopg.Error: if the connection is lost.
        """
        self._connection = connection
        self._may_have_requests = True
        self._can_wait = not connection.is_pooled and self._listen()
        # Receives those that come with the reply to a statement.
        connection.add_notify_handler(lambda _: self._receive())

    @classmethod
    def of(cls, connection: PoolProxiedConnection) -> Self:
        """Return those of a pool's connection, which keeps them until it is closed."""
        if cls not in connection.info:
            connection.info[cls] = cls(connection.driver_connection)
        notifications: Self = connection.info[cls]
        return notifications

    def wait(self, seconds: float, wakeup: HasFileno | None) -> bool | None:
        """See :meth:`storage.interface.InterviewStorageInterface.wait_for_requests`.

        Raises:
            psycopg.Error: if the connection is lost.
        """
        if not self._can_wait:
            return None
        poll = select.poll()
        for file in filter(None, (self._connection, wakeup)):
            poll.register(file, select.POLLIN)
        deadline = time.monotonic() + seconds
        while not self._may_have_requests:
            left = max(deadline - time.monotonic(), 0)
            ready = {descriptor for descriptor, _ in poll.poll(left * 1_000)}
            if self._connection.fileno() not in ready:
                return False
            self._connection.pgconn.consume_input()
            while self._connection.pgconn.notifies():
                self._receive()
        self._may_have_requests = False
        return True

    def _listen(self) -> bool:
        """Returns whether the server notifies. One that refuses to listen does not."""
        try:
            self._connection.execute(_LISTEN)
            ((is_notified,),) = self._connection.execute(_IS_NOTIFIED, [_CHANNEL]).fetchall()
            self._connection.commit()
        except psycopg.Error:
            if self._connection.closed:
                raise
            self._connection.rollback()
            return False
        return bool(is_notified)

    def _receive(self) -> None:
        self._may_have_requests = True
