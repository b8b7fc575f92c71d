"""Kombu's Redis transport for what is not a job: events, remote control, callbacks.

Jobs are claimed without it (``worker/execution/consumer.py``). It differs from kombu's in three
ways. A full server refuses the declaration of the queues for remote control, and a demoted one
refuses every write: kombu raises both as errors that end a starting or reconnecting worker, and
then nothing drains the full queue. It does not restore the unacknowledged messages of stock
workers on the same Redis. Pool processes publish only to the queues that they may.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import kombu
from celery.app.amqp import AMQP
from celery.utils.log import get_logger
from interview_access.connections import KEEPALIVE, sentinel_options
from interview_access.contracts import result_key
from interview_access.errors import shortened
from interview_access.redis_address import RedisAddress, masked
from kombu.transport import redis as kombu_redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ResponseError

from worker.broker.claims import PREFIX
from worker.settings import Settings

logger = get_logger(__name__)

_RESERVED = (PREFIX, result_key(""), "_kombu.", "unacked")
"""Reserved prefixes of keys, to which no message is published: claims, results, kombu's."""

_REFUSED_SECONDS = 1.0  # before reconnecting to a server that refuses writes


CLIENT_NAME = "interview-access-worker"
"""The name of a worker's connections in ``CLIENT LIST``."""

_PRIORITY_SEPARATOR = "\x06\x16"
_SENTINEL_SECONDS = 3.0  # for the replies of all Sentinels together
_MASK = "***"


def list_key(queue: str, priority: int) -> str:
    """Name the list of a queue's messages of one priority, as kombu does."""
    return f"{queue}{_PRIORITY_SEPARATOR}{priority}" if priority else queue


def celery_settings(settings: Settings) -> dict[str, Any]:
    """Celery's settings that follow from the environment.

    Celery reads CELERY_BROKER_URL by itself, but for the two settings of reading and writing.
    """
    broker, results = settings.broker, settings.results
    return {
        "broker_read_url": broker.celery_url,
        "broker_write_url": broker.celery_url,
        "broker_transport_options": {
            "client_name": CLIENT_NAME,
            **_sentinels(broker),
            **({} if broker.path else KEEPALIVE),
        },
        "redis_client_name": CLIENT_NAME,
        "result_expires": settings.result_retention,
        "result_backend_transport_options": {
            **_sentinels(results),
            "connection": {
                **({} if results.path else KEEPALIVE),
                # The backend parses the options of a rediss:// URL by itself.
                **(results.connection_options if results.master_name else {}),
            },
        },
    }


def _sentinels(address: RedisAddress) -> dict[str, Any]:
    if not address.master_name:
        return {}
    return {
        "master_name": address.master_name,
        "sentinel_kwargs": sentinel_options(address, _SENTINEL_SECONDS),
    }


class BrokerConnection(kombu.Connection):  # type: ignore[misc] # kombu ships no types
    """kombu's own, without passwords in its description, which `inspect stats` and Flower show."""

    def ensure(self, obj: Any, fun: Any, *args: Any, **policy: Any) -> Any:
        """Retry only as often as the caller says.

        A worker's heartbeat event names no limit: kombu would keep the main loop from everything
        else for as long as Redis is away.
        """
        return super().ensure(obj, fun, *args, **{"max_retries": 0, **policy})

    def info(self) -> dict[str, Any]:
        """Describe the connection."""
        info: dict[str, Any] = super().info()
        options = dict(info["transport_options"])
        options.pop("sentinel_kwargs", None)
        hostname = info["hostname"] or ""
        return {
            **info,
            "hostname": masked(hostname).strip("'") if "://" in hostname else hostname,
            "password": info["password"] and _MASK,
            "alternates": [masked(url).strip("'") for url in info["alternates"]],
            "transport_options": options,
        }

    def as_uri(self, *args: Any, **options: Any) -> str:
        """As kombu writes it; Flower asks for the password."""
        plain = kombu.Connection(**dict(self._info(resolve=False)))
        return str(plain.as_uri(*args, **options))


class Protocol(AMQP):  # type: ignore[misc] # Celery ships no types
    """Celery's own, with connections that describe themselves without a password."""

    Connection = BrokerConnection


@contextmanager
def refusal_as_connection_error() -> Iterator[None]:
    """Treat a server that refuses writes as lost: another may be found under its name."""
    try:
        yield
    except ResponseError as error:
        time.sleep(_REFUSED_SECONDS)
        raise RedisConnectionError(str(error)) from error


class QueueRefusedError(Exception):
    """A message's callback is not to be published to its queue."""


def restrict_publishing(queues: Collection[str] | None) -> None:
    """Let this process publish to queues only, as a pool process does on a message's behalf.

    Args:
        queues: To which it may publish; None: to any that is not reserved.
    """
    _TolerantChannel.callbacks_only = True
    _TolerantChannel.callback_queues = None if queues is None else frozenset(queues)


class _QoS(kombu_redis.QoS):  # type: ignore[misc] # kombu ships no types
    """Leaves the messages of stock workers alone."""

    def restore_visible(self, *args: object, **kwargs: object) -> None:
        """Restore nothing."""


class _TolerantChannel:
    """A channel that works on a full server, and publishes where it may."""

    QoS = _QoS
    callbacks_only: ClassVar[bool] = False
    callback_queues: ClassVar[frozenset[str] | None] = None

    def _put(self: Any, queue: str, message: Any, **kwargs: Any) -> None:
        allowed = self.callback_queues
        if queue.startswith(_RESERVED) or (allowed is not None and queue not in allowed):
            expected = (
                "one that is not reserved" if allowed is None else "one of GRANT_CALLBACK_QUEUES"
            )
            raise QueueRefusedError(f"queue: expected {expected}, got {shortened(queue)}")
        super()._put(queue, message, **kwargs)  # type: ignore[misc] # kombu's

    def _put_fanout(self: Any, exchange: str, message: Any, *args: Any, **kwargs: Any) -> None:
        if self.callbacks_only:
            raise QueueRefusedError(f"exchange: expected a direct one, got {shortened(exchange)}")
        super()._put_fanout(exchange, message, *args, **kwargs)  # type: ignore[misc] # kombu's

    def _queue_bind(self: Any, exchange: str, *args: Any) -> None:
        with refusal_as_connection_error():
            try:
                super()._queue_bind(exchange, *args)  # type: ignore[misc] # kombu's
            except OutOfMemoryError as error:
                logger.warning("Redis is full, remote control may not reply: error=%s", error)

    def _size(self: Any, queue: str) -> int:
        try:
            return int(super()._size(queue))  # type: ignore[misc] # kombu's
        except OutOfMemoryError:
            return 0  # Redis 7.0 refuses even LLEN within MULTI; the size is for information


class Channel(_TolerantChannel, kombu_redis.Channel):  # type: ignore[misc] # kombu ships no types
    """A channel to one Redis."""


class SentinelChannel(_TolerantChannel, kombu_redis.SentinelChannel):  # type: ignore[misc] # no types
    """A channel to the Redis that the Sentinels name."""


class Transport(kombu_redis.Transport):  # type: ignore[misc] # kombu ships no types
    """To one Redis."""

    Channel = Channel


class SentinelTransport(kombu_redis.SentinelTransport):  # type: ignore[misc] # no types
    """To the Redis that the Sentinels name."""

    Channel = SentinelChannel
