"""Fixtures: a Redis that tests may fill, stop and reconfigure, and both clients of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis import Redis

from devstack.servers import LocalStack
from tests.support.clients import CLIENTS, Client


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """A server for these tests only, without workers."""
    with LocalStack(tmp_path_factory.mktemp("server") / "data", durable=False) as stack:
        yield stack


@pytest.fixture
def redis(server: LocalStack) -> Iterator[Redis]:
    """A connection to the server, which is empty."""
    with Redis(unix_socket_path=server.broker_url.removeprefix("redis+socket://")) as redis:
        redis.flushall()
        yield redis


@pytest.fixture
def broker(server: LocalStack) -> str:
    """The URL that `client` connects to; modules with a worker override it."""
    return server.broker_url


@pytest.fixture(params=CLIENTS)
def client(broker: str, request: pytest.FixtureRequest) -> Iterator[Client]:
    """The blocking client and the asyncio client in turn."""
    client = CLIENTS[request.param](broker)
    yield client
    client.close()
