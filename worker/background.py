"""Background services: threads of the worker's main process that do not depend on the pool."""

from __future__ import annotations

import random
import threading
from abc import ABC, abstractmethod
from contextlib import suppress
from queue import Empty, SimpleQueue

from celery import Celery
from celery.utils.log import get_logger
from interview_access.errors import shortened
from kombu import Connection
from kombu.exceptions import OperationalError
from redis import Redis
from redis.exceptions import RedisError

from storage.interface import StorageError

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
        self._wakeup: SimpleQueue[None] = SimpleQueue()  # an Event deadlocks in nested handlers
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)

    @abstractmethod
    def run_once(self, redis: Redis) -> None:
        """Do the work that is due, or :meth:`pause`.

        Args:
            redis: The server of the queue.
        """

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the current :meth:`run_once`. Callable from a signal handler."""
        self._stopping = True
        self._wakeup.put(None)

    def pause(self, seconds: float) -> None:
        """Sleep, but not beyond :meth:`stop`."""
        if not self._stopping:
            with suppress(Empty):
                self._wakeup.get(timeout=seconds)

    def _run(self) -> None:
        failures = 0
        while not self._stopping:
            try:
                self.run_once(self._redis())
            except Exception as error:  # a defect in one call must not end the service
                failures += 1
                if failures == 1:
                    logger.warning(
                        "background service failed, will retry: service=%s error=%s: %s",
                        self._thread.name,
                        type(error).__name__,
                        shortened(str(error), quoted=False, at_most=500),
                        exc_info=not isinstance(error, _OUTAGES),
                    )
                self._disconnect()
                self.pause(_backoff(failures))
            else:
                if failures:
                    name = self._thread.name
                    logger.info(
                        "background service recovered: service=%s failures=%d", name, failures
                    )
                failures = 0
        self._disconnect()

    def _redis(self) -> Redis:
        """Connect, on a connection of this thread, to the server that kombu resolves."""
        if self._client is None:
            self._connection = self._app.connection_for_write()
            self._client = self._connection.channel().client
        return self._client

    def _disconnect(self) -> None:
        connection, self._connection, self._client = self._connection, None, None
        if connection is not None:
            with suppress(Exception):
                connection.release()


def _backoff(failures: int) -> float:
    """Seconds to wait after so many consecutive failures: 0.5 to 1, doubling up to 5."""
    longest = min(2.0 ** min(failures - 1, 10), _LONGEST_BACKOFF_SECONDS)
    return longest * random.uniform(0.5, 1)  # noqa: S311 - jitter
