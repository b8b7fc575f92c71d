"""Notifications of new outbox requests: LISTEN, and a wait that another event can end.

PostgreSQL serializes the commits of transactions that notify. So services notify only while a relay
holds an advisory lock. A relay that takes the lock continues to poll until no transaction is open
that may have added a request without a notification.
"""

from __future__ import annotations

import select
import time
from typing import Any, Self

import psycopg
from sqlalchemy import PoolProxiedConnection

from storage import models
from storage.interface import HasFileno

LISTENING_LOCK = 7_160_244_398_155_012_683
"""Key of the advisory lock of listening relays; the trigger of migration 0006 has the same."""

_CHANNEL = models.requests.name
_MIN_POLLING_SECONDS = 1.0  # after a notification
_POLL_SECONDS = 0.5  # between two polls

_LISTEN = f"LISTEN {_CHANNEL}"
# The trigger of migration 0006. It does not notify if transactions may be prepared.
_IS_NOTIFIED = """
    SELECT current_setting('max_prepared_transactions') = '0' AND EXISTS (
        SELECT FROM pg_trigger
        WHERE tgrelid = to_regclass(%s) AND tgname = 'grant_access_request_notify'
            AND tgenabled IN ('O', 'A'))
"""
_UNLOCK = "SELECT pg_advisory_unlock_shared(%s)"
_TRY_LOCK = "SELECT pg_try_advisory_lock_shared(%s)"
_NEXT_TRANSACTION = "SELECT pg_current_xact_id()::text::bigint"  # in no snapshot yet
_OLDEST_TRANSACTION = "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint"


class RequestNotifications:
    """Notifications that arrive on one session."""

    def __init__(self, connection: Any) -> None:
        """Execute LISTEN, unless no notification can arrive.

        Args:
            connection: A connection of an engine of :func:`storage.connections.open_engine`.

        Raises:
            psycopg.Error: if the connection is lost.
        """
        self._connection = connection
        self._may_have_requests = True
        self._is_polling = True
        self._poll_until = 0.0
        self._first_notifying: int | None = None
        """ID of a transaction from which on every transaction notifies."""
        self._can_wait = not connection.is_pooled and self._listen()
        # Handles notifications that arrive with the reply to a statement.
        connection.add_notify_handler(lambda _: self._receive())

    @classmethod
    def of(cls, connection: PoolProxiedConnection) -> Self:
        """Return the notifications of a pooled connection, which keeps them until it is closed."""
        if cls not in connection.info:
            connection.info[cls] = cls(connection.driver_connection)
        notifications: Self = connection.info[cls]
        return notifications

    def wait(self, seconds: float, wakeup: HasFileno | None) -> bool | None:
        """Wait for a request; see :meth:`storage.readers.OutboxMonitor.wait_for_requests`.

        Raises:
            psycopg.Error: if the connection is lost.
        """
        if not self._can_wait:
            return None
        if not self._may_have_requests:
            if self._stop_polling():
                return True  # the last transaction without a notification may have added a request
            self._receive_for(_POLL_SECONDS if self._is_polling else seconds, wakeup)
        if self._may_have_requests:
            self._start_polling()
        is_added = self._may_have_requests or self._is_polling
        self._may_have_requests = False
        return is_added

    def _stop_polling(self) -> bool:
        """Have services notify, and stop polling once every older transaction has ended.

        Returns:
            Whether this call stopped it.
        """
        if not self._is_polling or time.monotonic() < self._poll_until:
            return False
        if self._first_notifying is None:
            if not self._value(_TRY_LOCK, LISTENING_LOCK):
                return False  # a service holds the lock, briefly or by a defect: poll
            self._first_notifying = self._value(_NEXT_TRANSACTION)
        self._is_polling = self._value(_OLDEST_TRANSACTION) < self._first_notifying
        return not self._is_polling

    def _start_polling(self) -> None:
        if self._first_notifying is not None:
            self._value(_UNLOCK, LISTENING_LOCK)
        self._is_polling, self._first_notifying = True, None
        self._poll_until = time.monotonic() + _MIN_POLLING_SECONDS

    def _receive_for(self, seconds: float, wakeup: HasFileno | None) -> None:
        poll = select.poll()
        for file in filter(None, (self._connection, wakeup)):
            poll.register(file, select.POLLIN)
        deadline = time.monotonic() + seconds
        while not self._may_have_requests:
            left = max(deadline - time.monotonic(), 0)
            ready = {descriptor for descriptor, _ in poll.poll(left * 1_000)}
            if self._connection.fileno() not in ready:
                break
            self._connection.pgconn.consume_input()
            while self._connection.pgconn.notifies():
                self._receive()

    def _listen(self) -> bool:
        """Execute LISTEN. Returns whether the server notifies of new requests."""
        try:
            self._connection.execute(_LISTEN)
            is_notified = self._value(_IS_NOTIFIED, _CHANNEL)
        except psycopg.Error:
            if self._connection.closed:
                raise
            self._connection.rollback()
            return False
        return bool(is_notified)

    def _value(self, statement: str, *parameters: object) -> Any:
        """Return a statement's only value, in a transaction of its own."""
        ((value,),) = self._connection.execute(statement, parameters).fetchall()
        self._connection.commit()
        return value

    def _receive(self) -> None:
        self._may_have_requests = True
