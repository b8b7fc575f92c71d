"""Background services continue after any error, log outages once, and stop at once."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator

import pytest
from celery import Celery
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from devstack.servers import LocalStack
from storage.errors import StorageError
from tests.support.stores import until
from worker.services.background import BackgroundService


class Service(BackgroundService):
    """A service that raises the given errors, one for each call, and then waits."""

    def __init__(self, app: Celery, errors: list[Exception]) -> None:
        super().__init__(app)
        self.errors = errors
        self.clients: list[Redis] = []

    def run_once(self, redis: Redis) -> None:
        """See the base class."""
        redis.ping()
        self.clients.append(redis)
        if self.errors:
            raise self.errors.pop(0)
        self.pause(60)

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.fixture
def app(stack: LocalStack) -> Iterator[Celery]:
    """An app on the tests' Redis."""
    app = Celery(broker=stack.broker_url, set_as_current=False)
    yield app
    app.close()


@pytest.mark.parametrize(
    "error",
    [
        StorageError("away"),
        RedisConnectionError("away"),
        MemoryError(),
        RecursionError(),
        KeyError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_ends_no_service(app: Celery, error: Exception) -> None:
    """After an error of any class the service continues on a new connection."""
    service = Service(app, [error])
    service.start()
    until(lambda: len(service.clients) == 2)
    service.stop()
    service.join()
    assert service.clients[0] is not service.clients[1]


def test_an_outage_is_logged_once(app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    """An outage is one line at its beginning and one at its end, without raw control characters."""
    caplog.set_level(logging.INFO, logger="worker.services.background")
    service = Service(app, [StorageError("away\nforged line"), StorageError("still away")])
    service.start()
    until(lambda: len(service.clients) == 3)
    service.stop()
    service.join()
    assert [record.getMessage() for record in caplog.records] == [
        (
            "background service failed, will retry: service=Service "
            "error_type=StorageError error=away\\nforged line"
        ),
        "background service recovered: service=Service failures=2",
    ]


@pytest.mark.parametrize("failing", [False, True])
def test_a_service_stops_at_once(app: Celery, failing: bool) -> None:
    """A service that waits for work or backs off ends as soon as it is stopped."""
    service = Service(app, [StorageError("away")] * 1_000 if failing else [])
    service.start()
    until(lambda: len(service.clients) == (3 if failing else 1))
    before = time.monotonic()
    service.stop()
    service.join()
    assert time.monotonic() - before < 0.4


def test_a_pause_ends_when_a_socket_is_readable(app: Celery) -> None:
    """A pause ends when the given socket is readable, and returns whether it was."""
    service = Service(app, [])
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert not service.pause(0, ours)
        theirs.send(b"x")
        assert service.pause(60, ours)


def test_the_wakeup_socket_is_readable_when_the_service_stops(app: Celery) -> None:
    """The wake-up socket becomes readable when the service stops, and not before."""
    service = Service(app, [])
    service.start()
    until(lambda: len(service.clients) == 1)
    wakeup = service.wakeup
    assert wakeup
    with pytest.raises(BlockingIOError):
        wakeup.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
    service.stop()
    service.join()
    assert wakeup.fileno() == -1
