"""What a worker does beside its jobs: a thread of the main process that goes its rounds.

A child could not: with all children busy nobody would be answered, and no job would be begun.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from contextlib import suppress
from queue import Empty, SimpleQueue

from celery import Celery
from celery.utils.log import get_logger
from kombu.exceptions import OperationalError
from redis import Redis
from redis.exceptions import RedisError

from storage.interface import StorageError

logger = get_logger(__name__)

_KNOWN = (OperationalError, RedisError, OSError, StorageError)
_AFTER_TROUBLE_SECONDS = 1.0


class Rounds(ABC):
    """A thread that does the same again and again while the worker runs, whatever comes."""

    def __init__(self, app: Celery) -> None:
        """Nothing is connected before :meth:`start`."""
        self._app = app
        self._client: Redis | None = None
        self._stopping = False
        self._bell: SimpleQueue[None] = SimpleQueue()  # an Event deadlocks in nested handlers
        self._thread = threading.Thread(target=self._go, name=type(self).__name__, daemon=True)

    @abstractmethod
    def round(self, redis: Redis) -> None:
        """Go one round, of a few seconds at most.

        Args:
            redis: The server of the queue.
        """

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Go no further round. Callable from a signal's handler."""
        self._stopping = True
        self._bell.put(None)

    def pause(self, seconds: float) -> None:
        """Let time pass, but no longer than the worker runs."""
        with suppress(Empty):
            self._bell.get(timeout=seconds)

    def _go(self) -> None:
        trouble = False
        while not self._stopping:
            try:
                self.round(self._redis())
            except Exception as error:  # whatever it is: the worker goes on, and so does this
                if not trouble:
                    known = isinstance(
                        error, OperationalError | RedisError | OSError | StorageError
                    )
                    logger.warning("%s: %s", self._thread.name, error, exc_info=not known)
                trouble = True
                self.pause(_AFTER_TROUBLE_SECONDS)
            else:
                trouble = False

    def _redis(self) -> Redis:
        """A connection of the thread's own, to whichever server kombu finds behind its URL."""
        if self._client is None:
            self._connection = self._app.connection_for_write()
            self._client = self._connection.channel().client
        return self._client
