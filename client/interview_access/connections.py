"""The connections of clients and workers to Redis: addresses, time limits, names.

Retries of redis-py are off: the caller decides what is sent again.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from functools import cache
from typing import Any

from redis import Connection, Redis
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool

from interview_access.redis_address import FORMS, RedisAddress, masked
from interview_access.text import describe

CONNECT_SECONDS, SOCKET_SECONDS = 2.0, 3.0
"""Time limits in seconds. With these a command that is sent twice fails within 10 s."""

MAX_CONNECTIONS = 100_000
"""One for each thread that executes a command; redis-py's own limit is 100 connections."""

CLIENT_NAME = "interview-access-client"
"""The name of a producer's connections in ``CLIENT LIST``."""

KEEPALIVE: dict[str, Any] = {
    "socket_keepalive": True,
    "socket_keepalive_options": {
        getattr(socket, name): value
        for name, value in {
            "TCP_KEEPIDLE": 5,
            "TCP_KEEPINTVL": 2,
            "TCP_KEEPCNT": 3,
            "TCP_USER_TIMEOUT": 10_000,  # milliseconds, for data without a TCP acknowledgement
        }.items()
        if hasattr(socket, name)
    },
}
"""Options of redis-py's TCP connections: an unreachable host is detected within 11 s."""


def redis_addresses(
    broker_url: str | None, result_backend: str | None
) -> tuple[RedisAddress, RedisAddress]:
    """Parse the addresses of the queue's server and the results' server.

    Args:
        broker_url: One of Celery's URLs; by default ``CELERY_BROKER_URL`` of the environment.
        result_backend: Likewise, ``CELERY_RESULT_BACKEND``; by default the broker.

    Returns:
        The address of the queue's server, and that of the results' server.

    Raises:
        ValueError: if no broker is given, or a URL is invalid. The text masks passwords.
    """
    broker = _address(broker_url, "broker_url", "CELERY_BROKER_URL")
    results = _address(result_backend, "result_backend", "CELERY_RESULT_BACKEND")
    if broker is None:
        raise ValueError(
            "No broker: expected a URL as the argument broker_url or in CELERY_BROKER_URL, "
            "such as redis://localhost:6379/0."
        )
    return broker, results or broker


def _address(url: str | None, argument: str, variable: str) -> RedisAddress | None:
    if url is not None and not isinstance(url, str):
        raise ValueError(f"{argument}: expected {FORMS['redis']}, got {describe(url)}.")
    name = argument if url else variable
    url = url or os.environ.get(variable)
    if not url:
        return None
    try:
        return RedisAddress.parse(
            url, sentinel_password=os.environ.get("REDIS_SENTINEL_PASSWORD") or None
        )
    except ValueError as error:
        raise ValueError(f"{name}: got {masked(url)}, expected {error}.") from None


def connect(
    address: RedisAddress,
    *,
    client_name: str,
    connect_timeout: float = CONNECT_SECONDS,
    timeout: float = SOCKET_SECONDS,
    max_connections: int = MAX_CONNECTIONS,
) -> Redis:
    """Create a redis-py client, which connects at its first command.

    Args:
        address: The server, or the Sentinels that know it.
        client_name: The name of the connections in ``CLIENT LIST``, if the Redis user may set it.
        connect_timeout: Seconds to connect, for all addresses of a host's name together.
        timeout: Seconds for a reply, and for the replies of all Sentinels together.
        max_connections: Maximum number of connections in use at once.
    """

    def set_client_name(connection: Connection) -> None:
        connection.on_connect()  # type: ignore[no-untyped-call] # redis-py's
        with suppress(ResponseError):  # without the permission connections have no name
            connection.send_command("CLIENT", "SETNAME", client_name)  # type: ignore[no-untyped-call] # likewise
            connection.read_response()

    options: dict[str, Any] = {
        **address.connection_options,
        "socket_connect_timeout": connect_timeout,
        "socket_timeout": timeout,
        "retry": Retry(NoBackoff(), 0),
        "redis_connect_func": set_client_name,
        "max_connections": max_connections,
    }
    if address.path:
        return Redis(unix_socket_path=address.path, **options)
    options |= KEEPALIVE
    if not address.master_name:
        ((host, port),) = address.hosts
        return _with_shared_timeout(Redis(host, port, **options))
    sentinels = Sentinel(  # type: ignore[no-untyped-call] # likewise
        address.hosts, sentinel_kwargs=sentinel_options(address, timeout), **options
    )
    for sentinel in sentinels.sentinels:
        _with_shared_timeout(sentinel)
    client: Redis = sentinels.master_for(  # type: ignore[no-untyped-call] # likewise
        address.master_name, connection_pool_class=_SentinelPool
    )
    return client


def _with_shared_timeout(client: Redis) -> Redis:
    """Make the time limit to connect that of all addresses of the host's name together."""
    pool = client.connection_pool
    pool.connection_class = _sharing_timeout(pool.connection_class)
    return client


@cache
def _sharing_timeout(kind: type[Any]) -> type[Any]:
    """Derive a class of connections; redis-py applies the time limit to each address."""

    def connect(connection: Any) -> None:
        whole = connection.socket_connect_timeout
        with suppress(OSError):  # reported by the attempt to connect
            found = socket.getaddrinfo(connection.host, connection.port, type=socket.SOCK_STREAM)
            connection.socket_connect_timeout = whole / len(found)
        try:
            kind.connect(connection)
        finally:
            connection.socket_connect_timeout = whole

    return type(kind.__name__, (kind,), {"connect": connect})


class _SentinelPool(SentinelConnectionPool):
    """A pool that also closes its connections to the Sentinels."""

    def disconnect(self, inuse_connections: bool = True) -> None:
        super().disconnect(inuse_connections)
        if inuse_connections:
            self.sentinel_manager.close()


def sentinel_options(address: RedisAddress, timeout: float) -> dict[str, Any]:
    """Build the arguments of redis-py's clients of the Sentinels.

    Args:
        address: An address with Sentinels.
        timeout: Seconds in which all Sentinels are queried, one after another.
    """
    each = timeout / len(address.hosts)
    return {
        **address.sentinel_credentials,
        **KEEPALIVE,
        "socket_connect_timeout": each,
        "socket_timeout": each,
        "retry": Retry(NoBackoff(), 0),  # the next Sentinel is queried instead
    }
