"""Fixtures: an empty Redis database, and the scripts with two worker sessions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis import Redis

from devstack.servers import LocalStack
from tests.support.claims import DATABASE
from worker.broker.claims import Claims


@pytest.fixture
def path(stack: LocalStack) -> str:
    """The path of the Redis server's socket."""
    return stack.broker_url.removeprefix("redis+socket://")


@pytest.fixture
def redis(path: str) -> Iterator[Redis]:
    """An empty Redis database."""
    with Redis(unix_socket_path=path, db=DATABASE) as redis:
        redis.flushdb()
        yield redis


@pytest.fixture
def protocol(redis: Redis) -> Claims:
    """The scripts, with the sessions ``ann`` and ``bob``."""
    protocol = Claims(redis)
    protocol.open("ann")
    protocol.open("bob")
    return protocol
