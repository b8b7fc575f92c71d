"""Background services: threads of the main process, which work while the pool is busy."""

from __future__ import annotations

import random
import select
import socket
import threading
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from math import inf

from celery import Celery
from celery.utils.log import get_logger
from interview_access.errors import shortened
from kombu import Connection
from kombu.exceptions import OperationalError
from redis import Redis
from redis.exceptions import RedisError

from storage.errors import StorageError

logger = get_logger(__name__)

_OUTAGES = (OperationalError, RedisError, OSError, StorageError)
_LONGEST_BACKOFF_SECONDS = 5.0


class BackgroundService(ABC):
    """A thread that repeats :meth:`run_once` until the worker stops.

    An exception never ends the thread. It is logged once per outage, and the next call follows
    after an exponential back-off with jitter, on a new connection.
    """

    def __init__(self, app: Celery) -> None:
        """Connect to nothing before :meth:`start`."""
        self._app = app
        self._connection: Connection | None = None
        self._client: Redis | None = None
        self._stopping = False
        self._succeeded_at = -inf
        self.error: Exception | None = None
        """The error of the last call, or None if it succeeded."""
        self._alarm: socket.socket | None = None  # Event.set() in nested signal handlers deadlocks
        self._wakeup: socket.socket | None = None  # readable after stop()
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)

    @abstractmethod
    def run_once(self, redis: Redis) -> None:
        """Do the work that is due, or :meth:`pause`.

        Args:
            redis: Client of the queue's Redis.
        """

    def start(self) -> None:
        """Start the thread."""
        self._alarm, self._wakeup = socket.socketpair()
        self._alarm.setblocking(False)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the current :meth:`run_once`. May be called in a signal handler."""
        self._stopping = True
        if self._alarm:
            with suppress(OSError):  # the thread has ended
                self._alarm.send(b"\0")

    @property
    def is_stopping(self) -> bool:
        """Whether :meth:`stop` was called."""
        return self._stopping

    @property
    def seconds_since_success(self) -> float:
        """Seconds since a call succeeded; infinite before the first one."""
        return time.monotonic() - self._succeeded_at

    @property
    def wakeup(self) -> socket.socket | None:
        """A socket that is readable after :meth:`stop`; None before :meth:`start`."""
        return self._wakeup

    def pause(self, seconds: float, *sockets: socket.socket) -> bool:
        """Sleep until a socket is readable or the service is stopped.

        Args:
            seconds: The longest sleep.
            sockets: Sockets to poll.

        Returns:
            Whether one of the sockets is readable.
        """
        poll = select.poll()
        for one in filter(None, (self._wakeup, *sockets)):
            poll.register(one, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(seconds * 1_000)}
        return any(one.fileno() in ready for one in sockets)

    def _run(self) -> None:
        failures = 0
        while not self._stopping:
            try:
                self.run_once(self._redis())
            except Exception as error:  # a defect must not end the service
                self.error = error
                failures += 1
                if failures == 1:
                    logger.warning(
                        "background service failed, will retry: service=%s error_type=%s error=%s",
                        self._thread.name,
                        type(error).__name__,
                        shortened(str(error), quoted=False, at_most=500),
                        exc_info=not isinstance(error, _OUTAGES),
                    )
                self.disconnect()
                self.pause(_backoff(failures))
            else:
                if failures:
                    name = self._thread.name
                    logger.info(
                        "background service recovered: service=%s failures=%d", name, failures
                    )
                failures = 0
                self.error, self._succeeded_at = None, time.monotonic()
        self.disconnect()
        for one in filter(None, (self._alarm, self._wakeup)):
            one.close()

    def _redis(self) -> Redis:
        """Return this thread's client of the queue's Redis, which kombu resolves."""
        if self._client is None:
            self._connection = self._app.connection_for_write()
            self._client = self._connection.channel().client
        return self._client

    def disconnect(self) -> None:
        """Disconnect from Redis after a failure, or at the end of the service."""
        connection, self._connection, self._client = self._connection, None, None
        if connection is not None:
            with suppress(Exception):
                connection.release()


def _backoff(failures: int) -> float:
    """Return the seconds to wait after consecutive failures: 0.5 to 1, doubling up to 5."""
    longest = min(2.0 ** min(failures - 1, 10), _LONGEST_BACKOFF_SECONDS)
    return longest * random.uniform(0.5, 1)  # noqa: S311 - jitter
